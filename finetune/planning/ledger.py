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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune.memory.places import label_of, working_for

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
class Piece:
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

    def later(self, ticks: int) -> Piece:
        """The same, by so many ticks later; for tens of thousands, and so without ``dataclasses.replace``."""
        born, died = self.born + ticks, self.died + ticks
        return Piece(self.nbytes, born, self.where, self.op, self.what, self.host, self.pinned, died)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enter it inside a ``FakeTensorMode``, or alone over real CPU tensors.

    Storages without a label of ``memory.places`` are taken to be on the device.

    Args:
        scalar: what reading a number off a tensor gives; None really reads it, which a fake tensor cannot.
    """

    def __init__(self, scalar: float | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pieces: list[Piece] = []
        self.where = ""
        """What runs now; written into the pieces made meanwhile."""
        self._scalar = scalar
        self._tick = 0
        self._live: dict[int, tuple[weakref.ref[Any], Piece, int]] = {}
        self._young: list[tuple[weakref.ref[Any], Piece]] = []
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
        piece = Piece(-(-nbytes // ALIGNMENT) * ALIGNMENT, self._tick, self.where, str(op))
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
        self.pieces.append(Piece(nbytes, self._tick - 1, self.where, op, what=what, died=self._tick))

    @staticmethod
    def _read_label(storage: torch.UntypedStorage | None, piece: Piece) -> None:
        label = None if storage is None else label_of(storage)
        if label is not None:
            piece.what, piece.host, piece.pinned = label.what, label.host, label.pinned

    def name(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of ``tensors`` are for; a label of ``memory.places`` goes before."""
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

    def piece_of(self, tensor: Tensor) -> Piece | None:
        """What was entered for the storage of ``tensor``."""
        self._settle()
        known = self._live.get(tensor.untyped_storage()._cdata)
        return None if known is None else known[1]

    def enter_again(self, pieces: Sequence[Piece], ticks: int, kept: Mapping[int, Tensor]) -> None:
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

    def _alive(self) -> Iterator[Piece]:
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
