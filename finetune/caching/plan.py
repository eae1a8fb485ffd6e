"""From a dataset to what the cache must hold for it: the manifest, and the entries that are missing.

Every row and every video's header is read and every file digested; no weight is loaded and no clip is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.caching.check import UNREADABLE, PlannedClip, check_dataset, named
from finetune.caching.encode import LatentsJob, PromptJob
from finetune.caching.request import Fingerprints, full_fingerprints, make_request, sample_bucket
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.checksums import digest_of
from finetune.core.errors import CacheError, DataError, raise_all
from finetune.core.files import require_space
from finetune.core.terminal import Bar
from finetune.core.types import DTYPE_BYTES, Bucket, DtypeName
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import (
    KINDS,
    FileStamp,
    Kind,
    Manifest,
    ManifestItem,
    image_address,
    latents_address,
    portable,
    prompt_address,
)
from finetune.datasets.decode_pool import PIXEL_RULE
from finetune.datasets.schedule import Item, StepPlan
from finetune.datasets.sources import choose_val_split, source_files

_HASHING_THREADS = 4

ENTRY_OVERHEAD = 8192
"""Bytes that an entry takes beside its tensors: a header of one or two kB, and what rounding up to blocks costs."""

MARGIN = 0.01
"""Part of the computed space that is asked for on top: folders, digests, and what the file system keeps for itself."""


@dataclass(frozen=True)
class ImageJob:
    """One validation image whose pixels are missing."""

    address: Mapping[str, Any]
    image: Path
    bucket: Bucket


@dataclass(frozen=True)
class CachePlan:
    """What a dataset needs and what of it is missing."""

    manifest: Manifest
    latents: tuple[LatentsJob, ...]
    prompts: tuple[PromptJob, ...]
    images: tuple[ImageJob, ...]
    needed_bytes: int
    """Disk space that the missing entries and the manifest will take."""

    @property
    def missing(self) -> dict[Kind, int]:
        """How many entries are missing, by kind."""
        return {"latents": len(self.latents), "prompts": len(self.prompts), "images": len(self.images)}


def plan_cache(config: RunConfig, spec: ModelSpec, cache: Cache, *, progress: bool) -> CachePlan:
    """Read the dataset, digest its files and list the entries it needs.

    Raises:
        DataError: listing every row and file that cannot be used.
        ModelError: if an encoder cannot be found.
    """
    # Digested before they are read: a file that changes in between is then seen as changed, not missed.
    inputs = {path: cache.stamp(path) for path in source_files(config.data.sources, config.base)}
    # Captions are compared with it, before an encoder of 10 GB is fetched.
    resolve_pretrained(config.model.pretrained, config.model.revision, components=["tokenizer"])
    report = check_dataset(config, spec, progress=progress)
    encoders = full_fingerprints(config.model, cache, config.memory.text_encoder)
    samples = config.validation.samples
    images = {sample.image for sample in samples if sample.image and spec.image_to_video}
    conditions = {clip.sample.image for clip in report.clips if clip.sample.image and spec.image_to_video}
    left_out = {config.base / name for name in report.skipped.get(UNREADABLE, ())}
    media = {clip.sample.video for clip in report.clips} | {path for path in left_out if path.is_file()}
    inputs |= stamp_files(media | conditions | images, cache, progress)

    needs = _Needs(config, spec, encoders, inputs)
    held = held_out(report.clips, {path: stamp.digest for path, stamp in inputs.items()}, config.data.holdout)
    manifest = Manifest(
        items=tuple(
            ManifestItem(
                clip=clip.name,
                where=clip.sample.where,
                caption=clip.sample.caption,
                bucket=clip.plan.bucket,
                repeats=clip.sample.repeats,
                holdout=is_held,
                latents_key=needs.clip(clip),
                prompt_key=needs.prompt(clip.sample.caption),
                media_digest=inputs[clip.sample.video].digest,
            )
            for clip, is_held in zip(report.clips, held, strict=True)
        ),
        empty_prompt_key=needs.prompt(""),
        request=portable(make_request(config, spec, encoders), config.base),
        inputs={str(path): stamp for path, stamp in inputs.items()},
        prompts={sample.prompt: needs.prompt(sample.prompt) for sample in samples},
        images={str(path): needs.image(path) for path in sorted(images)},
        skipped={reason: len(names) for reason, names in report.skipped.items()},
        notes=(*report.notes, *_both_sides(report.clips, inputs)),
        kept={str(bucket): str(kept) for bucket, kept in report.kept.items()},
    )
    return needs.missing(manifest, cache)


class _Needs:
    """Collects the entries that a dataset needs, each once however often it is asked for."""

    def __init__(
        self, config: RunConfig, spec: ModelSpec, encoders: Fingerprints, stamps: Mapping[Path, FileStamp]
    ) -> None:
        self._config, self._spec, self._encoders, self._stamps = config, spec, encoders, stamps
        self._image_draws = config.cache.image_draws if spec.image_to_video else None
        self._latents: dict[str, LatentsJob] = {}
        self._prompts: dict[str, PromptJob] = {}
        self._images: dict[str, ImageJob] = {}

    def clip(self, clip: PlannedClip) -> str:
        """The key of a clip's latents."""
        image = clip.sample.image if self._spec.image_to_video else None
        stamp = self._stamps[clip.sample.video]
        address = latents_address(
            media_digest=stamp.digest,
            image_digest=self._stamps[image].digest if image else None,
            plan=clip.plan,
            pixel_rule=PIXEL_RULE,
            vae=self._encoders.vae,
            vae_dtype=self._encoders.dtype,
            latents_dtype=self._config.cache.latents_dtype,
            image_draws=self._image_draws,
            corrections=clip.probe.corrections,
        )
        # Decoding needs no frame times, and those of a hundred thousand videos would fill gigabytes.
        probe = replace(clip.probe, frame_times_s=())
        job = LatentsJob(address, clip.where, clip.sample.video, stamp, probe, clip.plan, image)
        key = job.key
        self._latents.setdefault(key, job)
        return key

    def prompt(self, text: str) -> str:
        """The key of a caption's embedding."""
        job = PromptJob(
            prompt_address(
                text=text,
                text_encoder=self._encoders.text_encoder,
                max_length=self._spec.max_text_seq_length,
                dtype=self._encoders.dtype,
            )
        )
        key = digest_of(job.address)
        self._prompts.setdefault(key, job)
        return key

    def image(self, image: Path) -> str:
        """The key of a validation image's pixels."""
        bucket = sample_bucket(self._config)
        address = image_address(image_digest=self._stamps[image].digest, bucket=bucket, pixel_rule=PIXEL_RULE)
        key = digest_of(address)
        self._images.setdefault(key, ImageJob(address, image, bucket))
        return key

    def missing(self, manifest: Manifest, cache: Cache) -> CachePlan:
        """What of it all the cache does not hold."""
        there = {kind: cache.keys(kind) for kind in KINDS}
        latents = tuple(job for key, job in self._latents.items() if key not in there["latents"])
        prompts = tuple(job for key, job in self._prompts.items() if key not in there["prompts"])
        images = tuple(job for key, job in self._images.items() if key not in there["images"])
        dtype, draws = self._config.cache.latents_dtype, self._image_draws or 0
        needed = sum(clip_bytes(self._spec, job.plan.bucket, dtype, draws=draws) for job in latents)
        needed += len(prompts) * prompt_bytes(self._spec, self._encoders.dtype)
        needed += sum(3 * job.bucket.height * job.bucket.width for job in images)
        needed += ENTRY_OVERHEAD * (len(latents) + len(prompts) + len(images))
        needed += 2 * len(manifest.to_bytes(self._config.base))  # the old one stands until the new one is whole
        return CachePlan(manifest, latents, prompts, images, needed)


