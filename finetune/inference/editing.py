"""Inverting a video file and sampling it again, as it was or for another prompt: ``finetune invert``.

T5, the VAE and the transformer are in memory one after the other.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.caching.encode import release_memory, set_tiling
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.encode import condition_latents, encode_image, encode_prompts, encode_video, model_latents
from finetune.cogvideox.load import load_scheduler, load_text, load_transformer, load_vae
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.core.errors import ConfigError, raise_all
from finetune.core.files import require_writable
from finetune.core.precision import without_reduced_precision
from finetune.core.rng import generator
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, VideoProbe
from finetune.datasets.decode_pool import load_fitted_image
from finetune.inference.adapters import AdapterSource, LoadedAdapters, read_sources, riflex_of
from finetune.inference.inversion import Condition, Editing, angles, edit, invert, predictor
from finetune.inference.request import AdapterArgument
from finetune.inference.source_video import Cut, SourceVideo, frames_at, read_video
from finetune.inference.vae_files import as_frames, decode_latents, frame_psnr, tile_for_decoding
from finetune.inference.videos import Frames, contact_sheet, write_mp4

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InvertRequest:
    """A video, and what it is to become."""

    video: Path
    out: Path
    """Folder for what is written."""
    model: ModelConfig
    device: torch.device
    prompt: str | None = None
    """Of the edit; None samples the video itself again, which shows how exact the inversion is."""
    source_prompt: str = ""
    """What the video shows, which it is inverted for."""
    negative_prompt: str = ""
    image: Path | None = None
    """First frame of the edit, for image-to-video models; None: the video's own."""
    adapters: tuple[AdapterArgument, ...] = ()
    bucket: Bucket | None = None
    """None: the model's native size, of as many frames as the video has."""
    fps: float | None = None
    """None: the model's native rate."""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    corrections: int = 3
    """Of each step of the inversion (``inversion.invert``)."""
    share: float = 1.0
    """The part of the steps in which the edit attends to the video (``inversion.Editing``)."""
    seed: int | None = None
    """Of noise to begin the edit with; None begins with the inverted noise."""


@dataclass(frozen=True)
class InvertReport:
    """What was written; ``str()`` is what the command prints."""

    files: tuple[Path, ...]
    bucket: Bucket
    fps: float
    noise_std: float
    """Of the inverted noise; 1 where the model takes the video for one of its own."""
    psnr: tuple[float, ...]
    """Of each frame of the result against the source, in dB."""
    psnr_vae: tuple[float, ...]
    """The same of the source through the VAE alone: no reconstruction is nearer than that."""
    edited: bool
    frames: Frames = field(repr=False)
    """The result, uint8 [F, H, W, 3]."""

    def __str__(self) -> str:
        result, alone = (sum(values) / len(values) for values in (self.psnr, self.psnr_vae))
        lines = [
            f"{self.bucket} (frames x height x width) at {self.fps:g} fps",
            f"inverted noise: standard deviation {self.noise_std:.3f}",
            f"{'edit' if self.edited else 'reconstruction'} against the source: PSNR {result:.2f} dB"
            f" (the VAE alone: {alone:.2f} dB)",
        ]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])


@without_reduced_precision()
def invert_video(request: InvertRequest) -> InvertReport:
    """Invert a video, and sample it again into ``request.out``: ``edit.mp4`` or ``reconstruction.mp4``, and a sheet.

    Raises:
        ConfigError: for what the model cannot do; all of it at once, before a weight is loaded.
        DataError: if the video or the image cannot be used.
        ModelError: if the model cannot be found or loaded.
    """
    model = request.model
    sources, faults = read_sources(request.adapters)
    records = [(s.where, s.record) for s in sources.values() if s.adapter.strength and s.record is not None]
    riflex, notes = riflex_of(None, records)
    spec = replace(spec_of(model, shipped=True), riflex=riflex)
    what, fix = "it follows a control video, and a video is inverted without one", "sample with `finetune generate`"
    followers = [*(["--model"] if spec.control else []), *(where for where, record in records if record.control)]
    faults = [*faults, *(ConfigError(what, where=where, fix=fix) for where in followers)]
    raise_all(ConfigError, [*faults, *_faults(request, spec)], what="{n} things are wrong with the request")
    require_writable(request.out, kind=ConfigError, what="the videos", where=f"--output {request.out}")
    for note in notes:
        _log.info("note: %s", note)
    video = read_video(request.video, lambda probe: _cut(request, spec, probe))
    bucket = Bucket(*video.pixels.shape[1:])
    image = None if request.image is None else load_fitted_image(request.image, bucket)

    texts = [request.source_prompt, request.prompt or "", request.negative_prompt]
    embeds = _embeds(request, spec, texts)
    vae = load_vae(model, device=request.device)
    mean, latents, images = _encoded(vae, spec, video, image)
    vae.to("cpu")
    release_memory()

    source, target = Condition(embeds[0], images[0]), Condition(embeds[1], images[1])
    noise, result = _resampled(request, spec, sources, latents, (source, target, embeds[2]))
    release_memory()

    vae.to(request.device)
    tile_for_decoding(vae, bucket)
    front = spec.front_padding(mean.shape[1])
    pixels = decode_latents(vae, result[0, :, front:] / spec.scaling_factor, bucket.frames)
    alone = decode_latents(vae, mean, bucket.frames)
    frames, edited = as_frames(pixels), request.prompt is not None
    name = "edit" if edited else "reconstruction"
    rows = [("source", as_frames(video.pixels)), (request.prompt or name, frames)]
    return InvertReport(
        files=(
            write_mp4(request.out / f"{name}.mp4", frames, video.fps),
            contact_sheet(rows, request.out / f"{name}.png"),
        ),
        bucket=bucket,
        fps=video.fps,
        noise_std=float(noise.std()),
        psnr=tuple(frame_psnr(video.pixels, pixels)),
        psnr_vae=tuple(frame_psnr(video.pixels, alone)),
        edited=edited,
        frames=frames,
    )


