"""The large buffers of memory techniques, and the copies between host and device that run beside the compute.

A technique asks here for host and device memory, lays many tensors into one flat buffer so that they travel as one
copy, and copies explicitly. Every buffer is labelled, for the planner: it runs the same code on fake CPU tensors, and
tells host from device, and what each byte is for, by the labels. No technique reads them.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from finetune.core.errors import TrainingError


@dataclass(frozen=True)
class BufferLabel:
    """What a storage is for, and where it is."""

    what: str
    """Such as ``streaming ring``."""
    host: bool
    pinned: bool = False
    """Page-locked: the device copies from it while it computes."""


_labels: WeakIdKeyDictionary = WeakIdKeyDictionary()

_working: ContextVar[BufferLabel | None] = ContextVar("working_for", default=None)


def label_buffer(tensor: Tensor, what: str, *, host: bool = False, pinned: bool = False) -> Tensor:
    """Register the storage of ``tensor``; it is returned."""
    _labels[tensor.untyped_storage()] = BufferLabel(what, host, pinned)
    return tensor


def label_of(storage: torch.UntypedStorage) -> BufferLabel | None:
    """What a storage was registered as; None for one that no technique made."""
    label: BufferLabel | None = _labels.get(storage)  # type: ignore[no-untyped-call]
    return label


@contextmanager
def host_work(what: str) -> Iterator[None]:
    """Around work that is done on the host: what it allocates and has no label of its own is host memory for ``what``.

    It changes nothing but what ``working_for`` says.
    """
    before = _working.set(BufferLabel(what, host=True))
    try:
        yield
    finally:
        _working.reset(before)


def working_for() -> BufferLabel | None:
    """What memory allocated right now is for, where that is known."""
    return _working.get()


def host_buffer(nbytes: int, *, pinned: bool, what: str) -> Tensor:
    """A flat uint8 buffer on the host.

    Args:
        nbytes: its size.
        pinned: page-locked, where there is a GPU. A host that refuses gives pageable memory, with a warning: the result
            is the same, and copies wait for each other.
        what: what it is for.
    """
    # Asked for even where no GPU is: the planner counts what a run would pin.
    if pinned and torch.cuda.is_available():
        try:
            return label_buffer(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), what, host=True, pinned=True)
        except RuntimeError as error:
            warnings.warn(
                f"{nbytes / 2**30:.2f} GiB of host memory cannot be pinned for {what} ({error}); using pageable memory,"
                " which the GPU cannot copy while it computes. `ulimit -l` and the container's limits decide.",
                stacklevel=2,
            )
            pinned = False
    return label_buffer(torch.empty(nbytes, dtype=torch.uint8), what, host=True, pinned=pinned)


def device_buffer(nbytes: int, device: torch.device, what: str) -> Tensor:
    """A flat uint8 buffer on ``device``."""
    return label_buffer(torch.empty(nbytes, dtype=torch.uint8, device=device), what)


# ------------------------------------------------------------------------------------- many tensors in one flat buffer

ALIGNMENT = 256
"""Bytes: what CUDA's own allocations are aligned to, and what kernels with vector loads rely on."""

LARGEST_CHUNK = 2**31
"""Bytes: ``flat_buffers`` makes no allocation that is larger, unless one buffer is."""


@dataclass(frozen=True)
class TensorSlot:
    """Where in a flat buffer one tensor lies."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class BufferLayout:
    """Where in a flat buffer tensors lie, whatever their dtypes; equal for blocks that are formed alike."""

    slots: tuple[TensorSlot, ...]
    nbytes: int
    """Of the whole, a multiple of ``ALIGNMENT``."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> BufferLayout:
        """One after the other, each contiguous and aligned."""
        slots, end = [], 0
        for tensor in tensors:
            nbytes = prod(tensor.shape) * tensor.element_size()
            slots.append(TensorSlot(end, nbytes, tensor.dtype, tensor.shape))
            end += _aligned(nbytes)
        return cls(tuple(slots), end)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in ``flat``, uint8 of at least ``nbytes``; they share its memory."""
        return [flat[slot.offset : slot.offset + slot.nbytes].view(slot.dtype).view(slot.shape) for slot in self.slots]


def flat_buffers(sizes: Sequence[int], *, pinned: bool, what: str) -> Iterator[Tensor]:
    """Flat uint8 host buffers, cut from few allocations, each of which is made when its first buffer is asked for.

    torch rounds an allocation of pinned memory up to a power of two: one of 10.4 GiB would take 16, and 252 MiB each
    take 256. So neighbours share allocations in the way that rounds up least.

    Args:
        sizes: of the buffers, in bytes, in order.
        pinned: see ``host_buffer``.
        what: see ``host_buffer``.
    """
    aligned = [_aligned(size) for size in sizes]
    for first, last in _shared_allocations(aligned):
        buffer, begin = host_buffer(sum(aligned[first:last]), pinned=pinned, what=what), 0
        for size, taken in zip(sizes[first:last], aligned[first:last], strict=True):
            yield buffer[begin : begin + size]
            begin += taken


def _shared_allocations(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts ``sizes`` into runs ``[first, last)`` with the least sum of their totals, rounded up to powers of two."""
    # Best way to cut the first n sizes: bytes, number of allocations, where the last one begins.
    best: list[tuple[int, int, int]] = [(0, 0, 0)]
    for last in range(1, len(sizes) + 1):
        total, ways = 0, []
        for first in range(last - 1, -1, -1):
            total += sizes[first]
            if total > LARGEST_CHUNK and first < last - 1:
                break
            ways.append((best[first][0] + rounded(total), best[first][1] + 1, first))
        best.append(min(ways))
    runs, end = [], len(sizes)
    while end:
        runs.append((best[end][2], end))
        end = best[end][2]
    return runs[::-1]