def clip_bytes(spec: ModelSpec, bucket: Bucket, dtype: DtypeName, *, draws: int) -> int:
    """Size of one clip's tensors: mean and deviation, and for image-to-video ``draws`` single frames."""
    channels, frames, height, width = spec.latent_shape(bucket)
    return (2 * frames + draws) * channels * height * width * DTYPE_BYTES[dtype]


def prompt_bytes(spec: ModelSpec, dtype: DtypeName) -> int:
    """Size of one caption's embedding."""
    return spec.max_text_seq_length * spec.text_embed_dim * DTYPE_BYTES[dtype]


def require_room(plan: CachePlan, root: Path) -> None:
    """Refuse to begin what the disk cannot hold, with a margin.

    Raises:
        CacheError: with what is needed and what is free.
    """
    if not any(plan.missing.values()):
        return
    require_space(
        root,
        int(plan.needed_bytes * (1 + MARGIN)),
        kind=CacheError,
        what=f"encoding {sum(plan.missing.values())} entries",
        fix="make room (`finetune cache gc`), or set cache.dir to a larger disk",
        files=2 * sum(plan.missing.values()),  # each may be the first of its folder
    )


def stamp_files(paths: Collection[Path], cache: Cache, progress: bool) -> dict[Path, FileStamp]:
    """Digest many files at once; hashing leaves Python to other threads.

    Raises:
        DataError: listing every file that cannot be read.
    """

    def stamp(path: Path) -> FileStamp | DataError:
        try:
            return cache.stamp(path)
        except DataError as error:
            return error

    ordered = sorted(paths)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        found = pool.map(stamp, ordered)
        bar = Bar(found, total=len(ordered), desc="reading files", disable=not progress)
        stamps = dict(zip(ordered, bar, strict=True))
    errors = [one for one in stamps.values() if isinstance(one, DataError)]
    raise_all(DataError, errors, what="{n} files cannot be read")
    return {path: one for path, one in stamps.items() if isinstance(one, FileStamp)}


