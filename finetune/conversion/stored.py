"""An adapter or a model as it lies on disk: its files, their headers, what they say of scale and of the base."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from safetensors import SafetensorError, safe_open

from finetune.checkpoint.folders import CONFIG, step_folders
from finetune.cogvideox.components import Transformer, read_json, read_json_as
from finetune.cogvideox.control import PROJECTION, UPDATES
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.conversion.lora_layouts import LAYOUTS, Layout, split_name
from finetune.conversion.model_card import PEFT_CONFIG, PEFT_FILE
from finetune.core.errors import ConfigError, ModelError
from finetune.core.files import CONTROL_FILE, LORA_FILE, TRAINABLE
from finetune.methods.adapter import COMPONENT, FINETRAINERS_KEY, METADATA_KEY, pattern_value, some

_WEIGHTS = "diffusion_pytorch_model*.safetensors"

_BLOCK = re.compile(r"^((?:transformer_)?blocks\.)(\d+)(?=\.)")

_LARGEST_ALPHA = 1e9

Shapes = Mapping[str, tuple[int, ...]]
"""By name: of a layer [out, in], of the first generation's convolution [out, in, height, width]."""


class Form(NamedTuple):
    """What a stored tensor is, but for its content."""

    dtype: str
    shape: tuple[int, ...]


def find_files(path: Path) -> tuple[tuple[Path, ...], list[str]]:
    """The weight files of an adapter, a transformer, a pipeline, an export or a run, and which of several was taken.

    Raises:
        ConfigError: if there is none, or several that do not belong together.
    """
    if path.is_file():
        return (path,), []
    folder, notes = path, []
    if checkpoints := step_folders(path):
        folder = checkpoints[-1][1]
        notes.append(f"the run's newest checkpoint was taken, {folder.name}")
    for pattern in (LORA_FILE, TRAINABLE, PEFT_FILE, f"transformer/{_WEIGHTS}", _WEIGHTS, "*.safetensors"):
        files = tuple(sorted(file for file in folder.glob(pattern) if file.is_file()))
        if len(files) > 1 and pattern == "*.safetensors":
            names = some(file.name for file in files)
            raise ConfigError(f"the folder holds several files: {names}", where=str(folder), fix="name one of them")
        if files:
            return files, notes
    if (folder / Path(TRAINABLE).stem).is_dir():
        raise ConfigError(
            "this checkpoint was written in shares by several processes",
            where=str(folder),
            fix=f"run `finetune export {path}`, and name the export",
        )
    raise ConfigError(
        "the folder holds no weights in safetensors" if folder.is_dir() else "there is no such file or folder",
        where=str(folder),
        fix="name a safetensors file, or the folder of an export, an adapter, a transformer, a pipeline or a run",
    )


def follows_control(file: Path, names: Iterable[str]) -> bool:
    """Whether a LoRA is only a part of what was trained: to follow a control video, a projection trained beside it."""
    updates = {f"{PROJECTION}.{update}" for update in UPDATES.values()}
    return file.with_name(CONTROL_FILE).is_file() or not updates.isdisjoint(names)


def require_lora_alone(file: Path, names: Iterable[str]) -> None:
    """Refuse a LoRA without which a projection would be left behind.

    Raises:
        ConfigError: if it ``follows_control``.
    """
    if follows_control(file, names):
        raise ConfigError(
            "the LoRA follows a control video: a projection trained beside it, which no layout of LoRAs holds",
            where=str(file),
            fix="`finetune export RUN --to merged --full-pipeline` makes one model of all of it",
        )


def read_headers(files: Sequence[Path]) -> tuple[dict[str, Form], dict[str, str]]:
    """Names, dtypes and shapes of the tensors in safetensors files, and their metadata; no tensor is read.

    Raises:
        ConfigError: if one is damaged, or none of the format.
    """
    forms: dict[str, Form] = {}
    metadata: dict[str, str] = {}
    for path in files:
        with opened(path, framework="np") as source:
            metadata |= source.metadata() or {}
            for name in source.keys():  # noqa: SIM118 - not a mapping
                part = source.get_slice(name)
                forms[name] = Form(part.get_dtype(), tuple(part.get_shape()))
    return forms, metadata


@contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """A safetensors file, whose faults are ``ConfigError``s.

    With torch it is mapped so that its pages may be written to, for which the machine must have the memory; with numpy
    it is not, which is enough for a header.
    """
    try:
        with safe_open(path, framework=framework) as source:
            yield source
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"this is no safetensors file, or a damaged one: {error}", where=str(path), fix="fetch or export it again"
        ) from None


