"""Copies between host and device that run beside the compute.

A ``Lane`` is the only place that knows streams and events. Techniques say what a copy must wait for and what must wait
for the copy, in marks; on a CPU every copy is done at once and marks are empty, through the same calls. A test can put
a lane of its own in its place, which delays copies and watches that nothing is touched before its time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Mark = Any
"""A point in the order of queued work, on a lane or on the compute; None for one that has passed already."""


class Lane:
    """A queue of copies, run in the order in which they were queued. This one does each at once, for a CPU."""

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[Mark] = ()) -> Mark:
        """Queue ``target.copy_(source)``. Both must stay alive, and ``source`` unchanged, until the copy is done.

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

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[Mark] = ()) -> Mark:
        """See ``Lane``. With pageable memory on the host, this returns when the copy is done."""
        for mark in after:
            if mark is not None:
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def compute(self) -> Mark:
        """See ``Lane``."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, mark: Mark) -> None:
        """See ``Lane``."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def finish(self, mark: Mark) -> None:
        """See ``Lane``."""
        if mark is not None:
            mark.synchronize()

    def passed(self, mark: Mark) -> bool:
        """See ``Lane``."""
        return mark is None or bool(mark.query())


def lane_to(device: torch.device) -> Lane:
    """A lane for copies between the host and ``device``."""
    return CudaLane(device) if device.type == "cuda" else Lane()
