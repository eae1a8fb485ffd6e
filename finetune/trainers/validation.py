"""Held-out loss at fixed clips, timesteps and noise, measured without touching a bit of the training state.

Nothing here draws a random number: the loop hands in ready batches, so two evaluations of the same weights give the same
number, and a difference between two numbers is a difference between weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from finetune.bands import loss_by_band
from finetune.geometry import BucketField
from finetune.section import Strict
from finetune.types import Batch


class SamplePrompt(Strict):
    """One video to sample: what for, from which image, with which noise."""

    prompt: str
    """The text to sample for, as it stands: caption prefix, suffix and trigger word are not added."""
    image: Path | None = None
    """First frame, for image-to-video models; a relative path starts at the configuration file's folder."""
    seed: int = Field(0, ge=0)
    """Of the noise that sampling starts from: the same at every step, so that only the weights differ."""


class ValidationConfig(Strict):
    """What is measured and sampled while training, and how often."""

    every: int | None = Field(100, ge=1)
    """Optimizer steps between two measurements of the held-out loss; null for none."""
    at_start: bool = True
    """Measure, and sample, before the first step as well: what the base model does is what the run is compared with."""
    clips: int = Field(16, ge=1)
    """At most this many held-out clips are measured, and as many training clips, whose difference is the
    generalisation gap."""
    timesteps: int = Field(8, ge=1, le=1000)
    """Each clip is measured at this many timesteps, spread evenly over the noise schedule."""
    samples: tuple[SamplePrompt, ...] = ()
    """Videos to sample, each from its prompt (and image) and seed."""
    sample_every: int | None = Field(None, ge=1)
    """Optimizer steps between two rounds of sampling; null for a round at the start and one at the end."""
    num_inference_steps: int = Field(50, ge=1, le=1000)
    """Denoising steps per sampled video."""
    guidance_scale: float = Field(6.0, ge=1)
    """Classifier-free guidance; 1 for none, which halves the time."""
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps, as CogVideoX's demo does with the DPM scheduler."""
    bucket: BucketField | None = None
    """Frames x height x width of the sampled videos; left out: the first of ``data.buckets``."""
