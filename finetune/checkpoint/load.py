"""Whole tensors out of the shares of them that several processes wrote; for one process, without torch.distributed."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    set_aside,
    step_folders,
    step_of,
)
from finetune.core.checksums import ChecksummedFolder, DamageError
from finetune.core.errors import CheckpointError
from finetune.core.files import COMPLETE, TRAINABLE, is_complete
from finetune.core.tensor_files import DTYPES_BY_NAME
from finetune.core.types import RunState

HEADER = "DCP_SHARDING_INFO"

OFFSETS = "saved_offsets"
"""Entry of a file's header, and key per tensor in it, that say where a share begins: torch's own names."""


def part_of(name: str) -> str:
    """The folder that holds what would be one file of ``name`` if one process had written it."""
    return name.removesuffix(".safetensors")


def has_shares(sealed: ChecksummedFolder, part: str) -> bool:
    """Whether a checkpoint holds ``part`` in shares."""
    return any(name.startswith(f"{part}/") for name in sealed.checksums)


class Shards(Mapping[str, Tensor]):
    """Whole tensors out of a folder of shares, put together one at a time, when they are asked for.

    Args:
        sealed: the checkpoint.
        part: the folder's name in it. Every file of it is verified now.

    Raises:
        DamageError: if a file is not as it was written, or the shares do not make up whole tensors.
        OSError: if a file cannot be read for another reason than damage.
    """

    def __init__(self, sealed: ChecksummedFolder, part: str) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = sealed.folder / part
        self._shares: dict[str, list[tuple[Any, tuple[slice, ...]]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name in sorted(name for name in sealed.checksums if name.startswith(f"{part}/")):
            sealed.verify(name)
            try:
                file: Any = safe_open(sealed.folder / name, framework="pt")
                offsets = json.loads(file.metadata()[HEADER])
                for key in file.keys():  # noqa: SIM118
                    self._add(key, file, offsets[key][OFFSETS])
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                raise DamageError(sealed.folder / name, f"holds no shares of tensors: {error}") from None
        for key, shape in self._shapes.items():
            held = sum(math.prod(place.stop - place.start for place in places) for _, places in self._shares[key])
            if held != math.prod(shape):
                raise DamageError(self.folder, f"holds {held} of {math.prod(shape)} numbers of {key}")

    def _add(self, key: str, file: Any, begins: list[int]) -> None:
        sizes = file.get_slice(key).get_shape()
        places = tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))
        self._shares.setdefault(key, []).append((file, places))
        known = self._shapes.get(key, tuple(0 for _ in places))
        self._shapes[key] = tuple(max(size, place.stop) for size, place in zip(known, places, strict=True))

    def __getitem__(self, key: str) -> Tensor:
        shares = self._shares[key]
        whole: Tensor | None = None
        for file, places in shares:
            share = file.get_tensor(key)
            if whole is None:
                whole = torch.empty(self._shapes[key], dtype=share.dtype)
            whole[places] = share
        assert whole is not None  # a key is there because a share of it is
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def forms(self) -> dict[str, Tensor]:
        """Shape and dtype of every whole tensor, as a tensor without content; nothing is read for it."""
        return {key: self._form(key) for key in self}

    def _form(self, key: str) -> Tensor:
        file, _ = self._shares[key][0]
        return torch.empty(self._shapes[key], dtype=DTYPES_BY_NAME[file.get_slice(key).get_dtype()], device="meta")


def forms_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of these shapes and dtypes, without reading any that is in shares."""
    return tensors.forms() if isinstance(tensors, Shards) else tensors


# -------- Reading a checkpoint, byte for byte as it was written or not at all, and which one a run continues from.

logger = logging.getLogger(__name__)

