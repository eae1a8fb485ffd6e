"""Checkpoint in, verified diffusers weights out. (SIGNATURES; being filled in)"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExportReport:
    """What was published, and how closely the stock pipeline reproduces the trained model."""

    folder: Path
    files: tuple[str, ...]
    max_abs_diff: float
    tolerance: float


def export(
    source: Path,
    to: Path | None = None,
    *,
    checkpoint: str = "latest",
    full_pipeline: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> ExportReport:
    """Export a run (or one checkpoint folder) to ``to`` (default ``<run>/export``), reload it through the stock pipeline and compare."""
    raise NotImplementedError
