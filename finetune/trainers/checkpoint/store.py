"""Checkpoints of a run: whole or absent, verified when read, removed only after a newer one stands.

``<run>/checkpoints/step-00000500/`` holds ``trainable.safetensors``, ``optimizer.safetensors`` and ``optimizer.json``,
``ema.safetensors`` where an average is kept, ``config.json``, ``state.json`` with the digest of every other file, and
the ``COMPLETE`` marker, written last. There is no pickle in it, and no random state: randomness follows from the step.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field
from torch import Tensor, distributed

from finetune.errors import CheckpointError
from finetune.files import atomic_save_tensors, atomic_write_text, digest_file, digest_of, is_complete, publish_dir
from finetune.section import Strict
from finetune.types import RunState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
OPTIMIZER_META = "optimizer.json"
EMA = "ema.safetensors"
CONFIG = "config.json"
STATE = "state.json"
FORMAT = 1
"""Raised whenever an older reader would misread a newer checkpoint."""
PARTIAL = ".partial"
"""Ending of what is being written or removed; never a checkpoint."""

T = TypeVar("T")


class CheckpointConfig(Strict):
    """When to save, what to keep, and where to continue."""

    every: int | None = Field(500, ge=1)
    """Optimizer steps between checkpoints; null for none in between. One is saved at the end, and on SIGTERM or SIGINT,
    in any case."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest checkpoints stay; an older one is removed only after the new one stands."""
    keep_best: bool = True
    """Save a checkpoint whenever the held-out loss improves, and keep the best one as well."""
    resume: Literal["latest", "none"] | Path = "latest"
    """``latest`` continues from the newest checkpoint of ``output_dir``, or begins where there is none; ``none``
    begins, and refuses a folder that holds checkpoints; a path names one checkpoint."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as read: tensors on the CPU, files verified."""

    path: Path
    state: RunState
    trainable: dict[str, Tensor]
    optimizer: tuple[dict[str, Tensor], dict[str, Any]]
    """As ``optim.optimizer_state`` gave it; empty where it was not asked for."""
    ema: dict[str, Tensor] | None
    config: dict[str, Any]
    """The resolved configuration, as JSON."""
    processes: int
    """How many processes trained."""


