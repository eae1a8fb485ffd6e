"""Reading a checkpoint, byte for byte as it was written or not at all, and which one a run continues from."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from finetune.checkpoint.folders import (
    CONFIG,
    EMA,
    FOLDER,
    FORMAT,
    OPTIMIZER,
    OPTIMIZER_META,
    STATE,
    damaged_folders,
    list_checkpoints,
    rename_damaged,
    step_folders,
    step_of,
)
from finetune.checkpoint.shares import Shares, forms_of, has_shares, part_of
from finetune.core.checksums import ChecksummedFolder, DamageError
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CheckpointError
from finetune.core.files import COMPLETE, TRAINABLE, is_complete
from finetune.core.types import RunState

logger = logging.getLogger(__name__)

_STATE_TYPE = TypeAdapter(RunState)


@dataclass(frozen=True, kw_only=True)
class CheckpointHead:
    """What a checkpoint says of itself beside its tensors."""

    path: Path
    state: RunState
    config: dict[str, Any]
    """The resolved configuration, as JSON."""
    processes: int
    """How many processes trained."""


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint(CheckpointHead):
    """A checkpoint as read: tensors on the CPU, files verified."""

    trainable: Mapping[str, Tensor]
    """What trains, by name. If several processes wrote it in shares, these are put together when asked for."""
    optimizer: tuple[Mapping[str, Tensor], dict[str, Any]]
    """As ``optim.optimizer_state`` gave it; empty where it was not asked for."""
    ema: Mapping[str, Tensor] | None


# ----------------------------------------------------------------------------------------------------------- choosing


def checkpoint_to_continue(run_dir: Path, resume: str | Path, ranks: ProcessGroup) -> LoadedCheckpoint | None:
    """The checkpoint that every process of the launch continues from: chosen by the main one, read by each.

    Raises:
        CheckpointError: as ``choose_checkpoint`` and ``load_checkpoint``, on every process.
    """
    chosen: LoadedCheckpoint | None = None

    def choose() -> Path | None:
        nonlocal chosen
        chosen = choose_checkpoint(run_dir, resume)
        return None if chosen is None else chosen.path

    def read() -> None:
        nonlocal chosen
        if path is not None and chosen is None:
            chosen = load_checkpoint(path)

    path = ranks.run_on_main(choose)
    ranks.run_on_all(read)
    return chosen


def choose_checkpoint(run_dir: Path, resume: str | Path) -> LoadedCheckpoint | None:
    """Read the checkpoint that ``CheckpointConfig.resume`` means, or None to begin at step 0.

    With ``latest`` this is the newest one that is whole. Damaged ones that are newer are renamed (``rename_damaged``)
    with a warning, so that nothing takes them for checkpoints again. With several processes, for the main one alone:
    the others read what it has chosen.

    Raises:
        CheckpointError: if a named checkpoint is missing or damaged; if there are checkpoints and none is whole, for
            then nobody can say that beginning anew is what was meant; or if the run that would follow could be mixed up
            with checkpoints that ``run_dir`` holds already.
    """
    if resume == "latest":
        return _newest_intact(run_dir)
    chosen = _named(run_dir, resume)
    return None if chosen is None else load_checkpoint(chosen)


def head_to_continue(run_dir: Path, resume: str | Path) -> CheckpointHead | None:
    """What the checkpoint that ``resume`` means says of itself, before hours are spent on what it may refuse.

    Returns:
        None at step 0, and where checkpoints are damaged: which of them is taken is known when all are read.

    Raises:
        CheckpointError: as ``choose_checkpoint``, but for damage.
    """
    if resume != "latest":
        chosen = _named(run_dir, resume)
        return None if chosen is None else read_head(chosen)
    for _, path in reversed(step_folders(run_dir)):
        with suppress(DamageError):
            return _read(path, _read_head)
    return None


def _named(run_dir: Path, resume: str | Path) -> Path | None:
    """The checkpoint that is named, if it goes with what else the run's folder holds; None for ``none``."""
    standing = step_folders(run_dir)
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


