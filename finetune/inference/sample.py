"""Videos through the stock diffusers pipelines, from modules that are loaded: for training, and for ``generate``.

The stock pipelines, because they are what a fine-tuned model will meet in other people's hands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.cogvideox.denoise import rotary_table
from finetune.cogvideox.encode import enable_tiling
from finetune.cogvideox.spec import ModelSpec
from finetune.core.rng import training_state_untouched
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, Offload
from finetune.inference.modes import FromControl, FromText, Mode
from finetune.inference.offload import offloading
from finetune.inference.videos import Frames

_log = logging.getLogger(__name__)

DECODED_BYTES_PER_PIXEL = 46_000
"""Memory that decoding whole frames takes per pixel of one frame, at two bytes per activation: counted on the VAE of
the published models (14.7 GiB for 49x480x720, 44.5 GiB for 81x768x1360); clips of less than 25 frames take less."""

DECODE_WHOLE_BELOW = 4 * 2**30
"""Above this, decode in tiles, which take about 4 GiB for any size."""


def decodes_in_tiles(bucket: Bucket, dtype: torch.dtype) -> bool:
    """Whether a sampled video is decoded in overlapping tiles. A rule of sizes alone, not of the memory that is free:
    the same prompt and seed give the same video on every card.
    """
    return DECODED_BYTES_PER_PIXEL * bucket.height * bucket.width * dtype.itemsize // 2 > DECODE_WHOLE_BELOW


@dataclass(frozen=True)
class SampleRequest:
    """One video to sample from embeddings that are ready: T5 need not be in memory."""

    prompt_embeds: Tensor
    """[L, D]"""
    negative_embeds: Tensor
    """[L, D]: what guidance leads away from, usually the embedding of the empty caption."""
    seed: int
    bucket: Bucket
    mode: Mode = field(default_factory=FromText)
    """What it is sampled from."""


@dataclass(frozen=True)
class SampleModules:
    """What samples; used as it is: dtype, device, adapters."""

    spec: ModelSpec
    transformer: Any
    """Unwrapped, with or without adapters."""
    scheduler: Any
    """The checkpoint's own, or another of its numbers."""
    vae: Any
    """In the transformer's dtype."""


@dataclass(frozen=True)
class SampleSettings:
    """How to sample."""

    num_inference_steps: int
    """Denoising steps."""
    guidance_scale: float
    """1 for no guidance."""
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps."""
    watch: Callable[[Any, int], dict[str, Any]] | None = None
    """Who looks on, such as ``preview.Preview.attach``: given the pipeline and its steps, what it is called with."""


def sample_videos(
    modules: SampleModules,
    requests: Sequence[SampleRequest],
    settings: SampleSettings,
    *,
    progress: bool = False,
    offload: Offload = "none",
    device: torch.device | None = None,
) -> list[Frames]:
    """Sample each request through the stock pipeline of its mode, one at a time: none depends on its neighbours.

    The modules are left as they were: no hook stays on them, their train/eval flags and the global random state are
    restored, and the scheduler's state is a copy's. All randomness comes from a CPU generator with the request's seed.

    Args:
        modules: what samples.
        requests: what to sample.
        settings: how.
        progress: show a bar per video.
        offload: what waits in host memory; with ``group`` and ``sequential`` the modules keep hooks for it.
        device: what computes where something waits; else where the modules are.

    Returns:
        One uint8 [F, H, W, 3] per request.

    Raises:
        ValueError: if an image is missing or superfluous, or the VAE has another dtype than the transformer.
        DataError: if an image cannot be read.
    """
    spec, transformer, vae = modules.spec, modules.transformer, modules.vae
    # The patch embedding's: LoRA weights come later and may be float32 beside a bfloat16 base.
    dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
    if vae.dtype != dtype:
        raise ValueError(f"the VAE is {vae.dtype} and the transformer {dtype}; the pipeline needs them equal")
    videos = []
    with training_state_untouched(transformer, vae):
        for request in requests:
            if request.mode.image_to_video != spec.image_to_video:
                kind, state = ("image", "missing") if spec.image_to_video else ("text", "given")
                raise ValueError(f"the model is {kind}-to-video, but an image is {state}")
            if isinstance(request.mode, FromControl) != spec.control:
                state = "missing" if spec.control else "given"
                raise ValueError(f"the model is {spec.task}, but a control video is {state}")
            pipeline = request.mode.pipeline(
                request.bucket,
                tokenizer=None,
                text_encoder=None,
                vae=vae,
                transformer=transformer,
                scheduler=type(modules.scheduler).from_config(modules.scheduler.config),
            )
            if spec.riflex is not None:
                pipeline._prepare_rotary_positional_embeddings = partial(_positions, spec)
            pipeline.progress_bar = lambda iterable=None, total=None: Bar(
                iterable, total=total, desc="denoising", disable=not progress
            )
            with (
                offloading(pipeline, offload, device or transformer.device),
                _without_new_hooks(transformer),
                _tiled_if_large(vae, request.bucket),
            ):
                here = pipeline._execution_device
                watching = settings.watch(pipeline, settings.num_inference_steps) if settings.watch else {}
                output = pipeline(
                    **request.mode.arguments(spec, request.bucket),
                    **watching,
                    prompt_embeds=request.prompt_embeds[None].to(here, dtype),
                    negative_prompt_embeds=request.negative_embeds[None].to(here, dtype),
                    height=request.bucket.height,
                    width=request.bucket.width,
                    num_inference_steps=settings.num_inference_steps,
                    guidance_scale=settings.guidance_scale,
                    use_dynamic_cfg=settings.dynamic_cfg,
                    generator=torch.Generator("cpu").manual_seed(request.seed),
                    output_type="np",
                )
            # The VAE decodes an even number of latent frames (possible with a temporal patch only) to 4F' frames
            # where 4F' - 3 were encoded: the first, single frame comes out as four.
            videos.append(_to_uint8(output.frames[0][-request.bucket.frames :], request.seed))
    return videos


def _positions(
    spec: ModelSpec, height: int, width: int, num_frames: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``rotary_table`` with the arguments of the stock pipelines' own: pixels, and latent frames with padding."""
    return rotary_table(spec, num_frames, height // spec.vae_spatial, width // spec.vae_spatial, device=device)


@contextmanager
def _without_new_hooks(transformer: Any) -> Iterator[None]:
    """Take away the hook registry that a pipeline call leaves on a transformer which had none."""
    had_registry = hasattr(transformer, "_diffusers_hook")
    try:
        yield
    finally:
        if not had_registry and hasattr(transformer, "_diffusers_hook"):
            del transformer._diffusers_hook


@contextmanager
def _tiled_if_large(vae: Any, bucket: Bucket) -> Iterator[None]:
    before = vae.use_tiling
    if decodes_in_tiles(bucket, vae.dtype):
        enable_tiling(vae)
    try:
        yield
    finally:
        vae.use_tiling = before


def _to_uint8(video: Any, seed: int) -> Frames:
    """[F, H, W, 3] in 0..1 to bytes; what is not a number becomes black, and is told."""
    if not np.isfinite(video).all():
        _log.warning("the sampled video with seed %d holds values that are not numbers; they are shown black", seed)
    frames: Frames = (np.nan_to_num(video, nan=0.0) * 255).round().astype(np.uint8)
    return frames
