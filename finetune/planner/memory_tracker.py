"""What the allocator would hold, operation by operation: every storage from the operation that makes it to its end.

A ``Ledger`` watches PyTorch's operations and keeps weak references to the storages that they return. It asks nothing of
a tensor but its size, so it works on fake tensors, which have no memory, exactly as on real ones.

What operations allocate and free within themselves is not seen. Where that matters it is written down here:

- The backward pass of fused attention (flash and cuDNN alike) adds up the queries' gradient in float32.
- Autograd adds two gradients in place where nobody else holds the first. It does not while a mode watches, so that the
  sum seems to need a third tensor: such an addition is entered after what dies in it.

Left out: cuBLAS' and cuDNN's workspaces, which are part of the fixed overhead that is added to a peak for the matrix
products of a transformer, but are not bounded for the VAE's convolutions; and fragmentation.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.memory.host_buffers import label_of, working_for

ALIGNMENT = 512
"""Bytes that PyTorch's CUDA allocator rounds every request up to."""

_aten = torch.ops.aten

_VIEWS = frozenset(
    {
        _aten.view.default,
        _aten.t.default,
        _aten.detach.default,
        _aten.alias.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.squeeze.dim,
        _aten.expand.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.unbind.int,
        _aten.permute.default,
        _aten._unsafe_view.default,
        _aten.as_strided.default,
        _aten.copy_.default,
    }
)
"""Operations that make no storage, and are most of all operations: the ledger looks away."""

_ATTENTION_BACKWARD = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _aten._scaled_dot_product_flash_attention_backward.default,
        _aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)

_ADD = _aten.add.Tensor

_DEVICE = torch.ops.prim.device.default

CPU = torch.device("cpu")
"""Where fake tensors are, whatever they stand for."""


