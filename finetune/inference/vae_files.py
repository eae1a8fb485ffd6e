"""Videos to files of latents and back, and what is lost of a video on the way through the VAE, frame by frame.

Pixels are in [-1, 1] on both sides, the range that the VAE was trained in. A file of latents names its VAE, size and
rate, so that it is decoded without being told any of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from finetune.caching.encode import set_tiling
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.encode import enable_tiling, encode_video
from finetune.cogvideox.load import fingerprint, load_vae
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.core.errors import ConfigError, DataError, FinetuneError, first_line
from finetune.core.files import atomic_write_text
from finetune.core.precision import without_reduced_precision
from finetune.core.tensor_files import atomic_save_tensors
from finetune.core.types import Bucket, VideoProbe
from finetune.inference.sample import decodes_in_tiles
from finetune.inference.source_video import Cut, SourceVideo, own_size, read_video
from finetune.inference.videos import Frames, side_by_side, write_mp4

FORMAT = "cogvideox-latents-1"
"""Stands in the file's metadata."""

_DIFFERENCE_GAIN = 4
"""Differences are shown enlarged: those of a good VAE cannot be seen."""


class LatentsMetadata(BaseModel):
    """What a file of latents says of itself; every value is a text there."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: str
    model: str
    """The folder or hub id whose VAE encoded it."""
    revision: str = ""
    vae: str
    """``fingerprint`` of that VAE."""
    scaling_factor: float = Field(gt=0)
    """Latents are stored before it: the transformer takes them multiplied by it."""
    invert_scale_latents: bool
    """Whether those of an image condition are divided by it instead."""
    frames: int = Field(gt=0)
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    fps: float = Field(gt=0, le=1000)

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width)


@dataclass(frozen=True)
class VaeRequest:
    """One file through the VAE, in one direction or both."""

    file: Path
    out: Path
    """The file to write; of a round trip, its folder."""
    model: ModelConfig
    device: torch.device
    bucket: Bucket | None = None
    """Of what is encoded; None: the whole video, as far as the VAE takes it."""
    fps: float | None = None
    worst: int = 4
    """Frames that a round trip shows."""


@dataclass(frozen=True)
class VaeReport:
    """What was written, and how good it is where that was measured; ``str()`` is what the command prints."""

    files: tuple[Path, ...]
    bucket: Bucket
    fps: float
    psnr: tuple[float, ...] = ()
    """Of each frame, in dB."""
    ssim: tuple[float, ...] = ()
    """Of each frame, at most 1."""
    frames: Frames | None = field(default=None, repr=False)
    """What was decoded, uint8 [F, H, W, 3]."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.bucket} (frames x height x width) at {self.fps:g} fps"]
        if self.psnr:
            worst = int(np.argmin(self.psnr))
            lines += [
                f"PSNR {np.mean(self.psnr):.2f} dB, SSIM {np.mean(self.ssim):.4f} on average",
                f"PSNR {self.psnr[worst]:.2f} dB, SSIM {self.ssim[worst]:.4f} in frame {worst}, the worst",
            ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), *(f"wrote {path}" for path in self.files)])


# ------------------------------------------------------------------------------------------------------ through the VAE


