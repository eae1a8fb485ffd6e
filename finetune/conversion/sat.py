"""SAT, the format that CogVideoX was trained and first published in: names and arrangement of its tensors, both ways.

Rules as in CogVideo's ``sat/dit_video_concat.py``, ``sat/vae_modules`` and ``tools/convert_weight_sat2hf.py``. A
checkpoint of a whole training holds three components under three prefixes; each name is read by its component's own
table, and a name that no table has is an error. ``{i}`` stands for a layer, ``{j}`` for a block of the VAE.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.core.errors import ModelError
from finetune.core.tensor_files import Deferred, content_of
from finetune.methods.adapter import some

Tensors = Mapping[str, Tensor | Deferred]

PREFIXES: Mapping[str, str] = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
}
"""Of each component's names in the checkpoint of a training, which holds all three."""

_RENAMED: Mapping[str, str] = {
    "transformer.layers.{i}.attention.dense": "transformer_blocks.{i}.attn1.to_out.0",
    "transformer.layers.{i}.mlp.dense_h_to_4h": "transformer_blocks.{i}.ff.net.0.proj",
    "transformer.layers.{i}.mlp.dense_4h_to_h": "transformer_blocks.{i}.ff.net.2",
    "transformer.layers.{i}.input_layernorm": "transformer_blocks.{i}.norm1.norm",
    "transformer.layers.{i}.post_attention_layernorm": "transformer_blocks.{i}.norm2.norm",
    "mixins.adaln_layer.query_layernorm_list.{i}": "transformer_blocks.{i}.attn1.norm_q",
    "mixins.adaln_layer.key_layernorm_list.{i}": "transformer_blocks.{i}.attn1.norm_k",
    "transformer.final_layernorm": "norm_final",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "ofs_embed.0": "ofs_embedding.linear_1",
    "ofs_embed.2": "ofs_embedding.linear_2",
    "mixins.patch_embed.proj": "patch_embed.proj",
    "mixins.patch_embed.text_proj": "patch_embed.text_proj",
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
    "mixins.final_layer.linear": "proj_out",
}
"""Modules with a weight and a bias that have another name and nothing else: SAT's to diffusers'."""

_FUSED: Mapping[str, tuple[int, Mapping[str, tuple[int, ...]]]] = {
    "transformer.layers.{i}.attention.query_key_value": (
        3,
        {
            "transformer_blocks.{i}.attn1.to_q": (0,),
            "transformer_blocks.{i}.attn1.to_k": (1,),
            "transformer_blocks.{i}.attn1.to_v": (2,),
        },
    ),
    # Shift, scale and gate of attention and feed-forward, for the video and then for the text.
    "mixins.adaln_layer.adaLN_modulations.{i}.1": (
        12,
        {
            "transformer_blocks.{i}.norm1.linear": (0, 1, 2, 6, 7, 8),
            "transformer_blocks.{i}.norm2.linear": (3, 4, 5, 9, 10, 11),
        },
    ),
}
"""SAT's modules that are several of diffusers': into how many equal parts their outputs are cut, and whose each is."""

SAT_POSITIONS, POSITIONS = "mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"
"""The table of positions: learned in 5B-I2V. That of 2B is sines, which diffusers computes and does not store."""

_COMPUTED = re.compile(
    r"mixins\.pos_embed\.freqs_(sin|cos)|transformer\.(word_embeddings|position_embeddings?)\.weight|.*\bembed_tokens\.\w+"
)
"""Tensors of the transformer that hold nothing of the model: what can be computed, and SAT's unused embeddings."""

_VAE_PREFIXES: Mapping[str, str] = {
    "{side}.down.{i}.block.{j}.": "{side}.down_blocks.{i}.resnets.{j}.",
    "{side}.down.{i}.downsample.": "{side}.down_blocks.{i}.downsamplers.0.",
    "{side}.mid.block_1.": "{side}.mid_block.resnets.0.",
    "{side}.mid.block_2.": "{side}.mid_block.resnets.1.",
    "{side}.up.{r}.block.{j}.": "{side}.up_blocks.{r}.resnets.{j}.",
    "{side}.up.{r}.upsample.": "{side}.up_blocks.{r}.upsamplers.0.",
}
"""Beginnings of names in the VAE, theirs to ours; ``{r}`` counts from the other end on the other side."""