def rounded(nbytes: int) -> int:
    """The power of two that torch's allocator of pinned memory makes of a size."""
    return 1 << max(nbytes - 1, 0).bit_length()


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


# --------------------------------------------------------------------------------------- copies that run beside compute
#
# A copy stream is the only place that knows CUDA's streams and events. Techniques say what a copy must wait for and
# what must wait for the copy, in events; on a CPU every copy is done at once and events are None, through the same
# calls.
#
# Three rules keep the host, the compute and the copy streams apart; ``tests/actors.py`` watches them:
#
# - What a copy writes is read by the compute after ``wait``, by the host after ``finish``.
# - What a copy reads or writes is overwritten by another stream only in the order of events, and by the host only after
#   ``finish``: whoever writes to weights on the host does it inside ``runner.rewriting_weights``.
# - What a copy reads or writes is not freed before somebody has waited for it: the copy stream holds it until then.

StreamEvent = Any
"""A point in the order of queued work, on a copy stream or on the compute; None for one that has passed already."""


class CopyStream:
    """A queue of copies, run in the order in which they were queued. This one does each at once, for a CPU."""

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[StreamEvent] = ()) -> StreamEvent:
        """Queue ``target.copy_(source)``. ``source`` must stay unchanged until the copy is done.

        Args:
            target: same shape and dtype as ``source``.
            source: what to copy.
            after: what the copy waits for, besides earlier copies on this stream.

        Returns:
            The end of the copy.
        """
        target.copy_(source)
        return None

    def compute(self) -> StreamEvent:
        """The end of everything that is queued on the compute so far."""
        return None

    def wait(self, event: StreamEvent) -> None:
        """Let the compute that is queued from here on wait for ``event``."""

    def finish(self, event: StreamEvent) -> None:
        """Wait here, on the host, for ``event``."""


class CudaCopyStream(CopyStream):
    """Copies on a CUDA stream of their own; with pageable memory on the host, each returns when it is done.

    Args:
        device: the CUDA device; the compute is what is current there when a method is called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._under_way: deque[tuple[StreamEvent, Tensor, Tensor]] = deque()
        # The host's updates have a thread of their own, which waits for copies that the main thread queues.
        self._lock = threading.Lock()
        # The allocator knows nothing of this stream: freed under a copy, as by a model that is dropped in the middle of
        # a pass, a buffer would be given to somebody else and then written to.
        weakref.finalize(self, _drain, self._under_way).atexit = False

    def copy(self, target: Tensor, source: Tensor, *, after: Iterable[StreamEvent] = ()) -> StreamEvent:
        for event in after:
            if event is not None:
                self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        end = self._stream.record_event()
        with self._lock:
            self._under_way.append((end, target, source))
        return end

    def compute(self) -> StreamEvent:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: StreamEvent) -> None:
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            self._let_go(event)

    def finish(self, event: StreamEvent) -> None:
        if event is not None:
            event.synchronize()
            self._let_go(event)

    def _let_go(self, event: StreamEvent) -> None:
        """Of what was copied up to ``event``, a copy of this stream or another point in time."""
        with self._lock:
            if any(event is end for end, *_ in self._under_way):
                while self._under_way.popleft()[0] is not event:
                    pass


def _drain(under_way: deque[tuple[StreamEvent, Tensor, Tensor]]) -> None:
    """Wait for a stream's last copy, and let go of what it copied; a device that has failed copies no more."""
    with suppress(RuntimeError):
        if under_way:
            under_way[-1][0].synchronize()
    under_way.clear()


def copy_stream(device: torch.device) -> CopyStream:
    """A stream for copies between the host and ``device``."""
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream()


# --------------------------------------------------------- tensors that stay where they are when their module is moved


def pin_to_host(module: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let ``module.to(...)`` and the like pass over these parameters and buffers; the rest moves as usual.

    Whatever prepares a model calls ``model.to(device)`` on the whole of it, and so would bring to the device what a
    technique keeps on the host. A change of dtype raises TrainingError: left undone without a word, it would be a model
    of two dtypes.
    """
    pinned = {id(tensor) for tensor in tensors}
    original: Callable[..., nn.Module] = type(module)._apply

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        def passing_over(tensor: Tensor) -> Tensor:
            if id(tensor) not in pinned:
                return fn(tensor)
            # Buffers of a block are codes and scales, which no cast is meant for.
            if isinstance(tensor, nn.Parameter) and fn(torch.empty(0, dtype=tensor.dtype)).dtype != tensor.dtype:
                raise TrainingError(
                    "the dtype of weights that are kept on the host cannot be changed",
                    where="memory",
                    fix="convert the model before MemoryConfig.apply",
                )
            return tensor.data if isinstance(tensor, nn.Parameter) else tensor

        return original(module, passing_over, recurse)

    untyped: Any = module
    untyped._apply = apply


def unpin_from_host(module: nn.Module) -> None:
    """Undo ``pin_to_host``."""
    module.__dict__.pop("_apply", None)
