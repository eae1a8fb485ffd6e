"""A CogVideoX block that holds what its gradient needs, and no more.

With u for the size of the token streams (text and video, [B, T + S, D]), the backward pass holds ten of them at most,
while attention is differentiated: the block's input, q, k, v, attention's output, the gradients of these four, and the
gradient of the residual stream, which is written where the outputs' gradient was. Stock autograd holds about
twenty-three. Everything else is made from these, used and forgotten: the norms and gates are one operation each
(``modulation``, ``qk_norm``), and the feed-forward, four times as wide as the streams, is run in chunks of tokens.

What the backward pass does not compute again: the outputs of ``ff.net.2``, ``to_v``, and, where the norm of queries and
keys can be undone, ``to_q`` and ``to_k``: their gradients do not depend on them. Numbers are the stock block's, but for
the order of sums and what narrow dtypes make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.memory.checkpointing import SavedAttention
from finetune.memory.lean_linear import SharedInput, computed_by, decoded_once, needs_features, shared_inputs, unread
from finetune.memory.modulation import Gated, Modulation, add_gated, gate_gradient, modulate, modulate_gradient
from finetune.memory.qk_norm import (
    Normed,
    gradient_in_place,
    input_gradient_in_place,
    norm_and_rotate_into,
    undoable,
)
from finetune.memory.runner import BlockInputs, gradients_of

PARTS = 6
"""Chunks of the feed-forward: few, and its four-fold width on one of them, twice or three times, is no more than the
two streams that are free then."""

LEAST = 2048
"""Tokens per clip that are worked at once in any case: with fewer, products are too small to keep a GPU busy."""

_ADALN, _BEFORE_ATTENTION, _BEHIND_ATTENTION, _FEED_FORWARD = range(4)
"""The parts of a block, as dropout masks are addressed."""


class LeanBlock:
    """The ``BlockForwardBackward`` of this file.

    Args:
        tokens: most tokens per clip in a chunk of the feed-forward; None for what costs no memory at the peak.
    """

    seeded = True

    def __init__(self, tokens: int | None = None) -> None:
        self.tokens = tokens
        self._undoable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @torch.no_grad()
    def forward(self, block: nn.Module, inputs: BlockInputs, attention: SavedAttention) -> tuple[Tensor, Tensor]:
        part = _Pass(block, inputs, self.tokens, temb=inputs.temb.detach())
        q, k, v, _ = part.project()
        with attention.recording():
            attended = _attend(block, q, k, v)
        del q, k, v
        with part.masks(_BEHIND_ATTENTION):
            projected = part.project_out(_features(attended))
        del attended
        outputs = torch.empty_like(inputs.hidden), torch.empty_like(inputs.encoder)
        entered = part.enter_feed_forward(projected, outputs)
        del projected
        with decoded_once(*part.feed_forward), computed_by(*part.in_feed_forward):
            for chunk in part.chunks:
                with part.masks(_FEED_FORWARD, chunk.index):
                    fed = part.block.ff(_tokens_of(entered, chunk))
                for piece in chunk.pieces:
                    gate = part.rows_of(1, piece.text)[2]
                    add_gated(outputs[piece.text][:, piece.within], Gated(fed[:, piece.own], gate))
        return outputs

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
        of_attended = part.backward_behind(attended.detach())
        part.sums.settle()
        if of_attended is not None:
            of_results = list(torch.autograd.grad(attended, leaves, of_attended.view(attended.shape)))
            del attended, of_attended, leaves
            if undo:
                part.undo_norms((Normed(q, rstd[0]), Normed(k, rstd[1])), of_results[:2])
            del q, k
            part.backward_before(of_results, undone=undo)
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
        most: tokens per clip in a chunk of the feed-forward, if it is not to be chosen.
        temb: the time embedding, as a leaf.
    """

    def __init__(self, block: Any, inputs: BlockInputs, most: int | None, *, temb: Tensor) -> None:
        self.block: Any = block
        self.before = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.into_attention = shared_inputs(self.before, inputs.hidden.dtype)
        self.out_of_attention = SharedInput(block.attn1.to_out[:1], inputs.hidden.dtype)
        self.norms = (block.attn1.norm_q, block.attn1.norm_k)
        self.feed_forward = (block.ff.net[0].proj, block.ff.net[2])
        self.in_feed_forward = [SharedInput([layer], inputs.hidden.dtype) for layer in self.feed_forward]
        self.inputs = inputs
        text, tokens = inputs.encoder.shape[1], inputs.encoder.shape[1] + inputs.hidden.shape[1]
        self.chunks = chunks(text, tokens, most or max(LEAST, -(-tokens // PARTS)))
        (self.everything,) = chunks(text, tokens, tokens)
        with torch.enable_grad(), masks(inputs.seed, _ADALN, 0, temb.device):
            self.adaln = [norm.linear(norm.silu(temb)) for norm in (block.norm1, block.norm2)]
        self.rows = [made.detach().requires_grad_(made.requires_grad) for made in self.adaln]
        """Of ``norm1`` and ``norm2``: shifts, scales and gates of both streams, [B, 6 D]."""

    def masks(self, segment: int, chunk: int = 0) -> AbstractContextManager[None]:
        """Dropout masks of a chunk."""
        return masks(self.inputs.seed, segment, chunk, self.inputs.hidden.device)

    def tokens(self, piece: Piece) -> Tensor:
        """What enters the block, [B, n, D]."""
        return (self.inputs.encoder if piece.text else self.inputs.hidden)[:, piece.within].detach()

    def rows_of(self, norm: int, text: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Shift, scale and gate of a stream, [B, 1, D] each."""
        rows = self.rows[norm].detach()[:, None, :]
        shift, scale, gate = rows.chunk(6, dim=-1)[3 * text : 3 * text + 3]
        return shift, scale, gate

    def modulation(self, norm: int, text: bool) -> Modulation:
        """Of ``norm1`` or ``norm2``."""
        return Modulation((self.block.norm1, self.block.norm2)[norm].norm, *self.rows_of(norm, text)[:2])

    def gated(self, projected: Tensor, piece: Piece) -> Gated:
        """What attention's output adds to a stream, of a tensor in the joint sequence."""
        return Gated(projected[:, piece.joint], self.rows_of(0, piece.text)[2])

    def project(self) -> _Projected:
        """Everything in front of attention, for both streams."""
        modulated = self.enter_attention()
        with self.masks(_BEFORE_ATTENTION):
            q, k, v = (self.heads(output) for layers in self.into_attention for output in layers(modulated))
        rstd = [q.new_empty(*q.shape[:-1], 1, dtype=torch.float32) for _ in range(2)]
        for features, norm, own in zip((q, k), self.norms, rstd, strict=True):
            norm_and_rotate_into(features, norm, self.inputs.rotary, Normed(features, own))
        return _Projected(q, k, v, (rstd[0], rstd[1]))

    def enter_attention(self) -> Tensor:
        """What the linear layers of queries, keys and values take, [B, T + S, D]."""
        entered = self._joint()
        for piece in self.everything.pieces:
            modulate(self.tokens(piece), None, self.modulation(0, piece.text), entered[:, piece.joint])
        return entered

    def enter_feed_forward(self, projected: Tensor, outputs: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the feed-forward takes, [B, T + S, D].

        Args:
            projected: attention's output behind ``to_out``, [B, T + S, D].
            outputs: video and text, to which the streams with attention's part are written.
        """
        entered = self._joint()
        for piece in self.everything.pieces:
            gated, modulation = self.gated(projected, piece), self.modulation(1, piece.text)
            total = outputs and outputs[piece.text]
            modulate(self.tokens(piece), gated, modulation, entered[:, piece.joint], total)
        return entered

    def project_out(self, features: Tensor) -> Tensor:
        """``to_out`` of attention's output, [B, T + S, D] both."""
        (projected,) = self.out_of_attention(features)
        for module in self.block.attn1.to_out[1:]:
            projected = module(projected)
        return projected

    def heads(self, features: Tensor) -> Tensor:
        """[B, n, D] as [B, n, H, head dim]."""
        return features.view(*features.shape[:-1], self.block.attn1.heads, -1)

    def _joint(self) -> Tensor:
        hidden = self.inputs.hidden
        return hidden.new_empty(len(hidden), self.everything.joint.stop, hidden.shape[-1])


class _BackwardPass(_Pass):
    """A pass with what its gradients are summed into.

    Args:
        block: the block.
        inputs: of it, leaves.
        most: tokens per clip in a chunk of the feed-forward, if it is not to be chosen.
        grads: of the block's outputs.
        parameters: that train.
    """

    def __init__(
        self,
        block: Any,
        inputs: BlockInputs,
        most: int | None,
        grads: tuple[Tensor, Tensor],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        super().__init__(block, inputs, most, temb=inputs.temb)
        self.sums = GradientSums(parameters)
        self.of_streams = writable(grads[0]), writable(grads[1])
        """Of video and text: the outputs' gradients, which become the inputs'."""
        trains = {id(parameter) for parameter in parameters}
        self._norms_train = [
            any(id(parameter) in trains for parameter in norm.norm.parameters()) for norm in (block.norm1, block.norm2)
        ]
        # Sums over tokens of what a norm's gradients are made of, and gates': text's beside video's.
        rows_train = [rows.requires_grad for rows in self.rows]
        entered = [rows_train[0] or self._norms_train[0], any(rows_train) or self._norms_train[1]]
        self._entered_sums = [self._zeros(2 + norm) if entered[norm] else None for norm in range(2)]
        self._gate_sums = self._zeros(1) if rows_train[1] else None
        before = {id(parameter) for module in (*self.before, *self.norms) for parameter in module.parameters()}
        self.through_attention = (
            any(tensor.requires_grad for tensor in (inputs.hidden, inputs.encoder, self.rows[0]))
            or self._norms_train[0]
            or not before.isdisjoint(trains)
        )
        """Whether a gradient is wanted that comes through attention."""

    def _zeros(self, count: int) -> Tensor:
        """Sums over tokens for video and text, [2, B, count, D]."""
        clips, _, width = self.inputs.hidden.shape
        dtype = torch.promote_types(self.inputs.hidden.dtype, torch.float32)
        return self.inputs.hidden.new_zeros(2, clips, count, width, dtype=dtype)

    def backward_behind(self, attended: Tensor) -> Tensor | None:
        """What lies behind attention: turn the outputs' gradient into that of the residual stream at attention's side.

        Args:
            attended: attention's output, [B, T + S, H, head dim].

        Returns:
            Its gradient, [B, T + S, D]; None where none is wanted.
        """
        own = _features(attended).requires_grad_(self.through_attention)
        with torch.enable_grad(), self.masks(_BEHIND_ATTENTION):
            projected = self.project_out(own)
        # Chunk by chunk the values become their own gradient; the graph has no use for them.
        root = torch.autograd.graph.get_gradient_edge(projected) if projected.requires_grad else None
        features = projected.detach()
        del projected
        entered = self.enter_feed_forward(features)
        with decoded_once(*self.feed_forward), computed_by(*self.in_feed_forward):
            for chunk in self.chunks:
                of_entered = self._backward_feed_forward(chunk, _tokens_of(entered, chunk))
                for piece in chunk.pieces:
                    modulate_gradient(
                        of_entered[:, piece.own],
                        self.tokens(piece),
                        self.gated(features, piece),
                        self.modulation(1, piece.text),
                        self.of_streams[piece.text][:, piece.within],
                        _of_stream(self._entered_sums[1], piece.text),
                    )
                del of_entered
        del entered
        of_own, *others = gradients_of([root], [features], [own, *self.sums.tensors])
        self.sums.add(others)
        return of_own

    def _backward_feed_forward(self, chunk: Chunk, entered: Tensor) -> Tensor:
        """The gradient of what the feed-forward takes, [B, n, D], from that of the block's outputs."""
        activation, *others = self.block.ff.net
        leaf = entered.requires_grad_()
        # Only a gate that trains needs to know what it was multiplied with, only a layer that trains what it was given.
        gate_trains = self._gate_sums is not None
        reads = gate_trains or needs_features(others[1])
        with torch.enable_grad(), self.masks(_FEED_FORWARD, chunk.index), unread(*others[1:2] * (not gate_trains)):
            inner = activation.proj(leaf)
            wide = inner.detach()
            given = activation.gelu(wide) if reads else wide.new_zeros(()).expand_as(wide)
            fed = given = given.requires_grad_()
            for module in others:
                fed = module(fed)
        of_fed = torch.empty_like(entered)
        for piece in chunk.pieces:
            features = fed.detach()[:, piece.own] if gate_trains else None
            grad, gate = self.of_streams[piece.text][:, piece.within], self.rows_of(1, piece.text)[2]
            gate_gradient(grad, gate, of_fed[:, piece.own], features, _of_stream(self._gate_sums, piece.text))
        of_given, *of_parameters = gradients_of([fed], [of_fed], [given, *self.sums.tensors])
        self.sums.add(of_parameters)
        del given, fed, of_fed, of_parameters
        assert of_given is not None
        of_wide = torch.ops.aten.gelu_backward.grad_input(
            of_given, wide, approximate=activation.approximate, grad_input=of_given
        )
        of_leaf, *of_parameters = gradients_of([inner], [of_wide], [leaf, *self.sums.tensors])
        self.sums.add(of_parameters)
        assert of_leaf is not None
        return of_leaf

    def undo_norms(self, results: tuple[Normed, Normed], grads: Sequence[Tensor]) -> None:
        """Turn the gradients of queries and keys as attention took them into those of what the linear layers gave.

        Args:
            results: queries and keys as attention took them.
            grads: of these, written to.
        """
        for result, grad, norm in zip(results, grads, self.norms, strict=True):
            gradient_in_place(grad, result, norm, self.inputs.rotary)

    def backward_before(self, of_results: list[Tensor], *, undone: bool) -> None:
        """What lies in front of attention: add its share to the residual stream's gradient.

        Args:
            of_results: gradients of queries, keys and values; emptied.
            undone: queries and keys are meant as the linear layers gave them; otherwise these are computed again.
        """
        wanted = any(tensor.requires_grad for tensor in (self.inputs.hidden, self.inputs.encoder))
        leaf = self.enter_attention().requires_grad_(wanted or self._entered_sums[0] is not None)
        norms = {} if undone else dict(zip(self.before, self.norms, strict=False))
        skipped = [linear for linear in self.before if linear not in norms]
        of_entered: Tensor | None = None
        with self.masks(_BEFORE_ATTENTION):
            for shared in self.into_attention:
                with torch.enable_grad():
                    outputs = [self.heads(output) for output in shared(leaf, skipped)]
                grads = [of_results.pop(0) for _ in outputs]
                for linear, output, grad in zip(shared.layers, outputs, grads, strict=True):
                    if (norm := norms.get(linear)) is not None:
                        of_norm = input_gradient_in_place(grad, output.detach(), norm, self.inputs.rotary)
                        self.sums.add_to({norm.weight: of_norm[0], norm.bias: of_norm[1]})
                of_leaf, *others = gradients_of(outputs, grads, [leaf, *self.sums.tensors])
                del outputs, output, grads, grad
                self.sums.add(others)
                of_entered = of_leaf if of_entered is None or of_leaf is None else of_entered.add_(of_leaf)
        if of_entered is None:
            return
        for piece in self.everything.pieces:
            modulation, sums = self.modulation(0, piece.text), _of_stream(self._entered_sums[0], piece.text)
            grad = self.of_streams[piece.text]
            modulate_gradient(of_entered[:, piece.joint], self.tokens(piece), None, modulation, grad, sums)

    def backward_adaln(self) -> Tensor | None:
        """The time embedding's gradient; those of the norms' and adaLN layers' own parameters are added to ``sums``."""
        of_rows = [None if not rows.requires_grad else self._zeros(3) for rows in self.rows]
        for norm, sums in enumerate(self._entered_sums):
            for text, of_stream in enumerate(sums if sums is not None else ()):
                self._settle_norm(norm, text, of_stream, of_rows)
        if self._gate_sums is not None and of_rows[1] is not None:
            of_rows[1][:, :, 2] = self._gate_sums[:, :, 0]
        pairs = [
            (made, of.transpose(0, 1).flatten(1).to(made.dtype))
            for made, of in zip(self.adaln, of_rows, strict=True)
            if of is not None
        ]
        inputs = [self.inputs.temb, *self.sums.tensors]
        of_temb, *others = gradients_of([made for made, _ in pairs], [of for _, of in pairs], inputs)
        self.sums.add(others)
        return of_temb

    def _settle_norm(self, norm: int, text: int, sums: Tensor, of_rows: list[Tensor | None]) -> None:
        """Gradients of shift, scale and the norm's weight and bias, from their sums over a stream's tokens.

        Args:
            norm: ``norm1`` or ``norm2``.
            text: of which stream.
            sums: as ``modulate_gradient`` gives them.
            of_rows: gradients of both norms' rows, [2, B, 3, D] each, written to.
        """
        layer, _, scale = self.modulation(norm, bool(text))
        weight, bias, factor = layer.weight.to(sums.dtype), layer.bias.to(sums.dtype), 1 + scale[:, 0].to(sums.dtype)
        of_added, along = sums[:, 0], sums[:, 1]
        if (of := of_rows[norm]) is not None:
            of[text, :, 0], of[text, :, 1] = of_added, weight * along + bias * of_added
        if norm == 1 and (of := of_rows[0]) is not None:
            of[text, :, 2] = sums[:, 2]
        if self._norms_train[norm]:
            self.sums.add_to({layer.weight: (factor * along).sum(0), layer.bias: (factor * of_added).sum(0)})


def _of_stream(sums: Tensor | None, text: bool) -> Tensor | None:
    return None if sums is None else sums[int(text)]


def _attend(block: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over the joint sequence, [B, T + S, H, head dim] to the same; the block's own, where it has one."""
    if (own := getattr(block.attn1.processor, "attend", None)) is not None:  # tokens are divided among processes
        result: Tensor = own(q, k, v)
        return result
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _features(attended: Tensor) -> Tensor:
    """Attention's output, [B, n, D]; contiguous, or a linear layer would repeat its weight per clip."""
    return attended.flatten(2).contiguous()


def _tokens_of(joint: Tensor, chunk: Chunk) -> Tensor:
    """A chunk of the joint sequence; contiguous, for the same reason."""
    return joint[:, chunk.joint].contiguous()


# ---------------------------------------------------------------------- chunks: where they lie, masks, sums over them


class Piece(NamedTuple):
    """Neighbouring tokens of one stream, for every clip."""

    text: bool
    """Of the text stream; otherwise of the video stream."""
    within: slice
    """Where in its stream."""
    joint: slice
    """Where in the joint sequence."""
    own: slice
    """Where in the chunk."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring tokens of the joint sequence that attention sees, text first, for every clip."""

    index: int
    joint: slice
    pieces: tuple[Piece, ...]
    """Of either stream."""


def chunks(text: int, tokens: int, most: int) -> list[Chunk]:
    """Cut the joint sequence into equal chunks, as far as it divides.

    Args:
        text: text tokens per clip.
        tokens: text and video tokens per clip.
        most: tokens in a chunk at most.
    """
    size = -(-tokens // -(-tokens // most))  # of as few chunks as there can be, none much smaller than the others
    return [
        Chunk(index, slice(first, min(first + size, tokens)), tuple(_pieces(text, first, min(first + size, tokens))))
        for index, first in enumerate(range(0, tokens, size))
    ]


def _pieces(text: int, first: int, last: int) -> Iterator[Piece]:
    for is_text, begin, end in ((True, first, min(last, text)), (False, max(first, text), last)):
        start = 0 if is_text else text
        if begin < end:
            joint, own = slice(begin, end), slice(begin - first, end - first)
            yield Piece(is_text, slice(begin - start, end - start), joint, own)


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
    # Only the generator that draws: ``fork_rng`` saves and restores all of them, chunk by chunk.
    # Steps by an odd constant without pattern keep addresses apart in the low 32 bits too, which is all that the CPU
    # generator reads.
    own = (seed + 0x9E3779B97F4A7C15 * (1 + segment + 4 * chunk)) % 2**63
    source = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index]
    before = source.get_state()
    source.manual_seed(own)
    try:
        yield
    finally:
        source.set_state(before)


class GradientSums:
    """Gradients of some tensors, summed over chunks: in float32 where the tensor is narrower.

    Args:
        tensors: what the gradients are of.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        self._index = {tensor: index for index, tensor in enumerate(self.tensors)}
        self._sums: list[Tensor | None] = [None] * len(self.tensors)
        self._own: set[int] = set()
        """Of which sums are tensors of ours, to be added to."""

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add one chunk's share, in the order of ``tensors``; None where a tensor had no part in it."""
        for index, gradient in enumerate(gradients):
            total = self._sums[index]
            if gradient is None:
                continue
            if total is None:
                self._sums[index] = gradient
                continue
            if index not in self._own:
                # A copy, even where nothing widens: autograd may hand out one tensor as the gradient of two.
                total = self._sums[index] = total.to(torch.promote_types(total.dtype, torch.float32), copy=True)
                self._own.add(index)
            total.add_(gradient)

    def add_to(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Add to the sums of those tensors that are among these."""
        shares: list[Tensor | None] = [None] * len(self.tensors)
        for tensor, gradient in gradients.items():
            if tensor in self._index:
                shares[self._index[tensor]] = gradient
        self.add(shares)

    def settle(self) -> list[Tensor | None]:
        """The sums in their tensors' dtypes; call it when what was added so far is complete, to drop the wide ones."""
        for index, (tensor, total) in enumerate(zip(self.tensors, self._sums, strict=True)):
            if total is not None and total.dtype != tensor.dtype:
                self._sums[index] = total.to(tensor.dtype)
                self._own.add(index)
        return list(self._sums)


def writable(grad: Tensor) -> Tensor:
    """``grad`` itself, unless its elements share memory as an expanded tensor's do."""
    shared = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return grad.clone(memory_format=torch.contiguous_format) if shared else grad
