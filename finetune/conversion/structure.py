"""What the shapes of its tensors tell of a CogVideoX, and which model it therefore is.

Shapes tell widths, depth, patches and channels. What they cannot tell (the native size, the number of text tokens, the
scheduler, the VAE's scaling factor) stands in JSON: that of the published model with these shapes, or of a model that
the user names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.cogvideox.components import read_part
from finetune.cogvideox.model_files import KNOWN_MODELS, json_folder, known_model
from finetune.core.errors import ModelError

Shapes = Mapping[str, Sequence[int]]
"""Of a component's tensors, by diffusers' names."""

_TEMPORAL_PATCH = 2
"""Of every model whose patch embedding is a linear layer, all of them 2x2x2; its shape gives the product alone."""


def model_of(components: Mapping[str, Shapes], model: str | None, where: str) -> Path:
    """The folder with the JSON of the model that tensors of these shapes are.

    Args:
        components: ``transformer`` and perhaps others.
        model: a diffusers folder or hub id to take the JSON from; None for the published model with these shapes.
        where: the source, for messages.

    Raises:
        ModelError: if no published model has the shapes, or ``model`` has others.
    """
    facts = {name: FACTS[name](shapes, where) for name, shapes in components.items() if name in FACTS}
    if model is not None:
        folder = json_folder(model)
        if differing := list(_differences(facts, folder)):
            raise ModelError(
                f"the tensors are of another model than {model}: " + "; ".join(differing),
                where=where,
                fix="name the model that was trained, or leave --model out where it is a published one",
            )
        return folder
    if "transformer" not in facts:
        raise ModelError(
            f"the source holds no transformer, and a {next(iter(components))} alone does not tell which model it is of",
            where=where,
            fix="name the model with --model, such as --model 5b",
        )
    for variant in KNOWN_MODELS:
        if not list(_differences(facts, known_model(variant))):
            return known_model(variant)
    size = facts["transformer"]
    raise ModelError(
        f"no published CogVideoX has these shapes: {size['num_layers']} layers, {size['num_attention_heads']} heads of"
        f" {size['attention_head_dim']}, {size['in_channels']} channels in and {size['out_channels']} out",
        where=where,
        fix="name a model in diffusers' format with the same shapes: --model FOLDER",
    )


def _differences(facts: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """What a folder's JSON states otherwise than the tensors' shapes."""
    for component, told in facts.items():
        stated = read_part(folder, component).model_dump()
        for field, value in told.items():
            if stated[field] != value:
                yield f"{component} {field} is {value} in the tensors, {stated[field]} there"


def transformer_facts(shapes: Shapes, where: str) -> dict[str, Any]:
    """Fields of ``transformer/config.json`` that shapes tell.

    Raises:
        ModelError: if a tensor that tells one is missing, or shapes contradict each other.
    """
    try:
        width, head = shapes["norm_final.weight"][0], shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
        patch, rows = shapes["patch_embed.proj.weight"], shapes["proj_out.weight"][0]
        is_linear = len(patch) == 2
        side = 2 if is_linear else patch[2]
        cells = side * side * (_TEMPORAL_PATCH if is_linear else 1)
        ofs = shapes.get("ofs_embedding.linear_1.weight")
        exact = not (width % head or rows % cells or (is_linear and patch[1] % cells))
        facts = {
            "num_layers": _depth(shapes, r"transformer_blocks\.(\d+)\."),
            "num_attention_heads": width // head,
            "attention_head_dim": head,
            "in_channels": patch[1] // cells if is_linear else patch[1],
            "out_channels": rows // cells,
            "patch_size": side,
            "patch_size_t": _TEMPORAL_PATCH if is_linear else None,
            "time_embed_dim": shapes["time_embedding.linear_1.weight"][0],
            "ofs_embed_dim": None if ofs is None else ofs[0],
            "text_embed_dim": shapes["patch_embed.text_proj.weight"][1],
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise _not_whole("transformer", error, where) from None
    if not exact:
        raise ModelError(
            f"the transformer's shapes contradict each other: width {width}, heads of {head}, patches {list(patch)},"
            f" {rows} outputs",
            where=where,
        )
    return facts


def vae_facts(shapes: Shapes, where: str) -> dict[str, Any]:
    """Fields of ``vae/config.json`` that shapes tell. Raises as ``transformer_facts``."""
    try:
        levels = _depth(shapes, r"encoder\.down_blocks\.(\d+)\.")
        return {
            "block_out_channels": [
                shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"][0] for level in range(levels)
            ],
            "layers_per_block": _depth(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": shapes["decoder.conv_in.conv.weight"][1],
        }
    except (KeyError, IndexError) as error:
        raise _not_whole("vae", error, where) from None


def text_encoder_facts(shapes: Shapes, where: str) -> dict[str, Any]:
    """Fields of ``text_encoder/config.json`` that shapes tell. Raises as ``transformer_facts``."""
    try:
        words, width = shapes["shared.weight"]
        buckets, heads = shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    except (KeyError, ValueError) as error:
        raise _not_whole("text_encoder", error, where) from None
    depth = _depth(shapes, r"encoder\.block\.(\d+)\.")
    return {
        "vocab_size": words,
        "d_model": width,
        "num_layers": depth,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


FACTS = {"transformer": transformer_facts, "vae": vae_facts, "text_encoder": text_encoder_facts}
"""By component: what shapes tell of its JSON."""


def _depth(shapes: Shapes, pattern: str) -> int:
    """How many there are of what ``pattern`` numbers in the tensors' names."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def _not_whole(component: str, error: Exception, where: str) -> ModelError:
    missing = f"{error.args[0]} is missing" if isinstance(error, KeyError) else f"a tensor has no such shape: {error}"
    return ModelError(
        f"this is no whole {component} of a CogVideoX: {missing} (by diffusers' names)",
        where=where,
        fix="give the checkpoint of a whole model; a file of one process of several is not",
    )
