"""What a checkpoint is made of, and its section of the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.section import MOST_STEPS, Strict

TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_META = "optimizer.json"
EMA = "ema.safetensors"
CONFIG = "config.json"
STATE = "state.json"
FORMAT = 2
"""Raised whenever an older reader would misread a newer checkpoint. 1 had its checksums in ``state.json``."""


class CheckpointConfig(Strict):
    """When to save, what to keep, and where to continue."""

    every: int | None = Field(500, ge=1, le=MOST_STEPS)
    """Optimizer steps between checkpoints; null for none in between. One is saved at the end, and when a signal stops
    the run, in any case."""
    keep_last: int = Field(2, ge=1, le=1_000_000)
    """How many of the newest checkpoints stay; an older one is removed only after the new one stands."""
    keep_best: bool = True
    """Save a checkpoint whenever the held-out loss improves, and keep the best one as well."""
    resume: Literal["latest", "none"] | Path = "latest"
    """``latest`` continues from the newest checkpoint of ``output_dir`` that is whole, or begins where there is none at
    all; ``none`` begins, and refuses a folder that holds checkpoints; a path names one checkpoint."""
