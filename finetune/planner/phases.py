"""The phases of a run, by the names that code and people use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from finetune.planner.memory_tracker import Phase

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


# -------- What a rehearsal is put together from: phases that are rehearsed together, with what their figures depend on.


@dataclass(frozen=True)
class EstimatedPart:
    """Some phases of a run, rehearsed in a world of their own."""

    depends_on: Mapping[str, Any]
    """All that the figures depend on beside code and libraries, as JSON has it; runs that agree in it share them."""
    make: Callable[[], tuple[Phase, ...]]
    """Rehearses them."""


Through = Callable[[EstimatedPart], tuple[Phase, ...]]
"""How a part comes to its phases: it is made, or found where somebody kept it."""


def made(part: EstimatedPart) -> tuple[Phase, ...]:
    """Make it, whoever may have made it before."""
    return part.make()
