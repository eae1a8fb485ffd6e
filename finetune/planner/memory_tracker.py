"""What the allocator would hold, operation by operation: every storage from the operation that makes it to its end.

``MemoryTracker`` watches PyTorch's operations and keeps weak references to the storages that they return. It asks
nothing of a tensor but its size, so it works on fake tensors, which have no memory, exactly as on real ones.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from finetune.memory.host_buffers import label_of, working_for

ALIGNMENT = 512
"""Bytes that PyTorch's CUDA allocator rounds every request up to."""

CPU = torch.device("cpu")
"""Where fake tensors are, whatever they stand for."""

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
"""Operations that make no storage: what they return of a tensor that was there before the tracker is not new."""

_ATTENTION_BACKWARD = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        _aten._scaled_dot_product_flash_attention_backward.default,
        _aten._scaled_dot_product_cudnn_attention_backward.default,
    }
)


@dataclass(slots=True)
class Allocation:
    """One storage: how large, from when to when, where, and what for."""

    nbytes: int
    """As the allocator counts them."""
    begin: int
    """Tick at which it is made; ticks count allocations and ends."""
    where: str
    """What ran."""
    op: str
    part: str = ""
    """Of the whole, such as ``gradients``; empty until somebody names it."""
    host: bool = False
    pinned: bool = False
    end: int = sys.maxsize


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it inside a ``FakeTensorMode``, or alone over real CPU tensors.

    Storages without a label of ``memory.host_buffers`` are taken to be on the device.

    Args:
        scalar: what reading a number off a tensor gives; None really reads it, which a fake tensor cannot.
    """

    def __init__(self, scalar: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocations: list[Allocation] = []
        self.where = ""
        """What runs now; written into what is allocated meanwhile."""
        self._scalar = scalar
        self._tick = 0
        self._live: dict[int, tuple[weakref.ref[Any], Allocation, int]] = {}
        """By the storage's address: the storage, its allocation, and its size then."""
        self._new: list[tuple[weakref.ref[Any], Allocation]] = []
        """Whose labels have not been read."""
        self._gradient_sum: torch.UntypedStorage | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled in here, and the wrapper that would see to it costs as much as the tracker.
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
        if func is torch.ops.prim.device.default:  # most of all calls, and there is one device
            return CPU
        self._settle()
        if self._scalar is not None and func is _aten._local_scalar_dense.default:
            return self._scalar
        output = func(*args, **(kwargs or {}))
        if func in _VIEWS:
            return output
        if func is _aten.add.Tensor and _called_by_autograd():
            storage = output.untyped_storage()
            if args[0].untyped_storage().nbytes() == storage.nbytes():
                self._gradient_sum = storage
                return output
        for leaf in [output] if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage(), str(func))
        if func in _ATTENTION_BACKWARD:
            self._hold_briefly(attention_workspace(args[1]), str(func), "attention workspace")
        return output

    def run_once_per_shape(self, module: nn.Module) -> None:
        """Have a call of ``module`` whose inputs have the shapes of an earlier call's only make the outputs, and hold
        for a moment what that call held at its highest. A VAE in tiles makes some fifty calls of five kinds.

        Its outputs must share no memory, and its inputs must outlive the call.
        """
        forward, calls = module.forward, dict[tuple[object, ...], tuple[Any, int, str]]()

        def call(*args: Any, **kwargs: Any) -> Any:
            leaves, form = tree_flatten((args, kwargs))
            kind = (str(form), *(leaf.shape if isinstance(leaf, Tensor) else leaf for leaf in leaves))
            begin, first = self.tick, len(self.allocations)
            if kind in calls:
                makers, nbytes, op = calls[kind]
                output = tree_map_only(partial, lambda make: make(), makers)
                self._hold_briefly(nbytes - sum(made.nbytes for made in self.allocations[first:]), op)
                return output
            output = forward(*args, **kwargs)
            timeline, top, maker = _highest(self.allocations[first:], begin, self.tick)
            makers = tree_map_only(Tensor, lambda made: partial(torch.empty, made.shape, dtype=made.dtype), output)
            calls[kind] = makers, int(timeline.total[top]), "" if maker is None else maker.op
            return output

        module.forward = call

    def _hold_briefly(self, nbytes: int, op: str, part: str = "") -> None:
        self._tick += 2
        self.allocations.append(Allocation(nbytes, self._tick - 1, self.where, op, part, end=self._tick))

    def _settle(self) -> None:
        """Enter a sum of gradients after the ends of its terms; read labels that were given since the last look."""
        if self._gradient_sum is not None:
            storage, self._gradient_sum = self._gradient_sum, None
            self._enter(storage, "sum of gradients")
        for reference, allocation in self._new:
            _read_label(reference(), allocation)
        self._new.clear()

    def _see(self, storage: torch.UntypedStorage, op: str) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and known[2] != storage.nbytes():  # resized in place
            self._end(storage._cdata)
            known = None
        if known is None:
            self._enter(storage, op)

    def _enter(self, storage: torch.UntypedStorage, op: str) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        if nbytes == 0:
            return
        self._tick += 1
        allocation = Allocation(-(-nbytes // ALIGNMENT) * ALIGNMENT, self._tick, self.where, op)
        if (label := working_for()) is not None:
            allocation.part, allocation.host = label.what, label.host
        reference = weakref.ref(storage, lambda _: self._end(key))
        self._live[key] = (reference, allocation, nbytes)
        self._new.append((reference, allocation))
        self.allocations.append(allocation)

    def _end(self, key: int) -> None:
        self._tick += 1
        self._live.pop(key)[1].end = self._tick

    def name(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of ``tensors`` are for; a label of ``memory.host_buffers`` goes before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and storage.nbytes():
                self._enter(storage, "made elsewhere")
            self._settle()
            if (known := self._live.get(storage._cdata)) is not None and label_of(storage) is None:
                known[1].part = part

    def name_since(self, tick: int, part: str) -> None:
        """Say what everything is for that was made after ``tick``, is alive, and has no name yet."""
        self._settle()
        for _, allocation, _ in self._live.values():
            if allocation.begin > tick and not allocation.part:
                allocation.part = part

    def read_labels(self) -> None:
        """Look again at the labels of everything alive: a technique may label a tensor long after it was made."""
        self._settle()
        for storage, allocation, _ in list(self._live.values()):
            _read_label(storage(), allocation)


def _read_label(storage: torch.UntypedStorage | None, allocation: Allocation) -> None:
    if storage is not None and (label := label_of(storage)) is not None:
        allocation.part, allocation.host, allocation.pinned = label.what, label.host, label.pinned


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


# -------------------------------------------------------------------------------------------------------- what runs now

_LAYERS = {"attn1": "attention", "ff": "feed-forward", "norm1": "modulation", "norm2": "modulation"}


class ModuleTracker:
    """Keeps ``tracker.where`` up to date: the pass, the block, and the layer of the block that runs."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker = tracker
        self._words = ["", "", ""]

    def enter(self, name: str) -> None:
        """A pass begins, such as ``backward``."""
        self._set(0, name)

    def _set(self, level: int, word: str) -> None:
        self._words[level:] = [word, "", ""][: 3 - level]
        self._tracker.where = ", ".join(filter(None, self._words))

    @contextmanager
    def watching(self, transformer: nn.Module) -> Iterator[None]:
        """Inside, hooks on the blocks of ``transformer`` tell which one runs, also in a backward pass."""
        blocks = list(transformer.get_submodule("transformer_blocks").children())
        with ExitStack() as hooks:
            for number, block in enumerate(blocks):
                for handle in self._hooks(block, f"block {number} of {len(blocks)}"):
                    hooks.callback(handle.remove)
            yield

    def _hooks(self, block: nn.Module, name: str) -> Iterator[Any]:
        def block_ends(_module: nn.Module, _inputs: object, output: Any) -> None:
            self._set(2, "")
            if torch.is_grad_enabled():
                # The first gradient that reaches a block's output is the first sign of its backward pass.
                for tensor in output if isinstance(output, tuple) else (output,):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda _: self._set(1, name))

        yield block.register_forward_pre_hook(lambda *_: self._set(1, name))
        yield block.register_forward_hook(block_ends)
        for child, layer in block.named_children():
            if child in _LAYERS:
                yield layer.register_forward_pre_hook(lambda *_, word=_LAYERS[child]: self._set(2, word))
                yield layer.register_forward_hook(lambda *_: self._set(2, ""))


# ------------------------------------------------------------------- how much is held at each moment, and of what parts

TRANSIENT = "block transient"
"""What nobody has named: it comes and goes within one block's passes, or within an encoder's."""

_ORDER = (
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


def rank_of(part: str) -> tuple[float, str]:
    """Sorting key of a part: what stays first is stacked and listed first; unknown names follow a batch."""
    return (_ORDER.index(part), "") if part in _ORDER else (_ORDER.index("batch") + 0.5, part)


PhaseName = Literal["text", "encode", "train", "sample", "decode"]

PHASES: Mapping[PhaseName, str] = {
    "text": "T5 pass",
    "encode": "VAE pass",
    "train": "training",
    "sample": "validation sampling",
    "decode": "VAE decode",
}
"""What people call them."""

RUN_PHASES: tuple[PhaseName, ...] = ("train", "sample", "decode")
"""Those with the transformer in memory."""


@dataclass(frozen=True)
class Point:
    """What is held at one moment."""

    at: float
    """Share of the phase's allocations and ends that lie before it, 0 to 1."""
    parts: Mapping[str, int]
    """Bytes by part."""

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Phase:
    """One part of a run: its peak, and the way there."""

    name: str
    peak: Point
    """Of device memory."""
    where: str
    """What ran at the peak."""
    pinned: int = 0
    """Most bytes of page-locked host memory."""
    pageable: int = 0
    """Most bytes of other host memory that techniques ask for."""
    note: str = ""
    """A decision that it was estimated under, such as tiling."""
    stations: Mapping[str, Point] = field(default_factory=dict)
    """The highest moment of each pass, or of each block in a pass, such as ``backward, block 3 of 42``."""
    curve: tuple[Point, ...] = ()
    spans: Mapping[str, float] = field(default_factory=dict)
    """Where in the curve its named stretches begin, such as ``backward``."""


class _Timeline:
    """Bytes by part at each tick of a phase."""

    def __init__(self, allocations: Sequence[Allocation], begin: int, end: int) -> None:
        self._parts = sorted({allocation.part or TRANSIENT for allocation in allocations}, key=rank_of)
        row = {part: number for number, part in enumerate(self._parts)}
        changes = np.zeros((len(row), end - begin + 2), dtype=np.int64)
        for allocation in allocations:
            change = changes[row[allocation.part or TRANSIENT]]
            change[max(allocation.begin - begin, 0)] += allocation.nbytes
            change[min(allocation.end - begin, end - begin + 1)] -= allocation.nbytes
        self._bytes = changes.cumsum(axis=1)[:, :-1]
        self.total = self._bytes.sum(axis=0)

    def parts(self, at: int) -> dict[str, int]:
        return {part: int(nbytes) for part, nbytes in zip(self._parts, self._bytes[:, at], strict=True) if nbytes}


def _highest(allocations: Sequence[Allocation], begin: int, end: int) -> tuple[_Timeline, int, Allocation | None]:
    """What is held from ``begin`` to ``end``, at which tick after ``begin`` the most, and what was made last then."""
    timeline = _Timeline(allocations, begin, end)
    top = int(timeline.total.argmax())
    return timeline, top, max((a for a in allocations if a.begin <= begin + top), key=lambda a: a.begin, default=None)


def measure(
    name: str,
    allocations: Sequence[Allocation],
    begin: int,
    end: int,
    spans: Mapping[str, int] | None = None,
    note: str = "",
) -> Phase:
    """The figures of one phase.

    Args:
        name: of the phase.
        allocations: of a tracker.
        begin: tick at which the phase begins; what is alive then counts.
        end: its last tick.
        spans: names of its stretches and the ticks at which they begin, in order.
        note: see ``Phase``.
    """
    alive = [allocation for allocation in allocations if allocation.begin <= end and allocation.end > begin]
    device = [allocation for allocation in alive if not allocation.host]
    timeline, top, maker = _highest(device, begin, end)
    total, length = timeline.total, max(end - begin, 1)
    highest: dict[str, int] = {}
    for allocation in device:
        if allocation.begin > begin:  # what is highest in a station is so just after something was allocated there
            station, at = ", ".join(allocation.where.split(", ")[:2]), allocation.begin - begin
            if station not in highest or total[at] > total[highest[station]]:
                highest[station] = at

    def point(at: int) -> Point:
        return Point(round(at / length, 6), timeline.parts(at))

    def host_peak(*, pinned: bool) -> int:
        return int(_Timeline([a for a in alive if a.host and a.pinned == pinned], begin, end).total.max())

    return Phase(
        name,
        peak=point(top),
        where="" if maker is None else _describe(maker),
        pinned=host_peak(pinned=True),
        pageable=host_peak(pinned=False),
        note=note,
        stations={station: point(at) for station, at in highest.items()},
        curve=tuple(point(at) for at in _curve_ticks(total, top)),
        spans={name: (tick - begin) / length for name, tick in (spans or {}).items()},
    )


def _describe(allocation: Allocation) -> str:
    op = allocation.op.removeprefix("aten.").removesuffix(".default")
    op = op.replace("_for_cpu", "").strip("_")  # it stands for a GPU's
    return f"{allocation.where} ({op})" if allocation.where else op


def _curve_ticks(total: np.ndarray, top: int, points: int = 400) -> list[int]:
    """At most so many ticks that show a curve: of every stretch its highest and its lowest, and the peak."""
    edges = np.linspace(0, len(total), points // 2 + 1).astype(int)
    chosen = {0, top, len(total) - 1}
    for first, last in pairwise(edges):
        if last > first:
            chosen |= {int(first + total[first:last].argmax()), int(first + total[first:last].argmin())}
    return sorted(chosen)
