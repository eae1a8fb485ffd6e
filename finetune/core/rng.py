"""Randomness has an address, not a history.

Every random number of a run is drawn from ``generator(seed, *path)``, a generator that depends on its arguments alone.
Nothing accumulates, so a resumed run needs no generator state, validation cannot disturb training, and the split of
an optimizer step over processes and micro-batches does not change what a sample sees.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PathPart = int | str


def seed_for(seed: int, *path: PathPart) -> int:
    """A 56-bit integer that depends only on its arguments (blake2b of their text)."""
    digest = hashlib.blake2b(repr((seed, *path)).encode("utf-8"), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def generator(seed: int, *path: PathPart) -> torch.Generator:
    """A CPU generator for one purpose, such as ``generator(seed, "noise", step, index)``.

    It lives on the CPU also in GPU runs: a seed then means the same run on every device.
    """
    import torch  # here, so that a configuration is read without it

    return torch.Generator("cpu").manual_seed(seed_for(seed, *path))


def permutation(size: int, seed: int, *path: PathPart) -> list[int]:
    """The numbers below ``size`` in an order drawn for one purpose."""
    import torch

    order: list[int] = torch.randperm(size, generator=generator(seed, *path)).tolist()
    return order
