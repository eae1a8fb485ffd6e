"""What a checkpoint is made of, and its section of the configuration."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from pathlib import Path
from typing import Literal

from pydantic import Field

from finetune.core.files import PARTIAL, is_complete, move, remove_dir, restore_replaced
from finetune.core.types import MOST_STEPS, Strict

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


# -------- Where the checkpoints of a run stand, which of them stay, and what becomes of a damaged one.

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"

_STEP = r"step-(\d{8,})"

_DAMAGED = r"\.damaged-[0-9a-f]{8}"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps stands."""
    return run_dir / FOLDER / f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name tells; None where it is no name of a checkpoint."""
    match = re.fullmatch(_STEP, name)
    return int(match[1]) if match else None


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first; whether they are whole is for who reads."""
    return [(step, path) for step, path in step_folders(run_dir) if is_complete(path)]


def step_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """Everything that bears a checkpoint's name, as (step, folder), oldest first."""
    return _matching(run_dir, _STEP)


def damaged_folders(run_dir: Path) -> list[tuple[int, Path]]:
    """What ``set_aside`` made, as (step, folder), oldest first."""
    return _matching(run_dir, _STEP + _DAMAGED)


def _matching(run_dir: Path, pattern: str) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(pattern, path.name), path) for path in (run_dir / FOLDER).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; ``prune`` removes it when a newer one stands.

    Raises:
        OSError: if it cannot be renamed.
    """
    aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    move(path, aside)
    return aside


def outlived(run_dir: Path, keep_last: int, best_step: int | None, *, also: int | None = None) -> list[Path]:
    """The checkpoints that need not stay.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest stay.
        best_step: the step whose checkpoint stays as well.
        also: a step that is taken to stand although it is yet to be written.
    """
    standing = list_checkpoints(run_dir)
    steps = sorted({*(step for step, _ in standing), *([] if also is None else [also])})
    keep = {*steps[-keep_last:], best_step, also}
    return [path for step, path in standing if step not in keep]


def prune(run_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Remove what ``outlived`` names, and damaged checkpoints that a newer one has made useless.

    An interruption leaves no half of a checkpoint under its name. What cannot be removed is a warning: the checkpoint
    for whose sake it should go stands.
    """
    doomed = outlived(run_dir, keep_last, best_step)
    newest = max((step for step, _ in list_checkpoints(run_dir)), default=-1)
    doomed += [path for step, path in damaged_folders(run_dir) if step <= newest]
    for path in doomed:
        try:
            remove_dir(path)
        except OSError as error:
            logger.warning("%s is not needed any more and cannot be removed: %s", path, error)


def sweep(run_dir: Path) -> None:
    """Undo and remove what a killed process left half done; only for who alone writes into the run's folder."""
    for path in restore_replaced(run_dir / FOLDER):
        logger.warning("%s was being replaced when its writer was killed, and stands again", path)
    for leftover in (run_dir / FOLDER).glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)