_VAE_UNCHANGED = re.compile(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\..*")

_SHORTCUTS = ("nin_shortcut.", "conv_shortcut.")

_UNPREFIXED: tuple[tuple[str, str], ...] = (
    (r"(transformer|mixins|time_embed|ofs_embed)\.", "transformer"),
    (r"(encoder|decoder)\.(down|mid|up|conv_in|conv_out|norm_out)\b|loss\.", "vae"),
)
"""Whose a name is in the file of one component."""


@dataclass(frozen=True)
class SatModel:
    """A SAT checkpoint by diffusers' names."""

    components: Mapping[str, Tensors]
    """``transformer``, ``vae``, ``text_encoder``, as far as they are there; nothing is in memory yet."""
    left_out: Sequence[str] = field(default=())
    """Names of tensors that no component has a use for: of a loss, of the noise schedule, of what is computed."""


def is_sat(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a SAT checkpoint's."""
    marks = (*map(re.escape, PREFIXES.values()), r"transformer\.layers\.", r"(encoder\.down|decoder\.up)\.\d")
    return any(re.match("|".join(marks), name) for name in names)


def from_sat(tensors: Tensors, where: str) -> SatModel:
    """A SAT checkpoint's tensors by diffusers' names.

    Args:
        tensors: of one file, of one component or of all three.
        where: the file, for messages.

    Raises:
        ModelError: if a name is none of its component's, or a fused tensor cannot be cut.
    """
    parts: dict[str, dict[str, Tensor | Deferred]] = {}
    left_out = []
    for name, tensor in tensors.items():
        component, own = _component_of(name)
        if not component or _useless(component, own):
            left_out.append(name)
        else:
            parts.setdefault(component, {})[own] = tensor
    readers: Mapping[str, Callable[[Tensors], tuple[Tensors, list[str]]]] = {
        "transformer": _transformer_from_sat,
        "vae": _vae_from_sat,
        "text_encoder": _text_encoder_from_sat,
    }
    components = {}
    for component, part in parts.items():
        components[component], unknown = readers[component](part)
        if unknown:
            raise ModelError(
                f"{len(unknown)} tensors of the {component} are none of a CogVideoX in SAT's format: {some(unknown)}",
                where=where,
                fix="give a checkpoint of CogVideoX; one with layers of its own cannot be converted without a rule",
            )
    return SatModel(components, left_out)


def to_sat(component: str, tensors: Tensors) -> Tensors:
    """The tensors of a component by SAT's names, without the prefix that a whole training puts before them.

    Args:
        component: ``transformer``, with its table of positions if it has one, or ``vae``.
        tensors: by diffusers' names.

    Raises:
        ModelError: if a name is none of a CogVideoX's.
    """
    named, unknown = (_vae_to_sat if component == "vae" else _transformer_to_sat)(tensors)
    if unknown:
        raise ModelError(f"{len(unknown)} tensors of the {component} have no name in SAT's format: {some(unknown)}")
    return named


# ------------------------------------------------------------------------------------------------- whose a tensor is


def _component_of(name: str) -> tuple[str, str]:
    """The component that a name is of, and the name within it; ("", name) if it is of none."""
    for component, prefix in PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    for pattern, component in _UNPREFIXED:
        if re.match(pattern, name):
            return component, name
    return "", name


def _useless(component: str, name: str) -> bool:
    if component == "transformer":
        return _COMPUTED.fullmatch(name) is not None
    # T5's embedding has two names; one of them is stored.
    return name.startswith("loss.") if component == "vae" else name == "encoder.embed_tokens.weight"


# ----------------------------------------------------------------------------------------------------- the transformer

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")


def _template(name: str, tables: Sequence[Mapping[str, object]]) -> tuple[str, str, str]:
    """(template, layer, leaf) of a name whose module stands in one of ``tables``; ("", "", "") if it is in none.

    The layer is the first number of a name, where its template has one.
    """
    module, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        layer = _NUMBER.search(f"{module}.")
        candidates = [(module, "")]
        if layer is not None:
            candidates.append((f"{module[: layer.start()]}{{i}}{module[layer.end() :]}", layer[1]))
        for candidate, number in candidates:
            if any(candidate in table for table in tables):
                return candidate, number, leaf
    return "", "", ""


def _transformer_from_sat(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """By diffusers' names, and the names that are unknown."""
    named: dict[str, Tensor | Deferred] = {}
    unknown = []
    for name, tensor in tensors.items():
        template, layer, leaf = _template(name, (_RENAMED, _FUSED))
        if name == SAT_POSITIONS:
            named[POSITIONS] = tensor
        elif template in _RENAMED:
            named[f"{_RENAMED[template].replace('{i}', layer)}.{leaf}"] = tensor
        elif template in _FUSED:
            count, owners = _FUSED[template]
            if not tensor.shape or tensor.shape[0] % count:
                unknown.append(f"{name} {list(tensor.shape)}, which cannot be cut into {count}")
                continue
            for ours, chunks in owners.items():
                named[f"{ours.replace('{i}', layer)}.{leaf}"] = _chunks(tensor, count, chunks)
        else:
            unknown.append(name)
    return named, unknown


def _transformer_to_sat(tensors: Tensors) -> tuple[Tensors, list[str]]:
    theirs_of = {ours: theirs for theirs, ours in _RENAMED.items()}
    fused_of = {ours: theirs for theirs, (_, owners) in _FUSED.items() for ours in owners}
    named: dict[str, Tensor | Deferred] = {}
    unknown = []
    for name, tensor in tensors.items():
        template, layer, leaf = _template(name, (theirs_of, fused_of))
        if name == POSITIONS:
            named[SAT_POSITIONS] = tensor
        elif template in theirs_of:
            named[f"{theirs_of[template].replace('{i}', layer)}.{leaf}"] = tensor
        elif template in fused_of:
            theirs = fused_of[template]
            count, owners = _FUSED[theirs]
            members = {f"{ours.replace('{i}', layer)}.{leaf}": chunks for ours, chunks in owners.items()}
            if missing := [member for member in members if member not in tensors]:
                raise ModelError(f"the transformer lacks {missing[0]}")
            named[f"{theirs.replace('{i}', layer)}.{leaf}"] = _joined(tensors, count, members)
        else:
            unknown.append(name)
    return named, unknown


def _chunks(tensor: Tensor | Deferred, count: int, chunks: tuple[int, ...]) -> Deferred:
    """Some of ``count`` equal parts of a tensor's first dimension, laid end to end."""

    def make() -> Tensor:
        parts = content_of(tensor).chunk(count)
        return torch.cat([parts[index] for index in chunks]) if len(chunks) > 1 else parts[chunks[0]]

    return Deferred(tensor.dtype, (tensor.shape[0] // count * len(chunks), *tensor.shape[1:]), make)


def _joined(tensors: Tensors, count: int, members: Mapping[str, tuple[int, ...]]) -> Deferred:
    """The inverse of ``_chunks`` over all owners of the parts."""

    def make() -> Tensor:
        parts: dict[int, Tensor] = {}
        for name, chunks in members.items():
            parts.update(zip(chunks, content_of(tensors[name]).chunk(len(chunks)), strict=True))
        return torch.cat([parts[index] for index in range(count)])

    first = tensors[next(iter(members))]
    rows = sum(tensors[name].shape[0] for name in members)
    return Deferred(first.dtype, (rows, *first.shape[1:]), make)


# ------------------------------------------------------------------------------------------------- VAE and text encoder


def _vae_from_sat(tensors: Tensors) -> tuple[Tensors, list[str]]:
    return _vae_renamed(tensors, reverse=False)


def _vae_to_sat(tensors: Tensors) -> tuple[Tensors, list[str]]:
    return _vae_renamed(tensors, reverse=True)


def _vae_renamed(tensors: Tensors, *, reverse: bool) -> tuple[Tensors, list[str]]:
    levels = [int(number) for name in tensors for number in re.findall(r"\.up(?:_blocks)?\.(\d+)\.", name)]
    named = {name: _vae_name(name, max(levels, default=0), reverse) for name in tensors}
    return {new: tensors[name] for name, new in named.items() if new}, [name for name, new in named.items() if not new]


def _vae_name(name: str, last_level: int, reverse: bool) -> str:
    """The other side's name of a VAE's tensor; "" if it is none of a CogVideoX's."""
    if _VAE_UNCHANGED.fullmatch(name):
        return name
    for theirs, ours in _VAE_PREFIXES.items():
        source, target = (ours, theirs) if reverse else (theirs, ours)
        pattern = re.sub(r"\\\{(\w+)\\\}", _placeholder, re.escape(source))
        if match := re.match(pattern, name):
            values = match.groupdict()
            if "r" in values:
                values["r"] = str(last_level - int(values["r"]))
            before, after = reversed(_SHORTCUTS) if reverse else _SHORTCUTS
            rest = name[match.end() :]
            return target.format(**values) + (after + rest.removeprefix(before) if rest.startswith(before) else rest)
    return ""


def _placeholder(match: re.Match[str]) -> str:
    return r"(?P<side>encoder|decoder)" if match[1] == "side" else rf"(?P<{match[1]}>\d+)"


def _text_encoder_from_sat(tensors: Tensors) -> tuple[Tensors, list[str]]:
    """The names are those of transformers' T5 already."""
    unknown = [name for name in tensors if not re.match(r"shared\.weight$|encoder\.(block|final_layer_norm)\.", name)]
    return {name: tensor for name, tensor in tensors.items() if name not in unknown}, unknown
