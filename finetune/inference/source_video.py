"""A video of the user's as what encoders take: frames chosen, resized and cut as training clips are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import DataError
from finetune.core.types import Bucket, VideoProbe
from finetune.datasets.decode_pool import DecodePool
from finetune.datasets.geometry import frame_indices
from finetune.inference.modes import read_clip


class SourceVideo(NamedTuple):
    """A clip that is in memory."""

    pixels: Tensor
    """uint8 RGB [3, F, H, W]"""
    fps: float


class Cut(NamedTuple):
    """What is taken of a video."""

    bucket: Bucket
    fps: float


def read_video(path: Path, choose: Callable[[VideoProbe], Cut]) -> SourceVideo:
    """Decode the beginning of a video, in a worker process: a file that crashes a decoder is an error like any other.

    Args:
        path: of the file.
        choose: says what is taken, given the file's header.

    Raises:
        DataError: if it cannot be decoded, is shorter than what is taken, or of another shape altogether; and whatever
            ``choose`` raises.
    """
    with DecodePool(1) as pool:
        ((_, probe),) = pool.probe_many([path])
    if isinstance(probe, DataError):
        raise probe
    cut = choose(probe)
    frames = torch.from_numpy(read_clip(path, cut.bucket, cut.fps))
    return SourceVideo(frames.permute(3, 0, 1, 2).contiguous(), cut.fps)


def frames_at(probe: VideoProbe, fps: float, step: int) -> int:
    """The most frames of the form ``step * N + 1`` that a video gives at a rate."""
    most = 1
    while frame_indices(probe.frame_times_s, most + step, fps, "head"):
        most += step
    return most


def own_size(probe: VideoProbe, spec: ModelSpec, fps: float | None) -> Cut:
    """All of a video as far as the VAE takes it: 4N+1 frames, sides in whole tokens, at its own rate or another.

    Raises:
        DataError: if its picture is smaller than one token.
    """
    rate, token = fps or probe.fps, spec.size_multiple
    height, width = (side // token * token for side in (probe.height, probe.width))
    if not height or not width:
        raise DataError(
            f"the picture is {probe.height}x{probe.width} pixels", fix=f"each side has to be {token} pixels or more"
        )
    return Cut(Bucket(frames_at(probe, rate, spec.vae_temporal), height, width), rate)
