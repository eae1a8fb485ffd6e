"""Filling the cache, and trusting it.

``plan_cache`` lists what a dataset needs, ``precompute`` encodes what the cache lacks of it: clips with the VAE, then
captions with T5. ``ensure_cache`` is what training calls: where a recorded manifest still answers the configuration, no
video and no encoder is opened.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.caching.check import (
    UNREADABLE,
    PlannedClip,
    check_dataset,
    named,
    note_line,
    split_clips,
    stamp_files,
    workers_for,
)
from finetune.caching.encode import (
    ClipJob,
    EncodeJob,
    EncodeResult,
    Failure,
    ImageJob,
    encode_captions,
    encode_clips,
    store_images,
)
from finetune.caching.request import (
    Fingerprints,
    ManifestMatch,
    find_manifest,
    full_fingerprints,
    make_request,
    sample_bucket,
)
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.config.rules import pin_model, require_valid
from finetune.config.schema import RunConfig, as_config
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CacheError, DataError, raise_all
from finetune.core.files import from_here, human_size, require_space
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
from finetune.datasets.sources import source_files

ENTRY_OVERHEAD = 8192
"""Bytes that an entry takes beside its tensors: a header of one or two kB, and what rounding up to blocks costs."""

MARGIN = 0.01
"""Part of the computed space that is asked for on top: folders, digests, and what the file system keeps for itself."""

_TITLES: Mapping[Kind, str] = {"latents": "clips", "prompts": "captions", "images": "images"}


# ----------------------------------------------------------------------------------------------------- what is missing


@dataclass(frozen=True)
class CachePlan:
    """What a dataset needs and what of it is missing."""

    manifest: Manifest
    latents: tuple[ClipJob, ...]
    prompts: tuple[EncodeJob, ...]
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

    entries = _RequiredEntries(config, spec, encoders, inputs)
    val_split = split_clips(report.clips, {path: stamp.digest for path, stamp in inputs.items()}, config.data.holdout)
    manifest = Manifest(
        items=tuple(
            ManifestItem(
                clip=clip.name,
                where=clip.sample.where,
                caption=clip.sample.caption,
                bucket=clip.plan.bucket,
                repeats=clip.sample.repeats,
                holdout=is_val,
                latents_key=entries.clip_key(clip),
                prompt_key=entries.prompt_key(clip.sample.caption),
                media_digest=inputs[clip.sample.video].digest,
            )
            for clip, is_val in zip(report.clips, val_split, strict=True)
        ),
        empty_prompt_key=entries.prompt_key(""),
        request=portable(make_request(config, spec, encoders), config.base),
        inputs={str(path): stamp for path, stamp in inputs.items()},
        prompts={sample.prompt: entries.prompt_key(sample.prompt) for sample in samples},
        images={str(path): entries.image_key(path) for path in sorted(images)},
        skipped={reason: len(names) for reason, names in report.skipped.items()},
        notes=(*report.notes, *_both_sides(report.clips, inputs)),
        kept={str(bucket): str(kept) for bucket, kept in report.kept.items()},
    )
    return entries.plan(manifest, cache)


class _RequiredEntries:
    """Collects the entries that a dataset needs, each once however often it is asked for."""

    def __init__(
        self, config: RunConfig, spec: ModelSpec, encoders: Fingerprints, stamps: Mapping[Path, FileStamp]
    ) -> None:
        self._config, self._spec, self._encoders, self._stamps = config, spec, encoders, stamps
        self._image_draws = config.cache.image_draws if spec.image_to_video else None
        self._latents: dict[str, ClipJob] = {}
        self._prompts: dict[str, EncodeJob] = {}
        self._images: dict[str, ImageJob] = {}

    def clip_key(self, clip: PlannedClip) -> str:
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
        job = ClipJob(address, clip.where, clip.sample.video, stamp, probe, clip.plan, image)
        self._latents.setdefault(job.key, job)
        return job.key

    def prompt_key(self, text: str) -> str:
        """The key of a caption's embedding."""
        job = EncodeJob(
            prompt_address(
                text=text,
                text_encoder=self._encoders.text_encoder,
                max_length=self._spec.max_text_seq_length,
                dtype=self._encoders.dtype,
            )
        )
        self._prompts.setdefault(job.key, job)
        return job.key

    def image_key(self, image: Path) -> str:
        """The key of a validation image's pixels."""
        bucket = sample_bucket(self._config)
        address = image_address(image_digest=self._stamps[image].digest, bucket=bucket, pixel_rule=PIXEL_RULE)
        job = ImageJob(address, image, bucket)
        self._images.setdefault(job.key, job)
        return job.key

    def plan(self, manifest: Manifest, cache: Cache) -> CachePlan:
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


# --------------------------------------------------------------------------------------------------------- encoding it