def _newest_intact(run_dir: Path) -> LoadedCheckpoint | None:
    standing, renamed = step_folders(run_dir), damaged_folders(run_dir)
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(standing):
        try:
            newest = _read(path, lambda folder: _read_files(folder, optimizer=True))
            break
        except DamageError as error:
            damaged.append((path, str(error)))
    else:
        if not standing and not renamed:
            return None
        raise CheckpointError(
            "no checkpoint of this run is whole: "
            + "; ".join([*(f"{path.name}: {damage}" for path, damage in damaged), *(path.name for _, path in renamed)]),
            where=str(run_dir / FOLDER),
            fix="restore one from a backup; to begin anew, choose another output_dir or remove this folder",
        )
    for path, damage in damaged:
        try:
            target = rename_damaged(path)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint is damaged ({damage}) and cannot be renamed: {error.strerror}",
                where=str(path),
                fix=f"move it away; the newest one that is whole is {newest.path.name}",
            ) from error
        logger.warning(
            "the checkpoint %s is damaged: %s; it is kept as %s, and the run continues from %s",
            path.name,
            damage,
            target.name,
            newest.path.name,
        )
    return newest


def _not_a_checkpoint(path: Path) -> CheckpointError:
    if inside := list_checkpoints(path):
        return CheckpointError(
            "this is a run's folder, not a checkpoint", where=str(path), fix=f"its newest checkpoint is {inside[-1][1]}"
        )
    others = ", ".join(other.name for other in _siblings(path))
    return CheckpointError(
        f"the checkpoint is incomplete: it has no {COMPLETE}" if path.is_dir() else "there is no checkpoint",
        where=str(path),
        fix=f"complete ones are {others}" if others else "name a run's folder, or a step-... in its checkpoints",
    )


def _siblings(path: Path) -> list[Path]:
    others = list_checkpoints(path.parent.parent) if path.parent.name == FOLDER else []
    return [other for _, other in others if other.name != path.name]


# ------------------------------------------------------------------------------------------------------------ reading


def load_checkpoint(path: Path, *, optimizer: bool = True) -> LoadedCheckpoint:
    """Read a checkpoint and verify every file that is read.

    Args:
        path: the checkpoint's folder.
        optimizer: whether to read the optimizer's state, by far the largest part after full fine-tuning.

    Raises:
        CheckpointError: if it is missing, incomplete, damaged (with the run's checkpoints that are not), or of another
            version of this package.
    """
    return _verified(path, lambda folder: _read_files(folder, optimizer))


def read_head(path: Path) -> CheckpointHead:
    """Read what a checkpoint says of itself, whatever its tensors are like. Errors are those of ``load_checkpoint``."""
    return _verified(path, _read_head)


C = TypeVar("C", bound=CheckpointHead)


def _verified(path: Path, read: Callable[[ChecksummedFolder], C]) -> C:
    if not is_complete(path):
        raise _not_a_checkpoint(path)
    try:
        return _read(path, read)
    except DamageError as damage:
        if not path.is_dir():  # pruned by a running training while it was read
            raise _not_a_checkpoint(path) from None
        intact = [other.name for other in _siblings(path) if is_intact(other)]
        raise CheckpointError(
            f"the checkpoint is damaged: {damage}",
            where=str(path),
            fix=f"use another one; whole are {', '.join(intact)}"
            if intact
            else "restore it from a backup: the run has no other checkpoint that is whole",
        ) from None


def is_intact(path: Path) -> bool:
    """Whether every file of a checkpoint is as it was written; reads all of it."""
    try:
        folder = ChecksummedFolder.open(path)
        for name in folder.checksums:
            folder.verify(name)
    except (DamageError, OSError):
        return False
    return True


def _read(path: Path, read: Callable[[ChecksummedFolder], C]) -> C:
    _refuse_first_format(path)
    try:
        return read(ChecksummedFolder.open(path))
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {error}", where=str(path), fix="this is not damage: mend it and try again"
        ) from error


