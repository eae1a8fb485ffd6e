"""What is left of a clip after the VAE: encoded and decoded again, frame by frame against what went in.

Training sees nothing that the VAE loses: fine text, grain, small faces far away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.caching.check import workers_for
from finetune.caching.encode import release_memory, set_tiling
from finetune.caching.planned_clips import PlannedClip
from finetune.cogvideox.load import load_vae
from finetune.config.schema import RunConfig
from finetune.core.errors import DataError
from finetune.core.terminal import Bar
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.diagnosis.frames import Encoded, Reconstruction, encoded
from finetune.inference.vae_files import psnr, through_vae


def reconstruct(
    clips: Sequence[PlannedClip], config: RunConfig, *, exact: bool, progress: bool
) -> Iterator[Reconstruction | DataError]:
    """Encode every clip to the mean of the VAE's posterior and decode that, on the GPU where there is one.

    Args:
        clips: what to decode, whole.
        config: of the run, whose VAE it is, in the model's dtype.
        exact: keep the worst frames at training size, without loss.
        progress: draw a bar.

    Raises:
        ModelError: if the VAE cannot be found or loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(config.model, device=device)
    jobs = [DecodeJob(clip.sample.video, clip.probe, clip.plan) for clip in clips]
    with DecodePool(workers_for(config, len(jobs))) as pool:
        decoded = pool.decode_many(jobs)
        for job, clip in Bar(decoded, total=len(jobs), desc="through the VAE", disable=not progress):
            if isinstance(clip, DataError):
                yield clip
                continue
            set_tiling(vae, config.cache.vae_tiling, job.plan.bucket)
            yield _compared(clip.pixels, through_vae(vae, clip.pixels), exact)
    del vae
    release_memory()


def _compared(pixels: Tensor, result: Tensor, exact: bool) -> Reconstruction:
    errors = (pixels.float() - result.float()).square().mean((0, 2, 3))
    worst = int(errors.argmax())

    def picture(frames: Tensor) -> Encoded:
        pixels = np.ascontiguousarray(frames[:, worst].permute(1, 2, 0).numpy())
        return encoded(Image.fromarray(pixels), worst, exact=exact)

    return Reconstruction(psnr(errors.mean()), psnr(errors[worst]), picture(pixels), picture(result))
