"""Where an export goes: what may be replaced there, and what killed exports have left beside it."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.load import load_transformer, pipeline_class, require_base, save_transformer
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.loading import as_path
from finetune.config.rules import pin_model
from finetune.convert.merge import Merged, adapter_scaling, merge, set_strength, tensor_checksums
from finetune.convert.model_card import command, copy_samples, model_card, training_record
from finetune.convert.source import Source, checkpoint_of, default_folder, find_source
from finetune.convert.verify import TrainedWeights, adapter_tensors, forward, verify
from finetune.core import locks
from finetune.core.checksums import folder_checksums
from finetune.core.distributed import compute_device
from finetune.core.errors import ExportError
from finetune.core.files import (
    LORA_FILE,
    PARTIAL,
    atomic_write_text,
    clear_leftovers,
    disk_fix,
    from_here,
    is_complete,
    publish_dir,
    require_space,
    require_writable,
)
from finetune.core.tensor_files import file_bytes
from finetune.inference.inputs import TRAINING_RECORD
from finetune.methods.lora import LoraMethod


def require_replaceable(folder: Path) -> Path:
    """``folder`` with its links followed, so that a link keeps pointing to the export.

    Raises:
        ExportError: if it holds something that is not an earlier export, or is the folder that the process stands in:
            replaced, it would be gone under the feet of whoever called.
    """
    real = folder.resolve()
    if real == Path.cwd():
        raise ExportError(
            "the place for the export is the folder that this command runs in",
            where=str(folder),
            fix="name a folder inside it with --output, or run the command elsewhere",
        )
    if not real.exists() or (real.is_dir() and not any(real.iterdir())):
        return real
    if not (real.is_dir() and is_complete(real) and (real / TRAINING_RECORD).is_file()):
        raise ExportError(
            "the place for the export holds something that is not an earlier export",
            where=str(folder),
            fix="name a new or empty folder with --output",
        )
    return real


@contextmanager
def arriving(folder: Path) -> Iterator[None]:
    """Undo and remove what killed exports to ``folder`` have left, unless another one is under way there.

    Raises:
        OSError: if the place cannot be written to.
    """
    users = folder.with_name(f".{folder.name}.exporting")
    try:
        with locks.hold(users, {}) as own:
            # Listed before looking: whoever made one of these and lives has said so already.
            left = [path for path in folder.parent.glob(f"*{PARTIAL}") if _is_of(path, folder)]
            if all(holder.path == own.path for holder in locks.live(users)):
                clear_leftovers(folder, left)
                locks.clear_dead(users)
            yield
    finally:
        with suppress(OSError):  # another one is there still
            users.rmdir()


def _is_of(path: Path, folder: Path) -> bool:
    unique = r"\.(\d+-[0-9a-f]{8}|[0-9a-f]{8}\.old)" + re.escape(PARTIAL)  # as files.publish_dir names them
    return re.fullmatch(re.escape(folder.name) + unique, path.name) is not None


# -------- A checkpoint in, weights for the stock diffusers pipeline out; nothing is published that does not reproduce
# the run.
#
# An adapter leaves as it is or merged into its base, a full fine-tuning as a whole transformer. Each is written into a
# partial folder, loaded again by diffusers' own code, and compared with the model as it was trained: tensor by tensor,
# and in one forward pass. Only then does the folder get its name.

_SIDE_FILES = 1 << 20
"""Bytes for the model card, the record and the marker; sampled videos come on top, and are small."""


@dataclass(frozen=True)
class ExportReport:
    """What was published, and how closely the stock pipeline reproduces the trained model."""

    folder: Path
    files: tuple[str, ...]
    """Relative to the folder, sorted."""
    step: int
    """Completed optimizer steps of the checkpoint."""
    weights: Literal["raw", "ema"]
    max_abs_diff: float
    """Largest difference of predicted velocity between the trained model and the reloaded export."""
    tolerance: float
    """What the difference may be; see ``exporting.verify.tolerance_of``."""
    merged: Merged | None = None
    """Of an adapter that was merged into its base."""
    notes: tuple[str, ...] = ()
    """What the request came to, where its words suggest something else, and whether a better checkpoint stands."""
    command: str = ""
    """Samples with it."""

    def __str__(self) -> str:
        averaged = ", averaged weights" if self.weights == "ema" else ""
        lines = [f"exported step {self.step}{averaged} to {from_here(self.folder)}: {', '.join(self.files)}"]
        lines += [str(self.merged)] if self.merged is not None else []
        lines += [f"note: {note}" for note in self.notes]
        lines.append(
            f"reloaded through the stock pipeline: largest difference {self.max_abs_diff:.2g}"
            f" (allowed {self.tolerance:.2g})"
        )
        lines += [f"next: {self.command}"] if self.command else []
        return "\n".join(lines)


def export(
    source: str | Path,
    to: str | Path | None = None,
    *,
    checkpoint: Literal["latest", "best"] = "latest",
    full_pipeline: bool = False,
    weights: Literal["auto", "ema", "raw"] = "auto",
    pretrained: str | Path | None = None,
    merged: bool = False,
    strength: float = 1.0,
) -> ExportReport:
    """Export a run or one of its checkpoints.

    A LoRA becomes ``pytorch_lora_weights.safetensors`` with its settings in the header, or merged into its base a
    ``transformer`` folder, which is what a full fine-tuning becomes in any case. All get a model card, a record for
    programs and the run's sampled videos.

    Args:
        source: a run's folder, or one checkpoint's.
        to: the export's folder, replaced if it is an earlier export; None for ``<run>/export``, or ``<run>/merged``.
        checkpoint: of a run's folder, the newest checkpoint or the one with the lowest held-out loss.
        full_pipeline: put the base's other components beside a whole transformer, so that the folder is a whole
            pipeline (hard links where the file system has them, copies elsewhere).
        weights: the moving average or the trained weights themselves; ``auto`` takes the average if one was kept.
        pretrained: where the base model is now, if not where the run had it.
        merged: put the adapter into the base's weights; a full fine-tuning is whole already, and exported as ever.
        strength: how much of the adapter is merged: 1 as trained, 0 none of it.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged; the message names those of the run that are whole.
        ModelError: if the base model cannot be found or loaded.
        ExportError: if ``to`` holds something else, the options do not fit the run, there is no room, the disk fails,
            or the reloaded export differs from the trained model; nothing is left at ``to`` but an earlier export.
    """
    source, to = as_path(source, "export: source"), None if to is None else as_path(to, "export: to")
    for option, value, known in (
        ("checkpoint", checkpoint, ("latest", "best")),
        ("weights", weights, ("auto", "ema", "raw")),
    ):
        if value not in known:
            raise ExportError(f"{option} is {value!r:.200}", where="export", fix=f"choose one of {', '.join(known)}")
    path = checkpoint_of(source, checkpoint)
    folder = to if to is not None else default_folder(path, "merged" if merged else "export")
    place = require_replaceable(folder)
    if is_complete(path):  # else it is refused for that, and no folder is made
        # Reading a checkpoint, loading a model twice and merging take minutes.
        require_writable(place.parent, kind=ExportError, what="the export", where=str(place))
    found = find_source(path, weights, None if pretrained is None else str(pretrained))
    config = pin_model(found.config)
    found = replace(found, config=config)
    spec = read_spec(config.model.pretrained, config.model.revision)
    _require_sense(found, full_pipeline=full_pipeline, merged=merged, strength=strength)
    device = compute_device()
    outcome: list[tuple[float, float, Merged | None]] = []

    def fill(partial: Path) -> str:
        trained = _write_weights(found, spec, partial, device, strength if merged and found.lora else None)
        _free()  # from here on the trained transformer is gone: never two in memory
        difference, tolerance = verify(partial, found, spec, trained, device)
        outcome.append((difference, tolerance, trained.merged))
        samples = copy_samples(found, trained.merged, partial)
        record = training_record(found, spec, trained.merged, max_abs_diff=difference, tolerance=tolerance)
        atomic_write_text(partial / TRAINING_RECORD, record)
        card = model_card(
            found, spec, trained.merged, name=from_here(folder), samples=samples, full_pipeline=full_pipeline
        )
        atomic_write_text(partial / "README.md", card)
        marker = folder_checksums(partial)  # before the base's files: they are others' and large
        if full_pipeline:
            _add_components(partial, config.model)
        return marker

    try:
        with arriving(place):
            publish_dir(place, fill)
    except (OSError, SafetensorError) as error:  # the latter from the library's writer
        raise ExportError(
            f"the export cannot be written: {error}",
            where=str(folder),
            fix=disk_fix(error) if isinstance(error, OSError) else "make room, or look at the disk, and export again",
        ) from error
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    difference, tolerance, what = outcome[0]
    notes = ["a full fine-tuning is whole: merged or not, its export is the same"] if merged and not found.lora else []
    if found.config.validation.samples and not any(name.startswith("samples/") for name in files):
        notes.append(f"the card shows no video: the run sampled none with these weights of step {found.state.step}")
    notes += [found.better] if found.better else []
    if not found.state.base:
        notes.append(f"{found.checkpoint.name} does not record which base transformer it was trained on")
    return ExportReport(
        folder,
        tuple(files),
        found.state.step,
        found.weights,
        difference,
        tolerance,
        merged=what,
        notes=tuple(notes),
        command=command(found, spec, from_here(folder), adapter=found.lora and not merged),
    )


def _require_sense(found: Source, *, full_pipeline: bool, merged: bool, strength: float) -> None:
    if full_pipeline and found.lora and not merged:
        raise ExportError(
            "a LoRA has no pipeline of its own",
            where="--full-pipeline",
            fix="leave the option out (the adapter is loaded onto the base pipeline), or add --merged",
        )
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ExportError("it is not a number", where=f"--strength {strength}", fix="give 1 (as trained), 0.8, ...")
    if strength != 1 and not (merged and found.lora):
        raise ExportError(
            "the strength of an adapter is chosen where it is loaded"
            if found.lora
            else "a full fine-tuning has no strength: nothing of the base is kept apart from it",
            where=f"--strength {strength:g}",
            fix="add --merged, or leave the option out" if found.lora else "leave the option out",
        )


# ------------------------------------------------------------------------------------------------------------- writing


def _write_weights(
    found: Source, spec: ModelSpec, folder: Path, device: torch.device, merge_at: float | None
) -> TrainedWeights:
    """Rebuild the model as it was trained, note what it computes, and write its weights.

    Args:
        found: the checkpoint.
        spec: of the model.
        folder: where to.
        device: to compute on.
        merge_at: the strength to merge an adapter at; None to write it as it is, or what is no adapter.
    """
    config = found.config
    transformer = load_transformer(config.model, device=device)
    require_base(
        transformer,
        found.state.base,
        ExportError,
        by="the run",
        where=f"{config.model.pretrained}, transformer, against {found.checkpoint}",
        fix="name their folder with --model",
    )
    # Where the adapter began is of no matter any more, and its file may be gone.
    method = config.method.model_copy(update={"init_from": None}) if found.lora else config.method
    method.apply(transformer, seed=config.train.seed)
    own = method.trainable(transformer)
    # An average is kept in float32 also where the weights are narrower.
    method.load_state(
        transformer, {name: t.to(own[name].dtype) if name in own else t for name, t in found.tensors.items()}
    )
    transformer.eval()
    if merge_at is not None:
        return _write_merged(transformer, spec, folder, device, merge_at)
    velocity = forward(transformer, spec, device)
    if isinstance(method, LoraMethod):
        _require_room(folder, file_bytes(method.peft_state(transformer)))
        _save_adapter(spec, folder, method.peft_state(transformer), method.lora_metadata(transformer))
        return TrainedWeights(velocity, adapter_tensors(transformer), adapter_scaling(transformer))
    _require_room(folder, file_bytes(transformer.state_dict()))
    save_transformer(transformer, folder / "transformer")
    # The tensors stay in the checkpoint's file, which is mapped, not read.
    return TrainedWeights(velocity, found.tensors, {})


def _write_merged(
    transformer: Any, spec: ModelSpec, folder: Path, device: torch.device, strength: float
) -> TrainedWeights:
    set_strength(transformer, strength)
    if strength == 0:  # DoRA's magnitudes act at any strength
        transformer.disable_adapters()
    velocity = forward(transformer, spec, device)
    merged = merge(transformer, strength)
    _require_room(folder, file_bytes(transformer.state_dict()))
    save_transformer(transformer, folder / "transformer")
    return TrainedWeights(velocity, {}, {}, tensor_checksums(transformer.state_dict()), merged)


def _save_adapter(spec: ModelSpec, folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    pipeline_class(spec).save_lora_weights(
        str(folder),
        transformer_lora_layers={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        transformer_lora_adapter_metadata=dict(settings),
        weight_name=LORA_FILE,
    )


def _add_components(folder: Path, model: ModelConfig) -> None:
    """Put the base's other components beside the transformer."""
    others = ["scheduler", "text_encoder", "tokenizer", "vae"]
    base = resolve_pretrained(model.pretrained, model.revision, components=others)
    files = [path.stat() for name in others for path in (base / name).rglob("*") if path.is_file()]
    _require_room(
        folder, sum(file.st_size for file in files if file.st_dev != folder.stat().st_dev)
    )  # others are linked

    def link_or_copy(source: str, target: str) -> str:
        real = Path(source).resolve()  # the hub's cache keeps links
        try:
            os.link(real, target)
        except OSError:
            shutil.copyfile(real, target)
        return target

    for component in others:
        shutil.copytree(base / component, folder / component, copy_function=link_or_copy)
    shutil.copyfile(base / "model_index.json", folder / "model_index.json")


def _require_room(folder: Path, needed: int) -> None:
    require_space(
        folder,
        needed + _SIDE_FILES,
        kind=ExportError,
        what="the export",
        fix="make room, or export to another disk with --output",
    )


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
