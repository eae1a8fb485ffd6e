"""The two passes that fill the cache: clips through the VAE, then captions through T5, one encoder in memory at a time.

Every item is handed to threads that write as soon as it is encoded (``writing``), so a process that is killed loses the
few in hand and no more.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from finetune.caching.writing import EncodeResult, EntryWriter
from finetune.cogvideox.captions import tokenize
from finetune.cogvideox.config import StoredFrames
from finetune.cogvideox.encode import enable_tiling, encode_image, encode_prompts, encode_video, pool_mask
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError, DataError, is_out_of_memory
from finetune.core.precision import without_reduced_precision
from finetune.core.rng import generator
from finetune.core.terminal import Bar
from finetune.core.types import DTYPE_BYTES, Bucket, Clip, ClipPlan, Companion, DtypeName, VideoProbe
from finetune.datasets.cache import Cache, Encoding, stored_frames
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.manifests import FileStamp
from finetune.memory.block_streaming import stream_text, text_placement

if TYPE_CHECKING:
    from finetune.caching.planned_clips import PlannedClip

NOISE_SEED = 0
"""Of the noise on stored image conditions. No option: the run's seed already decides which of the draws is used."""

UNTILED_BYTES_PER_PIXEL = 30_000
"""Free GPU memory, per pixel of a frame and at two bytes per activation, that encoding without tiles is given. Counted
on the real VAE in fake tensors, with the clip's own pixels, it takes 6.5 GiB for 49x480x720 and 23.9 GiB for
81x768x1360. That is 20.1 and 24.6 kB per pixel, and depends little on the length: eight or nine frames go through at a
time. The rest is for what convolutions allocate inside and for fragmentation. So 480x720 is tiled below 9.7 GiB free,
768x1360 below 29.2 GiB; in tiles they take 1.9 and 3.2 GiB."""


