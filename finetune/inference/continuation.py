"""A video longer than the model makes: each further part begins where the one before ends.

An image-to-video model takes the last frame as its first. A text-to-video model makes video-to-video of the last frames
and the last one held, and what both parts show is cross-faded. Every part is first brought to the colours of what it
continues: per channel, the mean and the standard deviation of the frames that both have become the same. So neither the
VAE's round trip nor the model's own drift adds up over the parts; what a part does to its colours later on is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from finetune.cogvideox.spec import ModelSpec
from finetune.core.rng import seed_for
from finetune.inference.modes import FromImage, FromVideo
from finetune.inference.sample import SampleRequest
from finetune.inference.videos import Frames

_MOST_GAIN = 2.0
"""A flat frame has hardly any contrast to go by; more than this is no drift."""


def overlap_of(spec: ModelSpec, frames: int) -> int:
    """Frames that a part shares with the one before: one where it is its condition, else about a quarter of a part."""
    if spec.image_to_video:
        return 1
    return max(1, spec.latent_frames(frames) // 4) * spec.vae_temporal + 1


def sample_continued(
    sample: Callable[[SampleRequest], Frames], spec: ModelSpec, request: SampleRequest, *, parts: int, strength: float
) -> Frames:
    """Sample a video and continue it.

    Args:
        sample: samples one part.
        spec: of the model.
        request: the first part.
        parts: how many more; their seeds follow from the request's.
        strength: of video-to-video, for a text-to-video model.

    Returns:
        uint8 [F + parts * (F - overlap), H, W, 3], with the overlap of ``overlap_of``.
    """
    video = sample(request)
    overlap = overlap_of(spec, request.bucket.frames)
    for part in range(1, parts + 1):
        shared = video[-overlap:]
        if spec.image_to_video:
            mode: FromImage | FromVideo = FromImage(torch.from_numpy(shared[-1].copy()).permute(2, 0, 1))
        else:
            held = shared[-1:].repeat(request.bucket.frames - overlap, axis=0)
            mode = FromVideo(np.concatenate([shared, held]), strength)
        following = sample(replace(request, seed=seed_for(request.seed, "part", part), mode=mode))
        video = join(video, match_colours(following, following[:overlap], shared), overlap)
    return video


def match_colours(frames: Frames, here: Frames, there: Frames) -> Frames:
    """``frames`` by the one gain and offset per channel that give ``here`` the mean and contrast of ``there``.

    Args:
        frames: what is corrected, uint8 [F, H, W, 3].
        here: some of them.
        there: what those should look like.
    """
    own, wanted = here.astype(np.float64), there.astype(np.float64)
    axes = (0, 1, 2)
    gain = np.maximum(wanted.std(axes), 1) / np.maximum(own.std(axes), 1)
    gain = gain.clip(1 / _MOST_GAIN, _MOST_GAIN)
    corrected = (frames - own.mean(axes)) * gain + wanted.mean(axes)
    result: Frames = corrected.round().clip(0, 255).astype(np.uint8)
    return result


def join(video: Frames, following: Frames, overlap: int) -> Frames:
    """Two videos as one: their ``overlap`` frames fade from the first to the second; a single one is the first's."""
    if overlap == 1:
        return np.concatenate([video, following[1:]])
    weights = (np.arange(1, overlap + 1) / (overlap + 1))[:, None, None, None]
    faded = video[-overlap:] * (1 - weights) + following[:overlap] * weights
    return np.concatenate([video[:-overlap], faded.round().astype(np.uint8), following[overlap:]])
