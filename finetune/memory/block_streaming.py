"""Weights of blocks that live on the host and visit the device for every pass.

Each streamed block has its tensors in one flat host buffer, and the device holds a ring of a few such buffers. While
one block computes, the next is copied into another slot of the ring: the order of blocks is known, forward and back. A
weight that does not change is never copied back; letting go of a slot costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from finetune.core.errors import TrainingError
from finetune.memory import host_buffers
from finetune.memory.config import TextEncoder
from finetune.memory.host_buffers import (
    BufferLayout,
    CopyStream,
    StreamEvent,
    copy_stream,
    device_buffer,
    flat_buffer,
    label_of,
)
from finetune.memory.quantized_linear import QuantisedPlacement


class _Home:
    """Where a block's streamed tensors live, and the tensors themselves, which a pass binds to a slot."""

    def __init__(self, tensors: Sequence[Tensor], layout: BufferLayout, flat: Tensor) -> None:
        self.tensors = tensors
        self.layout = layout
        self.flat = flat
        self.views = layout.views(flat)

    def bind(self, views: Sequence[Tensor]) -> None:
        # Through ``.data`` a tensor stays the object that modules, optimizers and autograd know.
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view


class _Slot:
    """One flat buffer of the ring."""

    def __init__(self, flat: Tensor, free: StreamEvent) -> None:
        self.flat = flat
        self.rank: int | None = None
        """Which block's weights it holds, or will when ``ready`` has passed."""
        self.ready: StreamEvent = None
        self.free = free
        """The end of the last use of its memory."""
        self._views: dict[BufferLayout, list[Tensor]] = {}

    def views(self, layout: BufferLayout) -> list[Tensor]:
        if layout not in self._views:
            self._views[layout] = layout.views(self.flat)
        return self._views[layout]


