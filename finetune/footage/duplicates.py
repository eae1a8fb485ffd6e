"""Clips that look like another one, found by the perceptual hashes of their frames."""

from __future__ import annotations

from collections.abc import Sequence
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
    if not places:
        return
    places.sort()
    clips = [np.asarray(sources[source][1][number].hashes, np.uint64) for _, source, number in places]
    index = _FrameIndex(clips, limit)
    originals = np.zeros(len(clips), bool)
    for place, (_, source, number) in enumerate(places):
        others = [other for other in index.clips_near(clips[place]) if other < place and originals[other]]
        distances = [_distance(clips[place], clips[other]) for other in others]
        if not distances or min(distances) > limit:
            originals[place] = True
            continue
        bits = min(distances)
        _, first, span_number = places[others[distances.index(bits)]]
        name, spans = sources[first]
        detail = f"{name} at {spans[span_number].start_s:.3f} s"
        sources[source][1][number] = sources[source][1][number].dropped("duplicate", bits, limit, detail)


def _distance(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> float:
    """Bits in which each frame of a clip differs from the nearest of another, on average, or the other way round."""
    bits = np.bitwise_count(hashes[:, None] ^ others)
    return float(max(bits.min(axis=1).mean(), bits.min(axis=0).mean()))


_PARTS, _PART_BITS = 4, 16
"""A hash is looked up by its parts."""

_MOST_FLIPPED = 2
"""Bits of a part that are tried; there are 137 ways to change up to two of 16, and 697 to change three."""


class _FrameIndex:
    """Which clips have a frame that is nearly one of some frames, without comparing all frames with all.

    Where two clips differ in at most ``limit`` bits a frame on average, so do two of their frames at the least, and of
    the four parts of these two one differs in a quarter of that (multi-index hashing, Norouzi et al. 2012).
    """

    def __init__(self, clips: Sequence[NDArray[np.uint64]], limit: float) -> None:
        self._limit = limit
        self._hashes = np.concatenate(clips)
        self._owners = np.repeat(np.arange(len(clips)), [len(hashes) for hashes in clips])
        most = int(limit) // _PARTS
        self._ways: NDArray[np.int64] | None = None
        if most <= _MOST_FLIPPED:
            flipped = (bits for count in range(most + 1) for bits in combinations(range(_PART_BITS), count))
            self._ways = np.asarray([sum(1 << bit for bit in bits) for bits in flipped])
        # Of each part: its frames ordered by its value, and where each value begins.
        self._orders: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for part in _parts_of(self._hashes):
            order = np.argsort(part, kind="stable")
            self._orders.append((order, np.searchsorted(part[order], np.arange(2**_PART_BITS + 1))))

    def clips_near(self, hashes: NDArray[np.uint64]) -> list[int]:
        """Numbers of the clips that have a frame within the limit of one of these, ascending."""
        if self._ways is None:
            return list(range(int(self._owners[-1]) + 1))
        owners = []
        for (order, starts), part in zip(self._orders, _parts_of(hashes), strict=True):
            values = (part[:, None] ^ self._ways).reshape(-1)
            first, counts = starts[values], starts[values + 1] - starts[values]
            # Every position of every range, end to end.
            ends = np.cumsum(counts)
            positions = np.arange(ends[-1]) + np.repeat(first - ends + counts, counts)
            frames = order[positions]
            wanted = np.repeat(np.repeat(hashes, len(self._ways)), counts)
            owners.append(self._owners[frames[np.bitwise_count(self._hashes[frames] ^ wanted) <= self._limit]])
        return list(map(int, np.unique(np.concatenate(owners))))


def _parts_of(hashes: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """The values of each part of some hashes."""
    shifts = (np.uint64(_PART_BITS * part) for part in range(_PARTS))
    return [(hashes >> shift).astype(np.int64) & (2**_PART_BITS - 1) for shift in shifts]
