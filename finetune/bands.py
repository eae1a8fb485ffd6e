"""Timestep bands: the same cut of the noise schedule for the training loss, the held-out loss and every chart.

The loss at a low timestep (little noise, fine detail) and at a high one (almost pure noise, layout) differ
several-fold, so one mean over random timesteps is mostly the luck of the draw. By band, a curve says what is learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BANDS = 4
"""How many bands the schedule is cut into."""


def band_of(timestep: int, num_train_timesteps: int, bands: int = BANDS) -> str:
    """The label of the band that holds ``timestep``, such as ``t000-249``; labels sort in order of time.

    Raises:
        ValueError: for a timestep outside 0 ... ``num_train_timesteps - 1``.
    """
    if not 0 <= timestep < num_train_timesteps:
        raise ValueError(f"timestep {timestep} is not in 0..{num_train_timesteps - 1}")
    index = timestep * bands // num_train_timesteps
    # The first t with t * bands // T == index; ceil, so that bands that do not divide T still tile it.
    first, end = (-(-edge * num_train_timesteps // bands) for edge in (index, index + 1))
    digits = len(str(num_train_timesteps - 1))
    return f"t{first:0{digits}d}-{end - 1:0{digits}d}"


def loss_by_band(
    losses: Sequence[float], timesteps: Sequence[int], num_train_timesteps: int, bands: int = BANDS
) -> dict[str, float]:
    """Mean loss per band, in order of time; a band no sample fell into is absent.

    Args:
        losses: one per sample.
        timesteps: one per sample, in the same order.
        num_train_timesteps: length of the schedule.
        bands: how many bands.
    """
    grouped: dict[str, list[float]] = {}
    for loss, timestep in zip(losses, timesteps, strict=True):
        grouped.setdefault(band_of(timestep, num_train_timesteps, bands), []).append(loss)
    # fsum is exact, so neither the order of samples nor their split over processes moves the last digit.
    return {band: math.fsum(members) / len(members) for band, members in sorted(grouped.items())}