@dataclass(frozen=True)
class EncodeJob:
    """One entry that is missing; of a caption, its address says everything."""

    address: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Of the entry."""
        return digest_of(self.address)

    @property
    def title(self) -> str:
        """What it is, for messages: here, the caption."""
        return f"caption {self.address['text']!r:.80}"


@dataclass(frozen=True)
class ClipJob(EncodeJob):
    """One clip whose latents are missing."""

    where: str
    """The clip and its row, for messages."""
    video: Path
    stamp: FileStamp
    probe: VideoProbe
    plan: ClipPlan
    image: Path | None
    """The file that stands for the first frame; None where the first frame itself does."""
    image_stamp: FileStamp | None
    companions: tuple[Companion, ...] = ()
    companion_stamps: tuple[FileStamp, ...] = ()

    @property
    def title(self) -> str:
        """The clip and its row."""
        return self.where


@dataclass(frozen=True)
class ImageJob(EncodeJob):
    """One validation image whose pixels are missing."""

    image: Path
    bucket: Bucket


@dataclass(frozen=True)
class ControlJob(EncodeJob):
    """One control video of validation whose pixels are missing."""

    video: DecodeJob


def clip_job(
    clip: PlannedClip, plan: ClipPlan, stamps: Mapping[Path, FileStamp], encoding: Encoding, spec: ModelSpec
) -> ClipJob:
    """What is encoded of a clip.

    Args:
        clip: which one.
        plan: its own, or that of its mirror image.
        stamps: of its files.
        encoding: how.
        spec: of the model.
    """
    image = clip.sample.image if spec.image_to_video else None
    stamp, image_stamp = stamps[clip.sample.video], stamps[image] if image else None
    digest = image_stamp.digest if image_stamp else None
    companion_stamps = tuple(stamps[one.path] for one in clip.companions)
    address = encoding.latents_address(
        stamp.digest,
        plan,
        image=digest,
        corrections=clip.probe.corrections,
        companions={
            one.name: (of_file.digest, *one.probe.corrections)
            for one, of_file in zip(clip.companions, companion_stamps, strict=True)
        },
    )
    # Decoding needs no frame times, and those of a hundred thousand videos would fill gigabytes.
    probe = replace(clip.probe, frame_times_s=())
    companions = tuple(
        replace(one, probe=replace(one.probe, frame_times_s=()), plan=replace(one.plan, flip=plan.flip))
        for one in clip.companions
    )
    more = (companions, companion_stamps)
    return ClipJob(address, clip.where, clip.sample.video, stamp, probe, plan, image, image_stamp, *more)


class ClipEncoder:
    """The VAE and decode workers, which are started by the first clip and stay until it is closed; a context manager.

    Args:
        config: of the run, whose VAE encodes, in the model's dtype.
        cache: where entries go.
        device: where the VAE runs.
        workers: decode processes.
    """

    def __init__(self, config: RunConfig, cache: Cache, device: torch.device, workers: int) -> None:
        self._config, self._cache, self._device = config, cache, device
        self._vae: Any = None
        self.pool = DecodePool(workers)

    def __enter__(self) -> ClipEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.close()
        if self._vae is not None:
            self._vae = None
            release_memory()

    @without_reduced_precision()
    def encode(self, jobs: Sequence[ClipJob], *, progress: bool) -> EncodeResult:
        """Decode clips in worker processes, encode them one by one and store them.

        Args:
            jobs: what is missing; nothing is loaded where there is none.
            progress: draw a bar.

        Returns:
            Counts, and a failure for every clip that could not be decoded; the others are stored.

        Raises:
            CacheError: if an entry cannot be written or the GPU's memory does not suffice.
        """
        if not jobs:
            return EncodeResult(0, 0)
        from finetune.cogvideox.load import load_vae

        if self._vae is None:
            self._vae = load_vae(self._config.model, device=self._device)
        options = self._config.cache
        decoded = self.pool.decode_many(
            DecodeJob(job.video, job.probe, job.plan, job.image, options.decoder, job.companions) for job in jobs
        )
        bar = Bar(decoded, total=len(jobs), desc="encoding clips", disable=not progress)
        with EntryWriter() as writer:
            for job, (_, clip) in zip(jobs, bar, strict=True):
                if isinstance(clip, DataError):
                    writer.fail(job, clip)
                elif (fault := _mask_fault(job, clip)) is not None:
                    writer.fail(job, fault)
                else:
                    encoded = _encode_clip(job, clip, self._vae, options.vae_tiling)
                    writer.store(job, partial(encoded.store, self._cache))
            return writer.finish()


def encode_clips(
    jobs: Sequence[ClipJob],
    config: RunConfig,
    cache: Cache,
    *,
    device: torch.device,
    workers: int,
    progress: bool,
) -> EncodeResult:
    """Encode clips with a ``ClipEncoder`` of their own. Arguments and errors are those of it and of its ``encode``."""
    with ClipEncoder(config, cache, device, min(workers, len(jobs))) as encoder:
        return encoder.encode(jobs, progress=progress)


@dataclass(frozen=True)
class _EncodedClip:
    """What the encoder made of a clip, where it made it: on a GPU, who brings it to the host waits for it."""

    job: ClipJob
    mean: Tensor
    std: Tensor
    image_latents: Tensor | None
    further: Mapping[str, Tensor]
    """What else the entry has, by its names there: frames beside the first, and what goes with the clip."""
    tiled: bool

    def store(self, cache: Cache) -> int:
        """Write the entry and return its bytes. Raises DataError if the clip's files are not those that were named."""
        job = self.job
        # Only now is it certain which bytes were decoded: those that the address was made from, or others.
        beside = zip((one.path for one in job.companions), job.companion_stamps, strict=True)
        for path, stamp in ((job.video, job.stamp), (job.image, job.image_stamp), *beside):
            if path is not None and stamp is not None and not cache.is_unchanged(path, stamp):
                raise DataError("the file changed while it was being encoded", fix="run precompute again")
        made_with = {"tiled": self.tiled}
        return cache.write_latents(
            job.address, self.mean, self.std, self.image_latents, further=self.further, made_with=made_with
        )


_BLACK = 32
"""Of 255: what compression makes of black stays below."""