@dataclass(slots=True)
class Allocation:
    """One storage: how large, from when to when, where, and what for."""

    nbytes: int
    """As the allocator counts them."""
    born: int
    """Tick of its allocation; ticks count allocations and ends."""
    where: str
    """What ran."""
    op: str
    what: str = ""
    """Empty until somebody names it."""
    host: bool = False
    pinned: bool = False
    died: int = sys.maxsize
    """Tick of its end."""

    def later(self, ticks: int) -> Allocation:
        """The same, by so many ticks later; for tens of thousands, and so without ``dataclasses.replace``."""
        born, died = self.born + ticks, self.died + ticks
        return Allocation(self.nbytes, born, self.where, self.op, self.what, self.host, self.pinned, died)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it inside a ``FakeTensorMode``, or alone over real CPU tensors.

    Storages without a label of ``memory.host_buffers`` are taken to be on the device.

    Args:
        scalar: what reading a number off a tensor gives; None really reads it, which a fake tensor cannot.
    """

    def __init__(self, scalar: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pieces: list[Allocation] = []
        self.where = ""
        """What runs now; written into the pieces made meanwhile."""
        self._scalar = scalar
        self._tick = 0
        self._live: dict[int, tuple[weakref.ref[Any], Allocation, int]] = {}
        self._young: list[tuple[weakref.ref[Any], Allocation]] = []
        self._sum: tuple[torch.UntypedStorage, str] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in here, and the wrapper that would see to it costs as much as the ledger.
        return False

    @property
    def tick(self) -> int:
        """Now."""
        self._settle()
        return self._tick

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and enter what it made."""
        if func is _DEVICE:  # most of all calls, and there is one device
            return CPU
        if self._young or self._sum is not None:
            self._settle()
        if self._scalar is not None and func is _aten._local_scalar_dense.default:
            return self._scalar
        output = func(*args, **(kwargs or {}))
        if func in _VIEWS:
            return output
        if func is _ADD and _called_by_autograd():
            storage = output.untyped_storage()
            if args[0].untyped_storage().nbytes() == storage.nbytes():
                self._sum = (storage, "sum of gradients")
                return output
        if isinstance(output, Tensor):
            self._see(output.untyped_storage(), func)
        elif output is not None:
            for leaf in tree_leaves(output):
                if isinstance(leaf, Tensor):
                    self._see(leaf.untyped_storage(), func)
        if func in _ATTENTION_BACKWARD:
            self._passing(attention_workspace(args[1]), "attention workspace", str(func))
        return output

    def _settle(self) -> None:
        """Enter a sum of gradients after the ends of its terms; read labels that were given since the last look."""
        if self._sum is not None:
            (storage, name), self._sum = self._sum, None
            self._enter(storage, name)
        for reference, piece in self._young:
            self._read_label(reference(), piece)
        self._young.clear()

    def _see(self, storage: torch.UntypedStorage, func: Any) -> None:
        known = self._live.get(storage._cdata)
        if known is None:
            self._enter(storage, func)
        elif known[2] != storage.nbytes():  # resized in place
            self._end(storage._cdata)
            self._enter(storage, func)

    def _enter(self, storage: torch.UntypedStorage, op: Any) -> None:
        nbytes = storage.nbytes()
        if nbytes == 0:
            return
        key = storage._cdata
        self._tick += 1
        piece = Allocation(-(-nbytes // ALIGNMENT) * ALIGNMENT, self._tick, self.where, str(op))
        if (label := working_for()) is not None:
            piece.what, piece.host = label.what, label.host
        reference = weakref.ref(storage, lambda _: self._end(key))
        self._live[key] = (reference, piece, nbytes)
        self._young.append((reference, piece))
        self.pieces.append(piece)

    def _end(self, key: int) -> None:
        _, piece, _ = self._live.pop(key)
        self._tick += 1
        piece.died = self._tick

    def _passing(self, nbytes: int, what: str, op: str) -> None:
        self._tick += 2
        self.pieces.append(Allocation(nbytes, self._tick - 1, self.where, op, what=what, died=self._tick))

    @staticmethod
    def _read_label(storage: torch.UntypedStorage | None, piece: Allocation) -> None:
        label = None if storage is None else label_of(storage)
        if label is not None:
            piece.what, piece.host, piece.pinned = label.what, label.host, label.pinned

    def name(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of ``tensors`` are for; a label of ``memory.host_buffers`` goes before."""
        self._settle()
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage.nbytes():
                self._enter(storage, "made elsewhere")
                self._settle()
            if (known := self._live.get(storage._cdata)) is not None and label_of(storage) is None:
                known[1].what = what

    def name_since(self, tick: int, what: str) -> None:
        """Say what everything is for that was made after ``tick``, is alive, and has no name yet."""
        for piece in self._alive():
            if piece.born > tick and not piece.what:
                piece.what = what

    def read_labels(self) -> None:
        """Look again at the labels of everything alive: a technique may label a tensor long after it was made."""
        self._settle()
        for reference, piece, _ in list(self._live.values()):
            self._read_label(reference(), piece)

    def piece_of(self, tensor: Tensor) -> Allocation | None:
        """What was entered for the storage of ``tensor``."""
        self._settle()
        known = self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def enter_again(self, pieces: Sequence[Allocation], ticks: int, kept: Mapping[int, Tensor]) -> None:
        """Enter, from now on, what a run made that is not run again.

        Args:
            pieces: of the run, with ticks from its begin.
            ticks: how many it lasted.
            kept: tensors that stand for what the run left behind, by the numbers of their pieces; just made.
        """
        begin = self.tick
        for number, piece in enumerate(pieces):
            if number not in kept:
                self.pieces.append(piece.later(begin))
            elif (own := self.piece_of(kept[number])) is not None:
                own.nbytes, own.born, own.where, own.op = piece.nbytes, begin + piece.born, piece.where, piece.op
        self._tick = begin + ticks

    def _alive(self) -> Iterator[Allocation]:
        self._settle()
        yield from (piece for _, piece, _ in list(self._live.values()))


def _called_by_autograd() -> bool:
    """Whether the engine itself calls, and no Python code that it runs: so it does to add up gradients."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith("eval_frame.py"):  # wrappers of torch's
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def attention_workspace(query: Tensor) -> int:
    """Bytes of the queries' gradient in float32, rows padded to whole tiles, and of one float32 per row.

    Args:
        query: [B, heads, S, head dimension].
    """
    batch, heads, rows, width = query.shape
    padded = -(-rows // 128) * 128
    elements = batch * heads * padded * (-(-width // 32) * 32)
    return 4 * elements + 4 * batch * heads * padded


# -------- What of a transformer runs at the moment, in words, for the figures of a rehearsal.

_PARTS = {"attn1": "attention", "ff": "feed-forward", "norm1": "modulation", "norm2": "modulation"}


class ModuleTracker:
    """Keeps ``ledger.where`` up to date; see ``following``."""

    def __init__(self, ledger: MemoryTracker) -> None:
        self._ledger = ledger
        self._pass = self._block = self._part = ""

    def enter(self, name: str) -> None:
        """A pass begins, such as ``backward``."""
        self._pass, self._block, self._part = name, "", ""
        self._say()

    def block(self, number: int, count: int) -> None:
        """The pass has come to a block."""
        self._block, self._part = f"block {number} of {count}", ""
        self._say()

    def part(self, name: str) -> None:
        """It has come to a part of the block, or left it (an empty name)."""
        self._part = name
        self._say()

    def _say(self) -> None:
        self._ledger.where = ", ".join(word for word in (self._pass, self._block, self._part) if word)


@contextmanager
def following(ledger: MemoryTracker, transformer: nn.Module) -> Iterator[ModuleTracker]:
    """Hooks on ``transformer`` that tell where a pass is, also a backward pass; they change nothing."""
    here = ModuleTracker(ledger)
    blocks = list(transformer.get_submodule("transformer_blocks").children())
    handles = []
    for number, block in enumerate(blocks):
        handles += _follow_block(here, block, number, len(blocks))
    try:
        yield here
    finally:
        for handle in handles:
            handle.remove()


def _follow_block(here: ModuleTracker, block: nn.Module, number: int, count: int) -> list[Any]:
    def backward_begins(gradient: Tensor) -> None:
        here.block(number, count)

    def ends(_module: nn.Module, _inputs: object, output: Any) -> None:
        here.part("")
        if torch.is_grad_enabled():
            # The first gradient that reaches a block's output is the first sign of its backward pass.
            for tensor in output if isinstance(output, tuple) else (output,):
                if tensor.requires_grad:
                    tensor.register_hook(backward_begins)

    handles = [block.register_forward_pre_hook(lambda *_: here.block(number, count)), block.register_forward_hook(ends)]
    for name, part in block.named_children():
        if name in _PARTS:
            handles.append(part.register_forward_pre_hook(lambda *_, said=_PARTS[name]: here.part(said)))
            handles.append(part.register_forward_hook(lambda *_: here.part("")))
    return handles


# -------- From pieces to figures: how much is held at each moment, the peak, and what it is made of.

TRANSIENT = "block transient"
"""What nobody has named: it comes and goes within one block's passes, or within an encoder's."""

ORDER = (
    "frozen weights",
    "trainable weights",
    "master copies",
    "optimizer state",
    "moving average",
    "VAE weights",
    "text encoder weights",
    "streaming ring",
    "gradients",
    "batch",
    "saved activations",
    "offload buffers",
    TRANSIENT,
    "attention workspace",
)
"""Parts in the order in which they are stacked and listed: what stays first. Others come before the last three."""


@dataclass(frozen=True)
class Point:
    """What is held at one moment, in bytes by part."""

    at: float
    """Share of the phase's allocations and ends that lie before it, 0 to 1."""
    parts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Span:
    """A named stretch of a phase, such as ``backward``, as shares of its allocations and ends."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Phase:
    """One part of a run: its peak, and the way there."""

    name: str
    peak: Point
    """Of device memory."""
    where: str
    """What ran at the peak."""
    pinned: Point
    """Of page-locked host memory, at its own peak."""
    pageable: Point
    """Of other host memory that techniques ask for, at its own peak."""
    curve: tuple[Point, ...]
    spans: tuple[Span, ...]
    stations: Mapping[str, Point]
    """The highest moment of each station: a pass, or in a pass a block, such as ``backward, block 3 of 42``."""
    note: str = ""
    """A decision that the phase was rehearsed under, such as tiling."""


def measure(
    name: str, pieces: Sequence[Allocation], begin: int, end: int, marks: Mapping[str, int], *, note: str = ""
) -> Phase:
    """The figures of one phase.

    Args:
        name: of the phase.
        pieces: of a ledger.
        begin: tick at which the phase begins; what is alive then counts.
        end: its last tick.
        marks: names of its spans and the ticks at which they begin, in order.
        note: see ``Phase``.
    """
    held = [piece for piece in pieces if piece.born <= end and piece.died > begin]
    device = [piece for piece in held if not piece.host]
    series = _series(device, begin, end)
    total = _together(series, end - begin + 1)
    top = int(total.argmax())
    maker = max((piece for piece in device if piece.born <= begin + top), key=lambda p: p.born, default=None)
    length = max(end - begin, 1)
    edges = [(name, (tick - begin) / length) for name, tick in marks.items()]
    spans = [Span(n, a, b) for (n, a), (_, b) in zip(edges, [*edges, ("", 1.0)][1:], strict=True)]
    return Phase(
        name=name,
        peak=_point(series, top, length),
        where="" if maker is None else _describe(maker),
        pinned=_highest([piece for piece in held if piece.host and piece.pinned], begin, end),
        pageable=_highest([piece for piece in held if piece.host and not piece.pinned], begin, end),
        curve=tuple(_point(series, at, length) for at in _telling(total, keep=top)),
        spans=tuple(spans),
        stations=_stations(device, series, total, begin, length),
        note=note,
    )


def _stations(
    device: Sequence[Allocation], series: Mapping[str, np.ndarray], total: np.ndarray, begin: int, length: int
) -> dict[str, Point]:
    highest: dict[str, int] = {}
    for piece in device:
        if piece.born > begin:  # what is highest in a station is so just after something was allocated there
            station = ", ".join(piece.where.split(", ")[:2])
            at = piece.born - begin
            if station not in highest or total[at] > total[highest[station]]:
                highest[station] = at
    return {station: _point(series, at, length) for station, at in highest.items()}


def _describe(piece: Allocation) -> str:
    op = (
        piece.op.removeprefix("aten.").removesuffix(".default").replace("_for_cpu", "").strip("_")
    )  # it stands for a GPU's
    return f"{piece.where} ({op})" if piece.where else op


def rank_of(part: str) -> tuple[int, str]:
    """Sorting key of a part's name; see ``ORDER``."""
    return (ORDER.index(part), "") if part in ORDER else (ORDER.index(TRANSIENT) - 3, part)


def _series(pieces: Iterable[Allocation], begin: int, end: int) -> dict[str, np.ndarray]:
    deltas: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(end - begin + 2, dtype=np.int64))
    for piece in pieces:
        delta = deltas[piece.what or TRANSIENT]
        delta[max(piece.born - begin, 0)] += piece.nbytes
        delta[min(piece.died - begin, end - begin + 1)] -= piece.nbytes
    return {part: deltas[part].cumsum()[:-1] for part in sorted(deltas, key=rank_of)}


def _point(series: Mapping[str, np.ndarray], at: int, length: int) -> Point:
    return Point(round(at / length, 6), {part: int(held[at]) for part, held in series.items() if held[at]})


def _highest(pieces: Sequence[Allocation], begin: int, end: int) -> Point:
    series = _series(pieces, begin, end)
    if not series:
        return Point(0.0, {})
    return _point(series, int(_together(series, end - begin + 1).argmax()), max(end - begin, 1))


def _together(series: Mapping[str, np.ndarray], length: int) -> np.ndarray:
    total = np.zeros(length, dtype=np.int64)
    for held in series.values():
        total += held
    return total


_POINTS = 400


def _telling(total: np.ndarray, *, keep: int) -> list[int]:
    """At most some hundred moments that show the curve: of every stretch its highest and its lowest, and the peak."""
    edges = np.linspace(0, len(total), _POINTS // 2 + 1).astype(int)
    chosen = {0, keep, len(total) - 1}
    for first, last in pairwise(edges):
        if last > first:
            chosen |= {first + int(total[first:last].argmax()), first + int(total[first:last].argmin())}
    return sorted(int(at) for at in chosen)
