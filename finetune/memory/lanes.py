"""Copies between host and device that run beside the compute.

A ``Lane`` is the only place that knows streams and events. Techniques say what a copy must wait for and what must wait
for the copy, in marks; on a CPU every copy is done at once and marks are empty, through the same calls.

Three rules keep the host, the compute and the lanes apart; ``tests/actors.py`` watches them:

- What a lane writes is read by the compute after ``wait``, by the host after ``finish``.
- What a lane reads or writes is overwritten by another lane or the compute only in the order of marks, and by the host
  only after ``finish``: whoever writes to weights on the host does it inside ``blocks.rewriting_weights``.
- What a lane reads or writes is not freed before somebody has waited for it: the lane holds it until then.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Mark = Any
"""A point in the order of queued work, on a lane or on the compute; None for one that has passed already."""


class Lane:
    """A queue of copies, run in the order in which they were queued. This one does each at once, for a CPU."""

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[Mark] = ()) -> Mark:
        """Queue ``target.copy_(source)``. ``source`` must stay unchanged until the copy is done.

        Args:
            target: same shape and dtype as ``source``.
            source: what to copy.
            after: what the copy waits for, besides earlier copies on this lane.

        Returns:
            The end of the copy.
        """
        target.copy_(source)
        return None

    def compute(self) -> Mark:
        """The end of everything that is queued on the compute so far."""
        return None

    def wait(self, mark: Mark) -> None:
        """Let the compute that is queued from here on wait for ``mark``."""

    def finish(self, mark: Mark) -> None:
        """Wait here, on the host, for ``mark``."""

    def passed(self, mark: Mark) -> bool:
        """Whether ``mark`` lies in the past."""
        return True


class CudaLane(Lane):
    """A lane on a stream of its own.

    Args:
        device: the CUDA device; the compute is what is current there when a method is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[Mark, Tensor, Tensor]] = deque()
        # The host's updates have a thread of their own, which waits for copies that the main thread queues.
        self._lock = threading.Lock()
        # The allocator knows nothing of this stream: freed under a copy, as by a model that is dropped in the middle of
        # a pass, a buffer would be given to somebody else and then written to.
        weakref.finalize(self, _drain, self._under_way).atexit = False

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[Mark] = ()) -> Mark:
        """See ``Lane``. With pageable memory on the host, this returns when the copy is done."""
        for mark in after:
            if mark is not None:
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        mark = self._stream.record_event()
        with self._lock:
            self._under_way.append((mark, target, source))
        return mark

    def compute(self) -> Mark:
        """See ``Lane``."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        """See ``Lane``."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)
            self._let_go(mark)

    def finish(self, mark: Mark) -> None:
        """See ``Lane``."""
        if mark is not None:
            mark.synchronize()
            self._let_go(mark)

    def passed(self, mark: Mark) -> bool:
        """See ``Lane``."""
        return mark is None or bool(mark.query())

    def _let_go(self, mark: Mark) -> None:
        """Of what was copied up to ``mark``, a copy of this lane or another point in time."""
        with self._lock:
            if any(mark is end for end, *_ in self._under_way):
                while self._under_way.popleft()[0] is not mark:
                    pass


def _drain(under_way: deque[tuple[Mark, Tensor, Tensor]]) -> None:
    """Wait for a lane's last copy, and let go of what it copied; a device that has failed copies no more."""
    with suppress(RuntimeError):
        if under_way:
            under_way[-1][0].synchronize()
    under_way.clear()


def lane_to(device: torch.device) -> Lane:
    """A lane for copies between the host and ``device``."""
    return CudaLane(device) if device.type == "cuda" else Lane()
