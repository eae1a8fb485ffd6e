"""What an ``--adapter`` turns out to be (a file, an export, a checkpoint or a run), and whether a base is its own."""

from __future__ import annotations

import functools
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from torch import Tensor, nn

from finetune.checkpoint.folders import step_folders
from finetune.checkpoint.load import CheckpointHead, load_checkpoint, read_head
from finetune.cogvideox.components import read_json
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.control import Projections
from finetune.cogvideox.load import build_pipeline, require_base
from finetune.cogvideox.model_files import canonical_name, is_hub_id, known_model, published_variant
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.document import Document
from finetune.core.checksums import digest_file, digest_of
from finetune.core.errors import ConfigError, FinetuneError, ModelError, is_out_of_memory
from finetune.core.files import CONTROL_FILE, TRAINABLE
from finetune.core.tensor_files import weights_digest
from finetune.core.text import holds_word
from finetune.core.types import SamplePrompt
from finetune.inference.request import AdapterArgument
from finetune.methods.adapter import COMPONENT, foreign_layout, is_lokr, read_adapter, read_lora_file, sha256_of
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod, is_lora

_log = logging.getLogger(__name__)

TRAINING_RECORD = "finetune.json"
"""Beside an export's weights: what it was trained on and with, for programs (the model card is for people)."""

MAX_FPS = 1000
"""The most that is taken from a record; who wants more says so."""

_STRUCTURE = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "patch_size",
    "patch_size_t",
    "use_rotary",
    "use_learned_positions",
    "ofs_embed_dim",
    "text_embed_dim",
    "latent_channels",
    "snr_shift_scale",
)
"""Numbers in which two models differ that are not the same one; the five published ones all do."""


_LAYER_END = re.compile(r"\.(?=lo(?:ra|kr)_)")
"""Between a layer's name and its adapter's."""


class BaseAdapter(BaseModel):
    """A LoRA that was a part of the base that an adapter was trained on."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Of its file."""
    strength: float
    sha256: str
    """Of its file."""


