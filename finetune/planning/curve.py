"""From pieces to figures: how much is held at each moment, the peak, and what it is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from finetune.planning.ledger import Piece

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
    name: str, pieces: Sequence[Piece], begin: int, end: int, marks: Mapping[str, int], *, note: str = ""
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
    device: Sequence[Piece], series: Mapping[str, np.ndarray], total: np.ndarray, begin: int, length: int
) -> dict[str, Point]:
    highest: dict[str, int] = {}
    for piece in device:
        if piece.born > begin:  # what is highest in a station is so just after something was allocated there
            station = ", ".join(piece.where.split(", ")[:2])
            at = piece.born - begin
            if station not in highest or total[at] > total[highest[station]]:
                highest[station] = at
    return {station: _point(series, at, length) for station, at in highest.items()}


def _describe(piece: Piece) -> str:
    op = (
        piece.op.removeprefix("aten.").removesuffix(".default").replace("_for_cpu", "").strip("_")
    )  # it stands for a GPU's
    return f"{piece.where} ({op})" if piece.where else op


def rank_of(part: str) -> tuple[int, str]:
    """Sorting key of a part's name; see ``ORDER``."""
    return (ORDER.index(part), "") if part in ORDER else (ORDER.index(TRANSIENT) - 3, part)


def _series(pieces: Iterable[Piece], begin: int, end: int) -> dict[str, np.ndarray]:
    deltas: defaultdict[str, np.ndarray] = defaultdict(lambda: np.zeros(end - begin + 2, dtype=np.int64))
    for piece in pieces:
        delta = deltas[piece.what or TRANSIENT]
        delta[max(piece.born - begin, 0)] += piece.nbytes
        delta[min(piece.died - begin, end - begin + 1)] -= piece.nbytes
    return {part: deltas[part].cumsum()[:-1] for part in sorted(deltas, key=rank_of)}


def _point(series: Mapping[str, np.ndarray], at: int, length: int) -> Point:
    return Point(round(at / length, 6), {part: int(held[at]) for part, held in series.items() if held[at]})


def _highest(pieces: Sequence[Piece], begin: int, end: int) -> Point:
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
