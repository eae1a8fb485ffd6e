"""A CogVideoX block that holds what its gradient needs, and no more.

All of a block but attention works on each token alone. So attention's inputs and output, and their gradients, are the
only tensors of full size; everything before and behind is run in chunks of tokens and forgotten. With u for the size of
the token streams (text and video, [B, T + S, D]), the backward pass holds ten of them at most, while attention is
differentiated: the block's input, q, k, v, attention's output, the gradients of these four, and the gradient of the
residual stream, which is written where the outputs' gradient was. Stock autograd holds about twenty-three.

What the backward pass does not compute again: the outputs of ``ff.net.2``, ``to_v``, and, where the norm of queries
and keys can be undone, ``to_q`` and ``to_k``: their gradients do not depend on them. Numbers are the stock block's, but
for the order of sums and what narrow dtypes make of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.memory.attention import AttentionTape
from finetune.memory.lean_chunks import Chunk, GradientSums, chunks, gradients_of, masks, writable
from finetune.memory.lean_linear import unread, whole
from finetune.memory.lean_rotary import Normed, Rotary, gradient, norm_and_rotate, rotate, undoable
from finetune.memory.parts import BlockGradients, BlockInputs, Wanted

TOKENS = 2048
"""Tokens per clip in a chunk: the feed-forward's four-fold width on them is small beside one full stream, and the
products are large enough to keep a GPU busy."""
_MODULATION, _INWARD, _OUTWARD = range(3)
"""The parts of a block, as dropout masks are addressed."""


class _Projected(NamedTuple):
    """Attention's inputs in the joint sequence, [B, T + S, H, head dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    rstd: tuple[Tensor, Tensor]
    """Of q's and k's norm, [B, T + S, H, 1]."""


