"""What ``finetune generate`` is asked for, and everything that can be wrong with it before a weight is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from finetune.checkpoint.folders import step_folders
from finetune.checkpoint.load import load_checkpoint
from finetune.cogvideox.components import read_json
from finetune.cogvideox.model_files import canonical_name, is_hub_id, known_model, published_variant
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.checksums import DamageError, read_published
from finetune.core.errors import ConfigError, FinetuneError, ModelError, raise_all
from finetune.core.files import COMPLETE, LORA_FILE, TRAINABLE
from finetune.core.text import holds_word, text_fault
from finetune.core.types import Bucket, SamplePrompt
from finetune.methods.adapter import COMPONENT, METADATA_KEY, foreign_layout

TRAINING_RECORD = "finetune.json"
"""Beside an export's weights: what it was trained on and with, for programs (the model card is for people)."""

MAX_FPS = 1000.0
"""The most that is taken from a record; who wants more says so."""


@dataclass(frozen=True)
class AdapterArgument:
    """A LoRA and how strongly it acts."""

    path: Path
    """A safetensors file, an export's folder, a checkpoint, or a run's folder (its newest checkpoint then)."""
    strength: float = 1.0
    """1 as trained, 0 not at all (the adapter is then not loaded)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def file(self) -> Path:
        """The safetensors file itself."""
        return self.path / LORA_FILE if self.path.is_dir() else self.path


@dataclass(frozen=True)
class GenerateRequest:
    """One call of ``generate``."""

    base: str | None
    """Model folder in diffusers format, or hub id; None: what the first adapter or ``transformer`` was trained on."""
    prompts: tuple[SamplePrompt, ...]
    out: Path
    """Folder for the videos."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    transformer: Path | None = None
    """A fully fine-tuned transformer in place of the base's: an export's folder, or its ``transformer`` sub-folder."""
    adapters: tuple[AdapterArgument, ...] = ()
    bucket: Bucket | None = None
    """Frames x height x width; None: what the first adapter or ``transformer`` was trained at, else the native size."""
    fps: float | None = None
    """Of the files written; None: what the first adapter or ``transformer`` was trained at, else the native rate."""
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    offload: bool = False
    """Keep on the GPU only the component that runs: slower, for cards on which the transformer just fits."""
    device: str | None = None
    """None: the GPU if there is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.transformer is not None:
            object.__setattr__(self, "transformer", Path(self.transformer))


def parse_adapter(text: str) -> AdapterArgument:
    """Read ``PATH`` or ``PATH:STRENGTH``, as in ``my_lora:0.8``.

    Raises:
        ConfigError: if what follows the last colon is no number.
    """
    if Path(text).exists() or ":" not in text:
        return AdapterArgument(Path(text))
    path, _, strength = text.rpartition(":")
    try:
        return AdapterArgument(Path(path), float(strength))
    except ValueError:
        raise ConfigError(
            f"the adapter's strength {strength!r} is not a number",
            where=f"--adapter {text}",
            fix="write PATH or PATH:STRENGTH, as in my_lora:0.8",
        ) from None


def prompts_with_seeds(prompts: list[str], images: list[Path], *, seed: int = 0) -> tuple[SamplePrompt, ...]:
    """Prompts as given one by one, the first with ``seed``, the next with ``seed + 1`` and so on.

    Args:
        prompts: the texts.
        images: none, one for all prompts, or one for each.
        seed: of the first.

    Raises:
        ConfigError: if there are images, but neither one nor as many as prompts.
    """
    if len(images) not in (0, 1, len(prompts)):
        raise ConfigError(
            f"{len(images)} images for {len(prompts)} prompts", where="--image", fix="give one for all, or one for each"
        )
    chosen: list[Path | None] = [*images] if len(images) == len(prompts) else [*images[:1], None][:1] * len(prompts)
    return tuple(
        SamplePrompt(prompt=prompt, image=image, seed=seed + index)
        for index, (prompt, image) in enumerate(zip(prompts, chosen, strict=True))
    )


def read_prompts(path: Path, *, seed: int = 0) -> tuple[SamplePrompt, ...]:
    """Read prompts from a file.

    Args:
        path: text with one prompt per line, or ``.jsonl`` with an object per line: ``prompt``, and where wanted
            ``image`` (relative to the file) and ``seed``. Empty lines are left out.
        seed: of the first prompt; each following one that states none gets the next number.

    Raises:
        ConfigError: if the file cannot be read or is empty; every bad line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts cannot be read: {error}", where=str(path)) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError("there is no prompt in the file", where=str(path), fix="write one prompt per line")
    if path.suffix != ".jsonl":
        return prompts_with_seeds([line for _, line in numbered], [], seed=seed)
    prompts, errors = [], []
    for index, (number, line) in enumerate(numbered):
        try:
            prompts.append(_from_row(json.loads(line), path.parent, seed + index))
        except RecursionError:
            errors.append(ConfigError("not usable JSON: nested too deeply", where=f"{path}:{number}"))
        except (ValueError, ValidationError) as error:
            reason = _reason(error)
            errors.append(ConfigError(reason, where=f"{path}:{number}"))
    raise_all(ConfigError, errors, what="{n} prompts cannot be used")
    return tuple(prompts)


