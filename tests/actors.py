"""The host, the compute and the lanes of a GPU as three kinds of actors, each with what it knows of the others.

No GPU is needed to find a missing wait. While ``Actors`` is entered, tensors made by techniques as host memory, and
work inside ``places.host_work``, are the host's; everything else is queued on the device, on the stream that is
current. An actor has a clock of what it has done, and knows of the others what it was told: a stream what the host knew
when it queued the work and what it waited for, the host what it waited for, a worker thread what was known when it was
given its task. Two operations of different actors on the same bytes, one of which writes, must be ordered by that;
otherwise they are a race, whichever comes first this time. What a lane copies is not there before somebody waits for
it, so that a reader whom nothing here sees reads NaN.

In ``CudaLane`` the streams and events of ``torch.cuda`` are replaced, and it is what is used: the lane itself is under
test.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from finetune.memory.host_buffers import CudaCopyStream, label_of, working_for

Clock = dict[str, int]
"""Per actor, up to which of its operations is known to be done."""
_READ_BY_THE_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"}
"""Operations whose result is a number of the host's or a shape: it waits for them."""


class RaceError(AssertionError):
    """Two actors touch the same memory, and nothing says which comes first."""


@dataclass(eq=False)
class Actor:
    """Something that does one thing after the other: a thread of the host, or a stream."""

    name: str
    clock: Clock = field(default_factory=dict)

    def act(self) -> None:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1

    def knows(self, other: str, at: int) -> bool:
        return other == self.name or self.clock.get(other, 0) >= at


@dataclass(eq=False)
class Event:
    """What takes the place of ``torch.cuda.Event``."""

    actors: Actors
    clock: Clock

    def synchronize(self) -> None:
        self.actors.learn(self.actors.host, self.clock)


@dataclass(eq=False)
class Stream(Actor):
    """What takes the place of ``torch.cuda.Stream``."""

    actors: Any = None

    def record_event(self) -> Event:
        return Event(self.actors, self.known())

    def known(self) -> Clock:
        """What its next work comes after: what it waited for, and what the thread knows that queues it. What another
        thread knew that queued work before says nothing: which of them comes first is chance.
        """
        clock = dict(self.clock)
        merge(clock, self.actors.host.clock)
        return clock

    def wait_event(self, event: Event) -> None:
        self.actors.learn(self, event.clock)


@dataclass
class _Memory:
    """One storage, and who touched which of its bytes last, and when."""

    alive: StorageWeakRef
    host: bool
    actors: set[str] = field(default_factory=set)
    touched: dict[tuple[int, int, bool, str], int] = field(default_factory=dict)
    """(first, last, whether written, by whom) -> the time of that actor's clock."""


@dataclass
class _Copy:
    """What a stream of its own writes, until somebody has waited for it."""

    stream: str
    number: int
    alive: StorageWeakRef
    address: int
    content: Tensor


