"""From a checkpoint's JSON files to ``Facts``, with every wrong file and key named."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import ModelError, raise_all
from finetune.facts.guard import CONFIG_FILES, read_json, read_part, require_own_files
from finetune.facts.locate import COMPLETE_CHECKPOINT, MODEL_INDEX, locate
from finetune.facts.model import Facts
from finetune.facts.parts import Scheduler, TextEncoder, Transformer, Vae

_LARGEST_TABLE = 1 << 30
"""Numbers in a stored table of positions; CogVideoX-5B-I2V's, the largest, has 54 million."""


class _Parts(NamedTuple):
    transformer: Transformer
    vae: Vae
    scheduler: Scheduler
    text_encoder: TextEncoder | None = None
    """Training from a complete cache needs none, so it may be absent; if present it has to fit."""


def read_facts(pretrained: str, revision: str | None = None) -> Facts:
    """Read a checkpoint's facts from its JSON; no weight is read or downloaded.

    Args:
        pretrained: a diffusers pipeline folder, or the id of one on the Hugging Face hub.
        revision: branch, tag or commit on the hub; for a folder only None.

    Raises:
        ModelError: if it cannot be found, or is not a CogVideoX; every wrong file and key is named.
    """
    folder = locate(pretrained, revision, patterns=[MODEL_INDEX, *CONFIG_FILES.values()])
    pipeline = read_json(folder / MODEL_INDEX).get("_class_name")
    if not str(pipeline).startswith("CogVideoX"):
        raise ModelError(
            f"this is not a CogVideoX pipeline: _class_name is {pipeline!r:.100}",
            where=str(folder / MODEL_INDEX),
            fix=COMPLETE_CHECKPOINT,
        )
    parts = _read_parts(folder)
    problems = [ModelError(what, where=str(folder / CONFIG_FILES[part])) for part, what in _misfits(parts)]
    raise_all(ModelError, problems, what="the checkpoint's parts do not fit together ({n} problems)")
    transformer, vae, scheduler = parts.transformer, parts.vae, parts.scheduler
    values = {**scheduler.model_dump(), **vae.model_dump(), **transformer.model_dump()}
    return Facts(
        **{field.name: values[field.name] for field in fields(Facts) if field.name in values},
        use_rotary=transformer.use_rotary_positional_embeddings,
        use_learned_positions=transformer.use_learned_positional_embeddings,
        vae_spatial=2 ** (len(vae.block_out_channels) - 1),
        vae_temporal=vae.temporal_compression_ratio,
    )


def _read_parts(folder: Path) -> _Parts:
    parts: dict[str, Any] = {}
    problems: list[ModelError] = []
    for part in (*CONFIG_FILES, "tokenizer"):
        try:
            # Lexists: a link that leads nowhere is a fault, and not absence.
            if part in CONFIG_FILES and (part != "text_encoder" or os.path.lexists(folder / CONFIG_FILES[part])):
                parts[part] = read_part(folder, part)
            require_own_files(folder / part)
        except ModelError as error:
            problems.append(error)
    raise_all(ModelError, problems, what="this is not a CogVideoX that this package understands ({n} problems)")
    return _Parts(**parts)


def _misfits(parts: _Parts) -> Iterator[tuple[str, str]]:
    """Pairs of (component, what): values legal one by one but not together, or outside the training arithmetic."""
    transformer, vae, scheduler = parts.transformer, parts.vae, parts.scheduler
    latent = vae.latent_channels
    if transformer.out_channels != latent:
        yield "transformer", f"out_channels is {transformer.out_channels}, but the VAE has {latent} latent channels"
    if transformer.in_channels not in (latent, 2 * latent):
        yield (
            "transformer",
            f"in_channels is {transformer.in_channels}; text-to-video has {latent} here, image-to-video {2 * latent}",
        )
    if transformer.temporal_compression_ratio != vae.temporal_compression_ratio:
        yield (
            "transformer",
            f"temporal_compression_ratio is {transformer.temporal_compression_ratio}, "
            f"but the VAE's is {vae.temporal_compression_ratio}",
        )
    latent_frames = (transformer.sample_frames - 1) // transformer.temporal_compression_ratio + 1
    cells = transformer.sample_height * transformer.sample_width // transformer.patch_size**2
    numbers = cells * latent_frames * transformer.num_attention_heads * transformer.attention_head_dim
    stored = transformer.use_learned_positional_embeddings or not transformer.use_rotary_positional_embeddings
    if stored and numbers > _LARGEST_TABLE:
        yield "transformer", f"its table of positions would hold {numbers:,} numbers"
    if transformer.use_learned_positional_embeddings and not transformer.use_rotary_positional_embeddings:
        yield "transformer", "use_learned_positional_embeddings needs use_rotary_positional_embeddings in diffusers"
    if parts.text_encoder and parts.text_encoder.d_model != transformer.text_embed_dim:
        yield (
            "text_encoder",
            f"d_model is {parts.text_encoder.d_model}, "
            f"but the transformer's text_embed_dim is {transformer.text_embed_dim}",
        )
    if scheduler.prediction_type != "v_prediction":
        yield "scheduler", f"prediction_type is {scheduler.prediction_type!r}; CogVideoX predicts v_prediction"
    if scheduler.beta_schedule != "scaled_linear":
        yield "scheduler", f"beta_schedule is {scheduler.beta_schedule!r}; CogVideoX's is scaled_linear"
    if scheduler.trained_betas is not None:
        yield "scheduler", "trained_betas is set; CogVideoX's betas follow from beta_start and beta_end"