@torch.no_grad()
def decode_latents(vae: Any, mean: Tensor, frames: int) -> Tensor:
    """Latents as the VAE gave them, before any scaling, to pixels. Whether it tiles is the caller's choice.

    Args:
        vae: an ``AutoencoderKLCogVideoX``.
        mean: [C, F', H', W']
        frames: how many there were. An even number of latent frames decodes to 4F', of which the first is no frame.

    Returns:
        uint8 [3, F, H, W] on the CPU.

    Raises:
        FinetuneError: if the VAE gives what is no number, as it may in float16.
    """
    sample = vae.decode(mean[None].to(vae.device, vae.dtype)).sample[0, :, -frames:]
    if not torch.isfinite(sample).all():
        raise FinetuneError("the VAE's output holds values that are not numbers", fix="take --dtype bf16 or fp32")
    levels: Tensor = ((sample.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    return levels


def through_vae(vae: Any, pixels: Tensor) -> Tensor:
    """Uint8 RGB [3, F, H, W] to the mean of the VAE's posterior and back, on the CPU."""
    mean, _ = encode_video(vae, pixels[None])
    return decode_latents(vae, mean[0], pixels.shape[1])


def tile_for_decoding(vae: Any, bucket: Bucket) -> None:
    """Switch tiling for what follows, by the rule of sizes that sampling has."""
    if decodes_in_tiles(bucket, vae.dtype):
        enable_tiling(vae)
    else:
        vae.disable_tiling()


# -------------------------------------------------------------------------------------------------------------- quality


def psnr(error: Tensor) -> float:
    """Of a mean squared error of uint8 levels, in dB; 99 where there is none."""
    return float(10 * torch.log10(255**2 / error.clamp(min=255**2 / 10**9.9)))


def frame_psnr(source: Tensor, result: Tensor) -> list[float]:
    """PSNR of each frame in dB; both uint8 [3, F, H, W]."""
    errors = (source.float() - result.float()).square().mean((0, 2, 3))
    return [psnr(error) for error in errors]


def frame_ssim(source: Tensor, result: Tensor) -> list[float]:
    """SSIM of each frame, the mean over pixels and colours (Wang et al. 2004: Gaussian window of 11, sigma 1.5).

    Args:
        source: uint8 [3, F, H, W], sides of 11 pixels or more.
        result: as ``source``.
    """
    at = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    line = line / line.sum()
    window = torch.outer(line, line)[None, None].expand(3, 1, 11, 11)

    def blurred(frame: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(frame[None], window, groups=3)[0]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for x, y in zip(source.double().unbind(1), result.double().unbind(1), strict=True):
        mean_x, mean_y = blurred(x), blurred(y)
        var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
        covariance = blurred(x * y) - mean_x * mean_y
        similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values.append(float((similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()))
    return values


# --------------------------------------------------------------------------------------------------------- the commands


@without_reduced_precision()
def encode_file(request: VaeRequest) -> VaeReport:
    """Encode a video to ``request.out``: the mean and the standard deviation of the posterior, unscaled, float32.

    Raises:
        ConfigError: for a size that the VAE does not take.
        DataError: if the video cannot be used.
        ModelError: if the VAE cannot be found or loaded.
    """
    model, spec = request.model, _spec(request.model)
    video = _source(request, spec)
    vae = load_vae(model, device=request.device)
    bucket = _bucket(video)
    set_tiling(vae, "auto", bucket)
    mean, std = encode_video(vae, video.pixels[None])
    folder = resolve_pretrained(model.pretrained, model.revision, components=["vae"])
    metadata = LatentsMetadata(
        format=FORMAT,
        model=str(Path(model.pretrained).absolute()) if Path(model.pretrained).is_dir() else model.pretrained,
        revision=model.revision or "",
        vae=fingerprint(folder, "vae"),
        scaling_factor=spec.scaling_factor,
        invert_scale_latents=spec.invert_scale_latents,
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=video.fps,
    )
    texts = {name: str(value) for name, value in metadata}
    atomic_save_tensors(request.out, {"mean": mean[0], "std": std[0]}, texts)
    return VaeReport((request.out,), bucket, video.fps)


def read_latents(path: Path) -> tuple[LatentsMetadata, Tensor]:
    """A file of ``encode_file``: what it says of itself, and the posterior's mean, float32 [C, F', H', W'].

    Raises:
        DataError: if it is none.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as source:
            metadata = LatentsMetadata.model_validate(source.metadata() or {})
            mean = source.get_tensor("mean")
        if metadata.format != FORMAT:
            raise ValueError(f"its format is {metadata.format!r:.60}, not {FORMAT}")
        if mean.ndim != 4 or not mean.is_floating_point():
            raise ValueError(f"its latents are {mean.dtype} {list(mean.shape)}, not [C, F', H', W']")
    except ValidationError as error:
        names = ", ".join(sorted({str(problem["loc"][0]) for problem in error.errors()}))
        raise _no_latents(path, f"its metadata lacks, or has wrong: {names}") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise _no_latents(path, first_line(error)) from None
    return metadata, mean.float()


def _no_latents(path: Path, reason: str) -> DataError:
    fix = "name a file that `finetune vae encode` wrote"
    return DataError(f"this is no file of latents: {reason}", where=str(path), fix=fix)


@without_reduced_precision()
def decode_file(request: VaeRequest) -> VaeReport:
    """Decode a file of ``encode_file`` to an mp4; model and rate are the file's where the request leaves them out.

    Raises:
        DataError: if the file is none of latents, or they are not this VAE's.
        ModelError: if the VAE cannot be found or loaded.
    """
    metadata, mean = read_latents(request.file)
    spec = _spec(request.model)
    expected = spec.latent_shape(metadata.bucket)
    if tuple(mean.shape) != expected:
        raise DataError(
            f"the latents are {list(mean.shape)}; of {metadata.bucket} this model's are {list(expected)}",
            where=str(request.file),
            fix="name the model that encoded them with --model",
        )
    vae = load_vae(request.model, device=request.device)
    folder = resolve_pretrained(request.model.pretrained, request.model.revision, components=["vae"])
    notes = []
    if fingerprint(folder, "vae") != metadata.vae:
        notes.append(f"another VAE encoded this, that of {metadata.model}")
    tile_for_decoding(vae, metadata.bucket)
    frames = as_frames(decode_latents(vae, mean, metadata.frames))
    fps = request.fps or metadata.fps
    return VaeReport((write_mp4(request.out, frames, fps),), metadata.bucket, fps, frames=frames, notes=tuple(notes))


@without_reduced_precision()
def roundtrip_file(request: VaeRequest) -> VaeReport:
    """Encode and decode a video, measure every frame, and write ``decoded.mp4``, ``worst.png`` and ``frames.json``.

    Raises:
        ConfigError: for a size that the VAE does not take.
        DataError: if the video cannot be used.
        ModelError: if the VAE cannot be found or loaded.
    """
    video = _source(request, _spec(request.model))
    vae = load_vae(request.model, device=request.device)
    bucket = _bucket(video)
    set_tiling(vae, "auto", bucket)
    mean, _ = encode_video(vae, video.pixels[None])
    tile_for_decoding(vae, bucket)
    result = decode_latents(vae, mean[0], bucket.frames)
    levels, similarities = frame_psnr(video.pixels, result), frame_ssim(video.pixels, result)
    frames = as_frames(result)
    table = request.out / "frames.json"
    files = (
        write_mp4(request.out / "decoded.mp4", frames, video.fps),
        _worst_sheet(request, as_frames(video.pixels), frames, list(zip(levels, similarities, strict=True))),
        table,
    )
    rows = [{"frame": i, "psnr": p, "ssim": s} for i, (p, s) in enumerate(zip(levels, similarities, strict=True))]
    atomic_write_text(table, json.dumps(rows, indent=1) + "\n")
    return VaeReport(files, bucket, video.fps, tuple(levels), tuple(similarities), frames)


def _worst_sheet(request: VaeRequest, source: Frames, result: Frames, quality: Sequence[tuple[float, float]]) -> Path:
    worst = sorted(range(len(quality)), key=lambda index: quality[index][0])[: request.worst]
    difference = np.abs(source.astype(np.int16) - result.astype(np.int16)) * _DIFFERENCE_GAIN
    shown = [source, result, difference.clip(0, 255).astype(np.uint8)]
    rows = [
        (
            f"frame {index}: PSNR {quality[index][0]:.2f} dB, SSIM {quality[index][1]:.4f}",
            [frames[index : index + 1] for frames in shown],
        )
        for index in worst
    ]
    headings = ["source", "through the VAE", f"difference x{_DIFFERENCE_GAIN}"]
    return side_by_side(rows, headings, request.out / "worst.png", columns=1)


def _spec(model: ModelConfig) -> ModelSpec:
    return spec_of(model, shipped=True)


def _source(request: VaeRequest, spec: ModelSpec) -> SourceVideo:
    """The video to encode. Raises ConfigError for a size that the VAE does not take."""
    wanted, step, token = request.bucket, spec.vae_temporal, spec.size_multiple
    if wanted is not None and (wanted.frames % step != 1 or wanted.height % token or wanted.width % token):
        raise ConfigError(
            f"{wanted} is not possible: the VAE takes {step}N+1 frames and sides in multiples of {token}",
            where=f"--bucket {wanted}",
            fix="take the nearest such size, or leave --bucket out for the video's own",
        )

    def choose(probe: VideoProbe) -> Cut:
        own = own_size(probe, spec, request.fps)
        return own if wanted is None else Cut(wanted, own.fps)

    return read_video(request.file, choose)


def _bucket(video: SourceVideo) -> Bucket:
    return Bucket(*video.pixels.shape[1:])


def as_frames(pixels: Tensor) -> Frames:
    """uint8 [3, F, H, W] as files have them, [F, H, W, 3]."""
    frames: Frames = np.ascontiguousarray(pixels.permute(1, 2, 3, 0).numpy())
    return frames