def _mask_fault(job: ClipJob, clip: Clip) -> DataError | None:
    """Why a clip cannot be learnt from through its mask; None if it can, or has none."""
    if (mask := clip.companions.get("mask")) is None or int(mask.max()) >= _BLACK:
        return None
    (path,) = (one.path for one in job.companions if one.name == "mask")
    return DataError(
        "the mask is black all over the clip, so that there is nothing to learn from",
        where=f"{path}, mask of {job.where}",
        fix="a mask is white where the clip is learnt; mend it, or take the row, or this part of the video, out",
    )


def _encode_clip(job: ClipJob, clip: Clip, vae: Any, tiling: Literal["auto", "on", "off"]) -> _EncodedClip:
    bucket = job.plan.bucket
    tiled = set_tiling(vae, tiling, bucket)
    draws = job.address["image_draws"]
    image_latents = None
    further: dict[str, Tensor] = {}
    try:
        mean, std = encode_video(vae, clip.pixels[None])
        if draws is not None:
            image = clip.pixels[:, 0] if clip.image is None else clip.image
            image_latents = encode_image(vae, image, draws, image_noise(job.address, draws))
            further |= _encode_frames(job, clip, vae, mean.shape[2])
        if (control := clip.companions.get("control")) is not None:
            further["control_latents"] = encode_video(vae, control[None])[0][0]
        if (mask := clip.companions.get("mask")) is not None:
            _, _, frames, height, width = mean.shape
            further["mask"] = pool_mask(mask, (frames, height, width))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise CacheError(
            f"the GPU's memory does not hold the VAE's work on {bucket}",
            where=job.where,
            fix="set cache.vae_tiling: on, free GPU memory, or use smaller buckets",
        ) from error
    return _EncodedClip(job, mean[0], std[0], image_latents, further, tiled)


def _encode_frames(job: ClipJob, clip: Clip, vae: Any, frames: int) -> dict[str, Tensor]:
    """``frame_latents``, [K, C, N, H', W'], if the address asks for images beside the first of so many latent frames.

    Each is the last pixel frame of its latent frame: of the last one, the clip's last, as an image for sampling is.
    """
    draws = job.address["image_draws"]
    # The first latent frame covers one pixel frame, each other one as many as the VAE takes together.
    step = (clip.pixels.shape[1] - 1) // max(1, frames - 1)
    images = [
        encode_image(vae, clip.pixels[:, step * frame], draws, image_noise(job.address, draws, frame))
        for frame in stored_frames(job.address.get("condition_frames"), frames)
    ]
    return {"frame_latents": torch.cat(images, dim=2)} if images else {}


def image_noise(address: Mapping[str, Any], draws: int, frame: int = 0) -> list[torch.Generator]:
    """One generator per draw of a clip's noise-augmented image: a function of content, not of order or process.

    Args:
        address: of the clip's latents.
        draws: K.
        frame: which latent frame is encoded as an image.
    """
    content = digest_of([address["media"], address["image"], address["plan"]])
    further = (frame,) if frame else ()
    return [generator(NOISE_SEED, "image-noise", content, k, *further) for k in range(draws)]


def clip_bytes(
    spec: ModelSpec, bucket: Bucket, dtype: DtypeName, *, draws: int, condition_frames: StoredFrames | None = None
) -> int:
    """Size of one clip's tensors: mean and deviation, for image-to-video ``draws`` encodings of each image, and a
    control's.
    """
    channels, frames, height, width = spec.latent_shape(bucket)
    images = 1 + len(stored_frames(condition_frames, frames))
    return ((3 if spec.control else 2) * frames + draws * images) * channels * height * width * DTYPE_BYTES[dtype]


def set_tiling(vae: Any, setting: Literal["auto", "on", "off"], bucket: Bucket) -> bool:
    """Switch tiling as the setting says, and return whether frames of ``bucket`` will be tiled."""
    wanted = setting == "on" or (setting == "auto" and needs_tiling(vae.device, vae.dtype, bucket))
    if wanted:
        enable_tiling(vae)
    else:
        vae.disable_tiling()
    # The VAE leaves frames whole that fit one tile.
    return wanted and (bucket.height > vae.tile_sample_min_height or bucket.width > vae.tile_sample_min_width)


