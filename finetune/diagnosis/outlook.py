"""What a run will take, before it is paid for: seconds, memory, disk and download. Predicted, not measured.

Seconds are arithmetic (``planner.cost_model``) and there at once. Memory is the planner's, whose process takes half a
minute the first time for a model and memory section, and a few seconds ever after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from finetune.cogvideox.components import Vae, read_part
from finetune.cogvideox.model_files import json_folder, local_folder, published_variant
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.files import free_space, human_size
from finetune.core.gpu import OVERHEAD_GIB, to_gib
from finetune.core.types import GIB, Bucket

DOWNLOAD_GB: Mapping[str, tuple[float, float, float]] = {
    "2b": (3.4, 0.4, 9.5),
    "5b": (11.1, 0.4, 9.5),
    "5b-i2v": (11.1, 0.4, 9.5),
    "1.5-5b": (11.1, 0.4, 9.5),
    "1.5-5b-i2v": (11.1, 0.4, 9.5),
}
"""Transformer, VAE and text encoder of the published models, in 16 bits: counted from their weights."""

_CONVOLUTIONS = 0.15
"""Rate of the VAE's convolutions, as a part of the rate of matrix products: an A800 was reported to make 41 TFLOP/s of
them, untiled (CogVideo's issue 579)."""

_T5_WEIGHTS = 4.762e9

PATIENCE_S = 3.0
"""How long a report waits for a prediction of memory that was not asked for."""


@dataclass(frozen=True)
class Outlook:
    """What a run will take; every figure is predicted."""

    device: str
    rates: str
    """Where the device's rates are from."""
    step_s: float
    training_s: float
    """All steps."""
    measuring_s: float
    """Held-out losses and sampled videos."""
    encode_s: Mapping[Bucket, float]
    """For the clips of each bucket."""
    caption_s: float
    """For all captions."""
    cache_bytes: Mapping[Bucket, int]
    caption_bytes: int
    free_bytes: int
    """On the cache's disk."""
    download_gb: float | None
    """None for a model of which nothing is known; 0 where it is on this machine."""
    memory: str = ""
    """In words."""
    fits: bool | None = None
    """Whether memory fits the card; None where one of the two is not known."""


def encode_operations(vae: Vae, bucket: Bucket) -> float:
    """Floating-point operations of the VAE's encoder for one clip, of its 3x3x3 and 3x3 convolutions.

    Args:
        vae: its configuration.
        bucket: of the clip.
    """
    compressing = vae.temporal_compression_ratio.bit_length() - 1
    frames, height, width, channels = bucket.frames, bucket.height, bucket.width, vae.block_out_channels[0]
    total = 2.0 * 27 * 3 * channels * frames * height * width
    for level, wider in enumerate(vae.block_out_channels):
        cells = frames * height * width
        total += 2.0 * 27 * cells * (channels * wider + (2 * vae.layers_per_block - 1) * wider**2)
        channels = wider
        if level < len(vae.block_out_channels) - 1:
            if level < compressing:
                frames = (frames - 1) // 2 + 1
            height, width = height // 2, width // 2
            total += 2.0 * 9 * frames * height * width * wider**2
    cells = frames * height * width
    return total + 2.0 * 27 * cells * (4 * channels**2 + channels * 2 * vae.latent_channels)


def look_ahead(
    config: RunConfig, spec: ModelSpec, clips: Mapping[Bucket, int], captions: int, run: tuple[int, int], device: str
) -> Outlook:
    """Predict what a run takes; memory is left open.

    Args:
        config: of the run.
        spec: of its model.
        clips: how many are encoded in each bucket, held-out and mirrored ones too.
        captions: how many different ones.
        run: optimizer steps, and held-out clips.
        device: name of the GPU; empty for the one that is here, or an A100.
    """
    # Both import torch, which takes a second that looking at clips need not wait for.
    from finetune.caching.encode import clip_bytes
    from finetune.caching.precompute import ENTRY_OVERHEAD, prompt_bytes
    from finetune.datasets.cache import stored_frames
    from finetune.planner.cost_model import device_here, rates_of
    from finetune.planner.step_time import step_cost

    steps, held_out = run
    rates = rates_of(device or device_here())
    cost = step_cost(config, spec, config.memory, rates)
    train, validation, cache = config.train, config.validation, config.cache
    forward_s = cost.forward.seconds / (train.batch_size * train.accumulation)
    passes = 0.0
    if validation.every and held_out:
        times = steps // validation.every + validation.at_start
        passes += times * 2 * min(validation.clips, held_out) * validation.timesteps
    if validation.sample_every and validation.samples:
        times = steps // validation.sample_every + validation.at_start
        guided = 2 if validation.guidance_scale > 1 else 1
        passes += times * len(validation.samples) * validation.num_inference_steps * guided
    vae = read_part(json_folder(config.model.pretrained, config.model.revision), "vae")
    assert isinstance(vae, Vae)
    draws = cache.image_draws if spec.image_to_video else 0
    further = config.data.condition_frames.stored
    entry_bytes = partial(clip_bytes, spec, dtype=cache.latents_dtype, draws=draws, condition_frames=further)

    def encode_s(bucket: Bucket) -> float:
        images = draws * len(stored_frames(further, spec.latent_frames(bucket.frames)))
        one = encode_operations(vae, replace(bucket, frames=1))
        return ((1 + spec.control) * encode_operations(vae, bucket) + images * one) / (_CONVOLUTIONS * rates.gemm)

    embeds = prompt_bytes(spec, "bf16")
    return Outlook(
        device=rates.device,
        rates=rates.source,
        step_s=cost.step_s,
        training_s=steps * cost.step_s,
        measuring_s=passes * forward_s,
        encode_s={bucket: count * encode_s(bucket) for bucket, count in clips.items()},
        caption_s=captions * 2 * _T5_WEIGHTS * spec.max_text_seq_length / rates.gemm,
        cache_bytes={bucket: count * (entry_bytes(bucket) + ENTRY_OVERHEAD) for bucket, count in clips.items()},
        caption_bytes=captions * (embeds + ENTRY_OVERHEAD),
        free_bytes=free_space(cache.dir),
        download_gb=_download_gb(config),
    )


def _download_gb(config: RunConfig) -> float | None:
    variant = published_variant(config.model.pretrained)
    folder = local_folder(config.model.pretrained, config.model.revision)
    if variant is None:
        return 0.0 if folder is not None else None
    parts = zip(("transformer", "vae", "text_encoder"), DOWNLOAD_GB[variant], strict=True)
    return sum(size for part, size in parts if folder is None or not any((folder / part).glob("*.safetensors")))


def with_memory(outlook: Outlook, nbytes: int | None, message: str, card_bytes: int | None) -> Outlook:
    """The outlook with what the planner came to.

    Args:
        outlook: without it.
        nbytes: predicted peak; None where there is none.
        message: in words, or why there is none.
        card_bytes: of the card; None where it is not known.
    """
    if nbytes is None or card_bytes is None:
        return replace(outlook, memory=message)
    needed = nbytes + round(OVERHEAD_GIB * GIB)
    fits = needed <= card_bytes
    words = f"{message}; with {OVERHEAD_GIB:g} GiB beside, {to_gib(needed)} of {to_gib(card_bytes)}"
    return replace(outlook, memory=f"{words}: {'fits' if fits else 'does not fit'}", fits=fits)


def in_words(outlook: Outlook, buckets: Sequence[Bucket]) -> list[tuple[str, str]]:
    """The figures as (label, value)."""
    encode_s = sum(outlook.encode_s[bucket] for bucket in buckets)
    cache = sum(outlook.cache_bytes[bucket] for bucket in buckets) + outlook.caption_bytes
    download = outlook.download_gb
    from finetune.planner.cost_model import OF_ANOTHER, OTHER

    rates = f"of an {OTHER}: none are known of {outlook.device}" if outlook.rates == OF_ANOTHER else outlook.rates
    return [
        ("one step", f"{outlook.step_s:.2f} s on {outlook.device} (rates {rates})"),
        ("training", f"{duration(outlook.training_s)}, and {duration(outlook.measuring_s)} of measuring and sampling"),
        ("encoding", f"{duration(encode_s)} for clips, {duration(outlook.caption_s)} for captions"),
        ("memory", outlook.memory or "not predicted"),
        ("cache", f"{human_size(cache)}, of {human_size(outlook.free_bytes)} free on its disk"),
        ("download", "not known" if download is None else "nothing" if not download else f"about {download:.1f} GB"),
    ]


def duration(seconds: float) -> str:
    """Such as ``12 s``, ``3.5 min``, ``2.1 h``, ``4.0 days``."""
    for unit, size in (("days", 172_800), ("h", 5_400), ("min", 90)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3_600, 'min': 60}[unit]:.1f} {unit}"
    return f"{seconds:.0f} s"