@dataclass(frozen=True)
class PrecomputeReport:
    """What one call of ``precompute`` did; its text is a table."""

    manifest: Manifest
    cache_dir: Path
    encoded: Mapping[Kind, int]
    """Entries written, over all processes."""
    reused: Mapping[Kind, int]
    """Entries that were there already."""
    skipped: Mapping[str, int]
    """Clips left out, by reason."""
    bytes: int
    """On disk, of every entry that the dataset needs."""
    written_bytes: int
    seconds: float

    @property
    def gib(self) -> float:
        """Size of the dataset's entries in GiB."""
        return self.bytes / 2**30

    def __str__(self) -> str:
        lines = [f"cache {from_here(self.cache_dir)}", f"{'':<10}{'encoded':>10}{'reused':>10}"]
        lines += [
            f"{_TITLES[kind]:<10}{self.encoded[kind]:>10}{self.reused[kind]:>10}"
            for kind in KINDS
            if self.encoded[kind] or self.reused[kind]
        ]
        lines += [f"left out  {count:>10}  {reason}" for reason, count in self.skipped.items()]
        lines.append(f"{human_size(self.bytes)}, {human_size(self.written_bytes)} of it new; {self.seconds:.1f} s")
        lines += [f"bucket {bucket}: {kept}" for bucket, kept in self.manifest.kept.items()]
        return "\n".join([*lines, *map(note_line, self.manifest.notes)])


