"""How programs name a LoRA's tensors: one table per layout, read in both directions.

Our own names are peft's, without any prefix: ``transformer_blocks.0.attn1.to_q.lora_A.weight``. A layout is a prefix, a
table of modules, a separator, and what it calls the two halves of an update. Sources: ComfyUI ``comfy/lora.py`` and
``comfy/ldm/cogvideo/model.py``; VideoX-Fun ``videox_fun/utils/lora_utils.py``; CogVideo ``sat/`` and
``tools/export_sat_lora_weight.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetune.core.errors import ConfigError
from finetune.methods.adapter import COMPONENT, some

COMFYUI_MODULES: Mapping[str, str] = {
    "transformer_blocks.{i}.attn1.to_q": "blocks.{i}.q",
    "transformer_blocks.{i}.attn1.to_k": "blocks.{i}.k",
    "transformer_blocks.{i}.attn1.to_v": "blocks.{i}.v",
    "transformer_blocks.{i}.attn1.to_out.0": "blocks.{i}.attn_out",
    "transformer_blocks.{i}.ff.net.0.proj": "blocks.{i}.ff_proj",
    "transformer_blocks.{i}.ff.net.2": "blocks.{i}.ff_out",
    "transformer_blocks.{i}.norm1.linear": "blocks.{i}.norm1.linear",
    "transformer_blocks.{i}.norm2.linear": "blocks.{i}.norm2.linear",
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding.linear_1": "time_embedding_linear_1",
    "time_embedding.linear_2": "time_embedding_linear_2",
    "ofs_embedding.linear_1": "ofs_embedding_linear_1",
    "ofs_embedding.linear_2": "ofs_embedding_linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}
"""Every module of a CogVideoX that a LoRA can adapt, and its name in ComfyUI's own implementation."""

SAT_MODULES: Mapping[str, str] = {
    "transformer_blocks.{i}.attn1.to_q": "transformer.layers.{i}.attention.query_key_value.0",
    "transformer_blocks.{i}.attn1.to_k": "transformer.layers.{i}.attention.query_key_value.1",
    "transformer_blocks.{i}.attn1.to_v": "transformer.layers.{i}.attention.query_key_value.2",
    "transformer_blocks.{i}.attn1.to_out.0": "transformer.layers.{i}.attention.dense.0",
}
"""SAT numbers the parts of one fused layer, behind the half: ``query_key_value.matrix_A.1`` is ``to_k``'s A."""

_OWN_MODULES: Mapping[str, str] = {module: module for module in COMFYUI_MODULES}

_PEFT_HALVES, _KOHYA_HALVES, _SAT_HALVES = ("lora_A", "lora_B"), ("lora_down", "lora_up"), ("matrix_A", "matrix_B")

_DOWN, _UP, _MAGNITUDE, _ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "alpha"

_PARTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\.lora(_A|_down|\.down)(\.default)?\.weight$"), _DOWN),
    (re.compile(r"\.lora(_B|_up|\.up)(\.default)?\.weight$"), _UP),
    (re.compile(r"\.(lora_magnitude_vector(\.default)?(\.weight)?|dora_scale)$"), _MAGNITUDE),
    (re.compile(r"\.alpha$"), _ALPHA),
    (re.compile(r"\.matrix_A(?=\.\d$)"), _DOWN),
    (re.compile(r"\.matrix_B(?=\.\d$)"), _UP),
)
"""How a tensor's name ends, by any program, and what of the update it is by ours."""

_LAYER = re.compile(r"(?<![a-z])((?:transformer_)?blocks|layers)([._])(\d+)(?=[._])")


NO_DORA = "ComfyUI divides by the norms of the base's weights instead of the sum's, and others pass over its magnitudes"
"""Why a DoRA is written by peft's names only. ComfyUI's rule is ``weight_decompose`` in ``weight_adapter/base.py``."""


