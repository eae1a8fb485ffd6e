"""What an ``--adapter`` turns out to be (a file, an export, a checkpoint or a run), and whether a base is its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from finetune.errors import ConfigError, FinetuneError, ModelError
from finetune.facts import Facts, canonical_name, known_model, published_variant, read_facts
from finetune.files import COMPLETE
from finetune.generate_inputs import ADAPTER_FILE, TRAINING_RECORD, Adapter, training_record
from finetune.seals import DamageError, read_published
from finetune.text import holds_word
from finetune.trainers.checkpoint import TRAINABLE, load_checkpoint, step_folders
from finetune.trainers.method import COMPONENT, METADATA_KEY, foreign_layout
from finetune.trainers.validation import SamplePrompt

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
"""Facts in which two models differ that are not the same one; the five published ones all do."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter as found on disk, by diffusers' names."""

    adapter: Adapter
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


def base_facts(facts: Facts) -> dict[str, Any]:
    """What a training record keeps of its base, JSON types: enough to tell it from another model."""
    return {name: asdict(facts)[name] for name in _STRUCTURE}


def read_sources(adapters: Iterable[Adapter]) -> tuple[list[AdapterSource], list[FinetuneError]]:
    """Find and read adapters; with what is wrong with those that cannot be used."""
    sources: list[AdapterSource] = []
    faults: list[FinetuneError] = []
    for adapter in adapters:
        try:
            sources.append(_read(adapter))
        except FinetuneError as fault:
            faults.append(fault)
    return sources, faults


def _read(adapter: Adapter) -> AdapterSource:
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


def _from_checkpoint(adapter: Adapter, checkpoint: Path) -> AdapterSource:
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
        "base_facts": _facts_of(model["pretrained"]),
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


def _facts_of(pretrained: str) -> dict[str, Any]:
    """Of a base in a folder that is still there; of others a name says as much."""
    try:
        return base_facts(read_facts(pretrained)) if Path(pretrained).is_dir() else {}
    except ModelError:
        return {}


# -------------------------------------------------------------------------------------------------------------- files


def _from_file(adapter: Adapter, where: str) -> AdapterSource:
    path, file = adapter.path, adapter.file
    if file.is_file() and file.suffix != ".safetensors":
        # diffusers would take it for a pickle.
        raise ConfigError(f"{file.name} is no *.safetensors file", where=where, fix="convert or rename it")
    if not file.is_file():
        if path.is_dir() and (known := foreign_layout([], path)):
            raise ConfigError(known[0], where=where, fix=known[1])
        raise ConfigError(
            f"the folder holds no {ADAPTER_FILE}" if path.is_dir() else "there is no such file or folder",
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
    if _is_hub_id(name) or Path(name).is_absolute():
        return name, revision if isinstance(revision, str) else None
    for _, checkpoint in reversed(step_folders(folder.resolve().parent)):
        try:
            pretrained = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["model"]["pretrained"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        return (pretrained, None) if isinstance(pretrained, str) and Path(pretrained).name == name else None
    return None


def base_faults(record: Mapping[str, Any], where: str, base: str, facts: Facts) -> Iterator[ConfigError]:
    """What a training record says that ``base`` is not: its kind, its numbers or its name.

    Weights are compared by their digest where the record has one (``base_digest``); a name counts only without.
    """
    told = record.get("base_model")
    # Without a slash it is a folder's name, whatever else may have it.
    name = (canonical_name(told) if "/" in told else told) if isinstance(told, str) else ""
    named = f", {name}" if name else ""
    fix = f"use --model {name}" if name else "use the base that it was trained on"
    here = base if Path(base).exists() else canonical_name(base)
    ours, theirs = base_facts(facts), record.get("base_facts")
    theirs = theirs if isinstance(theirs, Mapping) else {}
    theirs = theirs or (_facts_of_published(name) if _is_hub_id(name) else {})
    kind = record.get("image_to_video")
    if not isinstance(kind, bool) and "in_channels" in theirs:
        kind = theirs["in_channels"] != theirs.get("latent_channels")
    odd = [
        f"{field} is {theirs[field]} there, {ours[field]} here"
        for field in _STRUCTURE
        if theirs.get(field, ours[field]) != ours[field]
    ]
    if isinstance(kind, bool) and kind != facts.image_to_video:
        kinds = ["a text-to-video", "an image-to-video"]
        yield ConfigError(
            f"it was trained on {kinds[kind]} model{named}, and {base} is {kinds[not kind]} model", where=where, fix=fix
        )
    elif odd:
        yield ConfigError(
            f"it was trained on another model{named}, not on {base}: {', '.join(odd[:3])}", where=where, fix=fix
        )
    elif not record.get("base_digest") and _is_hub_id(name) and _is_hub_id(here) and name != here:
        yield ConfigError(
            f"it was trained on {name}, not on {base}",
            where=where,
            fix=f"{fix}; to try it on another base, move its file away from {TRAINING_RECORD}",
        )


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _facts_of_published(name: str) -> dict[str, Any]:
    variant = published_variant(name)
    return {} if variant is None else base_facts(read_facts(str(known_model(variant))))


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