class Actors(TorchDispatchMode):
    """Watches everything that runs while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._raced = False
        self.host = Actor("host")
        """The thread of the host that works now."""
        self.compute = Stream("compute", actors=self)
        self._current = self.compute
        self._streams = 0
        self._memory: dict[int, _Memory] = {}
        self._lent: dict[tuple[str, int], tuple[StorageWeakRef, int]] = {}
        """(lane, storage) -> since when, of the device's memory that lanes use: its allocator does not know of them."""
        self._copies: list[_Copy] = []
        self.copies: Clock = {}
        """By stream, how many there were."""
        self.threads = 0
        self.waits = 0
        """How often the host waited for what the device had still to do: more than a program says, and races would hide
        behind them."""
        self._queued = False
        """Whether the compute was given work since the host last waited for it."""

    # ------------------------------------------------------------------------------------- what takes torch's place

    def __enter__(self) -> Actors:
        patch = self._patch = pytest.MonkeyPatch()
        own = {"Stream": self._stream, "stream": self._on, "current_stream": lambda _: self._current}
        cuda = SimpleNamespace(**(vars(torch.cuda) | own))
        patch.setattr("finetune.memory.host_buffers.torch", SimpleNamespace(**(vars(torch) | {"cuda": cuda})))
        for module in (
            "memory.block_streaming",
            "memory.activation_offload",
            "parallel.gradient_release",
        ):
            patch.setattr(f"finetune.{module}.copy_stream", CudaCopyStream)
        for module in ("memory.gradient_offload", "datasets.dataloader"):
            patch.setattr(f"finetune.{module}.ThreadPoolExecutor", lambda *_, **__: _Pool(self))
        for name in ("tolist", "numpy"):  # which pass by the dispatcher
            patch.setattr(Tensor, name, self._read_directly(getattr(Tensor, name)))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()
        if not self._raced:
            self.require_nothing_freed()

    def copied(self, lane: Any) -> int:
        """How many copies a lane made."""
        return self.copies.get(lane._stream.name, 0)

    def _stream(self, device: object) -> Stream:
        self._streams += 1
        return Stream(f"lane {self._streams}", actors=self)

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def _read_directly(self, read: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def watched(tensor: Tensor) -> Any:
            memory = self._of(tensor)
            if not memory.host:
                self._host_waits()
            self.host.act()
            self._touch(self.host, memory, tensor, False, read.__name__)
            return read(tensor)

        return watched

    # --------------------------------------------------------------------------------------------------- what happens

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_view(func):
            return func(*args, **kwargs)
        name, touches = func._schema.name, _touches_memory(func)
        if name == "aten::lift_fresh" and _host_works():  # what Python's numbers become, in the host's own work
            self._of(args[0], host=True)
        given = [(self._of(tensor), tensor, writes) for tensor, writes in _arguments(func, args, kwargs)]
        here = [memory.host for memory, _, _ in given]
        by_host = all(here) if given else _host_works()
        if (
            any(here) and name != "aten::copy_"
        ):  # a library's own tables, such as bitsandbytes', go with the host's work
            by_host = by_host or _host_works()
        actor = self.host if by_host else self._current
        if touches:
            # CUDA allows numbers of the host in the device's work, and nothing else of the host's.
            if not by_host and name != "aten::copy_" and any(memory.host and t.dim() for memory, t, _ in given):
                raise self._race(f"{name} mixes host and device: {[tuple(tensor.shape) for _, tensor, _ in given]}")
            actor.act()
            self._queued = self._queued or (actor is self.compute and name not in _READ_BY_THE_HOST)
            for memory, tensor, writes in given:
                self._touch(actor, memory, tensor, writes, name)
        queued = name == "aten::copy_" and self._current is not self.compute
        output = self._copied(args[0], args[1]) if queued else func(*args, **kwargs)
        number = name == "aten::lift_fresh"  # what Python's numbers become
        for tensor in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            host = by_host or (number and isinstance(tensor, Tensor) and tensor.dim() == 0)
            # Memory that is only allocated may get its label after this.
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and (touches or host):
                memory = self._of(tensor, host=host)
                if touches:
                    self._touch(actor, memory, tensor, True, name)
        if not by_host and (name in _READ_BY_THE_HOST or (any(here) and _blocks(name, args, kwargs))):
            self._host_waits()
        return output

    def _host_waits(self) -> None:
        self.waits += self._queued
        self._queued = False
        self.learn(self.host, self._current.known())

    def _race(self, what: str) -> RaceError:
        self._raced = True  # the operation was not done: what follows from that is no second race
        return RaceError(what)

    def _of(self, tensor: Tensor, *, host: bool = False) -> _Memory:
        """What is known of a tensor's storage; of one not seen before, where it is: as it is labelled, or ``host``."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        memory = self._memory.get(key)
        if memory is None or memory.alive.expired():  # type: ignore[no-untyped-call]
            # While a weak reference to it is held, no other storage gets this one's address.
            label = label_of(storage)
            memory = _Memory(StorageWeakRef(storage), host if label is None else label.host)
            self._memory[key] = memory
        return memory

    def _touch(self, actor: Actor, memory: _Memory, tensor: Tensor, writes: bool, what: str) -> None:
        if not tensor.numel():
            return
        first, last = _span(tensor)
        memory.actors.add(actor.name)
        for (begin, end, wrote, other), at in memory.touched.items() if len(memory.actors) > 1 else ():
            if begin < last and first < end and (writes or wrote) and not self._comes_after(actor, other, at):
                does, did = ("writes" if writes else "reads"), ("writes" if wrote else "reads")
                raise self._race(f"{actor.name}: {what} {does} memory that {other} {did}, without having waited for it")
        at = memory.touched[first, last, writes, actor.name] = actor.clock[actor.name]
        if isinstance(actor, Stream) and actor is not self.compute and not memory.host:
            self._lent[actor.name, id(memory)] = memory.alive, at

    def _comes_after(self, actor: Actor, other: str, at: int) -> bool:
        return actor.knows(other, at) or self.host.knows(other, at)  # the thread that queues it

    def require_nothing_freed(self) -> None:
        """Raise if memory was freed that a lane uses, as far as the compute and the host know up to here."""
        for (stream, key), (alive, at) in list(self._lent.items()):
            if self.compute.knows(stream, at) or self.host.knows(stream, at):
                del self._lent[stream, key]
            elif alive.expired():  # type: ignore[no-untyped-call]
                raise self._race(f"memory of {stream} was freed before anybody waited for it")

    def learn(self, actor: Actor, clock: Clock) -> None:
        """``actor`` waits for ``clock``: what was copied up to it is there."""
        self.require_nothing_freed()
        left = []
        for copy in self._copies:
            if copy.number > clock.get(copy.stream, 0):
                left.append(copy)
            elif not copy.alive.expired():  # type: ignore[no-untyped-call]
                ctypes.memmove(copy.address, copy.content.data_ptr(), copy.content.numel())
        self._copies = left
        merge(actor.clock, clock)

    def _copied(self, target: Tensor, source: Tensor) -> Tensor:
        stream = self._current
        self.copies[stream.name] = self.copies.get(stream.name, 0) + 1
        with _disable_current_modes():
            assert target.shape == source.shape and target.dtype == source.dtype and target.is_contiguous()
            self._arrive(stream, source)
            content = source.contiguous().reshape(-1).view(torch.uint8).clone()
            ctypes.memset(target.data_ptr(), 0xFF, content.numel())
            alive = StorageWeakRef(target.untyped_storage())
            self._copies.append(_Copy(stream.name, stream.clock[stream.name], alive, target.data_ptr(), content))
        return target

    def _arrive(self, stream: Stream, source: Tensor) -> None:
        """Earlier copies of the same stream are done when a later one reads what they wrote."""
        for copy in self._copies:
            if copy.stream == stream.name and copy.address == source.data_ptr():
                ctypes.memmove(copy.address, copy.content.data_ptr(), copy.content.numel())


class _Pool:
    """What takes the place of a pool of one thread. Tasks are done at once, by an actor of their own: what it does is
    ordered with what others do by what it knows, not by when it happens to be done.
    """

    def __init__(self, actors: Actors) -> None:
        self._actors = actors
        actors.threads += 1
        self._thread = Actor(f"thread {actors.threads}")

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        actors, caller, task = self._actors, self._actors.host, Task(self._actors)
        merge(self._thread.clock, caller.clock)
        actors.host = self._thread
        try:
            task.set_result(work(*arguments))
        except Exception as error:
            task.set_exception(error)
        finally:
            task.clock = dict(self._thread.clock)
            actors.host = caller
        return task

    def shutdown(self, *_: Any, **__: Any) -> None:
        """Nothing is left to do."""


class Task(Future[Any]):
    def __init__(self, actors: Actors) -> None:
        super().__init__()
        self._actors = actors
        self.clock: Clock = {}

    def result(self, timeout: float | None = None) -> Any:
        self._actors.learn(self._actors.host, self.clock)
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> Any:
        self._actors.learn(self._actors.host, self.clock)
        return super().exception(timeout)


@contextmanager
def holding_nothing() -> Iterator[None]:
    """For canaries: lanes do not hold what they copy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.memory.host_buffers.deque", lambda: SimpleNamespace(append=lambda _: None))
        patch.setattr("finetune.memory.host_buffers._drain", lambda _: None)
        patch.setattr(CudaCopyStream, "_let_go", lambda *_: None)
        yield


def merge(clock: Clock, other: Clock) -> None:
    for name, at in other.items():
        if at > clock.get(name, 0):
            clock[name] = at


def _span(tensor: Tensor) -> tuple[int, int]:
    """Bytes [first, last) of its storage between which a tensor's elements lie."""
    size = tensor.element_size()
    first = tensor.storage_offset() * size
    if tensor.is_contiguous():
        return first, first + tensor.numel() * size
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * size


def _host_works() -> bool:
    label = working_for()
    return label is not None and label.host


def _blocks(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return name == "aten::copy_" and not (args[2] if len(args) > 2 else kwargs.get("non_blocking"))


@cache
def _touches_memory(func: Any) -> bool:
    """Whether an operation reads or writes elements: neither views nor uninitialised memory do."""
    return not _is_view(func) and not func.__name__.startswith(("empty", "new_empty", "lift_fresh", "_to_copy.meta"))


@cache
def _is_view(func: Any) -> bool:
    """Whether what an operation returns is its arguments' own memory, and nothing else happens."""
    if func._schema.name == "aten::lift_fresh":  # a number that is new to the host
        return False
    views = [r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns]
    return bool(views) and all(views)


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    for position, name, writes in _signature(func):
        given = args[position] if position < len(args) else kwargs.get(name)
        for tensor in given if isinstance(given, list | tuple) else (given,):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu":
                yield tensor, writes


@cache
def _signature(func: Any) -> list[tuple[int, str, bool]]:
    """Place and name of an operation's arguments that are tensors, and whether it writes to them."""
    return [
        (position, a.name, a.alias_info is not None and a.alias_info.is_write)
        for position, a in enumerate(func._schema.arguments)
        if "Tensor" in str(a.type)
    ]
