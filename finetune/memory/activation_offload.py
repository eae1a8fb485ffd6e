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

from finetune.memory.host_buffers import BufferLayout, CopyStream, StreamEvent, copy_stream, device_buffer, flat_buffer


class _Pool:
    """Pinned host buffers for boundaries, used again and again.

    Its size is that of the largest boundary yet, times as many as were away at once, rounded up to whole passes: a
    bucket with smaller clips uses the same buffers, and a larger one replaces them.

    Args:
        count: boundaries of one pass.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._nbytes = 0
        self._spare: list[_Piece] = []

    def take(self, nbytes: int) -> _Piece:
        if nbytes > self._nbytes:
            self._nbytes, self._spare = nbytes, []
        if not self._spare:
            pieces = flat_buffer([self._nbytes] * self._count, pinned=True, what="offloaded activations")
            self._spare = [_Piece(flat) for flat in pieces][::-1]
        return self._spare.pop()

    def give(self, piece: _Piece) -> None:
        if piece.flat.numel() == self._nbytes:
            self._spare.append(piece)


class _Piece:
    """A host buffer for one boundary."""

    def __init__(self, flat: Tensor) -> None:
        self.flat = flat
        self.free: StreamEvent = None
        """The end of the last copy that read it."""


class _Kept:
    """One boundary of one pass: here, away, or on its way back."""

    def __init__(self, index: int, device: torch.device, before: _Kept | None) -> None:
        self.index = index
        self.device = device
        self.before = before
        """The one that is needed next."""
        self.here: tuple[Tensor, Tensor] | None = None
        self.layout = BufferLayout((), 0)
        self.away: _Piece | None = None
        self.left: StreamEvent = None
        """The end of the copy to the host."""
        self.give_back: Callable[[], object] = lambda: None
        self.returning: _Returning | None = None


class _Returning:
    """The device buffer of a boundary that is on its way back."""

    def __init__(self, flat: Tensor, ready: StreamEvent) -> None:
        self.flat = flat
        self.ready = ready


class ActivationOffload:
    """The ``Boundaries`` of which all but the last few wait on the host.

    A pass that no backward pass follows gives its buffers back when autograd lets go of it. What ``put`` was given must
    not be written to afterwards.

    Args:
        blocks: of the transformer.
        keep: how many of the last blocks' boundaries stay on the device: they are wanted first, and at once.
        outward: copies to the host; by default a lane that fits the tensors' device.
        inward: copies back; likewise, and another one, so that neither direction waits for the other.
    """

    def __init__(
        self, blocks: int, *, keep: int = 2, outward: CopyStream | None = None, inward: CopyStream | None = None
    ) -> None:
        self.stalls = 0
        """Boundaries that were not on their way back when they were wanted."""
        self._first_kept = max(blocks - keep, 0)
        self._pool = _Pool(self._first_kept)
        self._outward = outward
        self._inward = inward
        self._last: weakref.ref[_Kept] | None = None
        self._leaving: list[tuple[StreamEvent, tuple[Tensor, Tensor]]] = []
        self._arriving: list[_Returning] = []

    def put(self, index: int, hidden: Tensor, encoder: Tensor) -> _Kept:
        """See ``Boundaries``."""
        outward, inward = self._lanes(hidden.device)
        self._settle(outward)
        for returning in self._arriving:  # of a backward pass that was broken off
            inward.wait(returning.ready)
        self._arriving.clear()
        kept = _Kept(index, hidden.device, self._before(index))
        self._last = weakref.ref(kept)
        tensors = (hidden.detach(), encoder.detach())
        if index >= self._first_kept:
            kept.here = tensors
            return kept
        kept.layout = BufferLayout.of(tensors)
        piece = kept.away = self._pool.take(kept.layout.nbytes)
        kept.give_back = weakref.finalize(kept, self._pool.give, piece)
        after = [outward.compute(), piece.free]
        for view, tensor in zip(kept.layout.views(piece.flat), tensors, strict=True):
            kept.left = outward.copy(view, tensor, after=after)
        # Until the compute has waited for the copy, their memory must not be given to anything else.
        self._leaving.append((kept.left, tensors))
        return kept

    def get(self, index: int, kept: _Kept) -> tuple[Tensor, Tensor]:
        """See ``Boundaries``."""
        outward, inward = self._lanes(kept.device)
        self._settle(outward)
        tensors = kept.here
        if tensors is None:
            if kept.returning is None:
                self.stalls += 1
                self._bring_back(kept, inward)
            returning = kept.returning
            if returning is None:
                raise RuntimeError(f"the boundary of block {index} was fetched before, and is gone")
            inward.wait(returning.ready)
            self._arriving = [other for other in self._arriving if other is not returning]
            hidden, encoder = kept.layout.views(returning.flat)
            tensors = hidden, encoder
        if kept.before is not None:
            self._bring_back(kept.before, inward)
        kept.here = kept.returning = kept.before = None
        return tensors

    def remove(self) -> None:
        """See ``Boundaries``."""
        if self._outward is not None and self._inward is not None:
            for mark, _ in self._leaving:
                self._outward.finish(mark)
            # Their buffers go back to the allocator with this object, and must not be written to after that.
            for returning in self._arriving:
                self._inward.finish(returning.ready)
        self._leaving.clear()
        self._arriving.clear()

    def _bring_back(self, kept: _Kept, inward: CopyStream) -> None:
        """Begin to copy a boundary to the device, unless it is there, on its way or gone."""
        piece, kept.away = kept.away, None
        if piece is None:
            return
        flat = device_buffer(kept.layout.nbytes, kept.device, "offload buffers")
        # The buffer may be memory that queued compute still uses for something else.
        after = [kept.left, inward.compute()]
        piece.free = inward.copy(flat, piece.flat[: kept.layout.nbytes], after=after)
        kept.returning = _Returning(flat, piece.free)
        self._arriving.append(kept.returning)
        kept.give_back()

    def _settle(self, outward: CopyStream) -> None:
        """Let the compute wait for what is leaving, and then let go of it."""
        for mark, _ in self._leaving:
            outward.wait(mark)
        self._leaving.clear()

    def _before(self, index: int) -> _Kept | None:
        last = None if self._last is None else self._last()
        return last if last is not None and last.index == index - 1 else None

    def _lanes(self, device: torch.device) -> tuple[CopyStream, CopyStream]:
        if self._outward is None:
            self._outward = copy_stream(device)
        if self._inward is None:
            self._inward = copy_stream(device)
        return self._outward, self._inward
