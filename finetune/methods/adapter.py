"""Named tensors of a model: comparing, copying, counting; and LoRA adapters as they lie on disk."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.cogvideox.config import MergedAdapter
from finetune.core.checksums import DamageError, digest_file, read_published
from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.files import COMPLETE, LORA_FILE, TRAINABLE

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_strictly(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy each tensor into the parameter of the same name, bit for bit.

    Raises:
        CheckpointError: as ``require_same``; nothing is copied then.
    """
    import torch

    require_same(parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def require_same(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint's tensors that are not the model's; their content is not looked at.

    Raises:
        CheckpointError: if names, shapes or dtypes are not the same on both sides.
    """
    problems = differences(parameters, tensors)
    if problems:
        raise CheckpointError(
            "the checkpoint's tensors are not this model's trainable tensors: " + "; ".join(problems),
            fix="resume with the model and method the checkpoint was made with",
        )


def differences(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
    """What two sets of named tensors differ in, but for their content: names, shapes and dtypes."""
    from finetune.core.tensor_files import form_of

    here, there = ({name: form_of(t.dtype, t.shape) for name, t in side.items()} for side in (expected, actual))
    missing, unknown = sorted(here.keys() - there.keys()), sorted(there.keys() - here.keys())
    both = sorted(here.keys() & there.keys())
    differing = [f"{name} is {here[name]} here, {there[name]} there" for name in both if here[name] != there[name]]
    problems = [f"missing: {some(missing)}" if missing else "", f"not in this run: {some(unknown)}" if unknown else ""]
    return [problem for problem in (*problems, some(differing)) if problem]


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few of ``names`` for a message, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def count_lines(transformer: nn.Module) -> list[tuple[str, str]]:
    """Trainable and frozen parameters, with their dtypes."""
    lines = []
    for label, trains in (("trainable parameters", True), ("frozen parameters", False)):
        counts: dict[str, int] = {}
        for parameter in transformer.parameters():
            if parameter.requires_grad is trains:
                dtype = str(parameter.dtype).removeprefix("torch.")
                counts[dtype] = counts.get(dtype, 0) + parameter.numel()
        for layer in () if trains else transformer.modules():
            if kind := getattr(layer, "kind", None):  # of a weight held in fewer bits, which is no parameter
                weight: Any = layer.weight
                counts[kind] = counts.get(kind, 0) + math.prod(weight.shape)
        if counts:
            lines.append((label, ", ".join(f"{count:,} in {dtype}" for dtype, count in counts.items())))
    return lines


# ------------------------------------------------------------------------------- an adapter on disk, whoever wrote it

_DOWN = ".lora_A.weight"

METADATA_KEY = "lora_adapter_metadata"
"""Header entry under which diffusers keeps an adapter's settings."""

FINETRAINERS_KEY = "lora_config"
"""Header entry under which finetrainers keeps them, and which diffusers does not read."""

COMPONENT = "transformer"
"""Prefix of every tensor and setting in diffusers' adapter files."""

_PEFT = "adapter_config.json"
"""Beside a file of peft's own."""

_LAYOUTS = (
    (r"base_model\.model\.", "peft's layout"),
    (r"diffusion_model\.", "ComfyUI's layout"),
    (r"lora_(unet|transformer|te\d?)_|.*\.lora_(down|up)\.", "kohya's layout"),
    (r".*\.(matrix_[AB]\.\d|query_key_value\b|dense_h_to_4h\b)", "SAT's layout, CogVideo's own"),
)
"""How other programs name a LoRA's tensors: a pattern for the name's start, and whose it is. ``convert`` knows more."""

_LYCORIS = r".*\.(lokr_|hada_|lora_mid)"

_LOKR = r"(transformer\.)?transformer_blocks\..*\.lokr_"


def is_lokr(names: Iterable[str]) -> bool:
    """Whether tensors of such names are a LoKr's that diffusers' transformers load."""
    return any(re.match(_LOKR, name) for name in names)


def refuse_lokr(names: Iterable[str], path: Path) -> None:
    """Raise ConfigError if the tensors of the file ``path`` are a LoKr's."""
    names = list(names)
    if is_lokr(names) and (known := foreign_layout(names, path)):
        raise ConfigError(known[0], where=str(path), fix=known[1])


def foreign_layout(names: Iterable[str], path: Path) -> tuple[str, str] | None:
    """Whose layout a LoRA has that is not in diffusers', and what to do with it; None where nothing is known of it.

    Args:
        names: of its tensors; none where ``path`` is a folder without a file that is known.
        path: its file or folder, which peft marks by a file of its own.
    """
    names = list(names)
    fix = f"run `finetune convert {shlex.quote(str(path))} --out FOLDER`, and name that folder"
    if not names and (path / _PEFT).is_file():
        return f"it is in {_LAYOUTS[0][1]}", fix
    if is_lokr(names):
        fix = "sample with it by `finetune generate --adapter`, or merge it: `finetune export RUN --to merged`"
        return "it is a LoKr, no LoRA", fix
    if any(re.match(_LYCORIS, name) for name in names):
        return "it is a LoHa, LoKr or LoCon of LyCORIS, no LoRA", "merge it into a model where it was made"
    return next(
        ((f"it is in {layout}", fix) for pattern, layout in _LAYOUTS if any(re.match(pattern, name) for name in names)),
        None,
    )


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as found on disk."""

    path: Path
    tensors: Mapping[str, Tensor]
    """By peft's state-dict names, without any prefix."""
    settings: Mapping[str, Any]
    """``rank``, ``alpha``, ``use_rslora`` and ``use_dora``, as ``LoraMethod`` names them; rank and alpha are those of
    most layers."""
    ranks: Mapping[str, int]
    """By layer."""
    scales: Mapping[str, float]
    """By layer: what its update is multiplied by."""
    note: str = ""
    """What a reader of an error should know about where the settings come from."""

    @property
    def scale(self) -> float | None:
        """What every update is multiplied by; None where layers differ."""
        first = next(iter(self.scales.values()))
        return first if all(math.isclose(scale, first, rel_tol=1e-5) for scale in self.scales.values()) else None


def read_adapter(source: Path, option: str = "method.init_from") -> Adapter:
    """Read an adapter and its settings from a safetensors file, an export's folder or one of our checkpoints.

    Settings stand in the file's header, as diffusers or finetrainers writes it, or in the checkpoint's ``config.json``.
    A file with neither is read as diffusers reads it: ranks from the shapes, alpha equal to the rank.

    Args:
        source: where it is.
        option: which names it, for messages.

    Raises:
        ConfigError: if there is no adapter at ``source``, or it is damaged (a file of an export or a checkpoint is
            verified against its folder's marker).
    """
    where = f"{option}: {source}"
    candidates = [source / LORA_FILE, source / TRAINABLE] if source.is_dir() else [source]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        if source.is_dir() and (known := foreign_layout([], source)):
            raise ConfigError(known[0], where=where, fix=known[1])
        if (source / TRAINABLE.removesuffix(".safetensors")).is_dir():
            raise ConfigError(
                "this checkpoint was written in shares by several processes, and an adapter is read from one file",
                where=where,
                fix=f"run `finetune export {source} --output FOLDER` and name that folder",
            )
        raise ConfigError(
            f"there is no adapter: the folder holds neither {LORA_FILE} nor {TRAINABLE}"
            if source.is_dir()
            else "there is no such file or folder",
            where=where,
            fix="name a LoRA safetensors file, an export's folder or a folder <run>/checkpoints/step-...",
        )
    named, header = read_lora_file(path, where)
    recorded, tensors = ({_bare(key): value for key, value in side.items()} for side in (header, named))
    with _reading(where):
        method = _method_of(path) if not recorded else {}
    if known := foreign_layout(tensors, path):
        raise ConfigError(known[0], where=where, fix=known[1])
    ranks = {
        name.removesuffix(_DOWN): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(_DOWN) and tensor.ndim
    }
    if not ranks:
        raise ConfigError("the file holds no LoRA tensors", where=where, fix="name a file with *.lora_A.weight tensors")
    if not all(ranks.values()):
        raise ConfigError("a layer has rank 0: the file is not whole", where=where, fix="fetch or export it again")
    rank = Counter(ranks.values()).most_common(1)[0][0]
    stated = recorded or method
    rooted = bool(stated.get("use_rslora", False))
    with _reading(where):
        scales = _scales(recorded, method, ranks, rooted=rooted)
    return Adapter(
        path=path,
        tensors=tensors,
        settings={
            "rank": rank,
            "alpha": next(scales[layer] for layer, own in ranks.items() if own == rank) * _divisor(rank, rooted=rooted),
            "use_rslora": rooted,
            "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        },
        ranks=ranks,
        scales=scales,
        note="" if stated else " (the file does not state its alpha; like diffusers we take alpha = rank)",
    )


def _scales(
    recorded: Mapping[str, Any], method: Mapping[str, Any], ranks: Mapping[str, int], *, rooted: bool
) -> dict[str, float]:
    """By layer: what its update is multiplied by, as the file's header says, or else a checkpoint's method.

    Raises:
        ValueError: if an alpha is no number.
    """
    if method:  # which gives every layer the same, whatever its rank
        own = _number(method["alpha"]) / _divisor(int(method["rank"]), rooted=rooted)
        return dict.fromkeys(ranks, own)
    patterns = recorded.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    return {
        layer: _number(pattern_value(layer, patterns, recorded.get("lora_alpha", rank))) / _divisor(rank, rooted=rooted)
        for layer, rank in ranks.items()
    }


def _divisor(rank: int, *, rooted: bool) -> float:
    return math.sqrt(rank) if rooted else rank


def _number(alpha: Any) -> float:
    if not isinstance(alpha, int | float):
        raise ValueError(f"an alpha of {alpha!r:.100} is no number")
    return float(alpha)


def pattern_value(layer: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """As peft chooses among its ``rank_pattern`` or ``alpha_pattern``: the first that a layer's name ends with."""
    bare = ((name.removeprefix("^"), value) for name, value in patterns.items())
    return next((value for name, value in bare if layer == name or layer.endswith(f".{name}")), default)


def pinned(adapter: MergedAdapter, where: str) -> MergedAdapter:
    """The adapter with its file's hash, unless it has one.

    Args:
        adapter: of a configuration.
        where: it is written, for messages.

    Raises:
        ConfigError: if there is no such file.
    """
    if adapter.sha256 is not None:
        return adapter
    return adapter.model_copy(update={"sha256": sha256_of(adapter.file, where)})


def sha256_of(file: Path, where: str) -> str:
    """As hubs of models state it. Raises ConfigError if the file cannot be read."""
    digest = hashlib.sha256()
    try:
        digest_file(file, digest)
    except OSError as error:
        raise ConfigError(
            f"the adapter {file} cannot be read: {error.strerror or error}",
            where=where,
            fix="name a LoRA safetensors file in diffusers' layout, or an export's folder",
        ) from None
    return digest.hexdigest()


def read_lora_file(path: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a LoRA's safetensors file, and the settings in its header, empty where it states none. Diffusers' have
    names with a prefix, finetrainers' have none.

    Args:
        path: the file; one of an export or a checkpoint is verified against its folder's marker.
        where: for messages.

    Raises:
        ConfigError: if it is damaged or cannot be read.
    """
    from safetensors.torch import load

    with _reading(where):
        content = read_published(path)
        tensors = load(content)  # first: it checks the header
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header.get("__metadata__") or {}
        settings = json.loads(metadata.get(METADATA_KEY, "{}"))
        if not isinstance(settings, dict):
            raise ValueError(f"{METADATA_KEY} in its header is no object")
    with suppress(ValueError, RecursionError):  # others may call something else so
        theirs = json.loads(metadata.get(FINETRAINERS_KEY, "{}"))
        settings = settings or (theirs if isinstance(theirs, dict) else {})
    return tensors, settings


@contextmanager
def _reading(where: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except DamageError as damage:
        raise ConfigError(
            f"the adapter is damaged: {damage}",
            where=where,
            fix=f"export or copy it again; whoever changed the file on purpose removes {COMPLETE} beside it",
        ) from None
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(f"the adapter file cannot be read: {error}", where=where) from None


def _method_of(path: Path) -> dict[str, Any]:
    """The method section of a checkpoint's configuration; empty where there is none beside the file."""
    config = path.with_name("config.json")
    value = json.loads(read_published(config)) if config.is_file() else {}
    method = value.get("method") if isinstance(value, dict) else None
    return method if isinstance(method, dict) else {}


def _bare(key: str) -> str:
    return key.removeprefix(f"{COMPONENT}.")