class LeanMath:
    """The ``BlockMath`` of this file.

    Args:
        tokens: most tokens per clip in a chunk.
    """

    seeded = True

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        self._undoable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @torch.no_grad()
    def forward(self, block: nn.Module, inputs: BlockInputs, attention: AttentionTape) -> tuple[Tensor, Tensor]:
        """See ``BlockMath``."""
        run = _Run(block, inputs, self.tokens, wanted=False)
        q, k, v, _ = run.project()
        with attention.recording():
            attended = _attend(q, k, v)
        del q, k, v
        hidden, encoder = torch.empty_like(inputs.hidden), torch.empty_like(inputs.encoder)
        with whole(*run.behind):
            for chunk in run.chunks:
                with run.masks(_OUTWARD, chunk):
                    tokens, fed, gate = run.outward(chunk, run.tokens(chunk), _features(attended, chunk))
                (encoder if chunk.text else hidden)[:, chunk.within] = tokens + gate * fed
        return hidden, encoder

    @torch.no_grad()
    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        wanted: Wanted,
        attention: AttentionTape,
    ) -> BlockGradients:
        """See ``BlockMath``. ``grads`` are overwritten."""
        run = _Run(block, inputs, self.tokens, wanted=wanted.temb)
        sums = GradientSums(parameters)
        inward = wanted.hidden or wanted.encoder or wanted.temb or _any_inward(block, parameters)
        undo = self._may_undo(block)
        q, k, v, rstd = run.project()
        leaves = [tensor.detach().requires_grad_(inward) for tensor in (q, k, v)]
        del v
        with torch.enable_grad(), attention.replaying():
            attended = _attend(*leaves)
        of_streams = writable(grads[0]), writable(grads[1])
        of_attended = torch.empty_like(q) if inward else None
        with whole(*run.behind):
            for chunk in run.chunks:
                is_wanted = wanted.encoder if chunk.text else wanted.hidden
                self._outward(run, chunk, attended, of_streams[chunk.text], of_attended, sums, is_wanted)
        sums.settle()
        if of_attended is not None:
            of_q, of_k, of_v = torch.autograd.grad(attended, leaves, of_attended)
            del attended, of_attended, leaves
            with whole(*run.in_front):
                for chunk in run.chunks:
                    is_wanted, here = wanted.encoder if chunk.text else wanted.hidden, chunk.joint
                    results = [Normed(q[:, here], rstd[0][:, here]), Normed(k[:, here], rstd[1][:, here])]
                    of_results = [of_q[:, here], of_k[:, here], of_v[:, here]]
                    of_stream = of_streams[chunk.text]
                    self._inward(run, chunk, results if undo else None, of_results, of_stream, sums, is_wanted)
        of_temb = run.modulation_gradient(sums)
        return BlockGradients(
            hidden=of_streams[0] if wanted.hidden else None,
            encoder=of_streams[1] if wanted.encoder else None,
            temb=of_temb,
            parameters=sums.settle(),
        )

    @staticmethod
    def _outward(
        run: _Run,
        chunk: Chunk,
        attended: Tensor,
        of_stream: Tensor,
        of_attended: Tensor | None,
        sums: GradientSums,
        wanted: bool,
    ) -> None:
        """What lies behind attention: turn the chunk of ``of_stream`` from the output's gradient into that of the
        residual stream at attention's side, and fill in that of attention's output.
        """
        tokens = run.tokens(chunk).detach().requires_grad_(wanted)
        own = _features(attended.detach(), chunk).requires_grad_(of_attended is not None)
        grad = of_stream[:, chunk.within]
        gated = run.rows[1].requires_grad
        with torch.enable_grad(), run.masks(_OUTWARD, chunk):
            # Only a gate that trains needs to know what it was multiplied with.
            with unread(*(() if gated else run.behind[2:])):
                middle, fed, gate = run.outward(chunk, tokens, own)
            outputs, of_outputs = ([middle + gate * fed], [grad]) if gated else ([middle, fed], [grad, grad * gate])
        found = gradients_of(outputs, of_outputs, [tokens, own, *run.rows, *sums.tensors])
        if found[0] is not None:
            grad.copy_(found[0])
        if of_attended is not None and found[1] is not None:
            of_attended[:, chunk.joint] = found[1].view(*found[1].shape[:2], *of_attended.shape[2:])
        run.row_sums.add(found[2:4])
        sums.add(found[4:])

    @staticmethod
    def _inward(
        run: _Run,
        chunk: Chunk,
        results: list[Normed] | None,
        of_results: list[Tensor],
        of_stream: Tensor,
        sums: GradientSums,
        wanted: bool,
    ) -> None:
        """What lies in front of attention: add its share to the residual stream's gradient.

        Args:
            run: this pass.
            chunk: which tokens.
            results: queries and keys as attention took them, if their norm is undone; None to run it again.
            of_results: gradients of queries, keys and values.
            of_stream: of the whole stream; added to in place.
            sums: of the parameters' gradients; added to.
            wanted: whether the stream's gradient is.
        """
        attn, rotary = run.block.attn1, run.rotary(chunk)
        tokens = run.tokens(chunk).detach().requires_grad_(wanted)
        skipped = run.in_front[2:] if results is None else run.in_front
        with torch.enable_grad(), run.masks(_INWARD, chunk), unread(*skipped):
            outputs = run.inward(chunk, tokens)
            if results is None:
                outputs = [rotate(attn.norm_q(outputs[0]), rotary), rotate(attn.norm_k(outputs[1]), rotary), outputs[2]]
        if results is not None:
            norms = (attn.norm_q, attn.norm_k)
            of_results = [
                *(gradient(r, g, n, rotary) for r, g, n in zip(results, of_results[:2], norms, strict=True)),
                of_results[2],
            ]
        found = gradients_of(outputs, of_results, [tokens, *run.rows, *sums.tensors])
        if found[0] is not None:
            of_stream[:, chunk.within] += found[0]
        run.row_sums.add(found[1:3])
        sums.add(found[3:])

    def _may_undo(self, block: Any) -> bool:
        """``undoable`` for both norms. Their values are looked at once: frozen, they stay what they are."""
        norms = (block.attn1.norm_q, block.attn1.norm_k)
        if any(parameter.requires_grad for norm in norms for parameter in norm.parameters()):
            return False
        for norm in norms:
            if norm not in self._undoable:
                self._undoable[norm] = undoable(norm)
        return all(self._undoable[norm] for norm in norms)


