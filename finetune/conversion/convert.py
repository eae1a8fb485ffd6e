"""A checkpoint of another program's in, what diffusers or SAT reads out; compared before it is published."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT, KNOWN_MODELS, MODEL_INDEX, resolve_pretrained
from finetune.cogvideox.spec import read_spec
from finetune.conversion.checkpoint_files import (
    DIFFUSERS_FILES,
    Checkpoint,
    by_component,
    files_of,
    merge_checkpoints,
    named_tensors,
)
from finetune.conversion.distributed_checkpoints import read_dcp, read_zero
from finetune.conversion.lora_conversion import (
    ReadLora,
    base_json,
    compare_own,
    compare_sat_lora,
    lora_alone,
    method_of,
    one_alpha,
    read_foreign_lora,
    write_own,
    write_sat_lora,
)
from finetune.conversion.lora_extraction import extract_lora
from finetune.conversion.lora_layouts import is_lora
from finetune.conversion.pipelines import (
    Model,
    add_sat_text,
    cast,
    checked_components,
    compare,
    complete_pipeline,
    require_room,
    write_diffusers,
    write_sat,
)
from finetune.conversion.sat import Tensors
from finetune.conversion.structure import model_of
from finetune.core.checksums import folder_checksums
from finetune.core.errors import ConfigError, ExportError
from finetune.core.files import disk_fix, from_here, publish_dir, require_writable
from finetune.core.types import DtypeName, torch_dtype
from finetune.methods.adapter import refuse_lokr, some

_READERS: Mapping[str, Callable[[Path], Tensors]] = {"ZeRO": read_zero, "DCP": read_dcp}
"""Of what is not in files that one process wrote; by ``files_of``."""


@dataclass(frozen=True)
class ConvertOptions:
    """What becomes of a source; ``finetune.convert`` says what each word means."""

    to: Literal["diffusers", "sat"] = "diffusers"
    model: str | None = None
    dtype: DtypeName | None = None
    alpha: float | None = None
    extract_lora: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What was published, and how it was compared with its source."""

    folder: Path
    kind: str
    """What the source was, such as ``SAT checkpoint of CogVideoX 5b``."""
    files: tuple[str, ...]
    """Relative to the folder, sorted."""
    comparisons: tuple[str, ...]
    """A line per component, or for an adapter."""
    notes: tuple[str, ...] = ()
    command: str = ""
    """What follows."""

    def __str__(self) -> str:
        lines = [f"converted: {self.kind}, to {from_here(self.folder)}: {some(self.files, 8)}"]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"loaded again and compared: {line}" for line in self.comparisons]
        lines += [f"next: {self.command}"] if self.command else []
        return "\n".join(lines)


def convert(source: Path, out: Path, options: ConvertOptions) -> ConversionReport:
    """Convert a checkpoint or an adapter; errors stand at ``finetune.convert``."""
    kind, paths = files_of(source)
    target = _free_folder(out)
    if options.extract_lora is not None:
        return _extract(_checkpoint(kind, paths, source), str(source), target, options, options.extract_lora)
    if kind == "diffusers folder" and options.to == "diffusers":
        raise ConfigError(
            "this is in diffusers' format already",
            where=str(source),
            fix="use it as it is, or give --to sat for a SAT checkpoint of it",
        )
    if kind != "diffusers folder":
        tensors = _READERS.get(kind, named_tensors)(paths[0])
        refuse_lokr(tensors, paths[0])
        if any(map(is_lora, tensors)):
            return _convert_lora(paths[0], lora_alone(tensors), target, options)
    if options.alpha is not None:
        raise ConfigError("a whole model has no alpha", where=f"--alpha {options.alpha:g}", fix="leave --alpha out")
    checkpoint = _checkpoint(kind, paths, source)
    if options.to == "sat":
        checkpoint = _for_sat(checkpoint, source)
    return _convert_model(checkpoint, source, target, options)