def held_out(clips: Sequence[PlannedClip], identities: Mapping[Path, str], holdout: float) -> tuple[bool, ...]:
    """Whether each clip is kept out of training: by its source, or because ``data.holdout`` takes its video.

    Args:
        clips: of the whole dataset.
        identities: what tells one video from another, by file: the digest of its bytes, so that copies are one video.
        holdout: ``HoldoutConfig.holdout``.
    """
    chosen = choose_val_split([identities[clip.sample.video] for clip in clips if not clip.holdout], holdout)
    return tuple(clip.holdout or identities[clip.sample.video] in chosen for clip in clips)


def identities(config: RunConfig, clips: Sequence[PlannedClip], *, progress: bool) -> dict[Path, str]:
    """What tells one video from another, as far as numbers of clips depend on it.

    That is the digest of a file, which ``data.holdout`` draws by. Where every file has a size of its own and gives the
    same clips, its name serves: there are no copies, and whichever are drawn, the numbers are the same.

    Raises:
        DataError: if a file cannot be read.
    """
    gives: dict[Path, Counter[tuple[Bucket, float, bool]]] = {}
    for clip in clips:
        gives.setdefault(clip.sample.video, Counter())[clip.plan.bucket, clip.sample.repeats, clip.holdout] += 1
    sizes = {video.stat().st_size for video in gives}
    alike = len({frozenset(given.items()) for given in gives.values()}) == 1
    if not config.data.holdout or (alike and len(sizes) == len(gives)):
        return {video: str(video) for video in gives}
    stamps = stamp_files(gives, Cache(config.cache.dir), progress)
    return {video: stamp.digest for video, stamp in stamps.items()}


def _both_sides(clips: Iterable[PlannedClip], stamps: Mapping[Path, FileStamp]) -> list[str]:
    """A note on videos that a training source and a held-out source share."""
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    names: dict[str, str] = {}
    for clip in clips:
        digest = stamps[clip.sample.video].digest
        sides[clip.holdout].add(digest)
        names[digest] = clip.name
    both = sorted(names[digest] for digest in sides[True] & sides[False])
    if not both:
        return []
    return [f"videos stand in a training source and in a held-out one, which flatters the held-out loss: {named(both)}"]