class TrainingRecord(BaseModel):
    """What a training says of itself. Only advice: a value that is not what it should be counts as absent."""

    model_config = ConfigDict(frozen=True, strict=True)

    base_model: str = ""
    revision: str | None = None
    base_digest: str | None = None
    base_facts: dict[str, Any] = {}
    """``base_numbers`` of the base."""
    base_adapters: list[BaseAdapter] = []
    """What was merged into the base before the training."""
    image_to_video: bool | None = None
    control: bool = False
    """Whether it follows a control video."""
    buckets: list[str] = []
    fps: float | None = Field(None, gt=0, le=MAX_FPS)
    trigger: str | None = None
    condition_frames: str | None = None
    """Kind of ``data.condition_frames``; None where it is not known."""
    riflex: int | None = Field(None, ge=1, le=100_000)

    @field_validator("*", mode="wrap")
    @classmethod
    def _only_advice(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return cls.model_fields[str(info.field_name)].default


def read_record(folder: Path) -> TrainingRecord | None:
    """What an export says of its training; None for a file from elsewhere."""
    try:
        content = read_json((folder if folder.is_dir() else folder.parent) / TRAINING_RECORD)
    except ModelError:
        return None
    return TrainingRecord.model_validate(content)


def base_numbers(spec: ModelSpec) -> dict[str, Any]:
    """What a training record keeps of its base, JSON types: enough to tell it from another model."""
    return {name: asdict(spec)[name] for name in _STRUCTURE}


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as found on disk, by diffusers' names."""

    adapter: AdapterArgument
    tensors: Mapping[str, Tensor]
    """Such as ``transformer.transformer_blocks.0.attn1.to_q.lora_A.weight``."""
    record: TrainingRecord | None
    """None for a file from elsewhere."""
    settings: Mapping[str, Any] | None = None
    """Rank, alpha and so on as ``load_lora_into_transformer`` takes them; None: they stand in the file."""
    projection: Mapping[str, Tensor] = field(default_factory=dict)
    """What trained beside it where it follows a control video (``control.updates_of``)."""
    note: str = ""
    """Which of several things was taken."""
    checkpoint: Path | None = None
    """The one that was taken of a run's."""

    @property
    def found(self) -> Path:
        """What was read: a run has another newest checkpoint later on."""
        return self.checkpoint or self.adapter.path

    @cached_property
    def digest(self) -> str:
        """Of what decides what it does: its file, or its tensors and settings where they were put together."""
        projection = {"projection": weights_digest(self.projection)} if self.projection else {}
        if self.settings is None:
            file = digest_file(self.adapter.file)
            return digest_of({"file": file, **projection}) if projection else file
        return digest_of({"tensors": weights_digest(self.tensors), "settings": dict(self.settings), **projection})

    @cached_property
    def sha256(self) -> str:
        """Of its file."""
        return sha256_of(self.adapter.file, self.where)

    @property
    def is_lokr(self) -> bool:
        """Whether it is a LoKr, which the transformer loads and the pipeline refuses."""
        return is_lokr(self.tensors)

    @property
    def where(self) -> str:
        """For messages."""
        return f"--adapter {self.adapter.path}"


def base_adapters(model: ModelConfig) -> list[dict[str, Any]]:
    """What a training record keeps of the adapters in its base, JSON types."""
    return [
        {"name": adapter.file.name, "strength": adapter.strength, "sha256": adapter.sha256}
        for adapter in model.adapters
    ]


# -------------------------------------------------------------------------------------------------------------- reading


def read_sources(
    adapters: Iterable[AdapterArgument],
) -> tuple[dict[Path, AdapterSource], list[FinetuneError]]:
    """Find and read adapters, each path once; with what is wrong with those that cannot be used.

    Returns:
        By path: the adapter as first named with a strength other than 0, so that it is known which of them act.
    """
    sources: dict[Path, AdapterSource] = {}
    faults: list[FinetuneError] = []
    for adapter in sorted(dict.fromkeys(adapters), key=lambda adapter: adapter.strength == 0):
        if adapter.path in sources:
            continue
        try:
            sources[adapter.path] = _read(adapter)
        except FinetuneError as fault:
            faults.append(fault)
    return sources, faults


def _read(adapter: AdapterArgument) -> AdapterSource:
    path, where = adapter.path, f"--adapter {adapter.path}"
    if not math.isfinite(adapter.strength):
        raise ConfigError(f"strength {adapter.strength} is not a number", where=where)
    checkpoints = step_folders(path)
    if checkpoints or (path / "state.json").is_file() or (path / TRAINABLE).is_file():
        try:
            return _from_checkpoint(adapter, checkpoints[-1][1] if checkpoints else path)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the checkpoint's config.json is none of this package: {error!r:.100}",
                where=where,
                fix="bring it back, or use another checkpoint of the run",
            ) from error
    if (path / "transformer" / "config.json").is_file():
        raise ConfigError("this is a whole transformer, no adapter", where=where, fix=f"give --transformer {path}")
    return _from_file(adapter, where)


def base_now(head: CheckpointHead) -> str:
    """Where a checkpoint's base model is: as its run has it in ``config.yaml``, where the recorded folder is gone.

    Who moves a project and goes on with the run has it there; what is trained is compared with the base's digest.
    """
    recorded = str(head.config["model"]["pretrained"])
    run = head.path.parent.parent / "config.yaml"
    if Path(recorded).is_absolute() and not Path(recorded).exists() and run.is_file():
        with suppress(FinetuneError):
            now = Document.read(run).values.get("model")
            if isinstance(now, dict) and Path(str(now.get("pretrained"))).is_dir():
                return str(now["pretrained"])
    return recorded