def _free_folder(out: Path) -> Path:
    """``out`` with its links followed.

    Raises:
        ExportError: if something is there, or nothing can be written there.
    """
    real = out.resolve()
    if real.exists() and not (real.is_dir() and not any(real.iterdir())):
        raise ExportError(
            "the place for the conversion is not empty", where=str(out), fix="name a new or empty folder with --out"
        )
    if real == Path.cwd():
        raise ExportError(
            "the place for the conversion is the folder that this command runs in",
            where=str(out),
            fix="name a folder inside it with --out",
        )
    require_writable(real.parent, kind=ExportError, what="the conversion", where=str(out))
    return real


def _checkpoint(kind: str, paths: list[Path], source: Path) -> Checkpoint:
    if kind == "diffusers folder":
        return _diffusers_checkpoint(source)
    read = _READERS.get(kind, named_tensors)
    merged = merge_checkpoints([by_component(read(path), path) for path in paths], source)
    return (
        replace(merged, kind=f"{merged.kind} in shares of several processes ({kind})") if kind in _READERS else merged
    )


def _diffusers_checkpoint(folder: Path) -> Checkpoint:
    """The weights of a diffusers folder: a pipeline's transformer and VAE, or a transformer alone."""
    is_pipeline = (folder / "transformer").is_dir()
    parts = {"transformer": folder / "transformer", "vae": folder / "vae"} if is_pipeline else {"transformer": folder}
    components: dict[str, Tensors] = {}
    for component, part in parts.items():
        files = [part / name for name in DIFFUSERS_FILES if (part / name).is_file()]
        if files:
            components[component] = named_tensors(files[0])
    if not components:
        raise ConfigError("the folder holds no weights in safetensors", where=str(folder), fix=COMPLETE_CHECKPOINT)
    return Checkpoint("diffusers folder", folder, components)


def _for_sat(checkpoint: Checkpoint, source: Path) -> Checkpoint:
    """What of a checkpoint SAT has in files of its own: it reads T5 as transformers has it."""
    if checkpoint.kind.startswith("SAT"):
        raise ConfigError("this is in SAT's format already", where=str(source), fix="leave --to sat out")
    own = {name: tensors for name, tensors in checkpoint.components.items() if name != "text_encoder"}
    return replace(checkpoint, components=own)


