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
from finetune.memory.config import TextEncoder
from finetune.memory.host_buffers import (
    BufferLayout,
    StreamEvent,
    copy_stream,
    device_buffer,
    flat_buffers,
    pin_to_host,
    unpin_from_host,
)
from finetune.memory.quantized_linear import QuantisedPlacement
from finetune.memory.runner import WeightPlacement


class _HostBlock:
    """A block's streamed tensors, which a pass binds to a slot of the ring, and where they live."""

    def __init__(self, block: nn.Module, tensors: Sequence[Tensor], flat: Tensor) -> None:
        self.block = block
        self.tensors = tensors
        self.layout = BufferLayout.of(tensors)
        self.flat = flat
        self.views = self.layout.views(flat)
        for tensor, view in zip(tensors, self.views, strict=True):
            view.copy_(tensor.data)
            tensor.data = view  # one by one, so that no block is held twice
        pin_to_host(block, tensors)

    def bind(self, views: Sequence[Tensor]) -> None:
        # Through ``.data`` a tensor stays the object that modules, optimizers and autograd know.
        for tensor, view in zip(self.tensors, views, strict=True):
            tensor.data = view

    def leave(self, device: torch.device | None) -> None:
        unpin_from_host(self.block)
        for tensor, view in zip(self.tensors, self.views, strict=True):
            tensor.data = torch.empty(view.shape, dtype=view.dtype, device=device or view.device).copy_(view)


class _RingSlot:
    """One flat device buffer of the ring."""

    def __init__(self, flat: Tensor, free: StreamEvent) -> None:
        self.flat = flat
        self.block: int | None = None
        """Which streamed block's weights it holds, or will when ``ready`` has passed."""
        self.ready: StreamEvent = None
        self.free = free
        """The end of the last use of its memory."""
        self._views: dict[BufferLayout, list[Tensor]] = {}

    def views(self, layout: BufferLayout) -> list[Tensor]:
        if layout not in self._views:
            self._views[layout] = layout.views(self.flat)
        return self._views[layout]


