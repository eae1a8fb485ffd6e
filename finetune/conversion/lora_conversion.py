"""A LoRA of any trainer's: what its scale is, written as one of ours or in SAT's layout, and its updates compared.

A low-rank update means nothing without its scale, and several trainers do not write it down. It is taken from where it
stands, in the file or beside it, and asked for where it stands nowhere: half of the strength, or twice, would look like
a bad training.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.cogvideox.components import Transformer, read_json_as
from finetune.cogvideox.load import build_pipeline, empty_component
from finetune.cogvideox.model_files import json_folder, known_model
from finetune.cogvideox.spec import read_spec
from finetune.conversion.checkpoint_files import named_tensors
from finetune.conversion.lora_files import MAGNITUDE, peft_settings, write_lora
from finetune.conversion.lora_layouts import LAYOUTS, Lora, detect, from_diffusers, split_name, to_diffusers
from finetune.conversion.model_card import lora_metadata
from finetune.conversion.sat import Tensors
from finetune.conversion.stored import (
    StoredLora,
    layer_shapes,
    published_bases,
    read_headers,
    require_lora_alone,
)
from finetune.conversion.torch_files import write_torch_file
from finetune.core.errors import ConfigError, ExportError, is_out_of_memory
from finetune.core.files import LORA_FILE, atomic_write_text, require_space
from finetune.core.rng import generator
from finetune.core.tensor_files import content_of, file_bytes
from finetune.methods.adapter import foreign_layout, some
from finetune.methods.lora import ADAPTER, LoraMethod, adapted_layers, ranks_by_name, whole
from finetune.methods.targets import PRESETS

SAT_LORA = "1/mp_rank_00_model_states.pt"
"""Where SAT looks for the checkpoint of a LoRA, below its folder."""

_DOWN, _UP = "lora_A.weight", "lora_B.weight"

_IN_MEMORY = re.compile(r"\.(lora_[AB]\.default|matrix_[AB]\.\d)")
"""In the names of a model that a LoRA was put into."""


@dataclass(frozen=True)
class ReadLora:
    """A LoRA with its scale."""

    lora: Lora
    """By our names, with an alpha for every module so that alpha / rank is what its update counts."""
    label: str
    """Whose layout it has."""
    stated: str
    """Where its scale stands."""
    metadata: Mapping[str, str]
    """Of the file's header."""

    def scale(self, module: str) -> float:
        """By what the update of a module is multiplied."""
        return self.lora.alphas[module] / self.lora.ranks[module]


def lora_alone(tensors: Tensors) -> Tensors:
    """A LoRA without the model that was saved with it, and without a trainer's wrapper before its names."""
    if any(map(_IN_MEMORY.search, tensors)):
        tensors = {name: tensor for name, tensor in tensors.items() if split_name(name)[1]}
    if detect(tensors) is None:
        wrapper = next((name.split("transformer_blocks.")[0] for name in tensors if "transformer_blocks." in name), "")
        tensors = {name.removeprefix(wrapper): tensor for name, tensor in tensors.items()}
    return tensors


def read_foreign_lora(path: Path, tensors: Tensors, alpha: float | None) -> ReadLora:
    """Read a LoRA by any names, and find its scale.

    Args:
        path: its file, or the folder of its shares.
        tensors: of that file (``lora_alone``).
        alpha: what the user says it is; None to find it.

    Raises:
        ConfigError: if the names are of no layout that is known, the scale stands nowhere and ``alpha`` is None, or
            it stands there otherwise than ``alpha``.
        ModelError: if the file is damaged.
    """
    where = str(path)
    require_lora_alone(path, tensors)
    layout = detect(tensors)
    if layout is None:
        what, fix = foreign_layout(tensors, path) or ("its tensors' names are of no program that is known here", "")
        raise ConfigError(what, where=where, fix=fix or "see what `finetune inspect` says of it")
    lora = to_diffusers({name: content_of(tensor) for name, tensor in tensors.items()}, layout)
    metadata = read_headers([path])[1] if path.suffix == ".safetensors" else {}
    stored = StoredLora(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata, layout)
    alphas, stated = dict(lora.alphas), "as its program has it"
    if stored.states_alpha:
        stated = "in its tensors"
    elif not alphas:
        alphas, stated = stored.alphas(read=False)
    alphas = {module: value or float(lora.ranks[module]) for module, value in alphas.items()}  # 0 is kohya's for none
    if wrong := [value for value in (*alphas.values(), 1.0 if alpha is None else alpha) if not 0 < value < math.inf]:
        raise ConfigError(f"an alpha of {wrong[0]:g} is none: a scale is a positive number", where=where)
    if alpha is not None:
        if any(not math.isclose(value, alpha) for value in alphas.values()):
            raise ConfigError(
                f"the file's alpha is {some(f'{value:g}' for value in sorted(set(alphas.values())))} ({stated})",
                where=f"--alpha {alpha:g}, {where}",
                fix="leave --alpha out",
            )
        alphas, stated = dict.fromkeys(lora.ranks, alpha), "as --alpha says"
    if not alphas:
        raise _scale_unknown(lora, layout.label, where)
    if stored.settings[0].get("use_rslora") is True:  # alpha / sqrt(rank)
        alphas = {module: value * math.sqrt(lora.ranks[module]) for module, value in alphas.items()}
    return ReadLora(Lora(lora.tensors, alphas), layout.label, stated, metadata)


