"""Writing a checkpoint: room for it first, then all of it or nothing, and only then less of the older ones."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.checkpoint.folders import (
    CONFIG,
    EMA,
    FORMAT,
    OPTIMIZER,
    OPTIMIZER_META,
    STATE,
    CheckpointConfig,
    checkpoint_path,
    prune,
    superseded,
)
from finetune.checkpoint.shares import part_of, share_bytes, write_shares
from finetune.core.checksums import folder_checksums
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.files import (
    TRAINABLE,
    atomic_write_text,
    begin_dir,
    disk_fix,
    finish_dir,
    free_space,
    human_size,
    require_space,
)
from finetune.core.tensor_files import atomic_save_tensors, file_bytes
from finetune.core.types import RunState
from finetune.optim.state import OptimizerState

_BLOCKS = 1 << 16
"""Bytes on top of what the files hold: their last blocks, directory entries, the marker."""


@dataclass(frozen=True)
class CheckpointContent:
    """Everything that a run needs to go on."""

    state: RunState
    """Where the run stands; ``best_step`` is what ``keep_best`` keeps."""
    trainable: Mapping[str, Tensor]
    """What trains, by name."""
    optimizer: OptimizerState
    """As ``optim.optimizer_state`` gives it."""
    ema: Mapping[str, Tensor] | None
    """The averaged weights by the same names as ``trainable``, where an average is kept."""
    config: Mapping[str, Any]
    """The resolved configuration, as JSON."""

    @property
    def parts(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors, by the file that holds them."""
        ema = {} if self.ema is None else {EMA: self.ema}
        return {TRAINABLE: self.trainable, OPTIMIZER: self.optimizer[0]} | ema

    def texts(self, processes: int) -> dict[str, str]:
        """The JSON files."""
        state = {"format": FORMAT, "state": dataclasses.asdict(self.state), "processes": processes}
        values = {OPTIMIZER_META: self.optimizer[1], CONFIG: self.config, STATE: state}
        return {
            name: json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            for name, value in values.items()
        }


def save_checkpoint(
    run_dir: Path,
    content: CheckpointContent,
    policy: CheckpointConfig,
    ranks: ProcessGroup | None = None,
    *,
    sharded: bool = False,
) -> Path:
    """Write a checkpoint, then remove those that ``policy`` no longer keeps; all processes call this at once.

    A checkpoint of the same step is replaced.

    Args:
        run_dir: the run's folder.
        content: of the checkpoint. Of processes that hold the same, the main one's is written.
        policy: what to keep.
        ranks: the processes; None for one.
        sharded: every process writes its shares of tensors, DTensors then, to files of its own.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if there is no room for it, or any process cannot write; on every process. Nothing is left of
            it then, and every earlier checkpoint stands.
    """
    ranks = ProcessGroup() if ranks is None else ranks
    path = checkpoint_path(run_dir, content.state.step)
    best_step = content.state.best_step if policy.keep_best else None
    sizes = [0]
    if sharded:
        sizes = ranks.run_on_all(lambda: sum(share_bytes(part, rank=ranks.rank) for part in content.parts.values()))

    def begin() -> tuple[Path, int]:
        texts = content.texts(ranks.world)
        needed = sum(len(text.encode()) for text in texts.values()) + _BLOCKS
        needed += sum(sizes) if sharded else sum(map(file_bytes, content.parts.values()))
        with _explained(path, needed):
            _require_room(path, needed, superseded(run_dir, policy.keep_last, best_step, new=content.state.step))
            return begin_dir(path, *(part_of(name) for name in content.parts if sharded)), needed

    def write() -> dict[str, str]:
        with _explained(path, needed):
            if sharded:
                return _write_shares(partial, content, ranks)
            return {name: atomic_save_tensors(partial / name, part) for name, part in content.parts.items()}

    def publish() -> Path:
        with _explained(path, needed):
            for file in checksums:
                if not (partial / file).is_file():
                    raise OSError(f"{file} was written by another process and is not to be seen from this one")
            texts = content.texts(ranks.world)
            checksums.update({name: atomic_write_text(partial / name, text) for name, text in texts.items()})
            finish_dir(partial, path, folder_checksums(partial, checksums))
        prune(run_dir, policy.keep_last, best_step)
        return path

    partial, needed = ranks.run_on_main(begin)
    try:
        written = ranks.run_on_all(write) if sharded else [ranks.run_on_main(write)]
        checksums = {file: checksum for files in written for file, checksum in files.items()}
        return ranks.run_on_main(publish)
    finally:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)


def _write_shares(folder: Path, content: CheckpointContent, ranks: ProcessGroup) -> dict[str, str]:
    checksums: dict[str, str] = {}
    for name, tensors in content.parts.items():
        part = part_of(name)
        files = write_shares(folder / part, tensors, rank=ranks.rank, world=ranks.world)
        checksums |= {f"{part}/{file}": checksum for file, checksum in files.items()}
    return checksums


@contextmanager
def _explained(path: Path, needed: int) -> Iterator[None]:
    """Say of a failed write which checkpoint it was, and what room there is."""
    try:
        yield
    except OSError as error:
        try:
            free = human_size(free_space(path))
        except OSError:  # the disk is gone altogether
            free = "an unknown amount is"
        raise CheckpointError(
            f"the checkpoint cannot be written: {error.strerror or error} (it takes {human_size(needed)}, {free} free)",
            where=str(path),
            fix=f"{disk_fix(error)}; earlier checkpoints are intact",
        ) from error


def _require_room(path: Path, needed: int, unneeded: list[Path]) -> None:
    fix = "make room and run the same command again, or lower checkpoint.keep_last; earlier checkpoints are intact"
    size = sum(file.stat().st_size for folder in unneeded for file in folder.rglob("*") if file.is_file())
    if unneeded and free_space(path) + size >= needed:
        # Never done here: until the new one stands, an old one is all there is.
        names = ", ".join(folder.name for folder in unneeded)
        fix = (
            f"make room and run the same command again; {names} ({human_size(size)}) would be removed once the new one"
            " stands, and removing it by hand would be enough"
        )
    require_space(path, needed, kind=CheckpointError, what="the checkpoint", fix=fix)


# ------------------------------------------------------------------------ a run whose checkpoint cannot be written

_RETRIES = 10
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
        initial: the state that the run begins or continues with.
    """

    def __init__(
        self, save: Callable[[RunState], Path], every: int | None, say: Callable[[str], object], initial: RunState
    ) -> None:
        self._save = save
        self._gap = max(1, (every or 100) // _RETRIES)
        self._say = say
        self._on_disk = initial
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
                before = self._on_disk
                state = replace(state, best_heldout_loss=before.best_heldout_loss, best_step=before.best_step)
            return state, None
        self._on_disk, self._failed_at = state, None
        return state, path
