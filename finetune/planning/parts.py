"""What a rehearsal is put together from: phases that are rehearsed together, with what their figures depend on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune.planning.curve import Phase


@dataclass(frozen=True)
class Part:
    """Some phases of a run, rehearsed in a world of their own."""

    depends_on: Mapping[str, Any]
    """All that the figures depend on beside code and libraries, as JSON has it; runs that agree in it share them."""
    make: Callable[[], tuple[Phase, ...]]
    """Rehearses them."""


Through = Callable[[Part], tuple[Phase, ...]]
"""How a part comes to its phases: it is made, or found where somebody kept it."""


def made(part: Part) -> tuple[Phase, ...]:
    """Make it, whoever may have made it before."""
    return part.make()