def _scale_unknown(lora: Lora, label: str, where: str) -> ConfigError:
    ranks = sorted(set(lora.ranks.values()))
    return ConfigError(
        f"the LoRA is in {label} and its scale stands nowhere: its update counts alpha / rank, rank is"
        f" {some(map(str, ranks))}, and neither the file nor one beside it states alpha",
        where=where,
        fix="say what it was trained with: --alpha NUMBER. CogVideo's finetune/ and CogKit have 64 by default,"
        " cogvideox-factory, finetrainers and VideoX-Fun what --lora_alpha or --network_alpha said; what CogVideo's"
        " export_sat_lora_weight.py wrote has 1. The rank itself makes the update count in full",
    )


# ------------------------------------------------------------------------------------------------------------ the base


def base_json(read: ReadLora, model: str | None, where: str) -> tuple[Path, tuple[str, ...]]:
    """A folder with the JSON of a model that the LoRA fits, and the published ones that it fits.

    Raises:
        ConfigError: if no published model has its layers, or ``model`` has not.
    """
    tensors = read.lora.tensors
    layers = {
        module: (len(tensors[f"{module}.{_UP}"]), *tensors[f"{module}.{_DOWN}"].shape[1:]) for module in read.lora.ranks
    }
    fitting = published_bases(layers, is_whole=False)
    if model is None:
        if not fitting:
            example = min(layers)
            raise ConfigError(
                f"no published CogVideoX has such layers: {example} is {list(layers[example])} there",
                where=where,
                fix="name the model that it was trained on: --model FOLDER",
            )
        return known_model(fitting[0]), fitting
    folder = json_folder(model)
    transformer = read_json_as(Transformer, folder / "transformer" / "config.json")
    own = layer_shapes(transformer)
    for module, shape in layers.items():
        block = re.match(r"transformer_blocks\.(\d+)\.", module)
        template = f"transformer_blocks.{{i}}.{module[block.end() :]}" if block else module
        if own.get(template) != shape or (block and int(block[1]) >= transformer.num_layers):
            raise ConfigError(
                f"the LoRA is of another model than {model}: {module} is {list(shape)}, there {own.get(template)}",
                where=where,
                fix="name the model that it was trained on, or leave --model out",
            )
    return folder, fitting


# ------------------------------------------------------------------------------------------------------------- written


def one_alpha(read: ReadLora, dtype: torch.dtype | None) -> tuple[Lora, list[str]]:
    """A LoRA as ours are, in ``dtype``, and what was changed: all layers' updates get one alpha / rank.

    ``method.init_from`` and the exports of others know one scale; what differs goes into the second halves.
    """
    lora, notes = read.lora, []
    scale = Counter(read.scale(module) for module in lora.ranks).most_common(1)[0][0]
    others = [module for module in lora.ranks if not math.isclose(read.scale(module), scale, rel_tol=1e-5)]
    tensors, alphas = dict(lora.tensors), dict(lora.alphas)
    if others:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
        for module in others:
            tensors[f"{module}.{_UP}"] = tensors[f"{module}.{_UP}"] * (read.scale(module) / scale)
            alphas[module] = scale * lora.ranks[module]
        notes.append(f"{len(others)} layers had another alpha / rank, which their tensors have now")
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    return Lora({name: tensor.contiguous() for name, tensor in tensors.items()}, alphas), notes


def write_own(folder: Path, lora: Lora, read: ReadLora, fitting: tuple[str, ...], name: str) -> None:
    """Write the file that ``load_lora_weights`` of a pipeline and ``method.init_from`` read. Raises ExportError."""
    _require_room(folder, lora.tensors)
    settings = peft_settings(lora)

    def describe(sha256: str) -> dict[str, str]:
        own = lora_metadata(
            name, fitting[0] if len(fitting) == 1 else None, settings["r"], settings["lora_alpha"], sha256
        )
        words = {key: value for key, value in read.metadata.items() if key.startswith(("modelspec.", "ss_"))}
        return {**words, **own}

    write_lora(lora, "diffusers", folder / LORA_FILE, "", describe)


def write_sat_lora(folder: Path, read: ReadLora, dtype: torch.dtype | None) -> None:
    """Write the LoRA as SAT does, which multiplies by 1 / rank. Raises ExportError; ConfigError where SAT cannot."""
    tensors = from_diffusers(read.lora, LAYOUTS["sat"])
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    _require_room(folder, tensors)
    (folder / SAT_LORA).parent.mkdir()
    write_torch_file(folder / SAT_LORA, tensors, "module")
    atomic_write_text(folder / "latest", Path(SAT_LORA).parent.name)