def needs_tiling(device: torch.device, dtype: torch.dtype, bucket: Bucket) -> bool:
    """Whether a frame's activations may not fit the GPU's free memory; False on a CPU."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    # What torch has reserved and does not use is free to us too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return must_tile(bucket, dtype, free)


def must_tile(bucket: Bucket, dtype: torch.dtype, free_bytes: int) -> bool:
    """What ``cache.vae_tiling: auto`` decides on a GPU with ``free_bytes`` beside the VAE's weights."""
    return free_bytes < untiled_bytes(dtype, bucket)


def untiled_bytes(dtype: torch.dtype, bucket: Bucket) -> int:
    """Free memory that encoding frames of ``bucket`` in one piece is given."""
    return UNTILED_BYTES_PER_PIXEL * bucket.height * bucket.width * dtype.itemsize // 2


@without_reduced_precision()
def encode_captions(
    jobs: Sequence[EncodeJob],
    config: RunConfig,
    spec: ModelSpec,
    cache: Cache,
    *,
    device: torch.device,
    progress: bool,
) -> EncodeResult:
    """Encode captions in batches with T5 and store each. Otherwise as ``encode_clips``.

    Args:
        jobs: what is missing; their addresses name the encoder as ``memory.text_encoder`` makes it.
        config: of the run, whose T5 encodes, in the model's dtype.
        spec: of its model.
        cache: where entries go.
        device: where T5 computes.
        progress: draw a bar.
    """
    if not jobs:
        return EncodeResult(0, 0)
    from finetune.cogvideox.load import load_text

    text_encoder, batch_size = config.memory.text_encoder, config.cache.text_batch_size
    start = torch.device("cpu") if text_encoder == "streamed" else device
    tokenizer, encoder = load_text(config.model, device=start, placement=text_placement(text_encoder))
    if text_encoder == "streamed":
        stream_text(encoder, device)
    with Bar(total=len(jobs), desc="encoding captions", disable=not progress) as bar, EntryWriter() as writer:
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            texts = [str(job.address["text"]) for job in batch]
            try:
                embeds = encode_prompts(tokenizer, encoder, texts, spec).cpu()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise CacheError(
                    f"the GPU's memory does not hold T5's work on {len(batch)} captions",
                    fix="lower cache.text_batch_size, set memory.text_encoder: streamed, or free GPU memory",
                ) from error
            for job, tokens, embed in zip(batch, tokenize(tokenizer, texts, spec), embeds, strict=True):
                writer.store(job, partial(cache.write_prompt, job.address, embed, tokens=tokens.length))
            bar.update(len(batch))
        result = writer.finish()
    del tokenizer, encoder
    release_memory()
    return result


def store_images(jobs: Sequence[ImageJob | ControlJob], cache: Cache, workers: int) -> EncodeResult:
    """Store validation images and control videos as the pixels that sampling starts from; the VAE that decodes the
    video encodes them.
    """
    size = 0
    images = [job for job in jobs if isinstance(job, ImageJob)]
    controls = [job for job in jobs if isinstance(job, ControlJob)]
    with DecodePool(min(workers, len(jobs))) as pool:
        pictures = pool.load_images((job.image, job.bucket) for job in images)
        clips = (clip for _, clip in pool.decode_many(job.video for job in controls))
        for job, content in zip([*images, *controls], chain(pictures, clips), strict=True):
            if isinstance(content, DataError):
                raise content
            size += cache.write_image(job.address, content.pixels if isinstance(content, Clip) else content)
    return EncodeResult(len(jobs), size)


def release_memory() -> None:
    """Give the memory of an encoder that nothing refers to any more back to the device, before the next is loaded."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        # Page-locked memory, such as that of a streamed T5, stays taken from the whole machine otherwise.
        empty_host = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty_host is not None:  # the first in torch 2.13, the second in 2.11
            empty_host()