def _from_row(row: Any, folder: Path, seed: int) -> SamplePrompt:
    if not isinstance(row, dict):
        raise ValueError('expected an object such as {"prompt": "a red ring", "seed": 3}')
    prompt = SamplePrompt.model_validate({"seed": seed, **row})
    if prompt.image is None:
        return prompt
    return prompt.model_copy(update={"image": folder / prompt.image.expanduser()})


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return str(error)


def training_record(folder: Path) -> dict[str, Any]:
    """What an export says of its training; empty for a file from elsewhere."""
    path = (folder if folder.is_dir() else folder.parent) / TRAINING_RECORD
    try:
        return read_json(path)
    except ModelError:
        return {}


def recorded_fps(record: Mapping[str, Any]) -> float | None:
    """The frame rate of a training record, if it is one."""
    fps = record.get("fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps <= MAX_FPS else None


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


def check_request(
    request: GenerateRequest, spec: ModelSpec, bucket: Bucket, others: Iterable[FinetuneError] = ()
) -> None:
    """Raise one ``ConfigError`` for everything that is wrong with a request, and for ``others`` of its faults."""
    faults = [*_faults(request, spec, bucket), *others]
    raise_all(ConfigError, faults, what="{n} things are wrong with the request")


def _faults(request: GenerateRequest, spec: ModelSpec, bucket: Bucket) -> Iterator[FinetuneError]:
    if not request.prompts:
        yield ConfigError("there is no prompt", fix="give --prompt TEXT or --prompts FILE")
    for index, prompt in enumerate(request.prompts):
        yield from _prompt_faults(prompt, spec, where=f"prompt {index + 1} ({prompt.prompt[:40]!r})")
    for problem in spec.check_bucket(bucket):
        yield ConfigError(problem, where=f"size {bucket}")
    if not 1 <= request.num_inference_steps <= spec.num_train_timesteps:
        steps = request.num_inference_steps
        yield ConfigError(f"{steps} denoising steps", where="--steps", fix=f"give 1 to {spec.num_train_timesteps}")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield ConfigError(f"guidance scale {request.guidance_scale}", where="--guidance", fix="give 1 (none) or more")
    if request.fps is not None and not (math.isfinite(request.fps) and request.fps > 0):
        yield ConfigError(f"{request.fps} frames per second", where="--fps", fix="give a positive number")
    if request.out.exists() and not request.out.is_dir():
        yield ConfigError("the output is a file, not a folder", where=str(request.out))


def _prompt_faults(prompt: SamplePrompt, spec: ModelSpec, *, where: str) -> Iterator[FinetuneError]:
    if fault := text_fault(prompt.prompt):
        yield ConfigError(f"the prompt is damaged: {fault}", where=where, fix="write it again as text")
    if spec.image_to_video and prompt.image is None:
        yield ConfigError("the model is image-to-video and needs a first frame", where=where, fix="give --image FILE")
    if prompt.image is not None and not spec.image_to_video:
        yield ConfigError("the model is text-to-video and takes no image", where=where, fix="leave the image out")
    elif prompt.image is not None and not prompt.image.is_file():
        yield ConfigError("there is no such image", where=f"{where}: {prompt.image}")


# -------- What an ``--adapter`` turns out to be (a file, an export, a checkpoint or a run), and whether a base is its
# own.

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


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as found on disk, by diffusers' names."""

    adapter: AdapterArgument
    tensors: Mapping[str, Tensor]
    """Such as ``transformer.transformer_blocks.0.attn1.to_q.lora_A.weight``."""
    record: Mapping[str, Any]
    """What its training says of itself, as in an export's ``finetune.json``; empty for a file from elsewhere."""
    settings: Mapping[str, Any] | None = None
    """Rank, alpha and so on as ``load_lora_into_transformer`` takes them; None: they stand in the file."""
    note: str = ""
    """Which of several things was taken."""

    @property
    def where(self) -> str:
        """For messages."""
        return f"--adapter {self.adapter.path}"


def base_numbers(spec: ModelSpec) -> dict[str, Any]:
    """What a training record keeps of its base, JSON types: enough to tell it from another model."""
    return {name: asdict(spec)[name] for name in _STRUCTURE}


def read_sources(adapters: Iterable[AdapterArgument]) -> tuple[list[AdapterSource], list[FinetuneError]]:
    """Find and read adapters; with what is wrong with those that cannot be used."""
    sources: list[AdapterSource] = []
    faults: list[FinetuneError] = []
    for adapter in adapters:
        try:
            sources.append(_read(adapter))
        except FinetuneError as fault:
            faults.append(fault)
    return sources, faults


def _read(adapter: AdapterArgument) -> AdapterSource:
    path, where = adapter.path, f"--adapter {adapter.path}"
    if not math.isfinite(adapter.strength):
        raise ConfigError(f"strength {adapter.strength} is not a number", where=where)
    standing = step_folders(path)
    if standing or (path / "state.json").is_file() or (path / TRAINABLE).is_file():
        try:
            return _from_checkpoint(adapter, standing[-1][1] if standing else path)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the checkpoint's config.json is none of this package: {error!r:.100}",
                where=where,
                fix="bring it back, or use another checkpoint of the run",
            ) from error
    if (path / "transformer" / "config.json").is_file():
        raise ConfigError("this is a whole transformer, no adapter", where=where, fix=f"give --transformer {path}")
    return _from_file(adapter, where)


