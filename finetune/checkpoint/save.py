"""Writing a checkpoint: room for it first, then all of it or nothing, and only then less of the older ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from finetune.checkpoint.folders import (
    CONFIG,
    EMA,
    FORMAT,
    OPTIMIZER,
    OPTIMIZER_META,
    STATE,
    CheckpointConfig,
    checkpoint_path,
    outlived,
    prune,
)
from finetune.core.checksums import folder_checksums
from finetune.core.errors import CheckpointError
from finetune.core.files import (
    TRAINABLE,
    atomic_write_text,
    disk_fix,
    free_space,
    human_size,
    publish_dir,
    require_space,
)
from finetune.core.tensor_files import atomic_save_tensors, file_bytes
from finetune.core.types import RunState

_BLOCKS = 1 << 16
"""Bytes on top of what the files hold: their last blocks, directory entries, the marker."""


def save_checkpoint(
    run_dir: Path,
    state: RunState,
    *,
    trainable: Mapping[str, Tensor],
    optimizer: tuple[Mapping[str, Tensor], Mapping[str, Any]],
    ema: Mapping[str, Tensor] | None,
    config: Mapping[str, Any],
    policy: CheckpointConfig,
) -> Path:
    """Write the checkpoint of ``state.step``, then remove those that ``policy`` no longer keeps.

    Only the process of rank 0 writes; others return at once, so a barrier is the caller's. A checkpoint of the same
    step is replaced.

    Args:
        run_dir: the run's folder.
        state: where the run stands; ``best_step`` is what ``keep_best`` keeps.
        trainable: ``method.state()``.
        optimizer: ``optim.optimizer_state()``.
        ema: the averaged weights by the same names as ``trainable``, or None.
        config: the resolved configuration, as JSON.
        policy: what to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if there is no room for it, or it cannot be written. Nothing is left of it then, and every
            earlier checkpoint stands.
    """
    parallel = distributed.is_available() and distributed.is_initialized()
    if parallel and distributed.get_rank() != 0:
        return checkpoint_path(run_dir, state.step)
    tensors = {TRAINABLE: trainable, OPTIMIZER: optimizer[0]} | ({} if ema is None else {EMA: ema})

    def write(folder: Path) -> dict[str, str]:
        return {name: atomic_save_tensors(folder / name, group) for name, group in tensors.items()}

    return publish_checkpoint(
        run_dir,
        state,
        write,
        needed=sum(map(file_bytes, tensors.values())),
        optimizer_meta=optimizer[1],
        config=config,
        policy=policy,
        processes=distributed.get_world_size() if parallel else 1,
    )


def publish_checkpoint(
    run_dir: Path,
    state: RunState,
    write: Callable[[Path], Mapping[str, str]],
    *,
    needed: int,
    optimizer_meta: Mapping[str, Any],
    config: Mapping[str, Any],
    policy: CheckpointConfig,
    processes: int,
) -> Path:
    """The rest of a checkpoint around its tensors: room for it, the JSON files, the marker; then older ones go.

    Args:
        run_dir: as for ``save_checkpoint``, like ``state``, ``config`` and ``policy``.
        state: where the run stands.
        write: puts the tensors into a folder and returns the checksum of every file by its name there.
        needed: bytes that ``write`` takes.
        optimizer_meta: the JSON part of ``optim.optimizer_state()``.
        config: the resolved configuration, as JSON.
        policy: what to keep.
        processes: how many trained.

    Raises:
        CheckpointError: as ``save_checkpoint``.
    """
    path = checkpoint_path(run_dir, state.step)
    content = {"format": FORMAT, "state": dataclasses.asdict(state), "processes": processes}
    texts = {OPTIMIZER_META: _to_json(optimizer_meta), CONFIG: _to_json(config), STATE: _to_json(content)}
    needed += sum(len(text.encode()) for text in texts.values()) + _BLOCKS
    best_step = state.best_step if policy.keep_best else None

    def fill(folder: Path) -> str:
        known = {**write(folder)}
        known |= {name: atomic_write_text(folder / name, text) for name, text in texts.items()}
        return folder_checksums(folder, known)

    try:
        _require_room(path, needed, outlived(run_dir, policy.keep_last, best_step, also=state.step))
        publish_dir(path, fill)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be written: {error.strerror or error} (it takes {human_size(needed)},"
            f" {_free(path)} free)",
            where=str(path),
            fix=f"{disk_fix(error)}; earlier checkpoints are intact",
        ) from error
    prune(run_dir, policy.keep_last, best_step)
    return path


def _require_room(path: Path, needed: int, outlived: list[Path]) -> None:
    fix = "make room and run the same command again, or lower checkpoint.keep_last; earlier checkpoints are intact"
    held = sum(file.stat().st_size for folder in outlived for file in folder.rglob("*") if file.is_file())
    if outlived and free_space(path) + held >= needed:
        # Never done here: until the new one stands, an old one is all there is.
        names = ", ".join(folder.name for folder in outlived)
        fix = (
            f"make room and run the same command again; {names} ({human_size(held)}) would be removed once the new one"
            " stands, and removing it by hand would be enough"
        )
    require_space(path, needed, kind=CheckpointError, what="the checkpoint", fix=fix)


def _free(path: Path) -> str:
    try:
        return human_size(free_space(path))
    except OSError:  # the disk is gone altogether
        return "an unknown amount is"


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# -------- What becomes of a run whose checkpoint cannot be written.

_TRIES = 10
"""Attempts, after the first, before the next checkpoint is due."""


class CheckpointManager:
    """Saves checkpoints, and gives a disk that fails until the next one is due.

    A checkpoint between two others that cannot be written is a warning, and is tried again ten times before the next
    one is due; if that one fails as well, or the last one of a run or that of a stop does, the error is raised. So a
    passing fault costs nothing, and a lasting one stops training with at most two intervals of work unsaved, where
    stopping at once would always lose one.

    Args:
        save: writes the checkpoint of a state. With several processes all call it, and it fails on all of them or on
            none.
        every: steps between two checkpoints; None where they are saved for another reason only.
        say: prints a line for a person.
        begun: the state that the run begins or continues with.
    """

    def __init__(
        self, save: Callable[[RunState], Path], every: int | None, say: Callable[[str], object], begun: RunState
    ) -> None:
        self._save = save
        self._gap = max(1, (every or 100) // _TRIES)
        self._say = say
        self._kept = begun
        """The last state that is on the disk."""
        self._failed_at: int | None = None

    def after_step(self, state: RunState, *, due: bool, must: bool) -> tuple[RunState, Path | None]:
        """Save after a step, if it is time to.

        Args:
            state: after the step.
            due: whether a checkpoint is wanted now.
            must: whether there will be no other chance.

        Returns:
            The state to go on with, and the checkpoint, None where none was written. A best measurement whose
            checkpoint was not written is no longer the best in that state: the one on the disk has to be kept.

        Raises:
            CheckpointError: if it cannot be written, and must be, or the one before could not either.
        """
        retries = self._failed_at is not None and (state.step - self._failed_at) % self._gap == 0
        if not (due or must or retries):
            return state, None
        try:
            path = self._save(state)
        except CheckpointError as error:
            if must or (due and self._failed_at is not None):
                raise
            self._say(f"warning: step {state.step}: {error}\n  training goes on; tried again in {self._gap} steps")
            self._failed_at = state.step if self._failed_at is None else self._failed_at
            if state.best_step == state.step:
                kept = self._kept
                state = replace(state, best_heldout_loss=kept.best_heldout_loss, best_step=kept.best_step)
            return state, None
        self._kept, self._failed_at = state, None
        return state, path
