"""From a checkpoint's JSON files to ``Facts``, with every wrong file and key named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationError

from finetune.errors import ModelError, raise_all
from finetune.facts.guard import CONFIG_FILES, read_component_json, read_json
from finetune.facts.locate import COMPLETE_CHECKPOINT, MODEL_INDEX, locate
from finetune.facts.model import Facts

SchedulerClass = Literal["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]

# Far above any model, and far below what would take all memory before a wrong number is noticed.
_Layers = Annotated[int, Field(gt=0, le=1_000)]
_Width = Annotated[int, Field(gt=0, le=65_536)]
_LARGEST_TABLE = 1 << 30
"""Numbers in a stored table of positions; CogVideoX-5B-I2V's, the largest, has 54 million."""


class _Json(BaseModel):
    """A component's JSON: known keys checked, others left alone; defaults are those of the diffusers class."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Transformer(_Json):
    """Defaults of ``diffusers.CogVideoXTransformer3DModel``."""

    class_name: Literal["CogVideoXTransformer3DModel"] = Field(alias="_class_name")
    num_layers: _Layers = 30
    num_attention_heads: _Width = 30
    attention_head_dim: _Width = 64
    in_channels: _Width = 16
    out_channels: _Width = 16
    patch_size: _Width = 2
    patch_size_t: _Width | None = None
    sample_height: _Width = 60
    sample_width: _Width = 90
    sample_frames: _Width = 49
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    ofs_embed_dim: _Width | None = None
    text_embed_dim: _Width = 4096
    max_text_seq_length: _Width = 226
    temporal_compression_ratio: _Width = 4


class _Vae(_Json):
    """Defaults of ``diffusers.AutoencoderKLCogVideoX``."""

    class_name: Literal["AutoencoderKLCogVideoX"] = Field(alias="_class_name")
    block_out_channels: tuple[_Width, ...] = Field((128, 256, 256, 512), min_length=1, max_length=8)
    latent_channels: _Width = 16
    temporal_compression_ratio: _Width = 4
    scaling_factor: PositiveFloat = 1.15258426
    invert_scale_latents: bool = False


class _Scheduler(_Json):
    """Defaults of ``diffusers.CogVideoXDDIMScheduler``, which ``CogVideoXDPMScheduler`` shares."""

    class_name: SchedulerClass = Field(alias="_class_name")
    num_train_timesteps: Annotated[int, Field(gt=0, le=100_000)] = 1000
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.0120
    beta_schedule: str = "scaled_linear"
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: PositiveFloat = 3.0


class _TextEncoder(_Json):
    d_model: _Width
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
    pipeline = read_json(folder / MODEL_INDEX).get("_class_name")
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
            content[part] = read_component_json(folder, part)
        except ModelError as error:
            problems.append(error)
    headline = "this is not a CogVideoX that this package understands ({n} problems)"
    raise_all(ModelError, problems, what=headline)
    try:
        return _Parts.model_validate(content)
    except ValidationError as error:
        for problem in error.errors():
            part, *key = (str(place) for place in problem["loc"])
            problems.append(
                ModelError(f"{'.'.join(key)}: {problem['msg']}"[:300], where=str(folder / CONFIG_FILES[part]))
            )
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