def _from_checkpoint(adapter: AdapterArgument, checkpoint: Path) -> AdapterSource:
    """The adapter as ``export`` would write it, the moving average where one was kept, without the comparison."""
    loaded = load_checkpoint(checkpoint, optimizer=False)
    method, model, data = (loaded.config[section] for section in ("method", "model", "data"))
    model = {**model, "pretrained": base_now(loaded)}
    if method["kind"] == "full":
        raise ConfigError(
            "the run trained the whole transformer, no adapter",
            where=f"--adapter {adapter.path}",
            fix=f"run `finetune export {adapter.path}`, and give --transformer the export",
        )
    trained = loaded.trainable if loaded.ema is None else loaded.ema
    tensors = {name: trained[name] for name in trained if is_lora(name)}
    projection = {name: trained[name] for name in trained if name not in tensors}
    control = model.get("control", False)
    layers = sorted({_LAYER_END.split(name)[0] for name in tensors})
    kind: type[LoraMethod] | type[LokrMethod] = LokrMethod if method["kind"] == "lokr" else LoraMethod
    settings = kind.model_validate(method).peft_settings(layers)
    numbers: dict[str, Any] = {}
    if Path(model["pretrained"]).is_dir():  # of others a name says as much
        try:
            numbers = base_numbers(read_spec(model["pretrained"], control=control))
        except ModelError:
            numbers = {}
    record = TrainingRecord(
        base_model=model["pretrained"],
        revision=model.get("revision"),
        base_digest=loaded.state.base or None,
        base_facts=numbers,
        control=control,
        base_adapters=[BaseAdapter(**one) for one in base_adapters(ModelConfig.model_validate(model))],
        riflex=model.get("riflex"),
        **{name: data[name] for name in ("buckets", "fps", "trigger")},
        condition_frames=data.get("condition_frames", {}).get("kind"),
    )
    note, best = "", loaded.state.best_step
    if checkpoint != adapter.path:
        note = f"--adapter {adapter.path}: the run's newest checkpoint is used, step {loaded.state.step}"
        if best is not None and best != loaded.state.step:
            note += f"; the lowest held-out loss is step {best}'s: --adapter {checkpoint.with_name(f'step-{best:08d}')}"
    named = {f"{COMPONENT}.{name}": tensors[name] for name in tensors}
    stated = {f"{COMPONENT}.{name}": value for name, value in settings.items()}
    return AdapterSource(adapter, named, record, stated, projection, note, checkpoint)


def _from_file(adapter: AdapterArgument, where: str) -> AdapterSource:
    path, file = adapter.path, adapter.file
    if file.is_file() and file.suffix != ".safetensors":
        # diffusers would take it for a pickle.
        raise ConfigError(f"{file.name} is no *.safetensors file", where=where, fix="convert or rename it")
    if not file.is_file():
        if path.is_dir() and (known := foreign_layout([], path)):
            raise ConfigError(known[0], where=where, fix=known[1])
        raise ConfigError(
            f"the folder holds no {file.name}" if path.is_dir() else "there is no such file or folder",
            where=where,
            fix="give a LoRA safetensors file, an export's folder, a checkpoint or a run's folder",
        )
    tensors, settings = read_lora_file(file, where)
    if is_lokr(tensors) and all(name.startswith(f"{COMPONENT}.") for name in tensors):
        return AdapterSource(adapter, tensors, read_record(path))
    if not any(name.startswith(f"{COMPONENT}.") and ".lora_A" in name for name in tensors):
        # diffusers would load nothing from such a file, and only log a warning.
        what, fix = foreign_layout(tensors, file) or _unknown_layout(tensors, file)
        what = f"the file holds no LoRA for a diffusers transformer (tensors named transformer.*.lora_A.weight): {what}"
        raise ConfigError(what, where=where, fix=fix)
    if settings and not any(name.startswith(f"{COMPONENT}.") for name in settings):
        _require_scale_1(file, where)
    _require_true_ranks(settings, {len(t) for name, t in tensors.items() if ".lora_A" in name and t.ndim}, where)
    beside = file.with_name(CONTROL_FILE)
    projection = read_lora_file(beside, where)[0] if path.is_dir() and beside.is_file() else {}
    return AdapterSource(adapter, tensors, read_record(path), projection=projection)


