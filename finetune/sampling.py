"""Videos from modules that are loaded already, through the stock diffusers pipeline: for training and for the command.

The stock pipeline, because it is what a fine-tuned model will meet in other people's hands.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.cogvideox import build_pipeline
from finetune.facts import Facts
from finetune.progress import Bar
from finetune.trainers.validation import training_state_untouched
from finetune.types import Bucket
from finetune.videos import Frames

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
    image: Path | Tensor | None = None
    """First frame for image-to-video: a file, or uint8 RGB [3, H, W]; resized and cropped as training clips are."""


def sample_videos(
    facts: Facts,
    transformer: Any,
    scheduler: Any,
    vae: Any,
    requests: Sequence[SampleRequest],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    dynamic_cfg: bool = False,
    progress: bool = False,
    offload_to: torch.device | None = None,
) -> list[Frames]:
    """Sample each request through the stock pipeline, one at a time, so that none depends on its neighbours.

    The modules are used as they are (dtype, device, adapters) and left as they were: no hook stays on them, their
    train/eval flags and the global random state are restored, and the scheduler's state is a copy's. All randomness
    comes from a CPU generator with the request's seed.

    Args:
        facts: of the model.
        transformer: unwrapped, with or without adapters.
        scheduler: the checkpoint's own.
        vae: in the transformer's dtype.
        requests: what to sample.
        num_inference_steps: denoising steps.
        guidance_scale: 1 for no guidance.
        dynamic_cfg: let the guidance grow with the denoising steps.
        progress: show a bar per video.
        offload_to: keep each module on the CPU but while it runs on this device.

    Returns:
        One uint8 [F, H, W, 3] per request.

    Raises:
        ValueError: if an image is missing or superfluous, or the VAE has another dtype than the transformer.
        DataError: if an image cannot be read.
    """
    # The patch embedding's: LoRA weights come later and may be float32 beside a bfloat16 base.
    dtype = next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())
    if vae.dtype != dtype:
        raise ValueError(f"the VAE is {vae.dtype} and the transformer {dtype}; the pipeline needs them equal")
    videos = []
    with training_state_untouched(transformer, vae), _no_traces(transformer):
        pipeline = build_pipeline(facts, transformer=transformer, scheduler=_fresh(scheduler), vae=vae)
        pipeline.progress_bar = lambda iterable=None, total=None: Bar(
            iterable, total=total, desc="denoising", disable=not progress
        )
        try:
            if offload_to is not None:
                pipeline.enable_model_cpu_offload(device=offload_to)
            device = pipeline._execution_device
            for request in requests:
                with _tiled(vae, request.bucket):
                    output = pipeline(
                        **_image_argument(facts, request),
                        prompt_embeds=request.prompt_embeds[None].to(device, dtype),
                        negative_prompt_embeds=request.negative_embeds[None].to(device, dtype),
                        num_frames=request.bucket.frames,
                        height=request.bucket.height,
                        width=request.bucket.width,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        use_dynamic_cfg=dynamic_cfg,
                        generator=torch.Generator("cpu").manual_seed(request.seed),
                        output_type="np",
                    )
                # The VAE decodes an even number of latent frames (possible with a temporal patch only) to 4F' frames
                # where 4F' - 3 were encoded: the first, single frame comes out as four.
                videos.append(_to_uint8(output.frames[0][-request.bucket.frames :], request.seed))
        finally:
            if offload_to is not None:
                pipeline.remove_all_hooks()
    return videos


def _fresh(scheduler: Any) -> Any:
    return type(scheduler).from_config(scheduler.config)


@contextmanager
def _no_traces(transformer: Any) -> Iterator[None]:
    """Take away the hook registry that a pipeline call leaves on a transformer which had none."""
    had_registry = hasattr(transformer, "_diffusers_hook")
    try:
        yield
    finally:
        if not had_registry and hasattr(transformer, "_diffusers_hook"):
            del transformer._diffusers_hook


@contextmanager
def _tiled(vae: Any, bucket: Bucket) -> Iterator[None]:
    before = vae.use_tiling
    if decodes_in_tiles(bucket, vae.dtype):
        vae.enable_tiling()
    try:
        yield
    finally:
        vae.use_tiling = before


def _image_argument(facts: Facts, request: SampleRequest) -> dict[str, Any]:
    if (request.image is not None) != facts.image_to_video:
        raise ValueError(
            f"the model is {'image' if facts.image_to_video else 'text'}-to-video, "
            f"but an image is {'missing' if request.image is None else 'given'}"
        )
    if request.image is None:
        return {}
    from PIL import Image

    from finetune.datasets.video import fit_image, load_fitted_image

    if isinstance(request.image, Path):
        image = load_fitted_image(request.image, request.bucket)
    else:
        image = fit_image(request.image, request.bucket)
    return {"image": Image.fromarray(image.permute(1, 2, 0).numpy())}


def _to_uint8(video: Any, seed: int) -> Frames:
    """[F, H, W, 3] in 0..1 to bytes; what is not a number becomes black, and is said."""
    if not np.isfinite(video).all():
        _log.warning("the sampled video with seed %d holds values that are not numbers; they are shown black", seed)
    frames: Frames = (np.nan_to_num(video, nan=0.0) * 255).round().astype(np.uint8)
    return frames
