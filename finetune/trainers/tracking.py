"""Metrics to TensorBoard (through accelerate) and to the console."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from finetune.section import Strict


class TrackingConfig(Strict):
    """Where the run's numbers go."""

    kind: Literal["tensorboard", "none"] = "tensorboard"
    """``tensorboard`` writes event files to ``output_dir/tensorboard``; ``none`` leaves the console only."""
    every: int = Field(1, ge=1)
    """Optimizer steps between two records of the training metrics. Held-out losses and videos are always recorded."""
    console_interval_s: float = Field(10.0, gt=0)
    """Seconds between two progress lines where the output is no terminal (a terminal's line follows every step)."""