def _unknown_layout(names: Iterable[str], file: Path) -> tuple[str, str]:
    names = [name for name in names if "transformer_blocks." in name]
    if any(".lora_A" in name for name in names):
        return f"its names lack the leading {COMPONENT}.", f"run `finetune convert {file} --out FOLDER`, and name that"
    if names:
        return "it looks like a whole transformer", "give the folder that it stands in with --transformer"
    return "its tensors' names are unknown", "convert it to diffusers' names"


def _require_scale_1(file: Path, where: str) -> None:
    """Refuse settings in a header that diffusers does not read, such as finetrainers', where they would matter."""
    scale = read_adapter(file, "--adapter").scale
    if scale is None or not math.isclose(scale, 1.0, rel_tol=1e-5):
        trained = "differently by layer" if scale is None else f"{scale:g}"
        raise ConfigError(
            f"its update would count 1 and was trained to count {trained}: its alpha stands in the header where"
            " diffusers does not look for it",
            where=where,
            fix=f"run `finetune convert {file} --out FOLDER`, and name that",
        )


def _require_true_ranks(settings: Mapping[str, Any], ranks: set[int], where: str) -> None:
    """Refuse a header with ranks that the tensors do not have: a layer of that size would be made first."""
    claimed = [value for key, value in settings.items() if key.rpartition(".")[2] == "r"]
    for pattern in [value for key, value in settings.items() if key.endswith("rank_pattern") and value]:
        if not isinstance(pattern, dict):
            raise ConfigError("its settings in the header cannot be read", where=where)
        claimed += pattern.values()
    if wrong := [value for value in claimed if value not in [*ranks]]:
        what = f"its header claims a rank of {wrong[0]!s:.30}, and its tensors have {sorted(ranks)}"
        raise ConfigError(what, where=where, fix="fetch or export it again")


def transformer_root(folder: Path) -> Path:
    """The folder whose ``transformer`` sub-folder holds the weights: ``folder`` itself, or its parent.

    Raises:
        ConfigError: if there are no transformer weights in either sense.
    """
    for root in (folder, folder.resolve().parent):
        if (root / "transformer" / "config.json").is_file() and (root == folder or folder.name == "transformer"):
            return root
    raise ConfigError(
        "there is no fine-tuned transformer",
        where=f"--transformer {folder}",
        fix="give the folder of a full fine-tuning's export, which holds transformer/config.json",
    )


# --------------------------------------------------------------------------------------------------- does the base fit?


def named_base(record: TrainingRecord, folder: Path) -> tuple[str, str | None] | None:
    """The base that a training record names, and its revision, where it can be found; else None.

    An export names a folder by its last part only, because the rest is about somebody's machine. In the run's folder
    (``RUN/export``) the run itself says where it is.
    """
    name = record.base_model
    if is_hub_id(name) or Path(name).is_absolute():
        return name, record.revision
    for _, checkpoint in reversed(step_folders(folder.resolve().parent) if name else []):
        with suppress(FinetuneError, KeyError, TypeError):
            pretrained = base_now(read_head(checkpoint))
            return (pretrained, None) if Path(pretrained).name == name else None
    return None


