"""Splitting micro-batches: fewer clips in the model at a time, for the same step.

The gradient of a step is a sum over its clips, so the parts of a micro-batch may go through the model one after the
other. What is equal: which clips, timesteps, noise and weights; each clip's loss and the gradient up to the order of
summation, that is to rounding. What is not: LoRA's dropout draws a mask of its own for every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from finetune.types import Batch


def parts(batch: Batch, clips: int | None) -> Iterator[Batch]:
    """Cut a micro-batch into parts of at most ``clips`` clips, in order; views, not copies.

    Args:
        batch: [B, ...].
        clips: None for the whole at once.
    """
    size = len(batch.slots)
    step = size if clips is None else clips
    for first in range(0, size, step):
        yield _rows(batch, slice(first, min(first + step, size)))


def _rows(batch: Batch, rows: slice) -> Batch:
    image: Tensor | None = batch.image_latents
    return replace(
        batch,
        latents=batch.latents[rows],
        noise=batch.noise[rows],
        timesteps=batch.timesteps[rows],
        prompt_embeds=batch.prompt_embeds[rows],
        image_latents=None if image is None else image[rows],
        slots=batch.slots[rows],
        clips=batch.clips[rows],
    )
