"""A CogVideoX block that holds what its gradient needs, and no more.

All of a block but attention works on each token alone. So attention's inputs and output, and their gradients, are the
only tensors of full size; everything before and behind is run in chunks of tokens and forgotten. With u for the size of
the token streams (text and video, [B, T + S, D]), the backward pass holds ten of them at most, while attention is
differentiated: the block's input, q, k, v, attention's output, the gradients of these four, and the gradient of the
residual stream, which is written where the outputs' gradient was. Stock autograd holds about twenty-three.

What the backward pass does not compute again: the outputs of ``ff.net.2``, ``to_v``, and, where the norm of queries and
keys can be undone, ``to_q`` and ``to_k``: their gradients do not depend on them. Numbers are the stock block's, but for
the order of sums and what narrow dtypes make of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.memory.checkpointing import SavedAttention
from finetune.memory.lean_linear import SharedInput, decoded_once, unread
from finetune.memory.qk_norm import Normed, Rotary, gradient_in_place, norm_and_rotate_into, rotate, undoable
from finetune.memory.runner import BlockInputs, gradients_of

TOKENS = 2048
"""Tokens per clip in a chunk: the feed-forward's four-fold width on them is small beside one full stream, and the
products are large enough to keep a GPU busy."""

_ADALN, _BEFORE_ATTENTION, _BEHIND_ATTENTION = range(3)
"""The parts of a block, as dropout masks are addressed."""


class LeanBlock:
    """The ``BlockForwardBackward`` of this file.

    Args:
        tokens: most tokens per clip in a chunk.
    """

    seeded = True

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        self._undoable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @torch.no_grad()
    def forward(self, block: nn.Module, inputs: BlockInputs, attention: SavedAttention) -> tuple[Tensor, Tensor]:
        part = _Pass(block, inputs, self.tokens, temb=inputs.temb.detach())
        q, k, v, _ = part.project()
        with attention.recording():
            attended = _attend(block, q, k, v)
        del q, k, v
        hidden, encoder = torch.empty_like(inputs.hidden), torch.empty_like(inputs.encoder)
        with decoded_once(*part.behind):
            for chunk in part.chunks:
                with part.masks(_BEHIND_ATTENTION, chunk):
                    tokens, fed, gate = part.behind_attention(chunk, part.tokens(chunk), _features(attended, chunk))
                (encoder if chunk.text else hidden)[:, chunk.within] = tokens + gate * fed
        return hidden, encoder

    @torch.no_grad()
    def backward(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
        attention: SavedAttention,
    ) -> list[Tensor | None]:
        part = _BackwardPass(block, inputs, self.tokens, grads, parameters)
        undo = self._may_undo(part.block)
        q, k, v, rstd = part.project()
        leaves = [tensor.detach().requires_grad_(part.through_attention) for tensor in (q, k, v)]
        del v
        with torch.enable_grad(), attention.replaying():
            attended = _attend(block, *leaves)
        of_attended = torch.empty_like(q) if part.through_attention else None
        with decoded_once(*part.behind):
            for chunk in part.chunks:
                part.backward_behind(chunk, attended, of_attended)
        part.sums.settle()
        if of_attended is not None:
            of_q, of_k, of_v = torch.autograd.grad(attended, leaves, of_attended)
            del attended, of_attended, leaves
            if undo:
                part.undo_norms((Normed(q, rstd[0]), Normed(k, rstd[1])), (of_q, of_k))
            del q, k
            with decoded_once(*part.before):
                for chunk in part.chunks:
                    part.backward_before(chunk, [of[:, chunk.joint] for of in (of_q, of_k, of_v)], undone=undo)
        of_temb = part.backward_adaln()
        of_hidden, of_encoder = part.of_streams
        return [
            of_hidden if inputs.hidden.requires_grad else None,
            of_encoder if inputs.encoder.requires_grad else None,
            of_temb,
            *part.sums.settle(),
        ]

    def _may_undo(self, block: Any) -> bool:
        """``undoable`` for both norms. Their values are looked at once: frozen, they stay what they are."""
        norms = (block.attn1.norm_q, block.attn1.norm_k)
        if any(parameter.requires_grad for norm in norms for parameter in norm.parameters()):
            return False
        for norm in norms:
            if norm not in self._undoable:
                self._undoable[norm] = undoable(norm)
        return all(self._undoable[norm] for norm in norms)


class _Projected(NamedTuple):
    """Attention's inputs in the joint sequence, [B, T + S, H, head dim]."""

    q: Tensor
    k: Tensor
    v: Tensor
    rstd: tuple[Tensor, Tensor]
    """Of q's and k's norm, [B, T + S, H, 1]."""


