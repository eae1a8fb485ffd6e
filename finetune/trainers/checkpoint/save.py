"""Writing a checkpoint: room for it first, then all of it or nothing, and only then less of the older ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

from finetune.errors import CheckpointError
from finetune.files import atomic_save_tensors, atomic_write_text, publish_dir
from finetune.seals import seal
from finetune.space import disk_fix, free_space, human_size, require_space
from finetune.tensorfiles import file_bytes
from finetune.trainers.checkpoint.folders import checkpoint_path, outlived, prune
from finetune.trainers.checkpoint.form import (
    CONFIG,
    EMA,
    FORMAT,
    OPTIMIZER,
    OPTIMIZER_META,
    STATE,
    TRAINABLE,
    CheckpointConfig,
)
from finetune.types import RunState

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
        return seal(folder, known)

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