def _convert_model(checkpoint: Checkpoint, source: Path, target: Path, options: ConvertOptions) -> ConversionReport:
    where = str(source)
    named = options.model
    if named is None and (checkpoint.path / MODEL_INDEX).is_file():
        named = str(checkpoint.path)
    shapes = {
        component: {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for component, tensors in checkpoint.components.items()
    }
    json = model_of(shapes, named, where)
    checked = checked_components(checkpoint.components, json, where)
    dtype = None if options.dtype is None else torch_dtype(options.dtype)
    model = Model({name: cast(tensors, dtype) for name, tensors in checked.items()}, json, read_spec(str(json)), where)
    require_room(target, model)
    lacking: list[str] = []
    comparisons: list[str] = []

    def fill(partial: Path) -> str:
        (write_sat if options.to == "sat" else write_diffusers)(partial, model)
        comparisons.extend(map(str, compare(partial, model, options.to)))
        marker = folder_checksums(partial)  # before the base's files: they are others' and large
        if options.to == "sat":
            add_sat_text(partial, checkpoint.path)
        else:
            lacking.extend(complete_pipeline(partial, model, options.model))
        return marker

    _publish(target, fill)
    name = json.name if json.name in KNOWN_MODELS else str(options.model or checkpoint.path.name)
    notes = [f"left out, of no use: {some(checkpoint.left_out)}"] if checkpoint.left_out else []
    if lacking:
        notes.append(
            f"the source has no {', '.join(lacking)}: for a whole pipeline give --model, a folder or hub id whose files"
            " are on this machine"
        )
    command = ""
    if options.to == "diffusers":
        place = shlex.quote(from_here(target))
        command = f"finetune generate --transformer {place} --prompt '...'"
        if not lacking:
            command = f"finetune generate --model {place} --prompt '...'"
    return ConversionReport(
        target,
        f"{checkpoint.kind} of CogVideoX {name}",
        _files(target),
        tuple(comparisons),
        tuple(notes),
        command,
    )


def _extract(
    checkpoint: Checkpoint, where: str, target: Path, options: ConvertOptions, wanted: float
) -> ConversionReport:
    """A LoRA of what a full fine-tuning changed."""
    if options.model is None or options.to != "diffusers" or options.alpha is not None:
        raise ConfigError(
            "a LoRA is extracted against the model that was trained from, into diffusers' layout",
            where=where,
            fix="give --model BASE, and leave --to and --alpha out",
        )
    base = resolve_pretrained(options.model, None, components=["transformer"])
    trained = checkpoint.components.get("transformer")
    if trained is None:
        raise ConfigError("the source has no transformer", where=where, fix="name the folder or file that has")
    extracted = extract_lora(trained, _diffusers_checkpoint(base).components["transformer"], wanted, where)
    read = ReadLora(extracted.lora, "a difference", "as its rank", {})
    json, fitting = base_json(read, options.model, where)
    dtype = None if options.dtype is None else torch_dtype(options.dtype)
    lora, _ = one_alpha(read, dtype)
    comparisons: list[str] = []

    def fill(partial: Path) -> str:
        write_own(partial, lora, read, fitting, target.name)
        comparisons.append(compare_own(partial, read, json, dtype))
        return folder_checksums(partial)

    _publish(target, fill)
    place = shlex.quote(from_here(target))
    return ConversionReport(
        target,
        f"LoRA of what {checkpoint.kind} changed",
        _files(target),
        tuple(comparisons),
        (str(extracted),),
        f"finetune generate --model {shlex.quote(options.model)} --adapter {place} --prompt '...'",
    )


def _convert_lora(path: Path, tensors: Tensors, target: Path, options: ConvertOptions) -> ConversionReport:
    read = read_foreign_lora(path, tensors, options.alpha)
    json, fitting = base_json(read, options.model, str(path))
    dtype = None if options.dtype is None else torch_dtype(options.dtype)
    lora, changes = one_alpha(read, dtype)
    comparisons: list[str] = []

    def fill(partial: Path) -> str:
        if options.to == "sat":
            write_sat_lora(partial, read, dtype)
            comparisons.append(compare_sat_lora(partial, read, dtype))
        else:
            write_own(partial, lora, read, fitting, target.name)
            comparisons.append(compare_own(partial, read, json, dtype))
        return folder_checksums(partial)

    _publish(target, fill)
    scales = sorted({f"{read.scale(module):g}" for module in read.lora.ranks})
    notes = [f"its update counts {some(scales)} (alpha / rank); alpha stands {read.stated}"]
    notes += [f"its layers are those of CogVideoX {' or '.join(fitting)}"] if fitting else []
    command = ""
    if options.to == "diffusers":
        notes += changes
        place = from_here(target)
        notes.append(f"to train it further: {method_of(lora, json, place)}")
        base = options.model or (fitting[0] if len(fitting) == 1 else "BASE")  # what is converted names none
        command = f"finetune generate --model {shlex.quote(base)} --adapter {shlex.quote(place)} --prompt '...'"
    return ConversionReport(
        target,
        f"LoRA of {len(read.lora.ranks)} layers in {read.label}",
        _files(target),
        tuple(comparisons),
        tuple(notes),
        command,
    )


def _publish(target: Path, fill: Callable[[Path], str]) -> None:
    try:
        publish_dir(target, fill)
    except (OSError, SafetensorError) as error:  # the latter from the library's writer
        raise ExportError(
            f"the conversion cannot be written: {error}",
            where=str(target),
            fix=disk_fix(error) if isinstance(error, OSError) else "make room, or look at the disk, and try again",
        ) from error


def _files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