# ------------------------------------------------------------------------------------------------------------- saving


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` optimizer steps stands."""
    return run_dir / FOLDER / f"step-{step:08d}"


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
    """
    path = checkpoint_path(run_dir, state.step)
    parallel = distributed.is_available() and distributed.is_initialized()
    if parallel and distributed.get_rank() != 0:
        return path

    from safetensors import SafetensorError

    def fill(folder: Path) -> None:
        atomic_save_tensors(folder / TRAINABLE, trainable)
        atomic_save_tensors(folder / OPTIMIZER, optimizer[0])
        atomic_write_text(folder / OPTIMIZER_META, _to_json(optimizer[1]))
        if ema is not None:
            atomic_save_tensors(folder / EMA, ema)
        atomic_write_text(folder / CONFIG, _to_json(config))
        content = {
            "format": FORMAT,
            "state": dataclasses.asdict(state),
            "processes": distributed.get_world_size() if parallel else 1,
            "files": {file.name: digest_file(file) for file in sorted(folder.iterdir())},
        }
        atomic_write_text(folder / STATE, _to_json({**content, "digest": digest_of(content)}))

    try:
        publish_dir(path, fill)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint cannot be written: {error}",
            where=str(path),
            fix="make room and run the same command again; earlier checkpoints are intact",
        ) from error
    prune(run_dir, policy.keep_last, state.best_step if policy.keep_best else None)
    return path


def prune(run_dir: Path, keep_last: int, best_step: int | None) -> None:
    """Remove all but the newest ``keep_last`` checkpoints and that of ``best_step``, and what a killed process left.

    A removal that is interrupted leaves no half of a checkpoint under its name.
    """
    standing = list_checkpoints(run_dir)
    keep = {path for _, path in standing[-keep_last:]}
    keep |= {path for step, path in standing if step == best_step}
    for _, path in standing:
        if path not in keep:
            os.replace(path, path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}"))
    for leftover in (run_dir / FOLDER).glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover, ignore_errors=True)


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# ------------------------------------------------------------------------------------------------------------ finding


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """The complete checkpoints of a run as (step, folder), oldest first."""
    return [(step, path) for step, path in _step_folders(run_dir) if is_complete(path)]


def find_checkpoint(run_dir: Path, resume: str | Path) -> Path | None:
    """The checkpoint that ``CheckpointConfig.resume`` means, or None to begin at step 0.

    Raises:
        CheckpointError: if a named checkpoint is missing or incomplete, or if the run that would follow could be mixed
            up with checkpoints that ``run_dir`` holds already.
    """
    standing = list_checkpoints(run_dir)
    for _, path in _step_folders(run_dir):
        if not is_complete(path):
            logger.warning("%s is incomplete (its writer was interrupted) and is passed over", path)
    if resume == "latest":
        return standing[-1][1] if standing else None
    if resume == "none":
        if standing:
            raise CheckpointError(
                f"the run folder holds {len(standing)} checkpoints, up to step {standing[-1][0]}, and resume is none",
                where=str(run_dir),
                fix="choose another output_dir, remove the folder, or continue with checkpoint.resume: latest",
            )
        return None
    chosen = Path(resume)
    if not is_complete(chosen):
        raise _not_a_checkpoint(chosen)
    own = chosen.parent.resolve() == (run_dir / FOLDER).resolve()
    chosen_step = next((step for step, path in standing if path.name == chosen.name), 0)
    beyond = [path for step, path in standing if not own or step > chosen_step]
    if beyond:
        # Two histories in one folder: pruning and "latest" go by step and would take the abandoned one for the newer.
        raise CheckpointError(
            f"the run folder holds checkpoints that do not lead to {chosen.name}: " + ", ".join(p.name for p in beyond),
            where=f"checkpoint.resume: {chosen}, output_dir: {run_dir}",
            fix="choose another output_dir, or move those checkpoints away",
        )
    return chosen


def _step_folders(run_dir: Path) -> list[tuple[int, Path]]:
    named = ((re.fullmatch(r"step-(\d{8,})", path.name), path) for path in (run_dir / FOLDER).glob("step-*"))
    return sorted((int(match[1]), path) for match, path in named if match and path.is_dir())


def _not_a_checkpoint(path: Path) -> CheckpointError:
    inside = list_checkpoints(path)
    if inside:
        return CheckpointError(
            "this is a run's folder, not a checkpoint", where=str(path), fix=f"its newest checkpoint is {inside[-1][1]}"
        )
    what = "the checkpoint is incomplete: its writer was interrupted" if path.is_dir() else "there is no checkpoint"
    others = list_checkpoints(path.parent.parent) if path.parent.name == FOLDER else []
    return CheckpointError(
        what,
        where=str(path),
        fix=f"complete ones are {', '.join(other.name for _, other in others)}" if others else "name a folder step-...",
    )


# ------------------------------------------------------------------------------------------------------------ loading


def load_checkpoint(path: Path, *, optimizer: bool = True) -> LoadedCheckpoint:
    """Read a checkpoint and verify every file of it.

    Args:
        path: the checkpoint's folder.
        optimizer: whether to read the optimizer's state, by far the largest part after full fine-tuning.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged, or of a later version of this package.
    """
    if not is_complete(path):
        raise _not_a_checkpoint(path)
    content = _read(path / STATE, _from_json)
    recorded = content.pop("digest", None)
    if content.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {content['format']}, this version reads {FORMAT}",
            where=str(path),
            fix="update cogvideox-finetune",
        )
    if recorded != digest_of(content):
        raise _damaged(path / STATE, "its own digest does not match")
    wanted = {name for name in content["files"] if optimizer or name not in (OPTIMIZER, OPTIMIZER_META)}
    for name in sorted(wanted):
        if not (path / name).is_file():
            raise _damaged(path / name, "the file is missing")
        if digest_file(path / name) != content["files"][name]:
            raise _damaged(path / name, "its bytes are not those that were written")
    return LoadedCheckpoint(
        path=path,
        state=_run_state(content["state"], path),
        trainable=_read_tensors(path / TRAINABLE),
        optimizer=_read_optimizer(path) if optimizer else ({}, {}),
        ema=_read_tensors(path / EMA) if EMA in wanted else None,
        config=_read(path / CONFIG, _from_json),
        processes=content["processes"],
    )


def _run_state(values: dict[str, Any], path: Path) -> RunState:
    try:
        return RunState(**values)
    except TypeError as error:
        raise CheckpointError(
            f"the checkpoint was written by another version of this package: {error}",
            where=str(path),
            fix="continue with the version that wrote it, or train anew (method.init_from keeps the adapter)",
        ) from error


def _read_optimizer(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _read_tensors(path / OPTIMIZER), _read(path / OPTIMIZER_META, _from_json)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return _read(path, load_file)


def _from_json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _read(path: Path, reader: Callable[[Path], T]) -> T:
    from safetensors import SafetensorError

    try:
        return reader(path)
    except (OSError, ValueError, SafetensorError) as error:  # JSON and UTF-8 errors are ValueErrors
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint is damaged: {path.name}: {detail}",
        where=str(path.parent),
        fix="continue from another checkpoint with checkpoint.resume: PATH (move this one away first)",
    )
