"""The phases of a run, by the names that code and people use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

PhaseName = Literal["text", "encode", "train", "sample", "decode"]
PHASES: Mapping[PhaseName, str] = {
    "text": "T5 pass",
    "encode": "VAE pass",
    "train": "training",
    "sample": "validation sampling",
    "decode": "VAE decode",
}
OF_THE_RUN: tuple[PhaseName, ...] = ("train", "sample", "decode")
"""Those with the transformer in memory."""
