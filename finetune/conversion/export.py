"""A checkpoint in, weights for the stock diffusers pipeline out; nothing is published that does not reproduce the run.

An adapter leaves as it is or merged into its base, a full fine-tuning as a whole transformer. Each is written into a
partial folder, loaded again by diffusers' own code, and compared with the model as it was trained: tensor by tensor,
and in one forward pass. Only then does the folder get its name.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from finetune.cogvideox.components import read_json
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.control import projection_state
from finetune.cogvideox.load import pipeline_class, require_base, save_transformer
from finetune.cogvideox.model_files import MODEL_INDEX, resolve_pretrained
from finetune.cogvideox.spec import CONTROL_PIPELINE, CONTROL_SCHEDULER, ModelSpec, spec_of
from finetune.conversion.lora_layouts import LAYOUTS, NO_DORA
from finetune.conversion.model_card import (
    ExportedModel,
    LayoutName,
    copy_samples,
    header_metadata,
    model_card,
    training_record,
)
from finetune.conversion.source import ExportSource, default_folder, find_checkpoint, read_source
from finetune.conversion.verify import (
    TrainedModel,
    Verification,
    adapter_scaling,
    seeded_velocity,
    tensor_checksums,
    verify,
)
from finetune.core import locks
from finetune.core.checksums import folder_checksums
from finetune.core.distributed import compute_device
from finetune.core.errors import ExportError
from finetune.core.files import (
    CONTROL_FILE,
    LORA_FILE,
    atomic_write_text,
    disk_fix,
    from_here,
    is_complete,
    publish_dir,
    require_space,
    require_writable,
    undo_interrupted,
)
from finetune.core.tensor_files import add_metadata, file_bytes
from finetune.core.types import DtypeName
from finetune.inference.adapters import TRAINING_RECORD
from finetune.methods.lora import LoraMethod, Merged, merge, set_strength
from finetune.methods.merged_base import load_base

_SIDE_FILES = 1 << 20
"""Bytes for the model card, the record and the marker; sampled videos come on top, and are small."""

_FOLDERS = {"diffusers": "export"}
"""In the run's folder, where no folder is named; of other layouts the layout's name."""

_OTHER_COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "vae")


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
    """What the difference may be; see ``convert.verify.tolerance_of``."""
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


@dataclass(frozen=True)
class ExportOptions:
    """What of a run is exported, and as what; ``finetune.export`` says what each word means."""

    checkpoint: Literal["latest", "best"] = "latest"
    full_pipeline: bool = False
    weights: Literal["auto", "ema", "raw"] = "auto"
    pretrained: str | None = None
    layout: Literal["diffusers", "comfyui", "kohya", "peft", "merged"] = "diffusers"
    strength: float = 1.0
    dtype: DtypeName | None = None
    max_shard_size: int | str = "5GB"

    @property
    def merged(self) -> bool:
        """Whether an adapter goes into its base."""
        return self.layout == "merged"


def export(source: Path, to: Path | None, options: ExportOptions) -> ExportReport:
    """Export a run or one of its checkpoints; errors stand at ``finetune.export``."""
    path = find_checkpoint(source, options.checkpoint)
    folder = to if to is not None else default_folder(path, _FOLDERS.get(options.layout, options.layout))
    target = _replaceable(folder)
    if is_complete(path):  # else it is refused for that, and no folder is made
        # Reading a checkpoint, loading a model twice and merging take minutes.
        require_writable(target.parent, kind=ExportError, what="the export", where=str(target))
    run = read_source(path, options.weights, options.pretrained, options.dtype)
    spec = spec_of(run.config.model)
    _require_sense(run, options, spec)
    outcome: list[tuple[ExportedModel, Verification]] = []

    def fill(partial: Path) -> str:
        outcome.append(_write(partial, run, spec, options, name=from_here(folder)))
        marker = folder_checksums(partial)  # before the base's files: they are others' and large
        if options.full_pipeline:
            _add_components(partial, run.config.model, spec)
        return marker

    try:
        with _only_writer(target):
            publish_dir(target, fill)
    except (OSError, SafetensorError) as error:  # the latter from the library's writer
        raise ExportError(
            f"the export cannot be written: {error}",
            where=str(folder),
            fix=disk_fix(error) if isinstance(error, OSError) else "make room, or look at the disk, and export again",
        ) from error
    ((model, verification),) = outcome
    files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    return ExportReport(
        folder,
        files,
        run.state.step,
        run.weights,
        verification.max_abs_diff,
        verification.tolerance,
        merged=model.merged,
        notes=tuple(_notes(run, options, shows_video=any(name.startswith("samples/") for name in files))),
        command=model.command,
    )


def _require_sense(run: ExportSource, options: ExportOptions, spec: ModelSpec) -> None:
    strength, is_adapter = f"--strength {options.strength:g}", run.trains_adapter and not options.merged
    method = run.config.method
    faults = (
        (
            spec.control and is_adapter and options.layout != "diffusers",
            "no other program loads a LoRA that follows a control video: the projection that trained beside it is more"
            " than a LoRA",
            f"--to {options.layout}",
            "leave the option out, or write --to merged",
        ),
        (
            options.full_pipeline and is_adapter,
            "an adapter has no pipeline of its own",
            "--full-pipeline",
            "leave the option out (the adapter is loaded onto the base pipeline), or add --to merged",
        ),
        (
            options.strength != 1 and not run.trains_adapter,
            "a full fine-tuning has no strength: nothing of the base is kept apart from it",
            strength,
            "leave the option out",
        ),
        (
            options.strength != 1 and not options.merged,
            "the strength of an adapter is chosen where it is loaded",
            strength,
            "add --to merged, or leave the option out",
        ),
        (
            options.layout in get_args(LayoutName) and options.layout != "diffusers" and not run.trains_adapter,
            "a full fine-tuning is no adapter, and this is a layout of adapters",
            f"--to {options.layout}",
            "leave the option out: the export is a transformer in diffusers' format, which kijai's wrapper reads too",
        ),
        (
            run.is_lokr and options.layout in get_args(LayoutName) and options.layout != "diffusers",
            "a LoKr has other tensors than the LoRA that this layout is of",
            f"--to {options.layout}",
            "leave the option out for a file that diffusers' transformers load, or write --to merged",
        ),
        (
            is_adapter
            and options.layout in LAYOUTS
            and not LAYOUTS[options.layout].takes_dora
            and isinstance(method, LoraMethod)
            and method.use_dora,
            f"no file of this layout acts as the DoRA was trained: {NO_DORA}",
            f"--to {options.layout}",
            "leave the option out, or write --to peft, or --to merged",
        ),
        (
            options.dtype is not None and is_adapter,
            "an adapter keeps its float32: it is small, and whoever loads it casts it",
            f"--dtype {options.dtype}",
            "leave the option out, or add --to merged",
        ),
    )
    for is_fault, what, where, fix in faults:
        if is_fault:
            raise ExportError(what, where=where, fix=fix)


def _notes(run: ExportSource, options: ExportOptions, *, shows_video: bool) -> Iterator[str]:
    if options.merged and not run.trains_adapter:
        yield "a full fine-tuning is whole: merged or not, its export is the same"
    if run.is_lokr and not options.merged:
        yield (
            "load_lora_weights of the pipeline refuses a LoKr; load the file as the card shows, with"
            " pipeline.transformer.load_lora_adapter"
        )
    if run.config.validation.samples and not shows_video:
        yield f"the card shows no video: the run sampled none with these weights of step {run.state.step}"
    if run.better_checkpoint:
        yield run.better_checkpoint
    if not run.state.base:
        yield f"{run.checkpoint.name} does not record which base transformer it was trained on"


# ------------------------------------------------------------------------------------------------- where it is written


def _replaceable(folder: Path) -> Path:
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
    is_free = not real.exists() or (real.is_dir() and not any(real.iterdir()))
    if not is_free and not (real.is_dir() and is_complete(real) and (real / TRAINING_RECORD).is_file()):
        raise ExportError(
            "the place for the export holds something that is not an earlier export",
            where=str(folder),
            fix="name a new or empty folder with --output",
        )
    return real


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Write to ``folder`` as the only export that does; what killed ones have left is undone and removed.

    Raises:
        ExportError: if another one is under way there.
        OSError: if the place cannot be written to.
    """
    with ExitStack() as lock:
        try:
            path = folder.with_name(f".{folder.name}.lock")
            lock.enter_context(locks.hold_alone(path, "export", logging.getLogger(__name__).warning))
        except locks.HeldError as holder:
            raise ExportError(
                f"another export to this folder is under way: {holder}",
                where=str(folder),
                fix="wait for it, or name another folder with --output",
            ) from None
        except locks.NoLocksError:
            pass  # what lies there may be another's
        else:
            undo_interrupted(folder.parent, folder.name)
        yield