def precompute(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    spec: ModelSpec | None = None,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: the run's configuration, its values, or its file (``config.as_config``).
        spec: of its model; read from it if None.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    config = as_config(config)
    ranks = distributed or ProcessGroup.current()
    config = pin_model(config, ranks.run_on_main)
    spec = spec or read_spec(config.model.pretrained, config.model.revision)
    cache = Cache(config.cache.dir)
    with cache.in_use("precompute", quiet=not ranks.is_main):
        return _precompute(config, spec, cache, ranks, progress=progress and ranks.is_main)


def _precompute(
    config: RunConfig, spec: ModelSpec, cache: Cache, ranks: ProcessGroup, *, progress: bool
) -> PrecomputeReport:
    begun = time.perf_counter()

    def prepare() -> CachePlan:
        require_valid(config, spec)
        plan = plan_cache(config, spec, cache, progress=progress)
        require_room(plan, cache.root)
        if any(plan.missing.values()):  # should this process die, its entries are still wanted
            cache.save_manifest(plan.manifest.pending(), config.base)
        return plan

    plan = ranks.run_on_main(prepare)
    share = slice(ranks.rank, None, ranks.world)
    results: dict[Kind, list[EncodeResult]] = {
        # First, because it takes no time and a damaged image should not be found after hours.
        "images": ranks.run_on_all(
            lambda: store_images(plan.images[share], cache, workers_for(config, len(plan.images), ranks.world))
        ),
        "latents": ranks.run_on_all(
            lambda: encode_clips(
                plan.latents[share],
                config,
                cache,
                device=ranks.device,
                workers=workers_for(config, len(plan.latents), ranks.world),
                progress=progress,
            )
        ),
        "prompts": ranks.run_on_all(
            lambda: encode_captions(plan.prompts[share], config, spec, cache, device=ranks.device, progress=progress)
        ),
    }
    return ranks.run_on_main(lambda: _finish(config, spec, cache, plan, results, time.perf_counter() - begun))


def _finish(
    config: RunConfig,
    spec: ModelSpec,
    cache: Cache,
    plan: CachePlan,
    results: Mapping[Kind, Sequence[EncodeResult]],
    seconds: float,
) -> PrecomputeReport:
    """Settle what could not be decoded, file the manifest and count."""
    failures = [failure for one in results["latents"] for failure in one.failures]
    if failures and config.data.unreadable_clips == "error":
        raise_all(
            DataError,
            [failure.error for failure in failures],
            what="{n} clips could not be encoded; all others are in the cache",
        )
    manifest = _without(plan.manifest, failures)
    if all(item.holdout for item in manifest.items):
        raise_all(DataError, [failure.error for failure in failures], what="no clip is left to train on; {n} failed")
    manifest = replace(manifest, notes=(*manifest.notes, *_cut_captions(manifest, cache, spec)))
    cache.save_manifest(manifest, config.base)
    encoded: dict[Kind, int] = {kind: sum(one.encoded for one in results[kind]) for kind in KINDS}
    sizes = [cache.size(kind, key) for kind in KINDS for key in manifest.keys(kind)]
    return PrecomputeReport(
        manifest=manifest,
        cache_dir=cache.root,
        encoded=encoded,
        reused={kind: len(plan.manifest.keys(kind)) - plan.missing[kind] for kind in KINDS},
        skipped=manifest.skipped,
        bytes=sum(sizes),
        written_bytes=sum(one.bytes for kind in KINDS for one in results[kind]),
        seconds=seconds,
    )


def _without(manifest: Manifest, failures: Sequence[Failure]) -> Manifest:
    """The manifest without the clips that failed, counted as unreadable."""
    failed = {failure.key for failure in failures}
    items = tuple(item for item in manifest.items if item.latents_key not in failed)
    lost = len(manifest.items) - len(items)
    if not lost:
        return manifest
    skipped = {**manifest.skipped, UNREADABLE: manifest.skipped.get(UNREADABLE, 0) + lost}
    notes = [f"left out: {failure.error.where}: {failure.error.what}" for failure in failures]
    return replace(manifest, items=items, skipped=skipped, notes=(*manifest.notes, *notes))


def _cut_captions(manifest: Manifest, cache: Cache, spec: ModelSpec) -> list[str]:
    """A note on captions longer than the model reads."""
    captions = {item.prompt_key: item.caption for item in manifest.items}
    captions |= {key: prompt for prompt, key in manifest.prompts.items()}
    cut = [text for key, text in captions.items() if cache.prompt_tokens(key) > spec.max_text_seq_length]
    if not cut:
        return []
    shown = named(repr(text if len(text) <= 60 else text[:57] + "...") for text in cut)
    return [f"captions are longer than the {spec.max_text_seq_length} tokens the model reads, and are cut: {shown}"]


# --------------------------------------------------------------------------------------------------------- trusting it


def ensure_cache(
    config: RunConfig,
    spec: ModelSpec,
    *,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
    cleanup: ExitStack | None = None,
) -> Manifest:
    """The manifest that training reads from, every entry of it in the cache.

    A recorded manifest is trusted when the configuration, the encoders and every source file are what they were. If
    there is none, ``cache.mode: auto`` precomputes and ``require`` raises; ``require`` also accepts that source files
    are not on this machine. What is done is printed on the main process.

    Args:
        config: the run's configuration.
        spec: of its model.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.
        cleanup: takes the lock that keeps ``cache gc`` from deleting the manifest's entries, which so lasts until this
            is closed; without it, until the call returns.

    Raises:
        CacheError: in mode ``require``, naming what differs; or as ``precompute`` does.
        DataError, ModelError: as ``precompute`` does.
    """
    ranks = distributed or ProcessGroup.current()
    cache = Cache(config.cache.dir)
    with ExitStack() as until_return:
        (cleanup or until_return).enter_context(cache.in_use("train", quiet=not ranks.is_main))
        manifest = ranks.run_on_main(lambda: _trusted(config, find_manifest(config, spec, cache), cache))
        if manifest is None:
            report = _precompute(config, spec, cache, ranks, progress=progress and ranks.is_main)
            if ranks.is_main:
                print(report, flush=True)
            manifest = report.manifest
    return manifest


def _trusted(config: RunConfig, answer: ManifestMatch, cache: Cache) -> Manifest | None:
    """The manifest if it can be used as it is, None if something has to be encoded or planned first."""
    require = config.cache.mode == "require"
    if answer.faults:
        if require:
            raise CacheError(
                "the cache does not hold what this run needs, and cache.mode is require\n" + _listed(answer.faults),
                where=str(cache.root),
                fix="run `finetune precompute` where the videos and the encoders are, or set cache.mode: auto",
            )
        print(f"cache {from_here(cache.root)} has to be brought up to date:\n{_listed(answer.faults)}", flush=True)
        return None
    manifest = answer.manifest
    assert manifest is not None  # an answer without faults has one
    if answer.absent and not require:
        raise CacheError(
            f"files that the cache was made from are not on this machine: {named(answer.absent)}",
            where=str(cache.root),
            fix="bring them back, or set cache.mode: require to train from the cache alone",
        )
    with suppress(OSError):  # `gc --unused-days` goes by this time; a cache may be read-only
        os.utime(cache.root / "manifests" / f"{manifest.name}.json")
    val = sum(item.holdout for item in manifest.items)
    print(
        f"cache {from_here(cache.root)}: complete, {len(manifest.items)} clips ({val} held out), nothing to encode",
        flush=True,
    )
    if answer.absent:
        print(f"note: source files are not on this machine and were not compared: {named(answer.absent)}", flush=True)
    if answer.outdated:
        print(
            "warning: an older version read the videos' headers. If some are upside-down, stretched, interlaced, HDR or"
            " transparent, run `finetune precompute` where the videos are: it encodes those anew and no other",
            flush=True,
        )
    if answer.unknown:
        print(f"note: not on this machine and not compared: {', '.join(answer.unknown)}", flush=True)
    return manifest


def _listed(lines: Sequence[str], limit: int = 12) -> str:
    more = [f"  and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([*(f"  {line}" for line in lines[:limit]), *more])