class BlockStreaming:
    """The ``Residency`` of blocks that stream, from ``install`` to ``remove``.

    Between passes a streamed tensor is its host copy, so that whoever saves, counts or compares weights sees true
    values at any time. Frozen parameters and buffers stream; what trains, such as an adapter, stays where it is, unless
    ``trainable``: then the host copy is what an optimizer must update, and ``invalidate`` must follow.

    Args:
        blocks: all of the transformer's, in the order in which they run.
        indices: of those that stream.
        ring: how many of them the device holds at a time; with 1 nothing is copied while a block computes.
        device: where they compute.
        trainable: whether parameters that train stream too (full fine-tuning). Gradients must not be left on them
            then: they belong to ``Blocks.sink``.
        lane: what copies; by default one that fits ``device``.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        indices: Sequence[int],
        ring: int,
        device: torch.device,
        *,
        trainable: bool = False,
        lane: CopyStream | None = None,
    ) -> None:
        self.indices = tuple(sorted(set(indices)))
        self.loads = 0
        """Blocks copied to the device so far."""
        self.stalls = 0
        """Those of ``loads`` that were not foreseen: their pass had to wait for all of the copy."""
        self._blocks = [blocks[index] for index in self.indices]
        self._ring = min(ring, len(self._blocks))
        self._device = device
        self._trainable = trainable
        self._lane = lane or copy_stream(device)
        self._ranks = {index: rank for rank, index in enumerate(self.indices)}
        self._homes: list[_Home] = []
        self._views: dict[int, Tensor] = {}
        self._slots: list[_Slot] = []
        self._bound: int | None = None
        """The rank whose weights are bound to a slot."""
        self._returns = True
        """Whether the forward pass under way is followed by its backward pass."""
        self._watch: Any = None

    def install(self) -> None:
        """Move the weights of the blocks to the host, and make the ring.

        Raises:
            TrainingError: a block holds nothing that could stream.
        """
        chosen = [self._tensors(block) for block in self._blocks]
        for index, tensors in zip(self.indices, chosen, strict=True):
            if not tensors:
                raise TrainingError(
                    f"block {index} has no frozen weights that could stream: all of it trains",
                    where="memory.streamed_blocks",
                    fix="set memory.streamed_blocks: 0",
                )
        layouts = [BufferLayout.of(tensors) for tensors in chosen]
        pieces = flat_buffer([layout.nbytes for layout in layouts], pinned=True, what="streamed weights")
        for block, tensors, layout, piece in zip(self._blocks, chosen, layouts, pieces, strict=True):
            home = _Home(tensors, layout, piece)
            for tensor, view in zip(tensors, home.views, strict=True):
                view.copy_(tensor.data)
                tensor.data = view  # one by one, so that no block is held twice
                self._views[id(tensor)] = view
            host_buffers.pin_to_host(block, tensors)
            self._homes.append(home)
        largest = max((layout.nbytes for layout in layouts), default=0)
        ring = [device_buffer(largest, self._device, "streaming ring") for _ in range(self._ring)]
        # What the allocator hands out may still be in use by compute that is queued.
        self._slots = [_Slot(flat, self._lane.compute()) for flat in ring]
        if self._blocks:
            # A forward pass without gradients is followed by the next forward pass, and not by its backward pass.
            # Inside a block this cannot be seen: gradients are not recorded there in either case.
            self._watch = self._blocks[0].register_forward_pre_hook(self._see)

    def remove(self, device: torch.device | None = None) -> None:
        """Leave the weights on ``device``, or in ordinary host memory if None, and free everything else."""
        self._let_go()
        for slot in self._slots:
            self._lane.finish(slot.ready)
            self._lane.finish(slot.free)
        self._slots = []
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        self._views.clear()
        while self._homes:  # taken off one by one, so that the host does not hold all of them twice
            home = self._homes.pop()
            host_buffers.unpin_from_host(self._blocks[len(self._homes)])
            for tensor, view in zip(home.tensors, home.views, strict=True):
                left = torch.empty(view.shape, dtype=view.dtype, device=device or view.device)
                left.copy_(view)
                tensor.data = left

    def home(self, parameter: Tensor) -> Tensor:
        """The host copy of a streamed tensor, which is its value: here an optimizer updates it, also while a pass has
        bound the tensor to the device.

        Raises:
            KeyError: if it does not stream.
        """
        return self._views[id(parameter)]

    def invalidate(self) -> None:
        """Forget what the ring holds, and wait here for copies that are under way: weights on the host are written to.
        To be called between passes, before that and after.
        """
        self._let_go()
        for slot in self._slots:
            self._lane.finish(slot.ready)
            # A change that is still queued on the compute comes before the next copy.
            slot.rank, slot.free = None, self._lane.compute()

    def acquire(self, index: int, *, backward: bool) -> None:
        """See ``Residency``."""
        rank = self._ranks.get(index)
        if rank is None:
            return
        self._let_go()  # of what a pass that failed left behind
        if rank not in self._loaded():
            self.stalls += 1
        self._fetch(rank, *self._order_after(rank, backward=backward))
        slot = self._loaded()[rank]
        self._lane.wait(slot.ready)
        self._homes[rank].bind(slot.views(self._homes[rank].layout))
        self._bound = rank

    def release(self, index: int, *, backward: bool) -> None:
        """See ``Residency``."""
        rank = self._ranks.get(index)
        if rank is None or rank != self._bound:
            return
        self._let_go()
        self._fetch(*self._order_after(rank, backward=backward))

    def _order_after(self, rank: int, *, backward: bool) -> Iterable[int]:
        """In which order blocks will be needed from here, across the turn of the pass."""
        number = len(self._blocks)
        if backward:
            return chain(reversed(range(rank)), range(number))
        return chain(range(rank + 1, number), reversed(range(number)) if self._returns else range(number))

    def _fetch(self, *order: int) -> None:
        """Have in the ring what is needed first, in place of what is needed last.

        After a pass through rank r that is r + B forward and r - B backward, B being the ring's size; around a turn it
        is nothing, because the last B blocks of one direction are the first of the other.
        """
        due = list(dict.fromkeys(order))[: self._ring]
        loaded = self._loaded()
        spare = [slot for slot in self._slots if slot.rank not in due]
        for rank in due:
            if rank not in loaded:
                self._load(spare.pop(0), rank)

    def _load(self, slot: _Slot, rank: int) -> None:
        flat = self._homes[rank].flat
        slot.rank = rank
        slot.ready = self._lane.copy(slot.flat[: flat.numel()], flat, after=[slot.free])
        self.loads += 1

    def _loaded(self) -> dict[int, _Slot]:
        return {slot.rank: slot for slot in self._slots if slot.rank is not None}

    def _let_go(self) -> None:
        if self._bound is not None:
            self._loaded()[self._bound].free = self._lane.compute()
            self._homes[self._bound].bind(self._homes[self._bound].views)
            self._bound = None

    def _see(self, *_: object) -> None:
        self._returns = torch.is_grad_enabled()

    def _tensors(self, block: nn.Module) -> list[Tensor]:
        streams = [p for p in block.parameters() if self._trainable or not p.requires_grad]
        return [tensor for tensor in (*streams, *block.buffers()) if not _stays(tensor)]


def _stays(tensor: Tensor) -> bool:
    """Whether another technique keeps it on the host and needs it there."""
    label = label_of(tensor.untyped_storage())
    return label is not None and label.what == "modulation"


# -------- T5 within the memory that training has: in eight bits, or with its blocks on the host.
#
# It is larger than most CogVideoX transformers and runs once per caption, so its weights may as well visit the device.

RING = 2
"""Blocks of T5 on the device: one computes while the next is copied."""

_LINEAR = r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i|i_0|i_1|o))"


def text_placement(text_encoder: TextEncoder) -> QuantisedPlacement | None:
    """How ``load_text`` places T5's weights; None for as they are."""
    return QuantisedPlacement("int8", _LINEAR) if text_encoder == "int8" else None


def stream_text(encoder: nn.Module, device: torch.device) -> BlockStreaming:
    """Have the blocks of a T5 encoder stream to ``device``, and move everything else there. Embeddings stay the same.

    Args:
        encoder: a ``T5EncoderModel`` on the CPU, frozen.
        device: where it will compute, and what tokens have to be on.

    Returns:
        What streams, to be kept as long as the encoder; its memory goes with the two of them.
    """
    blocks = list(encoder.get_submodule("encoder.block").children())
    streamed = BlockStreaming(blocks, range(len(blocks)), RING, device)
    streamed.install()
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(_enter, streamed, index))
        block.register_forward_hook(partial(_leave, streamed, index), always_call=True)
    inside = {id(tensor) for block in blocks for tensor in chain(block.parameters(), block.buffers())}
    for tensor in chain(encoder.parameters(), encoder.buffers()):
        if id(tensor) not in inside and tensor.device != device:
            held = device_buffer(tensor.nbytes, device, "weights").view(tensor.dtype).view(tensor.shape)
            tensor.data = held.copy_(tensor)
    return streamed


def _enter(streamed: BlockStreaming, index: int, *_: object) -> None:
    streamed.acquire(index, backward=False)


def _leave(streamed: BlockStreaming, index: int, *_: object) -> None:
    streamed.release(index, backward=False)