# ------------------------------------------------------------------------------------------------------ what is written


def _write(
    folder: Path, run: ExportSource, spec: ModelSpec, options: ExportOptions, *, name: str
) -> tuple[ExportedModel, Verification]:
    """Write weights, record, card and samples into ``folder``, the weights verified."""
    config, device = run.config, compute_device()
    transformer = _trained_transformer(run, device)
    merges = options.merged and run.trains_adapter
    if merges:
        set_strength(transformer, options.strength)
        if options.strength == 0:  # DoRA's magnitudes act at any strength
            transformer.disable_adapters()
    velocity = seeded_velocity(transformer, spec, device)
    merged = merge(transformer, options.strength) if merges else None
    model = ExportedModel(run, spec, merged, name, options.layout, options.full_pipeline)
    samples = copy_samples(model, folder)
    if model.is_adapter:
        _save_adapter(transformer, model, folder)
    else:
        _require_room(folder, file_bytes(transformer.state_dict()))
        save_transformer(transformer, folder / "transformer", max_shard_size=options.max_shard_size)
    trained = TrainedModel(
        velocity, tensor_checksums(transformer, config.model.torch_dtype()), adapter_scaling(transformer)
    )
    del transformer  # never two in memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    verification = verify(folder, trained, config.model, spec, device, where=str(run.checkpoint))
    if model.is_adapter and options.layout != "diffusers":
        _rename_adapter(model, folder)
    atomic_write_text(folder / TRAINING_RECORD, training_record(model, verification))
    atomic_write_text(folder / "README.md", model_card(model, samples))
    return model, verification


