"""What a video is sampled from: a text alone, a first frame, frames anywhere, another video, or a control video.

Each is a value of its own with the stock pipeline that samples it and the arguments which are that pipeline's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import DataError
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets.decode_pool import DecodeJob, DecodePool, fit_image, load_fitted_image
from finetune.datasets.geometry import ClipConfig, frame_indices, plan_clips
from finetune.inference.videos import Frames


class Mode(Protocol):
    """What a video is sampled from."""

    image_to_video: ClassVar[bool]
    """Which kind of model samples it."""

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """The diffusers pipeline around ``modules``, for a video of this size."""

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """What it is called with beside prompt, size, steps, guidance and generator.

        Raises:
            DataError: if an image cannot be read.
        """


@dataclass(frozen=True)
class FromText:
    """Text-to-video."""

    image_to_video: ClassVar[bool] = False

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """``CogVideoXPipeline``."""
        from diffusers import CogVideoXPipeline

        return CogVideoXPipeline(**modules)

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """How long the video is."""
        return {"num_frames": bucket.frames}


@dataclass(frozen=True)
class FromImage:
    """Image-to-video."""

    image_to_video: ClassVar[bool] = True
    image: Path | Tensor
    """First frame: a file, or uint8 RGB [3, H, W]; resized and cropped as training clips are."""

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """``CogVideoXImageToVideoPipeline``."""
        from diffusers import CogVideoXImageToVideoPipeline

        return CogVideoXImageToVideoPipeline(**modules)

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """The first frame, and how long the video is."""
        return {"num_frames": bucket.frames, "image": _picture(self.image, bucket)}


@dataclass(frozen=True)
class FromImages:
    """Image-to-video with other frames than the first: stock weights were not trained for it."""

    image_to_video: ClassVar[bool] = True
    images: Mapping[int, Path | Tensor]
    """At least one, each as in ``FromImage``, by its number in the video: 0 or a multiple of the VAE's step."""

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """The stock image-to-video pipeline, with its condition filled where there is an image, and nowhere else."""
        pipeline = FromImage(self.images[min(self.images)]).pipeline(bucket, **modules)
        step = pipeline.vae_scale_factor_temporal
        # Where the pipeline pads, it pads in front, and the first frame alone stays at the first place.
        places = {frame: (frame - bucket.frames + 1) // step - 1 if frame else 0 for frame in sorted(self.images)}
        pictures = {places[frame]: _picture(self.images[frame], bucket) for frame in places}
        pipeline.prepare_latents = partial(_with_frames, pipeline, pictures)
        return pipeline

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """As ``FromImage``'s, of the first image there is: the pipeline wants one, and has all of them already."""
        return FromImage(self.images[min(self.images)]).arguments(spec, bucket)


def image_mode(images: Mapping[int, Path | Tensor]) -> FromText | FromImage | FromImages:
    """What a video with these images, by their numbers in the video, is sampled from."""
    if not images:
        return FromText()
    return FromImage(images[0]) if images.keys() == {0} else FromImages(images)


@dataclass(frozen=True)
class FromVideo:
    """Video-to-video, by a text-to-video model."""

    image_to_video: ClassVar[bool] = False
    frames: Frames
    """As many as the bucket has, and of its size."""
    strength: float
    """Which part of the denoising steps is made: 1 keeps next to nothing of the video, a little above 0 all of it."""

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """``CogVideoXVideoToVideoPipeline``."""
        from diffusers import CogVideoXVideoToVideoPipeline

        return CogVideoXVideoToVideoPipeline(**modules)

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """The video, lengthened in front where the model wants whole temporal patches.

        Text-to-video pads its latents by itself and drops the padding again; this pipeline refuses such a video.
        """
        from PIL import Image

        extra = spec.front_padding(spec.latent_frames(bucket.frames)) * spec.vae_temporal
        frames = np.concatenate([self.frames[:1].repeat(extra, axis=0), self.frames])
        return {"video": [Image.fromarray(frame) for frame in frames], "strength": self.strength}


@dataclass(frozen=True)
class FromControl:
    """A video that follows a control video, by a model that was trained to."""

    image_to_video: ClassVar[bool] = False
    frames: Frames
    """As many as the bucket has, and of its size."""

    def pipeline(self, bucket: Bucket, **modules: Any) -> Any:
        """``CogVideoXFunControlPipeline``, which can step with DDIM alone.

        It refuses videos that do not come to whole temporal patches. It is then given one with frames more in front,
        and a control that is padded as in training.
        """
        from diffusers import CogVideoXDDIMScheduler, CogVideoXFunControlPipeline

        modules["scheduler"] = CogVideoXDDIMScheduler.from_config(modules["scheduler"].config)
        pipeline = CogVideoXFunControlPipeline(**modules)
        pipeline.prepare_control_latents = partial(_padded_control, pipeline, bucket.frames)
        return pipeline

    def arguments(self, spec: ModelSpec, bucket: Bucket) -> dict[str, Any]:
        """The control video; the pipeline takes the length from it."""
        from PIL import Image

        extra = spec.front_padding(spec.latent_frames(bucket.frames)) * spec.vae_temporal
        frames = np.concatenate([self.frames[:1].repeat(extra, axis=0), self.frames])
        return {"control_video": [Image.fromarray(frame) for frame in frames]}


def _padded_control(pipeline: Any, frames: int, mask: None, control: Tensor) -> tuple[None, Tensor]:
    """The control's latents as the stock pipeline makes them, [B, C, F, H, W], and copies of the first in front of them
    for what ``control`` [B, 3, F, H, W] has beyond ``frames``.
    """
    extra = control.shape[2] - frames
    _, latents = type(pipeline).prepare_control_latents(pipeline, mask, control[:, :, extra:])
    copies = extra // pipeline.vae_scale_factor_temporal
    return None, torch.cat([latents[:, :, :1].expand(-1, -1, copies, -1, -1), latents], dim=2)


def _with_frames(
    pipeline: Any, pictures: Mapping[int, Any], image: Tensor, batch_size: int, channels: int, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Noise and condition as the stock pipeline makes them, [B, F, C, H, W] each; then the place of every other frame.

    Args:
        pipeline: ``CogVideoXImageToVideoPipeline``.
        pictures: PIL images in the order of their frames, by latent frame: 0 for the first, others from the end.
        image: the first of them, [B, 3, H, W].
        batch_size: B.
        channels: C of either.
        rest: frames, height, width, dtype, device, generator and given noise, as the pipeline's call hands them on.
    """
    prepare = type(pipeline).prepare_latents
    frames, height, width, dtype, device, generator, _ = rest
    noise, condition = prepare(pipeline, image, batch_size, channels, frames, *rest[1:])
    if 0 not in pictures:
        condition[:, 0] = 0
    for place, picture in pictures.items():
        if place:
            # The image's own latents, scaled by the stock rule: the condition of a video of one frame. With noise
            # given, none is drawn, and the video starts from the noise that it has with the first frame alone.
            pixels = pipeline.video_processor.preprocess(picture, height=height, width=width).to(device, dtype)
            size = batch_size, channels, 1, height, width
            _, single = prepare(pipeline, pixels, *size, dtype, device, generator, noise)
            condition[:, place] = single[:, -1]
    return noise, condition


def _picture(image: Path | Tensor, bucket: Bucket) -> Any:
    from PIL import Image

    fitted = load_fitted_image(image, bucket) if isinstance(image, Path) else fit_image(image, bucket)
    return Image.fromarray(fitted.permute(1, 2, 0).numpy())


def require_clip(path: Path, bucket: Bucket, fps: float) -> None:
    """Refuse a video that ``read_clip`` would, by its header.

    Raises:
        DataError: as ``read_clip``.
    """
    with DecodePool(workers=1) as pool:
        _plan_clip(pool, path, bucket, fps)


def read_clip(path: Path, bucket: Bucket, fps: float) -> Frames:
    """The beginning of a video, at a rate and cut to a size by the rules for training clips.

    Args:
        path: the file.
        bucket: frames, height and width.
        fps: at which frames are taken.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        DataError: if it cannot be read, is too short, or of another shape altogether.
    """
    with DecodePool(workers=1) as pool:
        return _decoded(pool, _plan_clip(pool, path, bucket, fps))


def read_frames(path: Path) -> Frames:
    """Every frame of a video, as it is.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        DataError: if it cannot be read.
    """
    with DecodePool(workers=1) as pool:
        probe = _probe(pool, path)
        size = probe.height, probe.width
        plan = ClipPlan(tuple(range(probe.frames)), size, (0, 0), Bucket(probe.frames, *size))
        return _decoded(pool, DecodeJob(path, probe, plan))


def _probe(pool: DecodePool, path: Path) -> VideoProbe:
    ((_, probe),) = pool.probe_many([path])
    if isinstance(probe, DataError):
        raise probe
    return probe


def _decoded(pool: DecodePool, job: DecodeJob) -> Frames:
    ((_, clip),) = pool.decode_many([job])
    if isinstance(clip, DataError):
        raise clip
    frames: Frames = np.ascontiguousarray(clip.pixels.permute(1, 2, 3, 0).numpy())
    return frames


def _plan_clip(pool: DecodePool, path: Path, bucket: Bucket, fps: float) -> DecodeJob:
    probe = _probe(pool, path)
    if not frame_indices(probe.frame_times_s, bucket.frames, fps, "head"):
        raise DataError(
            f"the video has {int(probe.frame_times_s[-1] * fps + 0.5) + 1} frames at {fps:g} fps, and {bucket} needs"
            f" {bucket.frames}",
            where=str(path),
            fix="give a --bucket of fewer frames, or a higher --fps",
        )
    (plan,) = plan_clips(probe, ClipConfig(buckets=(bucket,)), fps, str(path))
    return DecodeJob(path, probe, plan)