class BlockStreaming(WeightPlacement):
    """The placement of blocks that stream, from ``install`` to ``remove``.

    Between passes a streamed tensor is its host copy, so that whoever saves, counts or compares weights sees true
    values at any time. Frozen parameters and buffers stream; what trains, such as an adapter, stays where it is, unless
    ``trainable``: then the host copy is what an optimizer must update, and ``invalidate`` must follow.

    Args:
        blocks: all of the transformer's, in the order in which they run.
        indices: of those that stream.
        ring: how many of them the device holds at a time; with 1 nothing is copied while a block computes.
        device: where they compute.
        trainable: whether parameters that train stream too (full fine-tuning). Gradients must not be left on them
            then: they belong to ``BlockRunner.sink``.
        leave: tensors that another technique keeps on the host and needs there.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        indices: Sequence[int],
        ring: int,
        device: torch.device,
        *,
        trainable: bool = False,
        leave: Iterable[Tensor] = (),
    ) -> None:
        self.loads = 0
        """Blocks copied to the device so far."""
        self.stalls = 0
        """Those of ``loads`` that were not foreseen: their pass had to wait for all of the copy."""
        self._indices = sorted(set(indices))
        self._blocks = [blocks[index] for index in self._indices]
        self._ring = min(ring, len(self._blocks))
        self._device = device
        self._trainable = trainable
        self._leave = {id(tensor) for tensor in leave}
        self._stream = copy_stream(device)
        self._numbers = {index: number for number, index in enumerate(self._indices)}
        """Of the streamed blocks among themselves, by which everything below goes."""
        self._homes: list[_HostBlock] = []
        self._views: dict[int, Tensor] = {}
        self._slots: list[_RingSlot] = []
        self._bound: int | None = None
        """The block whose weights are bound to a slot."""
        self._returns = True
        """Whether the forward pass under way is followed by its backward pass."""
        self._hook: Any = None

    def install(self) -> None:
        """Move the weights of the blocks to the host, and make the ring.

        Raises:
            TrainingError: a block holds nothing that could stream.
        """
        chosen = [self._tensors(block) for block in self._blocks]
        for index, tensors in zip(self._indices, chosen, strict=True):
            if not tensors:
                raise TrainingError(
                    f"block {index} has no frozen weights that could stream: all of it trains",
                    where="memory.streamed_blocks",
                    fix="set memory.streamed_blocks: 0",
                )
        sizes = [BufferLayout.of(tensors).nbytes for tensors in chosen]
        buffers = flat_buffers(sizes, pinned=True, what="streamed weights")
        for block, tensors, flat in zip(self._blocks, chosen, buffers, strict=True):
            home = _HostBlock(block, tensors, flat)
            self._views |= zip(map(id, tensors), home.views, strict=True)
            self._homes.append(home)
        ring = [device_buffer(max(sizes, default=0), self._device, "streaming ring") for _ in range(self._ring)]
        # What the allocator hands out may still be in use by compute that is queued.
        self._slots = [_RingSlot(flat, self._stream.compute()) for flat in ring]
        if self._blocks:
            # A forward pass without gradients is followed by the next forward pass, and not by its backward pass.
            # Inside a block this cannot be seen: gradients are not recorded there in either case.
            self._hook = self._blocks[0].register_forward_pre_hook(self._look_whether_it_returns)

    def remove(self, device: torch.device | None = None) -> None:
        """Leave the weights on ``device``, or in ordinary host memory if None, and free everything else."""
        self._unbind()
        for slot in self._slots:
            self._stream.finish(slot.ready)
            self._stream.finish(slot.free)
        self._slots = []
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._views.clear()
        while self._homes:  # taken off one by one, so that the host does not hold all of them twice
            self._homes.pop().leave(device)

    def home(self, parameter: Tensor) -> Tensor | None:
        """The host copy of a streamed tensor, which is its value: here an optimizer updates it, also while a pass has
        bound the tensor to the device. None if it does not stream.
        """
        return self._views.get(id(parameter))

    def invalidate(self) -> None:
        """Forget what the ring holds, and wait here for copies that are under way: weights on the host are written to.
        To be called between passes, before that and after.
        """
        self._unbind()
        for slot in self._slots:
            self._stream.finish(slot.ready)
            # A change that is still queued on the compute comes before the next copy.
            slot.block, slot.free = None, self._stream.compute()

    def acquire(self, index: int, *, backward: bool) -> None:
        number = self._numbers.get(index)
        if number is None:
            return
        self._unbind()  # what a pass that failed left behind
        if number not in self._loaded():
            self.stalls += 1
        self._fetch(number, *self._order_after(number, backward=backward))
        slot = self._loaded()[number]
        self._stream.wait(slot.ready)
        self._homes[number].bind(slot.views(self._homes[number].layout))
        self._bound = number

    def release(self, index: int, *, backward: bool) -> None:
        number = self._numbers.get(index)
        if number is None or number != self._bound:
            return
        self._unbind()
        self._fetch(*self._order_after(number, backward=backward))

    def _order_after(self, number: int, *, backward: bool) -> Iterable[int]:
        """In which order blocks will be needed from here, across the turn of the pass."""
        count = len(self._blocks)
        if backward:
            return chain(reversed(range(number)), range(count))
        return chain(range(number + 1, count), reversed(range(count)) if self._returns else range(count))

    def _fetch(self, *order: int) -> None:
        """Have in the ring what is needed first, in place of what is needed last.

        After a pass through block n that is n + R forward and n - R backward, R being the ring's size; around a turn it
        is nothing, because the last R blocks of one direction are the first of the other.
        """
        due = list(dict.fromkeys(order))[: self._ring]
        loaded = self._loaded()
        spare = [slot for slot in self._slots if slot.block not in due]
        for number in due:
            if number not in loaded:
                self._load(spare.pop(0), number)

    def _load(self, slot: _RingSlot, number: int) -> None:
        flat = self._homes[number].flat
        slot.block = number
        slot.ready = self._stream.copy(slot.flat[: flat.numel()], flat, after=[slot.free])
        self.loads += 1

    def _loaded(self) -> dict[int, _RingSlot]:
        return {slot.block: slot for slot in self._slots if slot.block is not None}

    def _unbind(self) -> None:
        if self._bound is not None:
            self._loaded()[self._bound].free = self._stream.compute()
            self._homes[self._bound].bind(self._homes[self._bound].views)
            self._bound = None

    def _look_whether_it_returns(self, *_: object) -> None:
        self._returns = torch.is_grad_enabled()

    def _tensors(self, block: nn.Module) -> list[Tensor]:
        parameters = [p for p in block.parameters() if self._trainable or not p.requires_grad]
        return [tensor for tensor in (*parameters, *block.buffers()) if id(tensor) not in self._leave]


# --------------------------------------------------------------------------- T5: in 8 bits, or block by block
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
            flat = device_buffer(tensor.nbytes, device, "weights")
            tensor.data = flat.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    return streamed


def _enter(streamed: BlockStreaming, index: int, *_: object) -> None:
    streamed.acquire(index, backward=False)


def _leave(streamed: BlockStreaming, index: int, *_: object) -> None:
    streamed.release(index, backward=False)