def base_faults(record: TrainingRecord, where: str, base: str, spec: ModelSpec) -> Iterator[ConfigError]:
    """What a training record says that ``base`` is not: its kind, its numbers or its name.

    Weights are compared by their digest where the record has one (``base_digest``); a name counts only without.
    """
    # Without a slash it is a folder's name, whatever else may have it.
    name = canonical_name(record.base_model) if "/" in record.base_model else record.base_model
    named = f", {name}" if name else ""
    fix = f"use --model {name}" if name else "use the base that it was trained on"
    here = base if Path(base).exists() else canonical_name(base)
    ours, theirs = base_numbers(spec), record.base_facts
    if not theirs and is_hub_id(name) and (variant := published_variant(name)):
        theirs = base_numbers(read_spec(str(known_model(variant)), control=record.control))
    image_to_video = record.image_to_video
    if image_to_video is None and "in_channels" in theirs and not record.control:
        image_to_video = theirs["in_channels"] != theirs.get("latent_channels")
    if spec.control and theirs.get("in_channels") == spec.latent_channels:  # the layers are the same
        theirs = {**theirs, "in_channels": spec.in_channels}
    different = [
        f"{field} is {theirs[field]} there, {ours[field]} here"
        for field in _STRUCTURE
        if theirs.get(field, ours[field]) != ours[field]
    ]
    if image_to_video not in (None, spec.image_to_video):
        kinds = ("an image-to-video", "a text-to-video")
        there, own = kinds if image_to_video else reversed(kinds)
        yield ConfigError(f"it was trained on {there} model{named}, and {base} is {own} model", where=where, fix=fix)
    elif different:
        yield ConfigError(
            f"it was trained on another model{named}, not on {base}: {', '.join(different[:3])}", where=where, fix=fix
        )
    elif not record.base_digest and is_hub_id(name) and is_hub_id(here) and name != here:
        yield ConfigError(
            f"it was trained on {name}, not on {base}",
            where=where,
            fix=f"{fix}; to try it on another base, move its file away from {TRAINING_RECORD}",
        )


def paths_of_base(sources: Mapping[Path, AdapterSource]) -> set[Path]:
    """The adapters that were merged into the base which another of ``sources`` was trained on."""
    wanted = {one.sha256 for source in sources.values() if source.record for one in source.record.base_adapters}
    return {path for path, source in sources.items() if source.settings is None and source.sha256 in wanted}


def lacking_adapters(
    adapters: Sequence[AdapterArgument], sources: Mapping[Path, AdapterSource]
) -> Iterator[ConfigError]:
    """What the base of an adapter had merged into it, and is not loaded beside it, which comes to the same.

    Args:
        adapters: that act together.
        sources: of all adapters, by path.
    """
    acting = [(sources[one.path], one.strength) for one in adapters if one.path in sources and one.strength]
    files = [(source, strength) for source, strength in acting if source.settings is None]
    for source, _ in acting:
        wanted = source.record.base_adapters if source.record is not None else []
        if wanted and any(".lora_magnitude_vector" in name for name in source.tensors):
            yield ConfigError(
                "it is a DoRA of a base with adapters merged into it, and would act on the base alone",
                where=source.where,
                fix="merge it into its base (`finetune export RUN --to merged`), and give --transformer the export",
            )
            continue
        for name, sha256 in dict.fromkeys((one.name, one.sha256) for one in wanted):
            # A file that is named twice acts by the sum, here and there.
            merged = math.fsum(one.strength for one in wanted if one.sha256 == sha256)
            beside = [strength for other, strength in files if other.sha256 == sha256]
            if not math.isclose(math.fsum(beside), merged, rel_tol=1e-5, abs_tol=1e-9):
                yield ConfigError(
                    f"it was trained on a base with {name} merged into it at strength {merged:g}, and"
                    f" {'that strength' if beside else 'that file'} is missing beside it (SHA-256 {sha256})",
                    where=source.where,
                    fix=f"give --adapter {name}:{merged:g} too; to sample without it on purpose, move the"
                    f" adapter away from {TRAINING_RECORD}",
                )


def lokr_faults(sources: Iterable[AdapterSource], *, quantised: bool) -> Iterator[ConfigError]:
    """What does not go with a LoKr.

    Args:
        sources: of all adapters that act at some time.
        quantised: whether the base's weights are held in fewer bits.
    """
    sources = list(sources)
    lokr = [source for source in sources if source.is_lokr]
    if lokr and len(lokr) < len(sources):
        what = "a LoKr and a LoRA are asked for, and diffusers loads one kind into a transformer"
        fix = "sample with one kind at a time, or merge one into the base (`finetune export RUN --to merged`)"
        yield ConfigError(what, where=lokr[0].where, fix=fix)
    if lokr and quantised:
        what = "a LoKr acts on weights in the model's own dtype, and these are held in fewer bits here"
        fix = "leave --quantize and GGUF out, or merge it first (`finetune export RUN --to merged --full-pipeline`)"
        yield ConfigError(what, where=lokr[0].where, fix=fix)