def _faults(request: InvertRequest, spec: ModelSpec) -> Iterator[ConfigError]:
    """Everything that is wrong with a request for this model, adapters left aside."""
    if request.bucket is not None:
        for problem in spec.check_bucket(request.bucket):
            yield ConfigError(problem, where=f"--bucket {request.bucket}")
    steps = request.num_inference_steps
    if not 2 <= steps <= spec.num_train_timesteps:
        yield ConfigError(f"{steps} denoising steps", where="--steps", fix=f"give 2 to {spec.num_train_timesteps}")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield ConfigError(f"guidance scale {request.guidance_scale}", where="--guidance", fix="give 1 (none) or more")
    if not 0 <= request.corrections <= 100:
        yield ConfigError(f"{request.corrections} corrections", where="--corrections", fix="give 0 to 100")
    if not 0 <= request.share <= 1:
        yield ConfigError(f"share {request.share}", where="--share", fix="give 0 (never) to 1 (in every step)")
    if request.image is not None and not spec.image_to_video:
        yield ConfigError("the model is text-to-video and takes no image", where="--image", fix="leave --image out")
    only_edits = {"--image": request.image, "--seed": request.seed}
    if request.prompt is None and any(value is not None for value in only_edits.values()):
        options = ", ".join(name for name, value in only_edits.items() if value is not None)
        yield ConfigError("there is no edit without a prompt", where=options, fix="give --prompt TEXT")


def _cut(request: InvertRequest, spec: ModelSpec, probe: VideoProbe) -> Cut:
    fps = request.fps or float(spec.native_fps)
    if request.bucket is not None:
        return Cut(request.bucket, fps)
    native = spec.training_bucket
    if spec.use_learned_positions:
        return Cut(native, fps)
    return Cut(Bucket(min(native.frames, frames_at(probe, fps, spec.frames_step)), native.height, native.width), fps)


def _embeds(request: InvertRequest, spec: ModelSpec, texts: list[str]) -> Tensor:
    """T5 embeddings [N, L, D] on the CPU; the encoder is gone from memory afterwards."""
    tokenizer, encoder = load_text(request.model, device=request.device)
    embeds = torch.cat([encode_prompts(tokenizer, encoder, [text], spec).cpu() for text in texts])
    del tokenizer, encoder
    release_memory()
    return embeds


def _encoded(
    vae: Any, spec: ModelSpec, video: SourceVideo, image: Tensor | None
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """The posterior's mean [C, F', H', W'], the same in model space, and the scaled first frames of source and edit."""
    set_tiling(vae, "auto", Bucket(*video.pixels.shape[1:]))
    mean, _ = encode_video(vae, video.pixels[None])
    latents = model_latents(spec, mean, torch.zeros_like(mean), torch.zeros_like(mean)).cpu()
    if not spec.image_to_video:
        return mean[0].cpu(), latents, (None, None)

    def condition(frame: Tensor) -> Tensor:
        sample = encode_image(vae, frame, 1, [generator(0, "invert", "image")], noise=False)
        return condition_latents(spec, sample).cpu()

    first = condition(video.pixels[:, 0])
    return mean[0].cpu(), latents, (first, first if image is None else condition(image))


def _resampled(
    request: InvertRequest,
    spec: ModelSpec,
    sources: Mapping[Path, AdapterSource],
    latents: Tensor,
    conditions: tuple[Condition, Condition, Tensor],
) -> tuple[Tensor, Tensor]:
    """The noise that latents come from, and what is sampled from noise again, both on the CPU.

    The transformer is gone from memory afterwards. ``conditions`` are those of the source and of the edit, and what
    guidance leads away from.
    """
    device, (source, target, negative_embeds) = request.device, conditions
    transformer: Any = load_transformer(request.model, device=device).requires_grad_(False)
    LoadedAdapters(spec, transformer, load_scheduler(request.model), sources).use(request.adapters)
    levels = angles(spec, request.num_inference_steps)
    with Bar(total=len(levels.timesteps), desc="inverting") as bar:
        predict = predictor(transformer, spec, source, device)
        trajectory = invert(predict, latents.to(device), levels, corrections=request.corrections, progress=bar.update)
    noise = start = trajectory[0]
    editing = Editing(levels, trajectory, source, source, negative_embeds, guidance_scale=1.0, share=0.0)
    if request.prompt is not None:
        editing = replace(editing, target=target, guidance_scale=request.guidance_scale, share=request.share)
        if request.seed is not None:
            start = torch.randn(noise.shape, generator=generator(request.seed, "edit"))
    with Bar(total=len(levels.timesteps), desc="sampling") as bar:
        result = edit(transformer, spec, start.to(device), editing, progress=bar.update)
    return noise, result.cpu()
