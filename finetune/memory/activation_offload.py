"""What enters the blocks, waiting on the host for the backward pass.

With every block run again in the backward pass, these are the activations that are left: for 5B at 49x480x720, 104 MiB
for each of 42 blocks. Each is copied out while a block computes and is back, by the order of the backward pass, before
it is needed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.memory.host_buffers import BufferLayout, StreamEvent, copy_stream, device_buffer, flat_buffers
from finetune.memory.runner import ActivationStore


class _HostBuffer:
    """A pinned buffer for the inputs of one block."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.free: StreamEvent = None
        """The end of the last copy that read it."""


class _Pool:
    """Host buffers that are used again and again.

    Its size is that of the largest inputs yet, times as many as were away at once, rounded up to whole passes: a bucket
    with smaller clips uses the same buffers, and a larger one replaces them.

    Args:
        count: buffers that a pass needs.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._nbytes = 0
        self._spare: list[_HostBuffer] = []

    def take(self, nbytes: int) -> _HostBuffer:
        if nbytes > self._nbytes:
            self._nbytes, self._spare = nbytes, []
        if not self._spare:
            flats = flat_buffers([self._nbytes] * self._count, pinned=True, what="offloaded activations")
            self._spare = [_HostBuffer(flat) for flat in flats][::-1]
        return self._spare.pop()

    def give_back(self, buffer: _HostBuffer) -> None:
        if buffer.flat.numel() == self._nbytes:
            self._spare.append(buffer)


class _Stored:
    """The inputs of one block in one pass: on the device, on the host, or on their way back."""

    def __init__(self, index: int, tensors: tuple[Tensor, Tensor], before: _Stored | None) -> None:
        self.index = index
        self.layout = BufferLayout.of(tensors)
        self.before = before
        """The ones that are needed next."""
        self.on_device: tuple[Tensor, Tensor] | None = None
        self.on_host: _HostBuffer | None = None
        self.sent: StreamEvent = None
        """The end of the copy to the host."""
        self.returning: tuple[Tensor, StreamEvent] | None = None
        """The device buffer, and the end of the copy to it."""
        self.give_back: Callable[[], object] = lambda: None


class ActivationOffload(ActivationStore):
    """The store of which all but the last few inputs wait on the host.

    A pass that no backward pass follows gives its buffers back when autograd lets go of it. What ``put`` was given must
    not be written to afterwards.

    Args:
        blocks: of the transformer.
        device: where it computes.
        keep: how many of the last blocks' inputs stay on the device: they are wanted first, and at once.
    """

    def __init__(self, blocks: int, device: torch.device, *, keep: int = 2) -> None:
        self.stalls = 0
        """Inputs that were not on their way back when they were wanted."""
        self._device = device
        self._first_kept = max(blocks - keep, 0)
        self._pool = _Pool(self._first_kept)
        # Two of them, so that neither direction waits for the other.
        self._outward, self._inward = copy_stream(device), copy_stream(device)
        self._last: weakref.ref[_Stored] | None = None
        self._leaving: list[tuple[StreamEvent, tuple[Tensor, Tensor]]] = []
        self._arriving: list[tuple[Tensor, StreamEvent]] = []

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> _Stored:
        self._release_sent()
        for _, ready in self._arriving:  # of a backward pass that was broken off
            self._inward.wait(ready)
        self._arriving.clear()
        tensors = (hidden.detach(), encoder.detach())
        last = None if self._last is None else self._last()
        stored = _Stored(index, tensors, last if last is not None and last.index == index - 1 else None)
        self._last = weakref.ref(stored)
        if index >= self._first_kept:
            stored.on_device = tensors
            return stored
        buffer = stored.on_host = self._pool.take(stored.layout.nbytes)
        stored.give_back = weakref.finalize(stored, self._pool.give_back, buffer)
        after = [self._outward.compute(), buffer.free]
        for view, tensor in zip(stored.layout.views(buffer.flat), tensors, strict=True):
            stored.sent = self._outward.copy(view, tensor, after=after)
        # Until the compute has waited for the copy, their memory must not be given to anything else.
        self._leaving.append((stored.sent, tensors))
        return stored

    def get(self, index: int, stored: _Stored) -> tuple[Tensor, Tensor]:
        self._release_sent()
        tensors = stored.on_device
        if tensors is None:
            if stored.returning is None:
                self.stalls += 1
                self._bring_back(stored)
            if stored.returning is None:
                raise RuntimeError(f"the inputs of block {index} were fetched before, and are gone")
            flat, ready = stored.returning
            self._inward.wait(ready)
            self._arriving = [other for other in self._arriving if other is not stored.returning]
            hidden, encoder = stored.layout.views(flat)
            tensors = hidden, encoder
        if stored.before is not None:
            self._bring_back(stored.before)
        stored.on_device = stored.returning = stored.before = None
        return tensors

    def close(self) -> None:
        for event, _ in self._leaving:
            self._outward.finish(event)
        # Their buffers go back to the allocator with this object, and must not be written to after that.
        for _, ready in self._arriving:
            self._inward.finish(ready)
        self._leaving.clear()
        self._arriving.clear()

    def _bring_back(self, stored: _Stored) -> None:
        """Begin to copy a block's inputs to the device, unless they are there, on their way or gone."""
        buffer, stored.on_host = stored.on_host, None
        if buffer is None:
            return
        flat = device_buffer(stored.layout.nbytes, self._device, "offload buffers")
        # The buffer may be memory that queued compute still uses for something else.
        after = [stored.sent, self._inward.compute()]
        buffer.free = self._inward.copy(flat, buffer.flat[: stored.layout.nbytes], after=after)
        stored.returning = flat, buffer.free
        self._arriving.append(stored.returning)
        stored.give_back()

    def _release_sent(self) -> None:
        """Let the compute wait for what is leaving, and then let go of it."""
        for event, _ in self._leaving:
            self._outward.wait(event)
        self._leaving.clear()