def shape_faults(source: AdapterSource, transformer: nn.Module) -> Iterator[ConfigError]:
    """What of an adapter has no place in a transformer, which may be one without content."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    misplaced = [name for name, tensor in source.tensors.items() if not _has_place(name, tensor, layers)]
    if misplaced:
        count = f"{len(misplaced)} of {len(source.tensors)}"
        yield _misfit(source, f"{count} tensors have no place, such as {min(misplaced)}")


def _has_place(name: str, tensor: Tensor, layers: Mapping[str, nn.Linear]) -> bool:
    layer, part = (*_LAYER_END.split(name.removeprefix(f"{COMPONENT}."), 1), "")[:2]
    linear = layers.get(layer)
    if linear is None or not name.startswith(f"{COMPONENT}."):
        return False
    if part.startswith("lokr_"):
        return True  # its factors fit if peft can load them
    part, shape = part.removeprefix("lora_"), tuple(tensor.shape)
    if part == "A.weight":
        return len(shape) == 2 and shape[1] == linear.in_features
    if part == "B.weight":
        return len(shape) == 2 and shape[0] == linear.out_features
    return shape == (linear.out_features,)  # DoRA's magnitudes, biases


def _misfit(source: AdapterSource, why: str) -> ConfigError:
    return ConfigError(
        f"the adapter does not fit the base model: {why}",
        where=source.where,
        fix="use the base model that the adapter was trained on; its model card names it",
    )


def require_same_base(transformer: nn.Module, base: str, sources: Iterable[AdapterSource]) -> None:
    """Refuse adapters that were trained on other weights than these.

    Raises:
        ConfigError: with both digests.
    """
    for source in sources:
        if not source.adapter.strength or source.record is None:
            continue
        if source.record.base_digest is None:
            _log.warning("%s: its record does not say which weights of the base it was trained on", source.where)
            continue
        require_base(
            transformer,
            source.record.base_digest,
            ConfigError,
            by="the adapter",
            where=f"--model {base}, {source.where}",
            fix=f"name them with --model; to try another base on purpose, move the adapter away from {TRAINING_RECORD}",
        )


def riflex_of(wanted: int | None, records: Sequence[tuple[str, TrainingRecord]]) -> tuple[int | None, list[str]]:
    """With which ``riflex`` to sample, and what is to be said of it.

    Args:
        wanted: as it was asked for: frames, 0 for the model's own positions, None for what the first record has.
        records: what trainings say of themselves, each with its place.
    """
    riflex = wanted if wanted is not None else records[0][1].riflex if records else None
    notes = []
    if wanted is None and riflex is not None:
        notes.append(f"{records[0][0]} was trained with riflex {riflex}, and is sampled so")
    notes += [
        f"{where} was trained with {f'riflex {own}' if own else 'no riflex'}, and is sampled with {riflex or 'none'}"
        for where, own in ((where, record.riflex) for where, record in records)
        if own != (riflex or None)
    ]
    return riflex or None, notes


def trigger_notes(record: TrainingRecord, where: str, prompts: Sequence[SamplePrompt]) -> Iterator[str]:
    """That prompts lack the word which calls what was learnt."""
    trigger = record.trigger or ""
    lacking = [p.prompt for p in prompts if not holds_word(" ".join(p.prompt.split()), trigger.strip())]
    if lacking:
        yield (
            f"{where} was trained with the trigger word {trigger!r}, which {len(lacking)} of {len(prompts)} prompts"
            f" lack, such as {lacking[0][:60]!r}"
        )


def frame_notes(records: Iterable[TrainingRecord], prompts: Sequence[SamplePrompt]) -> Iterator[str]:
    """That prompts give other frames than the first to weights that were not trained for it."""
    further = sum(bool(prompt.last_image or prompt.keyframes) for prompt in prompts)
    if further and all(record.condition_frames in (None, "first") for record in records):
        yield (
            f"{further} of {len(prompts)} prompts give another frame than the first, and nothing here says that the"
            " model was trained for it (data.condition_frames). By report, not measured here, 1.5-5B-I2V often follows"
            " a last frame all the same"
        )


# -------------------------------------------------------------------------------------------------------------- loading


class LoadedAdapters:
    """Adapters in a transformer, through the stock pipeline's own loader, and how strongly each of them acts now.

    Args:
        spec: of the model.
        transformer: unwrapped; it holds no adapters yet.
        scheduler: any of CogVideoX's: the stock pipeline wants one.
        sources: what may be asked for, by path.
    """

    def __init__(self, spec: ModelSpec, transformer: Any, scheduler: Any, sources: Mapping[Path, AdapterSource]):
        self._pipeline = build_pipeline(spec, transformer=transformer, scheduler=scheduler)
        self._projections = Projections(transformer)
        self._sources = sources
        self._names: dict[Path, str] = {}
        """Of those that are loaded."""
        self._loaded_ever = 0

    def use(self, adapters: Iterable[AdapterArgument], *, later: Iterable[AdapterArgument] = ()) -> None:
        """Let these act, and no others; one of strength 0 is left out, and one that is named twice acts by the sum.

        Args:
            adapters: what acts.
            later: what will be asked for later; all other adapters leave the memory.

        Raises:
            ConfigError: if an adapter does not fit the transformer, in full.
        """
        strengths = dict.fromkeys((adapter.path for adapter in adapters), 0.0)
        for adapter in adapters:
            strengths[adapter.path] += adapter.strength
        strengths = {path: strength for path, strength in strengths.items() if strength}
        needed = {*strengths, *(adapter.path for adapter in later if adapter.strength)}
        if unneeded := [name for path, name in self._names.items() if path not in needed]:
            self._pipeline.delete_adapters(unneeded)
        self._names = {path: name for path, name in self._names.items() if path in needed}
        for path in strengths:
            if path not in self._names:
                self._names[path] = self._load(self._sources[path])
        if strengths:
            self._pipeline.enable_lora()
            self._pipeline.set_adapters([self._names[path] for path in strengths], [*strengths.values()])
        elif self._names:
            self._pipeline.disable_lora()
        beside = [(self._sources[path], strength) for path, strength in strengths.items()]
        try:
            self._projections.use([(one.projection, strength) for one, strength in beside if one.projection])
        except ValueError as error:
            raise _misfit(next(one for one, _ in beside if one.projection), str(error)) from error

    def _load(self, source: AdapterSource) -> str:
        from peft import get_peft_model_state_dict

        name = f"adapter_{self._loaded_ever}"
        self._loaded_ever += 1
        transformer = self._pipeline.transformer
        try:
            if source.settings is None:
                folder, file = str(source.adapter.file.parent), source.adapter.file.name
                loader = self._pipeline.load_lora_weights
                if source.is_lokr:  # the pipeline's own hands itself on, to begin offloading anew with the new weights
                    loader = functools.partial(transformer.load_lora_adapter, _pipeline=self._pipeline)
                loader(folder, weight_name=file, adapter_name=name, use_safetensors=True)
            else:
                self._pipeline.load_lora_into_transformer(
                    dict(source.tensors),
                    transformer=transformer,
                    adapter_name=name,
                    metadata=dict(source.settings),
                    _pipeline=self._pipeline,
                )
        except (ValueError, RuntimeError, KeyError) as error:
            if is_out_of_memory(error):  # says nothing of the adapter
                raise
            raise _misfit(source, str(error).strip().splitlines()[0]) from error
        # diffusers only warns of tensors that found no place.
        placed = {f"{COMPONENT}.{key}" for key in get_peft_model_state_dict(transformer, adapter_name=name)}
        if left_out := source.tensors.keys() - placed:
            raise _misfit(source, f"{len(left_out)} tensors have no place, such as {min(left_out)}")
        return name