# ------------------------------------------------------------------------------------------------- runs, checkpoints


def _from_checkpoint(adapter: AdapterArgument, checkpoint: Path) -> AdapterSource:
    """The adapter as ``export`` would write it, the moving average where one was kept, without the comparison."""
    loaded = load_checkpoint(checkpoint, optimizer=False)
    method, model, data = (loaded.config[section] for section in ("method", "model", "data"))
    if method["kind"] != "lora":
        raise ConfigError(
            "the run trained the whole transformer, no adapter",
            where=f"--adapter {adapter.path}",
            fix=f"run `finetune export {adapter.path}`, and give --transformer the export",
        )
    tensors = loaded.trainable if loaded.ema is None else loaded.ema
    alpha = float(method["alpha"])
    settings = {
        "r": method["rank"],
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": method["use_rslora"],
        "use_dora": method["use_dora"],
        "target_modules": sorted({name.split(".lora_")[0] for name in tensors}),
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    record = {
        "base_model": model["pretrained"],
        "revision": model.get("revision"),
        "base_digest": loaded.state.base or None,
        "base_facts": _numbers_of(model["pretrained"]),
        "buckets": data["buckets"],
        "fps": data["fps"],
        "trigger": data["trigger"],
    }
    note, best = "", loaded.state.best_step
    if checkpoint != adapter.path:
        note = f"--adapter {adapter.path}: the run's newest checkpoint is used, step {loaded.state.step}"
        if best is not None and best != loaded.state.step:
            note += f"; the lowest held-out loss is step {best}'s: --adapter {checkpoint.with_name(f'step-{best:08d}')}"
    return AdapterSource(
        adapter,
        {f"{COMPONENT}.{name}": tensors[name] for name in tensors},
        record,
        {f"{COMPONENT}.{name}": value for name, value in settings.items()},
        note,
    )


def _numbers_of(pretrained: str) -> dict[str, Any]:
    """Of a base in a folder that is still there; of others a name says as much."""
    try:
        return base_numbers(read_spec(pretrained)) if Path(pretrained).is_dir() else {}
    except ModelError:
        return {}


# -------------------------------------------------------------------------------------------------------------- files


def _from_file(adapter: AdapterArgument, where: str) -> AdapterSource:
    path, file = adapter.path, adapter.file
    if file.is_file() and file.suffix != ".safetensors":
        # diffusers would take it for a pickle.
        raise ConfigError(f"{file.name} is no *.safetensors file", where=where, fix="convert or rename it")
    if not file.is_file():
        if path.is_dir() and (known := foreign_layout([], path)):
            raise ConfigError(known[0], where=where, fix=known[1])
        raise ConfigError(
            f"the folder holds no {LORA_FILE}" if path.is_dir() else "there is no such file or folder",
            where=where,
            fix="give a LoRA safetensors file, an export's folder, a checkpoint or a run's folder",
        )
    try:
        content = read_published(file)
        tensors = load(content)  # first: it checks the header
    except DamageError as damage:
        fix = f"export or copy it again; whoever changed the file on purpose removes {COMPLETE} beside it"
        raise ConfigError(f"the adapter is damaged: {damage}", where=where, fix=fix) from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"the file cannot be read as safetensors: {error}", where=where) from None
    if not any(name.startswith(f"{COMPONENT}.") and ".lora_A" in name for name in tensors):
        # diffusers would load nothing from such a file, and only log a warning.
        what, fix = foreign_layout(tensors, file) or _unknown_layout(tensors)
        what = f"the file holds no LoRA for a diffusers transformer (tensors named transformer.*.lora_A.weight): {what}"
        raise ConfigError(what, where=where, fix=fix)
    _require_true_ranks(content, {len(t) for name, t in tensors.items() if ".lora_A" in name and t.ndim}, where)
    return AdapterSource(adapter, tensors, training_record(path))