# -------- What follows from a configuration, its model's JSON and its clips' headers: numbers with their units.

MOST_EPOCHS = 100
"""How often a clip may be seen before a run is told of it: docs/training.md has 50 to 100 for ten clips."""


def run_advice(config: RunConfig, plan: StepPlan, steps: int, *, held: int) -> list[str]:
    """What a person should know of a run's length and of what it is measured on, before the first step.

    Args:
        config: the run's configuration.
        plan: over its training clips.
        steps: in all.
        held: number of different videos that are kept out of training.
    """
    advice = []
    asked = config.data.holdout
    if not held and (asked or any(source.split == "holdout" for source in config.data.sources)):
        why = (
            f"data.holdout is {asked:g}, and no video can be spared"
            if asked
            else "none of the held-out sources is left"
        )
        advice.append(f"no clip is held out, so no held-out loss is measured and overfitting stays unseen: {why}")
    elif 1 <= held < asked:
        advice.append(f"data.holdout asks for {asked:g} videos, and {held} can be kept out: training needs one")
    epochs = steps / plan.steps_per_epoch
    times = epochs * max(item.repeats for item in plan.items)
    if times > MOST_EPOCHS:
        advice.append(
            f"{len(plan.items)} clips for {steps} steps are {epochs:.5g} epochs: what is seen {times:.5g} times is"
            f" learnt by heart. Lower train.steps to {max(1, round(steps * MOST_EPOCHS / times))} or less, or add clips"
            " (docs/training.md says how many suit what)"
        )
    return advice


def overview(
    config: RunConfig, spec: ModelSpec, clips: Sequence[PlannedClip], identities: Mapping[Path, str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Derived numbers as (label, value), for one process; and advice on them.

    Args:
        config: the run's configuration.
        spec: of its model.
        clips: all clips of the dataset, from ``check_dataset``.
        identities: of their videos, from ``plan.identities``.
    """
    split = held_out(clips, identities, config.data.holdout)
    training = [clip for clip, is_held in zip(clips, split, strict=True) if not is_held]
    train = config.train
    plan = StepPlan(
        items=tuple(Item(clip.plan.bucket, clip.sample.repeats) for clip in training),
        seed=train.seed,
        batch_size=train.batch_size,
        micro_batches=train.accumulation,
    )
    steps = train.steps or plan.steps_for_epochs(train.epochs or 1)
    held = {identities[clip.sample.video] for clip, is_held in zip(clips, split, strict=True) if is_held}
    kind = "image-to-video" if spec.image_to_video else "text-to-video"
    numbers = [
        ("model", f"{config.model.pretrained}, {kind}, {spec.num_layers} blocks, dtype {config.model.dtype}"),
        *(("bucket", _size(spec, bucket)) for bucket in sorted({clip.plan.bucket for clip in clips}, key=str)),
        ("clips", f"{len(training)} to train on, {sum(split)} held out"),
        ("effective batch", f"{train.batch_size} x {train.accumulation} accumulation, times the number of processes"),
        ("epoch", f"{plan.samples_per_epoch} clips with repeats, {plan.steps_per_epoch:.2f} steps on one process"),
        ("steps", f"{steps}, {steps / plan.steps_per_epoch:.2f} epochs on one process"),
        ("method", config.method.kind),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("output", str(config.output_dir)),
    ]
    return numbers, run_advice(config, plan, steps, held=len(held))


def _size(spec: ModelSpec, bucket: Bucket) -> str:
    channels, frames, height, width = spec.latent_shape(bucket)
    padding = spec.front_padding(frames)
    padded = f" + {padding} in front" if padding else ""
    shape = f"{channels} channels x {frames}{padded} frames x {height} x {width}"
    return f"{bucket}: latents of {shape}, {spec.tokens(bucket):,} tokens with text"