@dataclass(frozen=True)
class Layout:
    """One program's names."""

    name: str
    label: str
    """Whose it is, for messages."""
    prefix: str
    modules: Mapping[str, str]
    """Ours to theirs, ``{i}`` standing for the layer."""
    separator: str = "."
    halves: tuple[str, str] = _PEFT_HALVES
    states_alpha: bool = False
    """Whether its files have a tensor ``.alpha`` per layer. One that lacks it counts 1 there: alpha is the rank."""

    @property
    def takes_dora(self) -> bool:
        """Whether the programs that read these names compute a DoRA as peft does, which trained it."""
        return self.halves is _PEFT_HALVES and not self.states_alpha

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {self.prefix + theirs.replace(".", self.separator): ours for ours, theirs in self.modules.items()}

    def module_of(self, stem: str) -> str | None:
        """Our name of the module that they call ``stem``; None where it is none of this layout."""
        layer = _LAYER.search(stem)
        template = stem if layer is None else f"{stem[: layer.start(3)]}{{i}}{stem[layer.end(3) :]}"
        ours = self._ours.get(template)
        return ours if ours is None or layer is None else ours.replace("{i}", layer[3])

    def stem_of(self, module: str) -> str | None:
        """Their name of our ``module``; None where the layout has none for it."""
        layer = _LAYER.search(module)
        template = module if layer is None else f"{module[: layer.start(3)]}{{i}}{module[layer.end(3) :]}"
        if template not in self.modules:
            return None
        stem = self.modules[template].replace("{i}", "" if layer is None else layer[3])
        return self.prefix + stem.replace(".", self.separator)


_KOHYA: Mapping[str, Any] = {"separator": "_", "halves": _KOHYA_HALVES}

LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("diffusers", "diffusers' layout", f"{COMPONENT}.", _OWN_MODULES),
        Layout("bare", "diffusers' layout without its leading `transformer.`", "", _OWN_MODULES),
        Layout("peft", "peft's layout", "base_model.model.", _OWN_MODULES),
        Layout("peft-pipeline", "peft's layout", f"base_model.model.{COMPONENT}.", _OWN_MODULES),
        Layout("comfyui", "ComfyUI's layout", "diffusion_model.", COMFYUI_MODULES, states_alpha=True),
        Layout("diffusion-model", "diffusers' names behind `diffusion_model.`", "diffusion_model.", _OWN_MODULES),
        Layout("kohya", "kohya's layout", "lora_unet_", _OWN_MODULES, states_alpha=True, **_KOHYA),
        Layout("videox-fun", "VideoX-Fun's layout", "lora_unet__", _OWN_MODULES, **_KOHYA),
        Layout("kohya-comfyui", "kohya's layout", "lora_unet_", COMFYUI_MODULES, states_alpha=True, **_KOHYA),
        Layout("sat", "SAT's layout", "model.diffusion_model.", SAT_MODULES, halves=_SAT_HALVES),
        Layout("sat-bare", "SAT's layout", "", SAT_MODULES, halves=_SAT_HALVES),
    )
}
"""By name. What two of them share (``proj_out``) is told apart by the other tensors of a file."""


@dataclass(frozen=True)
class Lora:
    """A LoRA by our names."""

    tensors: Mapping[str, Tensor]
    """Such as ``transformer_blocks.0.attn1.to_q.lora_A.weight`` [rank, in], ``.lora_B.weight`` [out, rank] and
    ``.lora_magnitude_vector`` [out]."""
    alphas: Mapping[str, float]
    """By module, those that the file states. The update counts alpha / rank."""

    @property
    def ranks(self) -> dict[str, int]:
        """By module, in the file's order."""
        ending = f".{_DOWN}"
        return {name.removesuffix(ending): len(t) for name, t in self.tensors.items() if name.endswith(ending)}


def is_lora(name: str) -> bool:
    """Whether a tensor of this name is one of a LoRA's two halves, in any layout that is known here."""
    return any(part in (_DOWN, _UP) and pattern.search(name) for pattern, part in _PARTS)


def detect(names: Iterable[str]) -> Layout | None:
    """The layout that most of a LoRA's tensor names are of; None where no name is of any."""
    stems = [stem for stem, _ in map(split_name, names)]
    scores = {name: sum(layout.module_of(stem) is not None for stem in stems) for name, layout in LAYOUTS.items()}
    best = max(scores, key=lambda name: scores[name])
    return LAYOUTS[best] if scores[best] else None


def to_diffusers(tensors: Mapping[str, Tensor], layout: Layout) -> Lora:
    """A LoRA's tensors by our names, and what they say of their scale.

    Args:
        tensors: of the whole file, by its own names.
        layout: of those names, as ``detect`` gives it.

    Raises:
        ConfigError: if a name has no place in CogVideoX, a half is missing, or the halves do not fit together.
    """
    found: dict[str, dict[str, Tensor]] = {}
    strange = []
    for name, tensor in tensors.items():
        stem, part = split_name(name)
        module = layout.module_of(stem) if part else None
        if module is None:
            strange.append(name)
        else:
            found.setdefault(module, {})[part] = tensor
    if strange:
        raise ConfigError(
            f"{len(strange)} of {len(tensors)} tensors have no place in CogVideoX's transformer: {some(strange)}",
            where=layout.label,
            fix="give a LoRA of a CogVideoX transformer; one of a text encoder, or of another model, has no use",
        )
    for module, parts in found.items():
        _require_pair(module, parts, layout)
    alphas = {module: parts[_ALPHA].float().item() for module, parts in found.items() if _ALPHA in parts}
    if layout.modules is SAT_MODULES:
        alphas = dict.fromkeys(found, 1.0)  # its LoRA multiplies by 1 / r
    elif layout.states_alpha:
        alphas = {module: alphas.get(module, float(len(parts[_DOWN]))) for module, parts in found.items()}
    return Lora(
        {
            f"{module}.{part}": parts[part].reshape(-1) if part == _MAGNITUDE else parts[part]
            for module, parts in found.items()
            for part in (_DOWN, _UP, _MAGNITUDE)
            if part in parts
        },
        alphas,
    )