def _require_room(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    require_space(
        folder,
        file_bytes(tensors) + (1 << 20),
        kind=ExportError,
        what="the conversion",
        fix="make room, or convert to another disk with --out",
    )


# ------------------------------------------------------------------------------------------------------------ compared


def compare_own(folder: Path, read: ReadLora, json: Path, dtype: torch.dtype | None) -> str:
    """Load what was written with the stock pipeline, and compare each layer's update of seeded inputs; in words.

    The base is the model's own class without weights: an update is computed beside them. ``dtype`` is the one that was
    asked for; rounding to it is allowed.

    Raises:
        ExportError: if a layer is missing or its update differs.
    """
    transformer: Any = empty_component(json, "transformer", torch.float32)
    _without_weights(transformer)
    try:
        pipeline = build_pipeline(read_spec(str(json)), transformer=transformer, scheduler=None)
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE, adapter_name=ADAPTER, use_safetensors=True)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise _not_the_same(f"it cannot be loaded: {error}") from error
    loaded = {}
    for name, layer in adapted_layers(transformer):
        loaded[name] = (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER])
        if layer.use_dora[ADAPTER]:
            magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float().flatten()
            expected = read.lora.tensors[f"{name}.{MAGNITUDE}"]
            if not torch.equal(magnitude, (expected if dtype is None else expected.to(dtype)).float()):
                raise _not_the_same(f"the magnitudes of {name} differ")
    return _compared(loaded, read, dtype)


def compare_sat_lora(folder: Path, read: ReadLora, dtype: torch.dtype | None) -> str:
    """As ``compare_own``, read by SAT's own rule."""
    again = to_diffusers({n: content_of(t) for n, t in named_tensors(folder / SAT_LORA).items()}, LAYOUTS["sat"])
    loaded = {
        module: (again.tensors[f"{module}.{_DOWN}"], again.tensors[f"{module}.{_UP}"], 1 / rank)
        for module, rank in again.ranks.items()
    }
    return _compared(loaded, read, dtype)


@torch.no_grad()
def _compared(loaded: Mapping[str, tuple[Tensor, Tensor, float]], read: ReadLora, dtype: torch.dtype | None) -> str:
    if unequal := sorted(loaded.keys() ^ read.lora.ranks.keys()):
        raise _not_the_same(f"{len(unequal)} layers have no counterpart, such as {unequal[0]}")
    worst = 0.0
    for module in read.lora.ranks:
        down, up = (read.lora.tensors[f"{module}.{part}"] for part in (_DOWN, _UP))
        inputs = torch.randn(4, math.prod(down.shape[1:]), generator=generator(0, "convert", module))
        ours = read.scale(module) * _update(inputs, down, up)
        again_down, again_up, scale = loaded[module]
        theirs = scale * _update(inputs, again_down, again_up)
        narrow = min((up.dtype, dtype or up.dtype), key=lambda kind: kind.itemsize)
        allowed = 1e-5 if narrow == torch.float32 else 4 * torch.finfo(narrow).eps
        difference = ((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-30)).item()
        if math.isnan(difference) or difference > allowed:
            raise _not_the_same(
                f"the update of {module} differs by {difference:.2g} of its size, allowed {allowed:.2g}"
            )
        worst = max(worst, difference)
    return f"{len(loaded)} layers, largest difference of an update {worst:.2g} of its size"


def _update(inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return inputs @ down.float().flatten(1).T @ up.float().flatten(1).T


def _without_weights(transformer: nn.Module) -> None:
    """Give every parameter a value and no memory: one zero, seen at every place."""
    for name, parameter in [*transformer.named_parameters()]:
        owner, _, leaf = name.rpartition(".")
        zero = nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), requires_grad=False)
        setattr(transformer.get_submodule(owner), leaf, zero)


def _not_the_same(what: str) -> ExportError:
    return ExportError(
        f"the LoRA that was written is not the source's, and was deleted: {what}",
        fix="update diffusers and peft; if it persists this is a bug, and the source is unharmed",
    )


# ----------------------------------------------------------------------------------------------------- trained further


def method_of(lora: Lora, json: Path, folder: str) -> str:
    """The ``method`` section that trains a LoRA further, all of whose updates count the same."""
    settings = peft_settings(lora)
    transformer = empty_component(json, "transformer", torch.float32)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    adapted = set(lora.ranks)
    targets = next(
        (preset for preset in PRESETS if {n for n in linear if LoraMethod(targets=preset).matches(n)} == adapted), ""
    )
    if not targets:
        targets = "[" + ", ".join(sorted({f"'{_pattern(name)}'" for name in adapted})) + "]"
    dora = ", use_dora: true" if settings["use_dora"] else ""
    rank = settings["r"]
    alpha = next(lora.alphas[module] for module, own in lora.ranks.items() if own == rank)
    others = ", ".join(f"{name}: {own}" for name, own in ranks_by_name(lora.ranks, rank).items())
    ranks = f" ranks: {{{others}}}," if others else ""
    return (
        f"method: {{kind: lora, rank: {rank}, alpha: {whole(alpha)},{ranks} targets: {targets}{dora},"
        f" init_from: {folder}}}"
    )


def _pattern(module: str) -> str:
    """The regular expression of ``method.targets`` for a layer in every block."""
    return re.sub(r"^transformer_blocks\\\.\d+", r"transformer_blocks\\.\\d+", re.escape(module))