def settings_beside(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that stands beside weights; empty where there is none that can be read."""
    try:
        return read_json(folder / name)
    except ModelError:
        return {}


# ------------------------------------------------------------------------------------------------------- an adapter


@dataclass(frozen=True)
class StoredLora:
    """A LoRA's headers."""

    file: Path
    shapes: Shapes
    metadata: Mapping[str, str]
    layout: Layout | None
    """Of its names; None where they are of no CogVideoX."""

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """Module by our name (by its own where the layout is unknown) -> part -> name of the tensor."""
        parts: dict[str, dict[str, str]] = {}
        for name in self.shapes:
            stem, part = split_name(name)
            if part:
                module = (self.layout and self.layout.module_of(stem)) or stem
                parts.setdefault(module, {})[part] = name
        return parts

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """(module, name of lora_A [rank, in], name of lora_B [out, rank]) of every layer that has both."""
        for module, parts in self.parts.items():
            down, up = parts.get("lora_A.weight", ""), parts.get("lora_B.weight", "")
            if down and up and len(self.shapes[down]) >= 2 and len(self.shapes[up]) >= 2:
                yield module, down, up

    @property
    def layers(self) -> Shapes:
        """What it adapts."""
        return {module: (self.shapes[up][0], *self.shapes[down][1:]) for module, down, up in self.pairs()}

    @property
    def ranks(self) -> dict[str, int]:
        """By module."""
        return {module: self.shapes[down][0] for module, down, _ in self.pairs()}

    @property
    def common_rank(self) -> int:
        """Of most layers."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @property
    def uses_dora(self) -> bool:
        """Whether it learned magnitudes."""
        return any("lora_magnitude_vector" in parts for parts in self.parts.values())

    @property
    def states_alpha(self) -> bool:
        """Whether it has a tensor ``.alpha`` for a layer."""
        return any("alpha" in parts for parts in self.parts.values())

    @cached_property
    def settings(self) -> tuple[dict[str, Any], str]:
        """``lora_alpha``, ``use_rslora``, ``alpha_pattern`` as peft calls them, and where they stand."""
        places = {METADATA_KEY: "in its header", FINETRAINERS_KEY: "in its header, as finetrainers writes it"}
        for key, where in places.items():
            try:
                header = json.loads(self.metadata.get(key, "{}"))
            except (ValueError, RecursionError):
                continue
            if isinstance(header, dict) and header:
                return {name.removeprefix(f"{COMPONENT}."): value for name, value in header.items()}, where
        if self.file.name == TRAINABLE:
            method = settings_beside(self.file.parent, CONFIG).get("method")
            if isinstance(method, dict) and "alpha" in method:
                return self._settings_of(method), "in the run's settings"
        if self.layout is not None and self.layout.name.startswith("peft"):
            return settings_beside(self.file.parent, PEFT_CONFIG), f"in {PEFT_CONFIG}"
        return {}, ""

    def _settings_of(self, method: Mapping[str, Any]) -> dict[str, Any]:
        """As peft has them, of a run's method, by which every layer counts the same, whatever its rank."""
        settings = {"lora_alpha": method["alpha"], "use_rslora": method.get("use_rslora")}
        if method.get("ranks"):
            ratios = {layer: rank / method["rank"] for layer, rank in self.ranks.items()}
            root = math.sqrt if settings["use_rslora"] else float
            settings["alpha_pattern"] = {layer: method["alpha"] * root(ratio) for layer, ratio in ratios.items()}
        return settings

    def alphas(self, *, read: bool) -> tuple[dict[str, float], str]:
        """Alpha of each module, as far as it is known, and where it stands.

        Args:
            read: whether ``.alpha`` tensors are read, one number each.
        """
        settings, where = self.settings
        patterns = settings.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        if _is_alpha(alpha := settings.get("lora_alpha")):
            own = {module: pattern_value(module, patterns, alpha) for module in self.ranks}
            return {module: float(value if _is_alpha(value) else alpha) for module, value in own.items()}, where
        if named := {module: parts["alpha"] for module, parts in self.parts.items() if "alpha" in parts}:
            if not read:
                return {}, f"in {len(named)} .alpha tensors, which --norms reads"
            with opened(self.file) as source:
                values = {module: float(source.get_tensor(name).float().sum()) for module, name in named.items()}
            return values, "in its .alpha tensors"
        if self.layout is not None and self.layout.name.startswith("sat"):
            return dict.fromkeys(self.ranks, 1.0), "as SAT has it"
        return {}, "not stated: programs take the rank for it"

    def scales(self, *, read: bool) -> dict[str, float]:
        """By what each module's update is multiplied; 1 where nothing is stated."""
        alphas, _ = self.alphas(read=read)
        rooted = self.settings[0].get("use_rslora") is True
        ranks = self.ranks
        return {
            module: alphas.get(module, math.sqrt(rank) if rooted else rank) / (math.sqrt(rank) if rooted else rank)
            for module, rank in ranks.items()
            if rank
        } | {module: 0.0 for module, rank in ranks.items() if not rank}


def _is_alpha(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < _LARGEST_ALPHA


# ------------------------------------------------------------------------------------------------ the base, by shapes


def layer_shapes(transformer: Transformer) -> Shapes:
    """Of every layer that multiplies by a matrix; ``{i}`` stands for the block."""
    width = transformer.num_attention_heads * transformer.attention_head_dim
    time, side, depth = transformer.time_embed_dim, transformer.patch_size, transformer.patch_size_t
    patch = (transformer.in_channels, side, side)
    ofs = transformer.ofs_embed_dim
    block = {
        **dict.fromkeys(("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"), (width, width)),
        "ff.net.0.proj": (4 * width, width),
        "ff.net.2": (width, 4 * width),
        **dict.fromkeys(("norm1.linear", "norm2.linear"), (6 * width, time)),
    }
    return {
        **{f"transformer_blocks.{{i}}.{name}": shape for name, shape in block.items()},
        "patch_embed.proj": (width, *patch) if depth is None else (width, math.prod(patch) * depth),
        "patch_embed.text_proj": (width, transformer.text_embed_dim),
        "time_embedding.linear_1": (time, width),
        "time_embedding.linear_2": (time, time),
        **({} if ofs is None else {"ofs_embedding.linear_1": (ofs, ofs), "ofs_embedding.linear_2": (ofs, ofs)}),
        "norm_out.linear": (2 * width, time),
        "proj_out": (transformer.out_channels * side * side * (depth or 1), width),
    }


def published_bases(layers: Shapes, *, is_whole: bool) -> tuple[str, ...]:
    """The published models that have a layer of that name and shape for each of ``layers``.

    Args:
        layers: by our names.
        is_whole: whether they are all layers of a transformer, not some that are adapted.
    """
    blocks, templates = block_count(layers), {_template(name): shape for name, shape in layers.items()}
    fitting = []
    for variant in KNOWN_MODELS if layers else ():
        transformer = read_json_as(Transformer, known_model(variant) / "transformer" / "config.json")
        shapes = layer_shapes(transformer)
        same = shapes == templates if is_whole else all(shapes.get(name) == form for name, form in templates.items())
        if same and (blocks == transformer.num_layers if is_whole else blocks <= transformer.num_layers):
            fitting.append(variant)
    return tuple(fitting)


def whole_layers(shapes: Shapes) -> tuple[Layout | None, dict[str, str]]:
    """Whose names a whole transformer's weights have, and its layers by our names with those of their weights."""
    for layout, prefix in ((LAYOUTS["bare"], ""), (LAYOUTS["comfyui"], ""), (LAYOUTS["comfyui"], "diffusion_model.")):
        layers = {
            module: name
            for name, shape in shapes.items()
            if len(shape) > 1 and name.endswith(".weight")
            if (module := layout.module_of(layout.prefix + name.removesuffix(".weight").removeprefix(prefix)))
        }
        if block_count(layers):
            return layout, layers
    return None, {}


def block_count(layers: Iterable[str]) -> int:
    """How many blocks the modules of a transformer are in, going by the highest."""
    return max((int(match[2]) + 1 for name in layers if (match := _BLOCK.match(name))), default=0)


def block_of(module: str) -> int | None:
    """Which block a module is in; None outside of all."""
    match = _BLOCK.match(module)
    return int(match[2]) if match else None


def inside(module: str) -> str:
    """A module's name inside its block; its own name outside of all."""
    return _BLOCK.sub("", module).removeprefix(".")


def _template(module: str) -> str:
    return _BLOCK.sub(r"\1{i}", module)