class _Pass:
    """One pass through one block.

    Args:
        block: the block.
        inputs: of it.
        most: tokens per clip in a chunk.
        temb: the time embedding, as a leaf.
    """

    def __init__(self, block: Any, inputs: BlockInputs, most: int, *, temb: Tensor) -> None:
        self.block: Any = block
        self.before = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.norms = (block.attn1.norm_q, block.attn1.norm_k)
        self.behind = (block.attn1.to_out[0], block.ff.net[0].proj, block.ff.net[2])
        self.into_attention = SharedInput(self.before, inputs.hidden.dtype)
        self.out_of_attention = SharedInput(self.behind[:1], inputs.hidden.dtype)
        self.inputs = inputs
        self.chunks = chunks(inputs.encoder.shape[1], inputs.hidden.shape[1], most)
        with torch.enable_grad(), masks(inputs.seed, _ADALN, 0, temb.device):
            self.adaln = [norm.linear(norm.silu(temb)) for norm in (block.norm1, block.norm2)]
        self.rows = [made.detach().requires_grad_(made.requires_grad) for made in self.adaln]
        """Of ``norm1`` and ``norm2``: shifts, scales and gates of both streams, [B, 6 D]."""

    def masks(self, segment: int, chunk: Chunk) -> AbstractContextManager[None]:
        """Dropout masks of this chunk."""
        return masks(self.inputs.seed, segment, chunk.index, self.inputs.hidden.device)

    def tokens(self, chunk: Chunk) -> Tensor:
        """What enters the block, [B, n, D]."""
        return (self.inputs.encoder if chunk.text else self.inputs.hidden)[:, chunk.within]

    def rotary(self, chunk: Chunk) -> Rotary | None:
        """Positions of these tokens; text has none."""
        tables = self.inputs.rotary
        return None if chunk.text or tables is None else (tables[0][chunk.within], tables[1][chunk.within])

    def _of_stream(self, norm: int, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate, [B, 1, D] each."""
        shift, scale, gate = self.rows[norm][:, None, :].chunk(6, dim=-1)[3 * chunk.text : 3 * chunk.text + 3]
        return shift, scale, gate

    def before_attention(self, chunk: Chunk, tokens: Tensor, skip: Collection[nn.Module] = ()) -> list[Tensor]:
        """Queries, keys and values as the linear layers give them, [B, n, H, head dim] each; nobody reads those of the
        layers to ``skip``.
        """
        shift, scale, _ = self._of_stream(0, chunk)
        modulated = self.block.norm1.norm(tokens) * (1 + scale) + shift
        outputs = self.into_attention(modulated, skip)
        return [torch.unflatten(output, -1, (self.block.attn1.heads, -1)) for output in outputs]

    def behind_attention(self, chunk: Chunk, tokens: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The stream behind attention, the feed-forward's output on it (both [B, n, D]), and the gate between them."""
        shift, scale, gate = self._of_stream(1, chunk)
        (projected,) = self.out_of_attention(attended)
        projected = self.block.attn1.to_out[1](projected)
        middle = tokens + self._of_stream(0, chunk)[2] * projected
        return middle, self.block.ff(self.block.norm2.norm(middle) * (1 + scale) + shift), gate

    def project(self) -> _Projected:
        """Everything in front of attention, for both streams."""
        attn, hidden = self.block.attn1, self.inputs.hidden
        shape = (len(hidden), self.chunks[-1].joint.stop, attn.heads, attn.inner_dim // attn.heads)
        q, k, v = (hidden.new_empty(shape) for _ in range(3))
        rstd = [hidden.new_empty(*shape[:-1], 1, dtype=torch.float32) for _ in range(2)]
        with decoded_once(*self.before):
            for chunk in self.chunks:
                with self.masks(_BEFORE_ATTENTION, chunk):
                    queries, keys, values = self.before_attention(chunk, self.tokens(chunk))
                rotary = self.rotary(chunk)
                results = [
                    Normed(into[:, chunk.joint], own[:, chunk.joint]) for into, own in zip((q, k), rstd, strict=True)
                ]
                for features, norm, result in zip((queries, keys), self.norms, results, strict=True):
                    norm_and_rotate_into(features, norm, rotary, result)
                v[:, chunk.joint] = values
        return _Projected(q, k, v, (rstd[0], rstd[1]))


class _BackwardPass(_Pass):
    """A pass with what its gradients are summed into.

    Args:
        block: the block.
        inputs: of it, leaves.
        most: tokens per clip in a chunk.
        grads: of the block's outputs.
        parameters: that train.
    """

    def __init__(
        self,
        block: nn.Module,
        inputs: BlockInputs,
        most: int,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        super().__init__(block, inputs, most, temb=inputs.temb)
        self.sums = GradientSums(parameters)
        self.row_sums = GradientSums(self.rows)
        self.of_streams = writable(grads[0]), writable(grads[1])
        """Of video and text: the outputs' gradients, which chunk by chunk become the inputs'."""
        attn = self.block.attn1
        modules = (self.block.norm1, *self.before, attn.norm_q, attn.norm_k)
        before = {id(parameter) for module in modules for parameter in module.parameters()}
        self.through_attention = any(
            (inputs.hidden.requires_grad, inputs.encoder.requires_grad, inputs.temb.requires_grad)
        ) or any(id(parameter) in before for parameter in parameters)
        """Whether a gradient is wanted that comes through attention."""

    def _leaf(self, chunk: Chunk) -> Tensor:
        wanted = (self.inputs.encoder if chunk.text else self.inputs.hidden).requires_grad
        return self.tokens(chunk).detach().requires_grad_(wanted)

    def backward_behind(self, chunk: Chunk, attended: Tensor, of_attended: Tensor | None) -> None:
        """What lies behind attention: turn the chunk of the outputs' gradient into that of the residual stream at
        attention's side, and fill in that of attention's output.
        """
        tokens = self._leaf(chunk)
        own = _features(attended.detach(), chunk).requires_grad_(of_attended is not None)
        grad = self.of_streams[chunk.text][:, chunk.within]
        gated = self.rows[1].requires_grad
        with torch.enable_grad(), self.masks(_BEHIND_ATTENTION, chunk):
            # Only a gate that trains needs to know what it was multiplied with.
            with unread(*(() if gated else self.behind[2:])):
                middle, fed, gate = self.behind_attention(chunk, tokens, own)
            outputs, of_outputs = ([middle + gate * fed], [grad]) if gated else ([middle, fed], [grad, grad * gate])
        of_tokens, of_own, *others = gradients_of(outputs, of_outputs, [tokens, own, *self.rows, *self.sums.tensors])
        if of_tokens is not None:
            grad.copy_(of_tokens)
        if of_attended is not None and of_own is not None:
            of_attended[:, chunk.joint] = of_own.view(*of_own.shape[:2], *of_attended.shape[2:])
        self.row_sums.add(others[:2])
        self.sums.add(others[2:])

    def undo_norms(self, results: tuple[Normed, Normed], grads: tuple[Tensor, Tensor]) -> None:
        """Turn the gradients of queries and keys as attention took them into those of what the linear layers gave.

        Args:
            results: queries and keys as attention took them.
            grads: of these, written to.
        """
        for result, grad, norm in zip(results, grads, self.norms, strict=True):
            gradient_in_place(grad, result, norm, self.inputs.rotary)

    def backward_before(self, chunk: Chunk, of_results: list[Tensor], *, undone: bool) -> None:
        """What lies in front of attention: add its share to the residual stream's gradient.

        Args:
            chunk: which tokens.
            of_results: gradients of queries, keys and values.
            undone: queries and keys are meant as the linear layers gave them; otherwise the norm is run again.
        """
        rotary, tokens = self.rotary(chunk), self._leaf(chunk)
        skipped = self.before if undone else self.before[2:]
        with torch.enable_grad(), self.masks(_BEFORE_ATTENTION, chunk):
            outputs = self.before_attention(chunk, tokens, skipped)
            if not undone:
                outputs[:2] = [
                    rotate(norm(output), rotary) for norm, output in zip(self.norms, outputs[:2], strict=True)
                ]
        of_tokens, *others = gradients_of(outputs, of_results, [tokens, *self.rows, *self.sums.tensors])
        if of_tokens is not None:
            self.of_streams[chunk.text][:, chunk.within] += of_tokens
        self.row_sums.add(others[:2])
        self.sums.add(others[2:])

    def backward_adaln(self) -> Tensor | None:
        """The time embedding's gradient; that of the adaLN layers' own parameters is added to ``sums``."""
        pairs = [(made, of) for made, of in zip(self.adaln, self.row_sums.settle(), strict=True) if of is not None]
        inputs = [self.inputs.temb, *self.sums.tensors]
        of_temb, *others = gradients_of([made for made, _ in pairs], [of for _, of in pairs], inputs)
        self.sums.add(others)
        return of_temb


def _attend(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the joint sequence, [B, T + S, H, head dim] to the same; the block's own, where it has one."""
    if (own := getattr(block.attn1.processor, "attend", None)) is not None:  # tokens are divided among processes
        result: Tensor = own(q, k, v)
        return result
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _features(attended: Tensor, chunk: Chunk) -> Tensor:
    """A chunk of attention's output, [B, n, D]; contiguous, or a linear layer would repeat its weight per clip."""
    return attended[:, chunk.joint].flatten(2).contiguous()


# ---------------------------------------------------------------------- chunks: where they lie, masks, sums over them


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring tokens of one stream, for every clip."""

    index: int
    """Running number over both streams."""
    text: bool
    """Of the text stream; otherwise of the video stream."""
    within: slice
    """Where in its stream."""
    joint: slice
    """Where in the sequence that attention sees: text first."""


def chunks(text: int, video: int, most: int) -> list[Chunk]:
    """Cut both streams into equal chunks, as far as they divide.

    Args:
        text: text tokens per clip.
        video: video tokens per clip.
        most: tokens in a chunk at most.
    """
    cut: list[Chunk] = []
    for is_text, count, start in ((True, text, 0), (False, video, text)):
        size = -(-count // -(-count // most))  # of as few chunks as there can be, none much smaller than the others
        for first in range(0, count, size):
            last = min(first + size, count)
            cut.append(Chunk(len(cut), is_text, slice(first, last), slice(start + first, start + last)))
    return cut


@contextmanager
def masks(seed: int | None, segment: int, chunk: int, device: torch.device) -> Iterator[None]:
    """Draw dropout masks from an address, so that a repeated run draws the same; global generators stay as they were.

    Args:
        seed: of this pass through the block; None where no dropout is active, and then nothing is done.
        segment: which part of the block.
        chunk: which tokens.
        device: where the masks are drawn.
    """
    if seed is None:
        yield
        return
    # Steps by an odd constant without pattern keep addresses apart in the low 32 bits too, which is all that the CPU
    # generator reads.
    own = (seed + 0x9E3779B97F4A7C15 * (1 + segment + 3 * chunk)) % 2**63
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(own)
        if cuda:
            torch.cuda.default_generators[device.index].manual_seed(own)
        yield


class GradientSums:
    """Gradients of some tensors, summed over chunks: in float32 where the tensor is narrower.

    Args:
        tensors: what the gradients are of.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._sums: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one chunk's share, in the order of ``tensors``; None where a tensor had no part in it."""
        for index, gradient in enumerate(gradients):
            total = self._sums[index]
            if gradient is None:
                continue
            if total is not None:
                total.add_(gradient)
                continue
            # A copy, even where nothing widens: autograd may hand out one tensor as the gradient of two.
            self._sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)

    def settle(self) -> list[Tensor | None]:
        """The sums in their tensors' dtypes; call it when what was added so far is complete, to drop the wide ones."""
        for index, (tensor, total) in enumerate(zip(self.tensors, self._sums, strict=True)):
            if total is not None:
                self._sums[index] = total.to(tensor.dtype)
        return list(self._sums)


def writable(grad: Tensor) -> Tensor:
    """``grad`` itself, unless its elements share memory as an expanded tensor's do."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return grad.clone(memory_format=torch.contiguous_format) if shared else grad
