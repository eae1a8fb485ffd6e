"""The validation history of a run folder: one line per measurement, which was best, where samples lie."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter, ValidationError

from finetune.core.types import RunState, SamplePrompt

_log = logging.getLogger(__name__)

HISTORY = "heldout.jsonl"
"""In the run's folder: one JSON line per measurement (``step``, ``heldout``, ``trainsubset``, ``by_band``)."""


def round_folder(run_dir: Path, step: int) -> Path:
    """Where a run's videos sampled after ``step`` optimizer steps stand."""
    return run_dir / "samples" / f"step-{step:08d}"


def sample_name(number: int, sample: SamplePrompt) -> str:
    """The file of one video of a round; ``number`` counts ``ValidationConfig.samples``."""
    return f"{number:02d}-seed{sample.seed}.mp4"


@dataclass(frozen=True)
class Measurement:
    """One line of ``HISTORY``: the held-out loss after ``step`` optimizer steps, and the same on training clips."""

    step: int
    heldout: FiniteFloat
    trainsubset: FiniteFloat
    by_band: dict[str, FiniteFloat]
    """Held-out loss by timestep band."""


_MEASUREMENT = TypeAdapter(Measurement)


def read_history(path: Path) -> list[Measurement]:
    """The measurements in a run's ``HISTORY``, oldest first; none where there is no such file.

    Nothing that is computed follows from them, so a damaged line is passed over with a warning that counts it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        _log.warning("%s cannot be read, and its measurements are not shown: %s", path, error)
        return []
    rows: dict[int, Measurement] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _MEASUREMENT.validate_json(line, strict=True)
            rows[row.step] = row
        except ValidationError:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        _log.warning("%s: %d damaged lines are passed over (line %s)", path, len(damaged), shown)
    return [rows[step] for step in sorted(rows)]


def best_of(history: Iterable[Measurement], state: RunState) -> tuple[int, float] | None:
    """The step with the lowest held-out loss, and that loss; None where no step was measured.

    Args:
        history: what was measured; the base model's own loss, at step 0, is passed over.
        state: remembers the best step also where ``HISTORY`` was lost.
    """
    losses = {row.step: row.heldout for row in history if row.step > 0 and math.isfinite(row.heldout)}
    if state.best_step is not None and state.best_heldout_loss is not None:
        losses.setdefault(state.best_step, state.best_heldout_loss)
    return min(losses.items(), key=lambda item: (item[1], item[0]), default=None)


def verdict(history: Sequence[Measurement], best: tuple[int, float]) -> str:
    """Which step was best by held-out loss, and what became of the gap to the training clips since.

    Args:
        history: oldest first, not empty.
        best: as ``best_of`` gives it.
    """
    rows = {row.step: row for row in history}
    last, (step, loss) = history[-1], best
    if loss >= last.heldout:
        text = f"best by held-out loss: the last step measured, {last.step}, with {last.heldout:.4f}"
    else:
        text = f"best by held-out loss: step {step} with {loss:.4f}; step {last.step} has {last.heldout:.4f}"
        if then := rows.get(step):
            gaps = [row.heldout - row.trainsubset for row in (then, last)]
            text += (
                f"\nsince then the gap (held-out minus training clips) went from {gaps[0]:+.4f} to {gaps[1]:+.4f}: "
                + (
                    "training clips went on improving, which is memorising"
                    if last.trainsubset < then.trainsubset
                    else "training clips got worse as well, so rather a smaller learning rate than fewer steps"
                )
            )
    if 0 in rows and rows[0].heldout <= loss:
        text += f"\nno step was better than the base model, with {rows[0].heldout:.4f}"
    return text