class _Run:
    """One pass through one block.

    Args:
        block: the block.
        inputs: of it.
        most: tokens per clip in a chunk.
        wanted: whether the time embedding's gradient is.
    """

    def __init__(self, block: Any, inputs: BlockInputs, most: int, *, wanted: bool) -> None:
        self.block: Any = block
        self.in_front = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.behind = (block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2])
        self._inputs = inputs
        self.chunks = chunks(inputs.encoder.shape[1], inputs.hidden.shape[1], most)
        self._temb = inputs.temb.detach().requires_grad_(wanted)
        with torch.enable_grad(), masks(inputs.seed, _MODULATION, 0, inputs.temb.device):
            self._made = [norm.linear(norm.silu(self._temb)) for norm in (block.norm1, block.norm2)]
        self.rows = [made.detach().requires_grad_(made.requires_grad) for made in self._made]
        """Of ``norm1`` and ``norm2``: shifts, scales and gates of both streams, [B, 6 D]."""
        self.row_sums = GradientSums(self.rows)

    def masks(self, segment: int, chunk: Chunk) -> AbstractContextManager[None]:
        """Dropout masks of this chunk."""
        return masks(self._inputs.seed, segment, chunk.index, self._inputs.hidden.device)

    def tokens(self, chunk: Chunk) -> Tensor:
        """What enters the block, [B, n, D]."""
        return (self._inputs.encoder if chunk.text else self._inputs.hidden)[:, chunk.within]

    def rotary(self, chunk: Chunk) -> Rotary | None:
        """Positions of these tokens; text has none."""
        tables = self._inputs.rotary
        return None if chunk.text or tables is None else (tables[0][chunk.within], tables[1][chunk.within])

    def _of_stream(self, norm: int, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate, [B, 1, D] each."""
        shift, scale, gate = self.rows[norm][:, None, :].chunk(6, dim=-1)[3 * chunk.text : 3 * chunk.text + 3]
        return shift, scale, gate

    def inward(self, chunk: Chunk, tokens: Tensor) -> list[Tensor]:
        """Queries, keys and values as the linear layers give them, [B, n, H, head dim] each."""
        shift, scale, _ = self._of_stream(0, chunk)
        attn = self.block.attn1
        modulated = self.block.norm1.norm(tokens) * (1 + scale) + shift
        return [linear(modulated).unflatten(-1, (attn.heads, -1)) for linear in self.in_front]

    def outward(self, chunk: Chunk, tokens: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream behind attention, the feed-forward's output on it (both [B, n, D]), and the gate between them."""
        shift, scale, gate = self._of_stream(1, chunk)
        projected = attended
        for module in self.block.attn1.to_out:
            projected = module(projected)
        middle = tokens + self._of_stream(0, chunk)[2] * projected
        return middle, self.block.ff(self.block.norm2.norm(middle) * (1 + scale) + shift), gate

    def project(self) -> _Projected:
        """Everything in front of attention, for both streams."""
        attn, hidden = self.block.attn1, self._inputs.hidden
        shape = (len(hidden), self.chunks[-1].joint.stop, attn.heads, attn.inner_dim // attn.heads)
        q, k, v = (hidden.new_empty(shape) for _ in range(3))
        rstd: list[Tensor] = []
        with whole(*self.in_front):
            for chunk in self.chunks:
                with self.masks(_INWARD, chunk):
                    queries, keys, values = self.inward(chunk, self.tokens(chunk))
                rotary = self.rotary(chunk)
                for index, (features, norm, into) in enumerate(((queries, attn.norm_q, q), (keys, attn.norm_k, k))):
                    into[:, chunk.joint], own = norm_and_rotate(features, norm, rotary)
                    if chunk.index == 0:
                        rstd.append(own.new_empty(*shape[:-1], 1))
                    rstd[index][:, chunk.joint] = own
                v[:, chunk.joint] = values
        return _Projected(q, k, v, (rstd[0], rstd[1]))

    def modulation_gradient(self, sums: GradientSums) -> Tensor | None:
        """The time embedding's gradient; that of the modulations' own parameters is added to ``sums``."""
        pairs = [(made, of) for made, of in zip(self._made, self.row_sums.settle(), strict=True) if of is not None]
        found = gradients_of([m for m, _ in pairs], [of for _, of in pairs], [self._temb, *sums.tensors])
        sums.add(found[1:])
        return found[0]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the joint sequence, [B, T + S, H, head dim] to the same."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _features(attended: Tensor, chunk: Chunk) -> Tensor:
    """A chunk of attention's output, [B, n, D]; contiguous, or a linear layer would repeat its weight per clip."""
    return attended[:, chunk.joint].flatten(2).contiguous()


def _any_inward(block: Any, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether a gradient of ``parameters`` comes through attention."""
    attn = block.attn1
    parts = (block.norm1, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
    inward = {id(parameter) for part in parts for parameter in part.parameters()}
    return any(id(parameter) in inward for parameter in parameters)
