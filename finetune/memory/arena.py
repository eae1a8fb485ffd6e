"""Many tensors in one flat buffer, and many flat buffers in few allocations.

A block's tensors travel as one copy if they lie in one buffer, in the same places on the host and on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from finetune.memory.places import host_buffer

ALIGNMENT = 256
"""Bytes: what CUDA's own allocations are aligned to, and what kernels with vector loads rely on."""
LARGEST_CHUNK = 2**31
"""Bytes: an allocation of an arena is not larger, unless one piece is."""


@dataclass(frozen=True)
class _Place:
    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Layout:
    """Where in a flat buffer tensors lie, whatever their dtypes; equal for blocks that are formed alike."""

    places: tuple[_Place, ...]
    nbytes: int
    """Of the whole, a multiple of ``ALIGNMENT``."""

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Layout:
        """One after the other, each contiguous and aligned."""
        places, end = [], 0
        for tensor in tensors:
            nbytes = prod(tensor.shape) * tensor.element_size()
            places.append(_Place(end, nbytes, tensor.dtype, tensor.shape))
            end += -(-nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(places), end)

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors in ``flat``, uint8 of at least ``nbytes``; they share its memory."""
        return [
            flat[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)
            for place in self.places
        ]


def arena(sizes: Sequence[int], *, pinned: bool, what: str) -> Iterator[Tensor]:
    """Flat uint8 host buffers, cut from few allocations, each of which is made when its first piece is asked for.

    torch rounds an allocation of pinned memory up to a power of two: one of 10.4 GiB would take 16, and 252 MiB each
    take 256. So neighbours share allocations in the way that rounds up least.

    Args:
        sizes: of the pieces, in bytes, in order.
        pinned: see ``places.host_buffer``.
        what: see ``places.host_buffer``.
    """
    aligned = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    for first, last in _chunks(aligned):
        buffer, begin = host_buffer(sum(aligned[first:last]), pinned=pinned, what=what), 0
        for size, taken in zip(sizes[first:last], aligned[first:last], strict=True):
            yield buffer[begin : begin + size]
            begin += taken


def _chunks(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Cuts ``sizes`` into runs ``[first, last)`` with the least sum of their totals, rounded up to powers of two."""
    # Best way to cut the first n pieces: bytes, number of allocations, where the last one begins.
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
