"""Clips that look like another one, found by the perceptual hashes of their frames."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from finetune.footage.filters import Span


def drop_duplicates(sources: Sequence[tuple[str, list[Span]]], limit: float | None) -> None:
    """Drop clips that look like another one, in place. Of two the one with more pixels is kept, then the first.

    Every sample of a clip is compared with the nearest of the other's, both ways: a clip that begins a little later, or
    was cut from another version, is found as well.

    Args:
        sources: name and spans of every source.
        limit: ``Limits.duplicate_bits``.
    """
    if limit is None:
        return
    places = [
        (-span.plan.crop[2] * span.plan.crop[3], source, number)
        for source, (_, spans) in enumerate(sources)
        for number, span in enumerate(spans)
        if span.plan is not None and span.hashes
    ]
    index = _HashIndex(limit)
    originals: list[tuple[int, int]] = []
    for _, source, number in sorted(places):
        span = sources[source][1][number]
        hashes = np.asarray(span.hashes, np.uint64)
        nearest = index.nearest(hashes)
        if nearest is None:
            index.add(hashes)
            originals.append((source, number))
            continue
        original, bits = nearest
        name, spans = sources[originals[original][0]]
        detail = f"{name} at {spans[originals[original][1]].start_s:.3f} s"
        sources[source][1][number] = span.dropped("duplicate", bits, limit, detail)


_PARTS, _PART_BITS = 4, 16
"""A hash is looked up by its parts."""

_MOST_FLIPPED = 2
"""Bits of a part that are tried; there are 137 ways to change up to two of 16, and 697 to change three."""


class _HashIndex:
    """Clips by their frames' hashes; those that are nearly a clip's are found without looking at all others.

    Where two clips differ in at most ``limit`` bits a frame on average, so do two of their frames at the least, and of
    the four parts of these two one differs in a quarter of that (multi-index hashing, Norouzi et al. 2012).
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        most = int(limit) // _PARTS
        self._ways: NDArray[np.int64] | None = None
        if most <= _MOST_FLIPPED:
            flipped = (bits for count in range(most + 1) for bits in combinations(range(_PART_BITS), count))
            self._ways = np.asarray([sum(1 << bit for bit in bits) for bits in flipped])
        self._members: list[dict[int, list[int]]] = [defaultdict(list) for _ in range(_PARTS)]
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, hashes: NDArray[np.uint64]) -> None:
        """Add a clip; its number is how many there were."""
        for members, parts in zip(self._members, _parts_of(hashes), strict=True):
            for part in parts.tolist():
                members[part].append(len(self._hashes))
        self._hashes.append(hashes)

    def nearest(self, hashes: NDArray[np.uint64]) -> tuple[int, float] | None:
        """The clip that differs least, the first of several, and in how many bits; None where all differ in more."""
        best: tuple[int, float] | None = None
        for number in self._candidates(hashes):
            bits = np.bitwise_count(hashes[:, None] ^ self._hashes[number])
            distance = float(max(bits.min(axis=1).mean(), bits.min(axis=0).mean()))
            if distance <= self._limit and (best is None or distance < best[1]):
                best = number, distance
        return best

    def _candidates(self, hashes: NDArray[np.uint64]) -> Iterable[int]:
        if self._ways is None:
            return range(len(self._hashes))
        found: set[int] = set()
        for members, parts in zip(self._members, _parts_of(hashes), strict=True):
            for key in (parts[:, None] ^ self._ways).reshape(-1).tolist():
                found.update(members.get(key, ()))
        return sorted(found)


def _parts_of(hashes: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """The different values of each part of some hashes."""
    return [
        np.unique((hashes >> np.uint64(_PART_BITS * part)).astype(np.int64) & (2**_PART_BITS - 1))
        for part in range(_PARTS)
    ]
