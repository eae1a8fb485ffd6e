"""A lane whose copies come as late as they may, and a watch over who touches what memory before its time.

No GPU is needed to find a missing wait: every queued operation, of the compute and of each lane, is a point on that
queue's clock, and marks carry clocks from one queue to another. Two operations of different queues on the same bytes,
of which at least one writes, must be ordered by marks; otherwise they are a race, whichever comes first this time.
What a copy should have written is not there before somebody waits for it: until then its target is filled with NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from finetune.memory.lanes import Lane

Clock = dict[str, int]
"""Per queue, up to which of its operations is known to be done."""


class RaceError(AssertionError):
    """Two queues touch the same memory, and nothing says which comes first."""


def span(tensor: Tensor) -> tuple[int, int]:
    """Addresses [first, last) of a tensor's elements."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@dataclass
class Copy:
    lane: str
    number: int
    target: tuple[int, int]
    source: tuple[int, int]
    alive: tuple[StorageWeakRef, StorageWeakRef]
    bytes: Tensor | None
    """What is to be written; None once it is."""


class Timeline(TorchDispatchMode):
    """Everything that runs while this mode is entered is the compute; lanes are made by ``lane``."""

    def __init__(self) -> None:
        super().__init__()
        self.compute: Clock = {}
        self.now = 0
        self.copies: list[Copy] = []
        self.numbers: Clock = {}
        self.touched: dict[tuple[int, int], list[int]] = {}
        """Addresses -> when the compute last read and last wrote them."""
        self.operations = 0

    def lane(self, name: str) -> WatchedLane:
        self.numbers[name] = 0
        return WatchedLane(self, name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _touches_memory(func):
            self.now += 1
            self.operations += 1
            self._no_pending_memory_freed()
            for tensor, writes in _arguments(func, args, kwargs):
                self._touch(span(tensor), writes, str(func))
        output = func(*args, **kwargs)
        if _touches_memory(func):
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    self._touch(span(tensor), True, str(func))
        return output

    def _touch(self, addresses: tuple[int, int], writes: bool, who: str) -> None:
        for copy in self.copies:
            if copy.number > self.compute.get(copy.lane, 0) and (
                overlap(copy.target, addresses) or (writes and overlap(copy.source, addresses))
            ):
                raise RaceError(f"{who} touches memory of copy {copy.number} on lane {copy.lane} without waiting")
        times = self.touched.setdefault(addresses, [0, 0])
        times[writes] = self.now

    def _no_pending_memory_freed(self) -> None:
        for copy in self.copies:
            if copy.number > self.compute.get(copy.lane, 0) and any(storage.expired() for storage in copy.alive):
                raise RaceError(f"memory of copy {copy.number} on lane {copy.lane} was freed before its time")

    def known(self, clock: Clock) -> None:
        """The compute waits for ``clock``: copies up to it have happened."""
        self._no_pending_memory_freed()
        self.happen(clock)
        merge(self.compute, clock)
        self.copies = [copy for copy in self.copies if copy.number > self.compute.get(copy.lane, 0)]

    def happen(self, clock: Clock) -> None:
        for copy in self.copies:
            if copy.number <= clock.get(copy.lane, 0) and copy.bytes is not None:
                ctypes.memmove(copy.target[0], copy.bytes.data_ptr(), copy.bytes.numel())
                copy.bytes = None


class WatchedLane(Lane):
    """A lane of a ``Timeline``."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.timeline = timeline
        self.name = name
        self.clock: Clock = {}

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[Any] = ()) -> Clock:
        line = self.timeline
        assert target.shape == source.shape and target.dtype == source.dtype
        for mark in after:
            merge(self.clock, mark or {})
        with _disable_current_modes():
            line.happen(self.clock)
            self._check(span(target), span(source))
            line.numbers[self.name] += 1
            self.clock[self.name] = line.numbers[self.name]
            alive = StorageWeakRef(target.untyped_storage()), StorageWeakRef(source.untyped_storage())
            flat = source.contiguous().reshape(-1).view(torch.uint8).clone()
            assert target.is_contiguous()
            ctypes.memset(target.data_ptr(), 0xFF, flat.numel())
            line.copies.append(Copy(self.name, self.clock[self.name], span(target), span(source), alive, flat))
        return dict(self.clock)

    def _check(self, target: tuple[int, int], source: tuple[int, int]) -> None:
        for addresses, (read, wrote) in self.timeline.touched.items():
            knows = self.clock.get("compute", 0)
            if (overlap(addresses, target) and max(read, wrote) > knows) or (
                overlap(addresses, source) and wrote > knows
            ):
                raise RaceError(f"lane {self.name} does not wait for the compute that uses this memory")
        for copy in self.timeline.copies:
            late = copy.lane != self.name and copy.number > self.clock.get(copy.lane, 0)
            if late and (overlap(copy.target, target) or overlap(copy.target, source) or overlap(copy.source, target)):
                raise RaceError(f"lane {self.name} does not wait for lane {copy.lane}")

    def compute(self) -> Clock:
        return {**self.timeline.compute, "compute": self.timeline.now}

    def wait(self, mark: Any) -> None:
        with _disable_current_modes():
            self.timeline.known(mark or {})

    finish = wait

    def passed(self, mark: Any) -> bool:
        return all(self.timeline.compute.get(name, 0) >= at for name, at in (mark or {}).items() if name != "compute")


@contextmanager
def careless(lane: Lane, method: str) -> Iterator[None]:
    """For canaries: ``lane`` forgets to do what ``method`` says, ``wait``, ``compute`` or ``after``."""
    if method == "after":
        copy = lane.copy
        lane.copy = lambda target, source, *, after=(): copy(target, source)  # type: ignore[method-assign]
        name = "copy"
    else:
        setattr(lane, method, lambda *_: None)
        name = method
    yield
    delattr(lane, name)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def merge(clock: Clock, other: Clock) -> None:
    for name, at in other.items():
        clock[name] = max(clock.get(name, 0), at)


@cache
def _touches_memory(func: Any) -> bool:
    """Whether an operation reads or writes elements: neither views nor uninitialised memory do."""
    if func.__name__.startswith(("empty", "new_empty", "detach", "_to_copy.meta")):
        return False
    returns = func._schema.returns
    views = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
    return not (views and all(views))


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    for position, argument in enumerate(func._schema.arguments):
        given = args[position] if position < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu":
                yield tensor, writes