def from_diffusers(lora: Lora, layout: Layout) -> dict[str, Tensor]:
    """A LoRA's tensors by the names of ``layout``.

    Args:
        lora: with an alpha for every module, whatever the layout: a layout that states none gets it in its tensors.
            What is trained with rsLoRA counts alpha / sqrt(rank): pass alpha * sqrt(rank).
        layout: one of ``LAYOUTS``.

    Returns:
        Tensors; SAT's second halves are multiplied by alpha, because it multiplies by 1 / rank alone. The layouts of
        diffusers and peft state alpha outside the tensors, which is left to the caller.

    Raises:
        ConfigError: if the layout has no name for a module, or its readers do not compute a DoRA.
    """
    down, up = layout.halves
    if not layout.takes_dora and any(name.endswith(f".{_MAGNITUDE}") for name in lora.tensors):
        raise ConfigError(
            f"{layout.label} cannot express a DoRA: {NO_DORA}",
            where=f"--to {layout.name}",
            fix="keep diffusers' or peft's layout, or merge the adapter into its base",
        )
    if missing := [module for module in lora.ranks if layout.stem_of(module) is None]:
        raise ConfigError(f"{layout.label} has no name for {some(missing)}", fix="choose another layout")
    is_sat = layout.modules is SAT_MODULES
    tensors: dict[str, Tensor] = {}
    for module, alpha in ((module, lora.alphas[module]) for module in lora.ranks):
        stem = layout.stem_of(module) or ""
        if is_sat:
            head, _, piece = stem.rpartition(".")
            tensors[f"{head}.{down}.{piece}"] = lora.tensors[f"{module}.{_DOWN}"]
            tensors[f"{head}.{up}.{piece}"] = lora.tensors[f"{module}.{_UP}"] * alpha
            continue
        tensors[f"{stem}.{down}.weight"] = lora.tensors[f"{module}.{_DOWN}"]
        tensors[f"{stem}.{up}.weight"] = lora.tensors[f"{module}.{_UP}"]
        if layout.states_alpha:
            tensors[f"{stem}.{_ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
        if (magnitude := lora.tensors.get(f"{module}.{_MAGNITUDE}")) is not None:
            tensors[f"{stem}.{_MAGNITUDE}"] = magnitude
    return tensors


def split_name(name: str) -> tuple[str, str]:
    """A tensor's name without what it says of its part in an update, and that part; ("", "") if it is of no LoRA."""
    for pattern, part in _PARTS:
        if match := pattern.search(name):
            return name[: match.start()] + name[match.end() :], part
    return "", ""


def _require_pair(module: str, parts: Mapping[str, Tensor], layout: Layout) -> None:
    if missing := [part for part in (_DOWN, _UP) if part not in parts]:
        raise ConfigError(
            f"{module} lacks {missing[0]} (by our names): the file is not whole",
            where=layout.label,
            fix="fetch or export it again",
        )
    down, up = parts[_DOWN], parts[_UP]
    if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0]:
        raise ConfigError(
            f"the halves of {module} do not fit together: {list(down.shape)} and {list(up.shape)}",
            where=layout.label,
            fix="fetch or export it again",
        )
    # Of a linear layer they are [out] or [out, 1]; of a convolution peft has them as [1, out, 1, 1].
    if (magnitudes := parts.get(_MAGNITUDE)) is not None and (
        magnitudes.numel() != len(up) or (up.ndim == 2 and magnitudes.shape[:1] != up.shape[:1])
    ):
        raise ConfigError(
            f"the magnitudes of {module}, {list(magnitudes.shape)}, are not one for each of its {len(up)} outputs",
            where=layout.label,
            fix="a DoRA that scales inputs, as LyCORIS can train it, has no other form: merge it where it was made",
        )
    if _ALPHA in parts and parts[_ALPHA].numel() != 1:
        raise ConfigError(f"alpha of {module} is no single number", where=layout.label)
