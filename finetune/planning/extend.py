"""From two short models to a long one: what a phase holds is linear in the number of blocks, station by station.

Blocks are alike. So what is held while, say, the last block but one runs backward grows by the same bytes with every
block that the model has more, and what is held at a block in between lies between the first ones and the last ones. The
highest station may be another one in the long model than in the short ones, which is why each is extended by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from finetune.planning.curve import TRANSIENT, Phase, Point

SHORT = (5, 6)
"""Layers of the two short models: two blocks at either end, which techniques may treat apart, at least one between them
that keeps the ends from each other's treatment, and what one more adds."""


@dataclass(frozen=True)
class Extended:
    """The peak of a phase of a model that was not rehearsed itself."""

    parts: Mapping[str, int]
    """Of the peak, in bytes."""
    where: str
    pinned: int
    """Bytes of page-locked host memory."""
    pageable: int
    """Bytes of other host memory."""
    note: str = ""
    """See ``Phase``."""

    @property
    def nbytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    def more(self, parts: Mapping[str, int], *, pinned: int = 0) -> Extended:
        """With so many bytes more in some parts, and of pinned memory."""
        together = {part: self.parts.get(part, 0) + parts.get(part, 0) for part in dict.fromkeys([*self.parts, *parts])}
        return replace(self, parts=together, pinned=self.pinned + pinned)


def extend(
    short: Phase, longer: Phase, layers: int, changed: Callable[[Mapping[str, int]], Mapping[str, int]] = dict
) -> Extended:
    """The peak with ``layers`` blocks.

    Args:
        short: the phase with ``SHORT[0]`` blocks.
        longer: the same with ``SHORT[1]``.
        layers: of the whole model, at least ``SHORT[1]``.
        changed: what becomes of the parts that are held at a station, before the highest is chosen.
    """
    few, more = SHORT
    best, where = Point(0.0, {}), ""
    for station, point in longer.stations.items():
        twin, named = _counterpart(station, layers)
        start = None if twin is None else short.stations.get(twin)
        if start is not None:
            found = Point(point.at, changed(_line(start.parts, point.parts, (layers - few) / (more - few))))
            if found.nbytes > best.nbytes:
                best, where = found, named
    steps = (layers - few) / (more - few)
    return Extended(
        parts=best.parts,
        where=where,
        pinned=_along(short.pinned.nbytes, longer.pinned.nbytes, steps),
        pageable=_along(short.pageable.nbytes, longer.pageable.nbytes, steps),
        note=longer.note,
    )


def _counterpart(station: str, layers: int) -> tuple[str | None, str]:
    """What a station of the longer model is called in the shorter one (None: it has no such), and in the whole."""
    few, more = SHORT
    found = re.fullmatch(r"(.*block) (\d+) of \d+", station)
    if found is None:
        return station, station
    number = int(found[2])
    if number < few // 2:
        return f"{found[1]} {number} of {few}", f"{found[1]} {number} of {layers}"
    from_end = more - 1 - number
    if from_end < few // 2:
        return f"{found[1]} {few - 1 - from_end} of {few}", f"{found[1]} {layers - 1 - from_end} of {layers}"
    return None, station


def _line(start: Mapping[str, int], end: Mapping[str, int], steps: float) -> dict[str, int]:
    parts = {part: _along(start.get(part, 0), end.get(part, 0), steps) for part in dict.fromkeys([*end, *start])}
    # Where the two name the same bytes differently, one part falls as another rises; together they are right.
    excess = sum(nbytes for nbytes in parts.values() if nbytes < 0)
    parts[TRANSIENT] = parts.get(TRANSIENT, 0) + excess
    return {part: nbytes for part, nbytes in parts.items() if nbytes > 0}


def _along(start: int, end: int, steps: float) -> int:
    return round(start + (end - start) * steps)
