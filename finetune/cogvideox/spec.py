"""A checkpoint in numbers, and the arithmetic of shapes that follows from them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from finetune.cogvideox.components import (
    CONFIG_FILES,
    Scheduler,
    TextEncoder,
    Transformer,
    Vae,
    read_json,
    read_part,
    require_own_files,
)
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import COMPLETE_CHECKPOINT, MODEL_INDEX, json_folder, locate
from finetune.core.errors import ModelError, raise_all
from finetune.core.types import Bucket, RowFile

_LONGEST_S = 10
"""Seconds that the second generation was made for: it states 16N+1 frames with N <= 10, and no file of it says so."""


BLOCK_LAYERS = (
    *("norm1.linear", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm2.linear"),
    *("ff.net.0.proj", "ff.net.2"),
)
"""Names of a block's linear layers, inside it."""


@dataclass(frozen=True)
class ModelSpec:
    """A CogVideoX checkpoint in numbers; the names are those of its JSON wherever it has one."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    """Of the transformer: the latent channels, or twice as many where an image condition is concatenated."""
    out_channels: int
    patch_size: int
    """Latent cells per token, each way."""
    patch_size_t: int | None
    """Latent frames per token; None in the first generation, whose tokens span one frame."""
    sample_height: int
    """Latent cells. The native height of the first generation; of the second, the reach of its position table."""
    sample_width: int
    """As ``sample_height``."""
    sample_frames: int
    """Pixel frames, unlike the two above; diffusers keeps it so for compatibility."""
    use_rotary: bool
    use_learned_positions: bool
    ofs_embed_dim: int | None
    """Width of the offset embedding; a model that has one is always given the offset 2.0."""
    text_embed_dim: int
    max_text_seq_length: int
    """Text tokens, padding included: CogVideoX attends to all of them."""
    latent_channels: int
    scaling_factor: float
    """Latents are multiplied by it before the transformer sees them."""
    invert_scale_latents: bool
    """Whether the latents of an *image condition* are divided by the scaling factor instead."""
    vae_spatial: int
    """Pixels per latent cell, each way."""
    vae_temporal: int
    """Pixel frames per latent frame, after the first."""
    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    snr_shift_scale: float
    rescale_betas_zero_snr: bool
    prediction_type: str
    control: bool = False
    """Whether the model is conditioned on a whole control video, concatenated on channels. Its JSON has the channels of
    an image-to-video model; the pipeline's class tells them apart."""
    riflex: int | None = None
    """Pixel frames within which temporal positions do not repeat (``cogvideox.riflex``); None for the checkpoint's own
    positions."""

    @property
    def conditioned(self) -> bool:
        """Whether the transformer is given a condition beside the latents, concatenated on channels."""
        return self.in_channels == 2 * self.latent_channels

    @property
    def image_to_video(self) -> bool:
        """Whether that condition is a first frame."""
        return self.conditioned and not self.control

    @property
    def row_files(self) -> tuple[RowFile, ...]:
        """What of a row, beside its video and captions, the model is conditioned on."""
        return ("control",) if self.control else ("image",) if self.image_to_video else ()

    @property
    def task(self) -> str:
        """What it makes of what, in words."""
        return "control-to-video" if self.control else "image-to-video" if self.image_to_video else "text-to-video"

    @property
    def native_fps(self) -> int:
        """Frames per second of the videos it was trained on.

        The one number that no file states: the first generation was trained at 8, the second at 16, and only the
        second has a temporal patch.
        """
        return 8 if self.patch_size_t is None else 16

    @property
    def size_multiple(self) -> int:
        """Height and width in pixels must be multiples of this: one token's side."""
        return self.vae_spatial * self.patch_size

    @property
    def training_bucket(self) -> Bucket:
        """The size a model was made for; of the second generation 81x768x1360, where its position table allows it.

        The JSON of the second generation states the reach of that table instead, a size that nobody trained at.
        """
        published, stated = Bucket(self.sample_frames, 768, 1360), self.stated_bucket
        fits = published.height <= stated.height and published.width <= stated.width
        return published if self.patch_size_t is not None and fits else stated

    @property
    def stated_bucket(self) -> Bucket:
        """Frames, height and width in pixels as the JSON states them: of the second generation, the largest size."""
        return Bucket(self.sample_frames, self.sample_height * self.vae_spatial, self.sample_width * self.vae_spatial)

    @property
    def frames_step(self) -> int:
        """A clip has this many frames times N, plus 1; see ``check_bucket``."""
        if self.patch_size_t is None:
            return math.lcm(self.vae_temporal, self.native_fps)
        return self.vae_temporal

    @property
    def linear_layers(self) -> list[str]:
        """Names of the transformer's linear layers, as diffusers names them."""
        timestep = ["time_embedding", *(["ofs_embedding"] if self.ofs_embed_dim is not None else [])]
        return [
            # The first generation's patches go through a convolution.
            *(["patch_embed.proj"] if self.patch_size_t is not None else []),
            "patch_embed.text_proj",
            *(f"{name}.linear_{part}" for name in timestep for part in (1, 2)),
            *(f"transformer_blocks.{index}.{layer}" for index in range(self.num_layers) for layer in BLOCK_LAYERS),
            "norm_out.linear",
            "proj_out",
        ]

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of ``frames`` pixel frames, before front padding."""
        return (frames - 1) // self.vae_temporal + 1

    def padded_latent_frames(self, frames: int) -> int:
        """Latent frames as the transformer sees them: padded in front to whole temporal patches."""
        latent_frames = self.latent_frames(frames)
        return latent_frames + self.front_padding(latent_frames)

    def front_padding(self, latent_frames: int) -> int:
        """How many copies of the first latent frame go before ``latent_frames`` frames: ``(p - F' mod p) mod p``."""
        return -latent_frames % (self.patch_size_t or 1)

    def positions(self, frames: int) -> int:
        """Positions in time of a clip of ``frames`` pixel frames: latent frames, or pairs of them as tokens have."""
        return self.padded_latent_frames(frames) // (self.patch_size_t or 1)

    def latent_shape(self, bucket: Bucket) -> tuple[int, int, int, int]:
        """(C, F', H', W') of a clip's latents, before front padding."""
        return (
            self.latent_channels,
            self.latent_frames(bucket.frames),
            bucket.height // self.vae_spatial,
            bucket.width // self.vae_spatial,
        )

    def tokens(self, bucket: Bucket) -> int:
        """Length of the sequence the transformer attends over: video tokens and text tokens."""
        cells = (bucket.height // self.size_multiple) * (bucket.width // self.size_multiple)
        return self.positions(bucket.frames) * cells + self.max_text_seq_length

    def check_bucket(self, bucket: Bucket) -> list[str]:
        """What makes ``bucket`` impossible for this model, in words with the nearest legal values; empty if nothing.

        - Learned positions are one table, for the native height, width and frame count. diffusers refuses another
          size, and silently puts a sine table in its place at another frame count.
        - The VAE takes 4N+1 frames. The first generation was made for whole seconds, 8N+1 up to its ``sample_frames``.
          The second asks for 16N+1, but its front padding takes any 4N+1: see ``advise_bucket``. With ``riflex`` both
          go up to that.
        - A token is ``size_multiple`` pixels wide and high.
        - The second generation cuts its rotary positions out of a table of ``sample_height`` x ``sample_width``.
          The first stretches them, and sine positions are computed for any size.
        """
        if self.use_learned_positions:
            if bucket == self.stated_bucket:
                return []
            fixed = f"its learned positions fix it to {self.stated_bucket} (frames x height x width)"
            return [f"{bucket} is not possible for this model: {fixed}"]
        first_generation = self.patch_size_t is None
        longest = self.riflex or (self.sample_frames if first_generation else None)
        problems = []
        if legal := _nearest(bucket.frames, self.frames_step, offset=1, largest=longest):
            rule = f"{self.frames_step}N+1 frames" + (f", at most {longest}" if longest else "")
            problems.append(f"{bucket.frames} frames are not possible: this model takes {rule}; nearest: {legal}")
        bounded = self.use_rotary and not first_generation
        for side in ("height", "width"):
            pixels, largest = getattr(bucket, side), getattr(self.stated_bucket, side) if bounded else None
            if legal := _nearest(pixels, self.size_multiple, offset=0, largest=largest):
                rule = f"a multiple of {self.size_multiple}" + (f", at most {largest}" if largest else "")
                problems.append(f"{side} {pixels} is not possible: it must be {rule}; nearest: {legal}")
        return problems

    def advise_bucket(self, bucket: Bucket) -> list[str]:
        """What is possible but not what the model was made for, in words; empty if nothing. For legal buckets."""
        if self.patch_size_t is not None:
            step, longest = self.native_fps, self.riflex or self.native_fps * _LONGEST_S + 1
            if legal := _nearest(bucket.frames, step, offset=1, largest=longest):
                return [
                    f"{bucket.frames} frames: the model was made for {step}N+1 frames, at most {longest}; "
                    f"nearest: {legal} (others train, with a padded first frame where needed)"
                ]
            return []
        native = self.stated_bucket
        if (bucket.height, bucket.width) != (native.height, native.width):
            return [
                f"{bucket.height}x{bucket.width}: the model was made for {native.height}x{native.width} (height x "
                "width); other sizes train, but their positions are stretched or new to it"
            ]
        return []


def _nearest(value: int, step: int, *, offset: int, largest: int | None) -> str:
    """The values of the form ``step * N + offset`` up to ``largest`` around ``value``, as text; "" if it is one."""
    lowest = offset or step
    below = max((value - offset) // step * step + offset, lowest)
    if largest is not None:
        below = min(below, (largest - offset) // step * step + offset)
    if below == value:
        return ""
    above = below + step
    return f"{below} or {above}" if below < value and (largest is None or above <= largest) else str(below)


# ---------------------------------------------------------------------------- from a checkpoint's JSON to ``ModelSpec``

_LARGEST_TABLE = 1 << 30
"""Numbers in a stored table of positions; CogVideoX-5B-I2V's, the largest, has 54 million."""


class _Parts(NamedTuple):
    transformer: Transformer
    vae: Vae
    scheduler: Scheduler
    text_encoder: TextEncoder | None = None
    """Training from a complete cache needs none, so it may be absent; if present it has to fit."""


CONTROL_PIPELINE = "CogVideoXFunControlPipeline"
"""diffusers' class for models that are conditioned on a control video."""

CONTROL_SCHEDULER = "CogVideoXDDIMScheduler"
"""The only one of CogVideoX's that it can step with."""


def spec_of(model: ModelConfig, *, shipped: bool = False) -> ModelSpec:
    """The spec of what a run trains.

    Args:
        model: the run's section.
        shipped: of a published model, take the JSON of this package and ask no network, as ``json_folder`` does.

    Raises:
        ModelError: as ``read_spec``.
    """
    pretrained, revision = model.pretrained, model.revision
    if shipped:
        pretrained, revision = str(json_folder(pretrained, revision)), None
    return replace(read_spec(pretrained, revision, control=model.control), riflex=model.riflex)


def read_spec(pretrained: str, revision: str | None = None, *, control: bool = False) -> ModelSpec:
    """Read a checkpoint's spec from its JSON; no weight is read or downloaded.

    Args:
        pretrained: a diffusers pipeline folder, or the id of one on the Hugging Face hub.
        revision: branch, tag or commit on the hub; for a folder only None.
        control: the spec with a control video (``model.control``): of a text-to-video checkpoint, whose transformer is
            to be widened (``control.widen``); or of one that was made for control and whose JSON does not say so.

    Raises:
        ModelError: if it cannot be found, or is not a CogVideoX; every wrong file and key is named. If ``control`` is
            asked of an image-to-video checkpoint.
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
    spec = ModelSpec(
        **{field.name: values[field.name] for field in fields(ModelSpec) if field.name in values},
        use_rotary=transformer.use_rotary_positional_embeddings,
        use_learned_positions=transformer.use_learned_positional_embeddings,
        vae_spatial=2 ** (len(vae.block_out_channels) - 1),
        vae_temporal=vae.temporal_compression_ratio,
    )
    if control and spec.conditioned and pipeline == "CogVideoXImageToVideoPipeline":
        raise ModelError(
            "model.control is for text-to-video models, and this one is image-to-video",
            where=str(folder / MODEL_INDEX),
            fix="name a text-to-video checkpoint, or leave model.control out",
        )
    if control or (spec.conditioned and pipeline == CONTROL_PIPELINE):
        return replace(spec, in_channels=2 * spec.latent_channels, control=True)
    return spec


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
