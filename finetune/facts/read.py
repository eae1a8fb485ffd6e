"""From a checkpoint's JSON files to ``Facts``, with every wrong file and key named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from finetune.errors import ModelError, raise_all
from finetune.facts.locate import COMPLETE_CHECKPOINT, MODEL_INDEX, locate
from finetune.facts.model import Facts

CONFIG_FILES = {
    "transformer": "transformer/config.json",
    "vae": "vae/config.json",
    "scheduler": "scheduler/scheduler_config.json",
    "text_encoder": "text_encoder/config.json",
}
"""Where a diffusers pipeline folder keeps the JSON of each component."""
SchedulerClass = Literal["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]


class _Json(BaseModel):
    """A component's JSON: known keys checked, others left alone; defaults are those of the diffusers class."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Transformer(_Json):
    """Defaults of ``diffusers.CogVideoXTransformer3DModel``."""

    class_name: Literal["CogVideoXTransformer3DModel"] = Field(alias="_class_name")
    num_layers: PositiveInt = 30
    num_attention_heads: PositiveInt = 30
    attention_head_dim: PositiveInt = 64
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    patch_size: PositiveInt = 2
    patch_size_t: PositiveInt | None = None
    sample_height: PositiveInt = 60
    sample_width: PositiveInt = 90
    sample_frames: PositiveInt = 49
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    ofs_embed_dim: PositiveInt | None = None
    text_embed_dim: PositiveInt = 4096
    max_text_seq_length: PositiveInt = 226
    temporal_compression_ratio: PositiveInt = 4


class _Vae(_Json):
    """Defaults of ``diffusers.AutoencoderKLCogVideoX``."""

    class_name: Literal["AutoencoderKLCogVideoX"] = Field(alias="_class_name")
    block_out_channels: tuple[PositiveInt, ...] = (128, 256, 256, 512)
    latent_channels: PositiveInt = 16
    temporal_compression_ratio: PositiveInt = 4
    scaling_factor: PositiveFloat = 1.15258426
    invert_scale_latents: bool = False


class _Scheduler(_Json):
    """Defaults of ``diffusers.CogVideoXDDIMScheduler``, which ``CogVideoXDPMScheduler`` shares."""

    class_name: SchedulerClass = Field(alias="_class_name")
    num_train_timesteps: PositiveInt = 1000
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: PositiveFloat = 3.0


class _TextEncoder(_Json):
    d_model: PositiveInt
    """Required: the default of ``transformers.T5Config`` is another T5's."""


class _Parts(_Json):
    transformer: _Transformer
    vae: _Vae
    scheduler: _Scheduler
    text_encoder: _TextEncoder | None = None
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
    pipeline = _read_json(folder / MODEL_INDEX).get("_class_name")
    if not str(pipeline).startswith("CogVideoX"):
        raise ModelError(
            f"this is not a CogVideoX pipeline: _class_name is {pipeline!r}",
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
    content: dict[str, Any] = {}
    problems: list[ModelError] = []
    for part, file in CONFIG_FILES.items():
        if part == "text_encoder" and not (folder / file).exists():
            continue
        try:
            content[part] = _read_json(folder / file)
        except ModelError as error:
            problems.append(error)
    headline = "this is not a CogVideoX that this package understands ({n} problems)"
    raise_all(ModelError, problems, what=headline)
    try:
        return _Parts.model_validate(content)
    except ValidationError as error:
        for problem in error.errors():
            part, *key = (str(place) for place in problem["loc"])
            problems.append(ModelError(f"{'.'.join(key)}: {problem['msg']}", where=str(folder / CONFIG_FILES[part])))
        raise_all(ModelError, problems, what=headline)
        raise


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.name} is missing", where=str(path), fix=COMPLETE_CHECKPOINT) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} holds a JSON {type(content).__name__}, not an object", where=str(path))
    return content