def _trained_transformer(run: ExportSource, device: torch.device) -> Any:
    """The model as it was trained: the base, the method applied to it, and the checkpoint's tensors."""
    config = run.config
    transformer = load_base(config.model, device=device)
    require_base(
        transformer,
        run.state.base,
        ExportError,
        by="the run",
        where=f"{config.model.pretrained}, transformer, against {run.checkpoint}",
        fix="name their folder with --model",
    )
    # Where the adapter began is of no matter any more, and its file may be gone.
    method = config.method
    if isinstance(method, LoraMethod):
        method = method.model_copy(update={"init_from": None})
    method.apply(transformer, seed=config.train.seed)
    parameters = method.trainable(transformer)
    # An average is kept in float32 also where the weights are narrower.
    dtypes = {name: parameters[name].dtype if name in parameters else t.dtype for name, t in run.tensors.items()}
    method.load_state(transformer, {name: t.to(dtypes[name]) for name, t in run.tensors.items()})
    return transformer.eval()


def _save_adapter(transformer: Any, model: ExportedModel, folder: Path) -> None:
    method: Any = model.source.config.method
    tensors: dict[str, Tensor] = method.peft_state(transformer)
    projection = {name: tensor.cpu().contiguous() for name, tensor in projection_state(transformer).items()}
    _require_room(folder, file_bytes(tensors) + file_bytes(projection))
    if projection:
        save_file(projection, folder / CONTROL_FILE, metadata={"format": "pt"})
    pipeline_class(model.spec).save_lora_weights(
        str(folder),
        transformer_lora_layers={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        transformer_lora_adapter_metadata=method.lora_metadata(transformer),
        weight_name=LORA_FILE,
    )
    add_metadata(folder / LORA_FILE, lambda sha256: header_metadata(model, folder, sha256))


def _rename_adapter(model: ExportedModel, folder: Path) -> None:
    """Put the verified file of diffusers' layout into another, which is read back and compared."""
    from finetune.conversion.lora_files import read_lora, write_lora

    layout: Any = model.layout
    lora, *_ = read_lora(folder / LORA_FILE)
    write_lora(
        lora,
        layout,
        folder if layout == "peft" else folder / model.adapter_file,
        model.public_base,
        lambda sha256: header_metadata(model, folder, sha256),
    )
    (folder / LORA_FILE).unlink()


def _add_components(folder: Path, model: ModelConfig, spec: ModelSpec) -> None:
    """Put the base's other components beside the transformer: linked where the file system allows it, else copied.

    Where a control video is followed, they are those of the pipeline for it, which samples with DDIM alone.
    """
    base = resolve_pretrained(model.pretrained, model.revision, components=_OTHER_COMPONENTS)
    files = [path.stat() for name in _OTHER_COMPONENTS for path in (base / name).rglob("*") if path.is_file()]
    _require_room(folder, sum(file.st_size for file in files if file.st_dev != folder.stat().st_dev))

    def link_or_copy(source: str, target: str) -> str:
        real = Path(source).resolve()  # the hub's cache keeps links
        try:
            os.link(real, target)
        except OSError:
            shutil.copyfile(real, target)
        return target

    for component in _OTHER_COMPONENTS:
        shutil.copytree(base / component, folder / component, copy_function=link_or_copy)
    shutil.copyfile(base / MODEL_INDEX, folder / MODEL_INDEX)
    if spec.control:
        index = read_json(folder / MODEL_INDEX) | {
            "_class_name": CONTROL_PIPELINE,
            "scheduler": ["diffusers", CONTROL_SCHEDULER],
        }
        atomic_write_text(folder / MODEL_INDEX, json.dumps(index, indent=2) + "\n")
        file = folder / "scheduler" / "scheduler_config.json"
        numbers = read_json(file) | {"_class_name": CONTROL_SCHEDULER}
        file.unlink()  # it may be a link to the base's
        atomic_write_text(file, json.dumps(numbers, indent=2) + "\n")


def _require_room(folder: Path, needed: int) -> None:
    require_space(
        folder,
        needed + _SIDE_FILES,
        kind=ExportError,
        what="the export",
        fix="make room, or export to another disk with --output",
    )