def _refuse_first_format(path: Path) -> None:
    """Format 1 had an empty marker; a marker that lost its content stands beside a state of a later format."""
    try:
        first = (path / COMPLETE).read_bytes() == b"" and json.loads((path / STATE).read_bytes())["format"] == 1
    except (OSError, ValueError, KeyError, TypeError):  # whatever it is, it is not format 1
        return
    if first:
        raise CheckpointError(
            "the checkpoint was written by an earlier version of this package (format 1)",
            where=str(path),
            fix="continue with the version that wrote it",
        )


def _read_head(folder: ChecksummedFolder) -> CheckpointHead:
    path, content = folder.folder, _read_object(folder, STATE)
    if (version := content.get("format")) != FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {version}, this version reads {FORMAT}",
            where=str(path),
            fix="update cogvideox-finetune",
        )
    state, processes = _read_state(content.get("state"), path), content.get("processes")
    if type(processes) is not int or processes < 1:  # True is an int, too
        raise _foreign(path, f"{STATE}: processes is {processes!r}")
    return CheckpointHead(path=path, state=state, config=_read_object(folder, CONFIG), processes=processes)


def _read_files(folder: ChecksummedFolder, optimizer: bool) -> LoadedCheckpoint:
    head = _read_head(folder)
    path, state = head.path, head.state
    trainable = _read_tensors(folder, TRAINABLE)
    ema = _read_tensors(folder, EMA) if EMA in folder or has_shares(folder, part_of(EMA)) else None
    if ema is not None:
        forms = forms_of(ema)
        if {name: form.shape for name, form in forms.items()} != {n: f.shape for n, f in forms_of(trainable).items()}:
            raise _foreign(path, f"{EMA} does not hold the tensors of {TRAINABLE}")
        if odd := [name for name, form in forms.items() if form.dtype != torch.float32]:
            raise _foreign(path, f"{EMA} holds {odd[0]} in another dtype than float32")
    # Of one file, the digest of the weights is its checksum (``tensor_files.weights_digest``).
    if state.weights and TRAINABLE in folder and state.weights != folder.checksums[TRAINABLE]:
        raise _foreign(path, f"{TRAINABLE} does not hold the weights whose digest stands in {STATE}")
    return LoadedCheckpoint(
        path=path,
        state=state,
        config=head.config,
        processes=head.processes,
        trainable=trainable,
        optimizer=(_read_tensors(folder, OPTIMIZER), _read_object(folder, OPTIMIZER_META)) if optimizer else ({}, {}),
        ema=ema,
    )


def _read_object(folder: ChecksummedFolder, name: str) -> dict[str, Any]:
    value = folder.read_json(name)
    if not isinstance(value, dict):
        raise _foreign(folder.folder, f"{name} holds a {type(value).__name__}")
    return value


def _read_tensors(folder: ChecksummedFolder, name: str) -> Mapping[str, Tensor]:
    """Of one file, or of the shares that several processes wrote in its place."""
    return Shares(folder, part_of(name)) if has_shares(folder, part_of(name)) else folder.read_tensors(name)


def _read_state(values: Any, path: Path) -> RunState:
    try:
        state = _STATE_TYPE.validate_json(json.dumps(values))
    except ValidationError as error:
        raise _foreign(path, f"{STATE}: {error}") from error
    if faults := list(_state_faults(state, path.name)):
        raise CheckpointError(
            f"the checkpoint's state contradicts itself: {'; '.join(faults)}",
            where=str(path / STATE),
            fix="it was changed after it was written: bring the file back, or use another checkpoint of the run",
        )
    return state


def _state_faults(state: RunState, name: str) -> Iterator[str]:
    named = step_of(name)
    if named is not None and named != state.step:
        yield f"step is {state.step} in {name}"
    if min(state.step, state.samples_seen) < 0:
        yield f"step is {state.step}, samples_seen {state.samples_seen}"
    loss, best = state.best_heldout_loss, state.best_step
    none = loss is None and best is None
    if not none and not (0 <= (-1 if loss is None else loss) < math.inf and 1 <= (best or 0) <= state.step):
        yield f"best_heldout_loss is {loss}, best_step {best} at step {state.step}"


def _foreign(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was written by another version of this package: {detail}",
        where=str(path),
        fix="continue with the version that wrote it, or train anew (method.init_from keeps the adapter)",
    )