_STATE_TYPE = TypeAdapter(RunState)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint as read: tensors on the CPU, files verified."""

    path: Path
    state: RunState
    trainable: Mapping[str, Tensor]
    """What trains, by name. If several processes wrote it in shares, these are put together when asked for."""
    optimizer: tuple[Mapping[str, Tensor], dict[str, Any]]
    """As ``optim.optimizer_state`` gave it; empty where it was not asked for."""
    ema: Mapping[str, Tensor] | None
    config: dict[str, Any]
    """The resolved configuration, as JSON."""
    processes: int
    """How many processes trained."""


# ----------------------------------------------------------------------------------------------------------- choosing


def choose_checkpoint(run_dir: Path, resume: str | Path) -> LoadedCheckpoint | None:
    """Read the checkpoint that ``CheckpointConfig.resume`` means, or None to begin at step 0.

    With ``latest`` this is the newest one that is whole. Damaged ones that are newer are renamed (``set_aside``) with
    a warning, so that nothing takes them for checkpoints again. With several processes, for the main one alone: the
    others read what it has chosen.

    Raises:
        CheckpointError: if a named checkpoint is missing or damaged; if there are checkpoints and none is whole, for
            then nobody can say that beginning anew is what was meant; or if the run that would follow could be mixed up
            with checkpoints that ``run_dir`` holds already.
    """
    if resume == "latest":
        return _newest_intact(run_dir)
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
    return load_checkpoint(chosen)


def _newest_intact(run_dir: Path) -> LoadedCheckpoint | None:
    standing, aside = step_folders(run_dir), damaged_folders(run_dir)
    damaged: list[tuple[Path, str]] = []
    for _, path in reversed(standing):
        try:
            found = _read_or_say(path, optimizer=True)
            break
        except DamageError as error:
            damaged.append((path, str(error)))
    else:
        if not standing and not aside:
            return None
        raise CheckpointError(
            "no checkpoint of this run is whole: "
            + "; ".join([*(f"{path.name}: {damage}" for path, damage in damaged), *(path.name for _, path in aside)]),
            where=str(run_dir / FOLDER),
            fix="restore one from a backup; to begin anew, choose another output_dir or remove this folder",
        )
    for path, damage in damaged:
        try:
            kept = set_aside(path)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint is damaged ({damage}) and cannot be renamed: {error.strerror}",
                where=str(path),
                fix=f"move it away; the newest one that is whole is {found.path.name}",
            ) from error
        logger.warning(
            "the checkpoint %s is damaged: %s; it is kept as %s, and the run continues from %s",
            path.name,
            damage,
            kept.name,
            found.path.name,
        )
    return found


def _not_a_checkpoint(path: Path) -> CheckpointError:
    inside = list_checkpoints(path)
    if inside:
        return CheckpointError(
            "this is a run's folder, not a checkpoint", where=str(path), fix=f"its newest checkpoint is {inside[-1][1]}"
        )
    what = f"the checkpoint is incomplete: it has no {COMPLETE}" if path.is_dir() else "there is no checkpoint"
    others = list_checkpoints(path.parent.parent) if path.parent.name == FOLDER else []
    return CheckpointError(
        what,
        where=str(path),
        fix=f"complete ones are {', '.join(other.name for _, other in others)}"
        if others
        else "name a run's folder, or a step-... in its checkpoints",
    )


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
    if not is_complete(path):
        raise _not_a_checkpoint(path)
    try:
        return _read_or_say(path, optimizer=optimizer)
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
        sealed = ChecksummedFolder.open(path)
        for name in sealed.checksums:
            sealed.verify(name)
    except (DamageError, OSError):
        return False
    return True


def _siblings(path: Path) -> list[Path]:
    others = list_checkpoints(path.parent.parent) if path.parent.name == FOLDER else []
    return [other for _, other in others if other.name != path.name]


def _read_or_say(path: Path, *, optimizer: bool) -> LoadedCheckpoint:
    try:
        return _read(path, optimizer)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint cannot be read: {error}", where=str(path), fix="this is not damage: mend it and try again"
        ) from error


def _read(path: Path, optimizer: bool) -> LoadedCheckpoint:
    _refuse_format_1(path)
    sealed = ChecksummedFolder.open(path)
    content = _dict(sealed, STATE)
    if (version := content.get("format")) != FORMAT:
        raise CheckpointError(
            f"the checkpoint has format {version}, this version reads {FORMAT}",
            where=str(path),
            fix="update cogvideox-finetune",
        )
    trainable = _tensors(sealed, TRAINABLE)
    ema = _tensors(sealed, EMA) if EMA in sealed or has_shares(sealed, part_of(EMA)) else None
    if ema is not None and _shapes(ema) != _shapes(trainable):
        raise _foreign(path, f"{EMA} does not hold the tensors of {TRAINABLE}")
    if ema is not None and (odd := [name for name, form in forms_of(ema).items() if form.dtype != torch.float32]):
        raise _foreign(path, f"{EMA} holds {odd[0]} in another dtype than float32")
    state = _run_state(content.get("state"), path)
    # Of one file, the digest of the weights is its checksum (``tensor_files.weights_digest``).
    if state.weights and TRAINABLE in sealed and state.weights != sealed.checksums[TRAINABLE]:
        raise _foreign(path, f"{TRAINABLE} does not hold the weights whose digest stands in {STATE}")
    return LoadedCheckpoint(
        path=path,
        state=state,
        trainable=trainable,
        optimizer=(_tensors(sealed, OPTIMIZER), _dict(sealed, OPTIMIZER_META)) if optimizer else ({}, {}),
        ema=ema,
        config=_dict(sealed, CONFIG),
        processes=_processes(content.get("processes"), path),
    )


def _refuse_format_1(path: Path) -> None:
    """Format 1 had an empty marker; a marker that lost its content stands beside a state of a later format."""
    try:
        if (path / COMPLETE).read_bytes() == b"" and json.loads((path / STATE).read_bytes())["format"] == 1:
            raise CheckpointError(
                "the checkpoint was written by an earlier version of this package (format 1)",
                where=str(path),
                fix="continue with the version that wrote it",
            )
    except (OSError, ValueError, KeyError, TypeError):  # whatever it is, it is not format 1
        return


def _dict(sealed: ChecksummedFolder, name: str) -> dict[str, Any]:
    value = sealed.read_json(name)
    if not isinstance(value, dict):
        raise _foreign(sealed.folder, f"{name} holds a {type(value).__name__}")
    return value


def _run_state(values: Any, path: Path) -> RunState:
    try:
        # By the constructor as well: pydantic would pass over a field that it does not know.
        state = RunState(**values)
        _STATE_TYPE.validate_json(json.dumps(values), strict=True)
    except (TypeError, ValidationError) as error:
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


def _processes(value: Any, path: Path) -> int:
    if type(value) is not int or value < 1:  # True is an int, too
        raise _foreign(path, f"{STATE}: processes is {value!r}")
    return value


def _tensors(sealed: ChecksummedFolder, name: str) -> Mapping[str, Tensor]:
    """Of one file, or of the shares that several processes wrote in its place."""
    return Shards(sealed, part_of(name)) if has_shares(sealed, part_of(name)) else sealed.read_tensors(name)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in forms_of(tensors).items()}


def _foreign(path: Path, detail: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint was written by another version of this package: {detail}",
        where=str(path),
        fix="continue with the version that wrote it, or train anew (method.init_from keeps the adapter)",
    )