def _unknown_layout(names: Iterable[str]) -> tuple[str, str]:
    names = [name for name in names if "transformer_blocks." in name]
    if any(".lora_A" in name for name in names):
        return f"its names lack the leading {COMPONENT}.", "put it before every name, or export it again"
    if names:
        return "it looks like a whole transformer", "give the folder that it stands in with --transformer"
    return "its tensors' names are unknown", "convert it to diffusers' names"


def _require_true_ranks(content: bytes, ranks: set[int], where: str) -> None:
    """Refuse a header with ranks that the tensors do not have: a layer of that size would be made first."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        settings = json.loads((header.get("__metadata__") or {}).get(METADATA_KEY, "{}"))
        claimed = [value for key, value in settings.items() if key.rpartition(".")[2] == "r"]
        claimed += [
            value for key, found in settings.items() if key.endswith("rank_pattern") for value in (found or {}).values()
        ]
    except (ValueError, AttributeError, RecursionError):
        raise ConfigError("its settings in the header cannot be read", where=where) from None
    if wrong := [value for value in claimed if value not in [*ranks]]:
        told = f"its header claims a rank of {wrong[0]!s:.30}, and its tensors have {sorted(ranks)}"
        raise ConfigError(told, where=where, fix="fetch or export it again")


# ------------------------------------------------------------------------------------------------- does the base fit?


def named_base(record: Mapping[str, Any], folder: Path) -> tuple[str, str | None] | None:
    """The base that a training record names, and its revision, where it can be found; else None.

    An export names a folder by its last part only, because the rest is about somebody's machine. In the run's folder
    (``RUN/export``) the run itself says where it is.
    """
    name, revision = record.get("base_model"), record.get("revision")
    if not isinstance(name, str) or not name:
        return None
    if is_hub_id(name) or Path(name).is_absolute():
        return name, revision if isinstance(revision, str) else None
    for _, checkpoint in reversed(step_folders(folder.resolve().parent)):
        try:
            pretrained = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model"]["pretrained"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return (pretrained, None) if isinstance(pretrained, str) and Path(pretrained).name == name else None
    return None


def base_faults(record: Mapping[str, Any], where: str, base: str, spec: ModelSpec) -> Iterator[ConfigError]:
    """What a training record says that ``base`` is not: its kind, its numbers or its name.

    Weights are compared by their digest where the record has one (``base_digest``); a name counts only without.
    """
    told = record.get("base_model")
    # Without a slash it is a folder's name, whatever else may have it.
    name = (canonical_name(told) if "/" in told else told) if isinstance(told, str) else ""
    named = f", {name}" if name else ""
    fix = f"use --model {name}" if name else "use the base that it was trained on"
    here = base if Path(base).exists() else canonical_name(base)
    ours, theirs = base_numbers(spec), record.get("base_facts")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    theirs = theirs or (_numbers_of_published(name) if is_hub_id(name) else {})
    kind = record.get("image_to_video")
    if not isinstance(kind, bool) and "in_channels" in theirs:
        kind = theirs["in_channels"] != theirs.get("latent_channels")
    odd = [
        f"{field} is {theirs[field]} there, {ours[field]} here"
        for field in _STRUCTURE
        if theirs.get(field, ours[field]) != ours[field]
    ]
    if isinstance(kind, bool) and kind != spec.image_to_video:
        kinds = ["a text-to-video", "an image-to-video"]
        yield ConfigError(
            f"it was trained on {kinds[kind]} model{named}, and {base} is {kinds[not kind]} model", where=where, fix=fix
        )
    elif odd:
        yield ConfigError(
            f"it was trained on another model{named}, not on {base}: {', '.join(odd[:3])}", where=where, fix=fix
        )
    elif not record.get("base_digest") and is_hub_id(name) and is_hub_id(here) and name != here:
        yield ConfigError(
            f"it was trained on {name}, not on {base}",
            where=where,
            fix=f"{fix}; to try it on another base, move its file away from {TRAINING_RECORD}",
        )


def _numbers_of_published(name: str) -> dict[str, Any]:
    variant = published_variant(name)
    return {} if variant is None else base_numbers(read_spec(str(known_model(variant))))


def shape_faults(source: AdapterSource, transformer: nn.Module) -> Iterator[ConfigError]:
    """What of an adapter has no place in a transformer, which may be one without content."""
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    odd = [name for name, tensor in source.tensors.items() if not _has_place(name, tensor, layers)]
    if odd:
        yield misfit(source, f"{len(odd)} of {len(source.tensors)} tensors have no place, such as {min(odd)}")


def _has_place(name: str, tensor: Tensor, layers: Mapping[str, nn.Linear]) -> bool:
    layer, _, part = name.removeprefix(f"{COMPONENT}.").partition(".lora_")
    linear = layers.get(layer)
    if linear is None or not name.startswith(f"{COMPONENT}."):
        return False
    shape, expected = tuple(tensor.shape), {"A.weight": (linear.in_features, 1), "B.weight": (linear.out_features, 0)}
    if part in expected:
        size, axis = expected[part]
        return len(shape) == 2 and shape[axis] == size
    return shape == (linear.out_features,)  # DoRA's magnitudes, biases


def misfit(source: AdapterSource, why: str) -> ConfigError:
    return ConfigError(
        f"the adapter does not fit the base model: {why}",
        where=source.where,
        fix="use the base model that the adapter was trained on; its model card names it",
    )


def trigger_notes(record: Mapping[str, Any], where: str, prompts: Sequence[SamplePrompt]) -> Iterator[str]:
    """That prompts lack the word which calls what was learnt."""
    trigger = record.get("trigger")
    lacking = [
        p.prompt
        for p in prompts
        if isinstance(trigger, str) and not holds_word(" ".join(p.prompt.split()), trigger.strip())
    ]
    if lacking:
        yield (
            f"{where} was trained with the trigger word {trigger!r}, which {len(lacking)} of {len(prompts)} prompts"
            f" lack, such as {lacking[0][:60]!r}"
        )
