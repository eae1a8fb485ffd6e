"""What stands in a run's folder: checkpoints, of which some stay, metrics, and the history of validation."""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from finetune.core.files import is_complete, move, remove_dir, undo_interrupted
from finetune.core.types import MOST_STEPS, RunState, SamplePrompt, Strict

logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------------------------------------- files and folders

FOLDER = "checkpoints"

OPTIMIZER = "optimizer.safetensors"

OPTIMIZER_META = "optimizer.json"

EMA = "ema.safetensors"

CONFIG = "config.json"

STATE = "state.json"

FORMAT = 2
"""Raised whenever an older reader would misread a newer checkpoint. 1 had its checksums in ``state.json``."""

HISTORY = "heldout.jsonl"
"""One JSON line per measurement (``step``, ``heldout``, ``trainsubset``, ``by_band``)."""

_STEP = r"step-(\d{8,})"

_DAMAGED = r"\.damaged-[0-9a-f]{8}"

METRICS = "metrics.jsonl"
"""One JSON line per record of metrics: ``step`` and the values by name, whatever else tracks the run."""


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps stands."""
    return run_dir / FOLDER / f"step-{step:08d}"


def samples_path(run_dir: Path, step: int) -> Path:
    """Where a run's videos sampled after ``step`` optimizer steps stand."""
    return run_dir / "samples" / f"step-{step:08d}"


def sample_name(number: int, sample: SamplePrompt) -> str:
    """The file of one of these videos; ``number`` counts ``ValidationConfig.samples``."""
    return f"{number:02d}-seed{sample.seed}.mp4"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells; None where it is no name of a checkpoint."""
    match = re.fullmatch(_STEP, name)
    return int(match[1]) if match else None


# ---------------------------------------------------------------------------------------------------------- checkpoints


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


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first; whether they are intact is for who reads."""
    return [(step, path) for step, path in step_folders(run_dir) if is_complete(path)]


def step_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Everything that bears a checkpoint's name, as (step, folder), oldest first."""
    return _matching(run_dir, _STEP)


def damaged_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """What ``rename_damaged`` renamed, as (step, folder), oldest first."""
    return _matching(run_dir, _STEP + _DAMAGED)


def _matching(run_dir: Path, pattern: str) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(pattern, path.name), path) for path in (run_dir / FOLDER).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def rename_damaged(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; ``prune`` removes it when a newer one stands.

    Raises:
        OSError: if it cannot be renamed.
    """
    target = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    move(path, target)
    return target


def superseded(run_dir: Path, keep_last: int, best_step: int | None, *, new: int | None = None) -> list[Path]:
    """The checkpoints that need not stay.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest stay.
        best_step: the step whose checkpoint stays as well.
        new: a step that is taken to stand although it is yet to be written.
    """
    standing = list_checkpoints(run_dir)
    steps = sorted({*(step for step, _ in standing), *([] if new is None else [new])})
    keep = {*steps[-keep_last:], best_step, new}
    return [path for step, path in standing if step not in keep]


def prune(run_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Remove what is ``superseded``, and damaged checkpoints that a newer one has made useless.

    An interruption leaves no half of a checkpoint under its name. What cannot be removed is a warning: the checkpoint
    for whose sake it should go stands.
    """
    unneeded = superseded(run_dir, keep_last, best_step)
    newest = max((step for step, _ in list_checkpoints(run_dir)), default=-1)
    unneeded += [path for step, path in damaged_folders(run_dir) if step <= newest]
    for path in unneeded:
        try:
            remove_dir(path)
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", path, error)


def clear_interrupted(run_dir: Path) -> None:
    """Undo and remove what a killed process left half done; only for who alone writes into the run's folder."""
    for path in undo_interrupted(run_dir / FOLDER):
        logger.warning("%s was being replaced when its writer was killed, and stands again", path)


# ------------------------------------------------------------------------------------------------ history of validation


@dataclass(frozen=True)
class Measurement:
    """One line of ``HISTORY``: the held-out loss after ``step`` optimizer steps, and the same on training clips."""

    step: int
    heldout: FiniteFloat
    trainsubset: FiniteFloat
    by_band: dict[str, FiniteFloat]
    """Held-out loss by timestep band."""


_MEASUREMENT = TypeAdapter(Measurement)

Outcome = Literal["learning", "still", "diverged", "level", "memorising", "worse"]
"""What measurements say of a run: the held-out loss still falls; nothing moves; it stayed far above that at step 0,
and so do training clips; it has stopped falling; it rises while training clips improve; both rise."""

_MOVED = 1e-3
"""Share of the first loss by which weights that learn something move the same clips' loss: a measurement has no noise,
so anything is a change, and less than this is none that anybody would see."""

_LEVEL = 5e-3
"""Share of the best loss within which a later one is called as good."""


_DIVERGED = 1.2
"""Times the loss at step 0 that no step came below: more than a warm-up or a few clips too few make of it."""


def outcome(history: Sequence[Measurement], best: tuple[int, float]) -> Outcome:
    """What became of a run.

    Args:
        history: oldest first, not empty.
        best: as ``best_of`` gives it.
    """
    first, last = history[0], history[-1]
    moves = (abs(row.trainsubset - first.trainsubset) > _MOVED * abs(first.trainsubset) for row in history)
    if not any(moves) and abs(best[1] - first.heldout) <= _MOVED * abs(first.heldout):
        return "still"
    above = first.step == 0 and best[1] > _DIVERGED * first.heldout
    if above and last.trainsubset > _DIVERGED * first.trainsubset:
        return "diverged"
    if best[1] >= last.heldout:
        return "learning"
    if last.heldout - best[1] <= _LEVEL * abs(best[1]):
        return "level"
    then = next((row for row in history if row.step == best[0]), first)
    return "memorising" if last.trainsubset < then.trainsubset else "worse"


def read_history(path: Path) -> list[Measurement]:
    """The measurements in a run's ``HISTORY``, oldest first; none where there is no such file.

    Nothing that is computed follows from them, so a damaged line is passed over with a warning that counts it.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        logger.warning("%s cannot be read, and its measurements are not shown: %s", path, error)
        return []
    rows: dict[int, Measurement] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.strip():
                row = _MEASUREMENT.validate_json(line, strict=True)
                rows[row.step] = row
        except ValidationError:
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        logger.warning("%s: %d damaged lines are passed over (line %s)", path, len(damaged), shown)
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
    if outcome(history, best) == "diverged":
        return (
            f"diverged: the held-out loss was {history[0].heldout:.4f} at step 0 and is {last.heldout:.4f} now, that"
            f" of training clips went from {history[0].trainsubset:.4f} to {last.trainsubset:.4f}; begin anew with a"
            " tenth of the learning rate"
        )
    if loss >= last.heldout:
        text = f"best by held-out loss: the last step measured, {last.step}, with {last.heldout:.4f}"
    else:
        text = f"best by held-out loss: step {step} with {loss:.4f}; step {last.step} has {last.heldout:.4f}"
        if then := rows.get(step):
            gaps = [row.heldout - row.trainsubset for row in (then, last)]
            text += (
                f"\nsince then the gap (held-out minus training clips) went from {gaps[0]:+.4f} to {gaps[1]:+.4f}: "
                + (
                    "training clips got worse as well, so rather a smaller learning rate than fewer steps"
                    if last.trainsubset >= then.trainsubset
                    else "training clips went on improving, which is memorising"
                )
            )
    if 0 in rows and rows[0].heldout <= loss:
        text += f"\nno step was better than the base model, with {rows[0].heldout:.4f}"
    return text
