"""Filling the cache, and trusting it.

``plan_cache`` lists what a dataset needs, ``precompute`` encodes what the cache lacks of it: clips with the VAE, then
captions with T5. ``ensure_cache`` is what training calls: where a recorded manifest still answers the configuration, no
video and no encoder is opened.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.caching.check import (
    UNREADABLE,
    check_dataset,
    named,
    note_line,
    quoted,
    sample_bucket,
    split_clips,
    stamp_files,
    validation_controls,
    workers_for,
)
from finetune.caching.encode import (
    ClipJob,
    ControlJob,
    EncodeJob,
    ImageJob,
    clip_bytes,
    clip_job,
    encode_captions,
    encode_clips,
    store_images,
)
from finetune.caching.parts import LEFT_OUT, all_finished, filed_parts, remove_parts, require_whole
from finetune.caching.planned_clips import PlannedClip
from finetune.caching.request import encoding_of, find_manifest, make_request, stream_identities
from finetune.caching.streaming import encode_streams
from finetune.caching.writing import EncodeResult, Failure
from finetune.cogvideox.model_files import resolve_pretrained
from finetune.cogvideox.spec import ModelSpec, spec_of
from finetune.config.rules import pin_model, require_valid
from finetune.config.schema import RunConfig, as_config
from finetune.core.collector import collector_paused
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import CacheError, CheckpointError, DataError, raise_all
from finetune.core.files import from_here, human_size, require_space
from finetune.core.types import DTYPE_BYTES, ClipPlan, DtypeName
from finetune.datasets.cache import Cache
from finetune.datasets.cache_packing import PackReport, pack
from finetune.datasets.decode_pool import DecodeJob
from finetune.datasets.manifests import (
    KINDS,
    FileStamp,
    Kind,
    Manifest,
    ManifestItem,
    portable,
)
from finetune.datasets.parts import Part
from finetune.datasets.samples import source_files

ENTRY_OVERHEAD = 8192
"""Bytes that an entry takes beside its tensors: a header of one or two kB, and what rounding up to blocks costs."""

MARGIN = 0.01
"""Part of the computed space that is asked for on top: folders, digests, and what the file system keeps for itself."""

_TITLES: Mapping[Kind, str] = {"latents": "clips", "prompts": "captions", "images": "images"}


# ------------------------------------------------------------------------------------------------------ what is missing


@dataclass(frozen=True)
class CachePlan:
    """What a dataset needs and what of it is missing."""

    manifest: Manifest
    latents: tuple[ClipJob, ...]
    prompts: tuple[EncodeJob, ...]
    images: tuple[ImageJob | ControlJob, ...]
    needed_bytes: int
    """Disk space that the missing entries and the manifest will take."""
    part: Part | None
    """Of the dataset; None for all of it."""
    failures: tuple[Failure, ...]
    """Clips that came as a stream, could not be encoded, and are gone."""
    streamed: tuple[EncodeResult, ...] = ()
    """What was encoded of streams, before it was known what the dataset needs."""
    begun: float = 0.0
    """When work on it began, by ``time.perf_counter`` of this process."""

    @property
    def missing(self) -> dict[Kind, int]:
        """How many entries are missing, by kind."""
        return {"latents": len(self.latents), "prompts": len(self.prompts), "images": len(self.images)}


@collector_paused()
def plan_cache(
    config: RunConfig, spec: ModelSpec, cache: Cache, *, progress: bool, part: Part | None = None
) -> CachePlan:
    """Read the dataset, digest its files and list the entries it needs; of a ``part`` of it, those of its clips.

    Raises:
        DataError: listing every row and file that cannot be used.
        ModelError: if an encoder cannot be found.
    """
    # Digested before they are read: a file that changes in between is then seen as changed, not missed.
    stamps = {path: cache.stamp(path) for path in source_files(config.data.sources, config.base)}
    # Captions are compared with it, before an encoder of 10 GB is fetched.
    resolve_pretrained(config.model.pretrained, config.model.revision, components=["tokenizer"])
    report = check_dataset(config, spec, progress=progress, part=part)
    streamed = report.streamed
    encoding = encoding_of(config, spec, cache, fetch=True)
    samples, bucket = config.validation.samples, sample_bucket(config)
    images = {image for sample in samples for image in sample.images if spec.image_to_video}
    controls = {path: job for path, job in validation_controls(config, spec).items() if isinstance(job, DecodeJob)}
    conditions = {clip.sample.image for clip in report.clips if clip.sample.image and spec.image_to_video}
    left_out = {config.base / name for name in report.skipped.get(UNREADABLE, ())}
    media = {clip.sample.video for clip in report.clips} | {path for path in left_out if path.is_file()}
    beside = {one.path for clip in report.clips for one in clip.companions}
    named_files = media | conditions | images | beside | controls.keys()
    stamps |= stamp_files(named_files - streamed.media.keys(), cache, progress)
    inputs = {str(path): stamp for path, stamp in stamps.items()}
    stamps |= {path: media.stamp for path, media in streamed.media.items()}  # of which nothing is left to compare
    clips: dict[str, ClipJob] = {}
    captions: dict[str, EncodeJob] = {}
    stills: dict[str, ImageJob | ControlJob] = {}

    def clip_key(clip: PlannedClip, plan: ClipPlan) -> str:
        job = clip_job(clip, plan, stamps, encoding, spec)
        return clips.setdefault(job.key, job).key

    def unmasked_key(clip: PlannedClip) -> str:
        others = tuple(one for one in clip.companions if one.name != "mask")
        masked = others != clip.companions
        return clip_job(replace(clip, companions=others), clip.plan, stamps, encoding, spec).key if masked else ""

    def flipped_key(clip: PlannedClip, is_val: bool) -> str:
        # A part does not see which of its clips the whole dataset holds out, and encodes all.
        flips = clip.sample.random_flip and not (is_val and part is None)
        return clip_key(clip, replace(clip.plan, flip=True)) if flips else ""

    def prompt_key(text: str) -> str:
        job = EncodeJob(encoding.prompt_address(text))
        return captions.setdefault(job.key, job).key

    def image_key(image: Path) -> str:
        job = ImageJob(encoding.image_address(stamps[image].digest, bucket), image, bucket)
        return stills.setdefault(job.key, job).key

    def control_key(video: DecodeJob) -> str:
        job = ControlJob(encoding.control_address(stamps[video.path].digest, video.plan), video)
        return stills.setdefault(job.key, job).key

    val_split = split_clips(report.clips, {path: stamp.digest for path, stamp in stamps.items()}, config.data.holdout)
    request = portable(make_request(config, spec, encoding, stream_identities(config, recorded=True)), config.base)
    manifest = Manifest(
        items=tuple(
            ManifestItem(
                clip=clip.name,
                where=clip.sample.where,
                caption=clip.sample.caption,
                bucket=clip.plan.bucket,
                repeats=clip.sample.repeats,
                holdout=is_val,
                latents_key=clip_key(clip, clip.plan),
                prompt_key=prompt_key(clip.sample.caption),
                media_digest=stamps[clip.sample.video].digest,
                variants=tuple((text, prompt_key(text)) for text in clip.sample.variants),
                caption_dropout=clip.sample.caption_dropout,
                weight=clip.sample.weight,
                flipped_key=flipped_key(clip, is_val),
                prior=clip.sample.prior and not is_val,
                unmasked_key=unmasked_key(clip),
            )
            for clip, is_val in zip(report.clips, val_split, strict=True)
        ),
        empty_prompt_key=prompt_key(""),
        request=request if part is None else part.request(request),
        inputs=inputs,
        prompts={sample.prompt: prompt_key(sample.prompt) for sample in samples},
        images={str(path): image_key(path) for path in sorted(images)}
        | {str(path): control_key(job) for path, job in sorted(controls.items())},
        skipped={reason: len(names) for reason, names in report.skipped.items()},
        notes=(*report.notes, *_both_sides(report.clips, stamps)),
        kept={str(bucket): str(kept) for bucket, kept in report.kept.items()},
    )
    there = {kind: cache.keys(kind) for kind in KINDS}
    failures = tuple(
        Failure(key, DataError(error.what, where=clips[key].where, fix=error.fix))
        for key, error in streamed.failed.items()
        if key in clips and key not in there["latents"]
    )
    # What else of a stream is missing went since it was encoded; who counts in the end will say so.
    latents = tuple(
        job for key, job in clips.items() if key not in there["latents"] and job.video not in streamed.media
    )
    prompts = tuple(job for key, job in captions.items() if key not in there["prompts"])
    pixels = tuple(job for key, job in stills.items() if key not in there["images"])
    draws = encoding.image_draws or 0
    stored, further = encoding.latents_dtype, encoding.condition_frames
    needed = sum(clip_bytes(spec, job.plan.bucket, stored, draws=draws, condition_frames=further) for job in latents)
    frames = sum(bucket.frames if isinstance(job, ControlJob) else 1 for job in pixels)
    needed += len(prompts) * prompt_bytes(spec, encoding.dtype) + frames * 3 * bucket.height * bucket.width
    needed += ENTRY_OVERHEAD * (len(latents) + len(prompts) + len(pixels))
    needed += 2 * len(manifest.to_bytes(config.base))  # the old one stands until the new one is whole
    return CachePlan(manifest, latents, prompts, pixels, needed, part, failures)


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
    bytes: int
    """On disk, of every entry that the dataset needs."""
    written_bytes: int
    seconds: float
    part: Part | None = None
    """Of the dataset; None where it is all of it."""
    packed: PackReport | None = None
    """What was laid into shards, of a dataset that is read as a stream."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """Clips left out, by reason."""
        return self.manifest.skipped

    def __str__(self) -> str:
        part = "" if self.part is None else f", shard {self.part} of the dataset"
        lines = [f"cache {from_here(self.cache_dir)}{part}", f"{'':<10}{'encoded':>10}{'reused':>10}"]
        lines += [
            f"{_TITLES[kind]:<10}{self.encoded[kind]:>10}{self.reused[kind]:>10}"
            for kind in KINDS
            if self.encoded[kind] or self.reused[kind]
        ]
        lines += [f"left out  {count:>10}  {reason}" for reason, count in self.skipped.items()]
        if mirrored := sum(bool(item.flipped_key) for item in self.manifest.items):
            lines.append(f"{mirrored} of {len(self.manifest.items)} clips are there mirrored as well")
        lines.append(f"{human_size(self.bytes)}, {human_size(self.written_bytes)} of it new; {self.seconds:.1f} s")
        lines += [f"bucket {bucket}: {kept}" for bucket, kept in self.manifest.kept.items()]
        lines += [] if self.packed is None else [str(self.packed)]
        return "\n".join([*lines, *map(note_line, self.manifest.notes)])


def precompute(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    spec: ModelSpec | None = None,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
    part: Part | None = None,
) -> PrecomputeReport:
    """Encode what the cache lacks of a dataset, shared out over the processes of the launch.

    What is encoded stays, whatever happens: killed at any moment, the next call goes on where this one stopped.

    Args:
        config: the run's configuration, its values, or its file (``config.as_config``).
        spec: of its model; read from it if None.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.
        part: encode these clips alone. Who ends last of all parts merges them.

    Raises:
        DataError: listing every row and file that cannot be used, before anything is encoded; or every clip whose
            pixels could not be decoded, after all others are encoded.
        CacheError: if the disk or the GPU is too small, or another process of the launch failed.
        ModelError: if an encoder cannot be found or loaded.
    """
    config = as_config(config)
    ranks = distributed or ProcessGroup.current()
    config = pin_model(config, ranks.run_on_main)
    spec = spec or spec_of(config.model)
    cache = Cache(config.cache.dir)
    with cache.in_use("precompute", quiet=not ranks.is_main):
        progress = progress and ranks.is_main
        plan = _planned(config, spec, cache, ranks, progress=progress, part=part)
        report = _encoded(config, spec, cache, ranks, plan, progress=progress)
        if part is not None:
            whole = ranks.run_on_main(lambda: _merge_if_last(config, spec, cache, report, progress=progress))
            report = whole or report
    ranks.run_on_all(lambda: None)  # until none of them uses the cache
    return ranks.run_on_main(lambda: _packed(config, cache, report, progress=progress))


def _streams(config: RunConfig) -> bool:
    return any(source.stream(config.base) is not None for source in config.data.sources)


def _merge_if_last(
    config: RunConfig, spec: ModelSpec, cache: Cache, report: PrecomputeReport, *, progress: bool
) -> PrecomputeReport | None:
    request = {name: value for name, value in report.manifest.request.items() if name != "shard"}
    if report.part is None or not all_finished(filed_parts(cache, request), report.part.of):
        return None
    whole = _merge(config, spec, cache, progress=progress)
    reused = {kind: count - report.encoded[kind] for kind, count in whole.reused.items()}
    return replace(whole, encoded=report.encoded, reused=reused, written_bytes=report.written_bytes)


def merge_parts(
    config: RunConfig | Mapping[str, Any] | str | Path, *, spec: ModelSpec | None = None, progress: bool = True
) -> PrecomputeReport:
    """File the manifest of a dataset whose parts were encoded one by one, if every entry of it is there and whole.

    Nothing is encoded. For one process; arguments and what else is raised are those of ``precompute``.

    Raises:
        CacheError: naming every entry that is missing or damaged, and the parts to run again.
    """
    config = pin_model(as_config(config))
    spec = spec or spec_of(config.model)
    require_valid(config, spec)
    cache = Cache(config.cache.dir)
    with cache.in_use("precompute"):
        report = _merge(config, spec, cache, progress=progress)
    return _packed(config, cache, report, progress=progress)


def _packed(config: RunConfig, cache: Cache, report: PrecomputeReport, *, progress: bool) -> PrecomputeReport:
    """Lay the entries of a dataset that came as a stream, which may be millions, into shards when all of it is there.

    Where another job uses the cache, or the file system has no locks, the report says why nothing was packed.
    """
    if report.part is not None or not _streams(config):
        return report
    try:
        return replace(report, packed=pack(cache, progress=progress))
    except CacheError as error:
        return replace(report, packed=PackReport(0, 0, 0, held_back=error.what))


def _merge(config: RunConfig, spec: ModelSpec, cache: Cache, *, progress: bool) -> PrecomputeReport:
    begun = time.perf_counter()
    plan = replace(plan_cache(config, spec, cache, progress=progress), begun=begun)
    parts = filed_parts(cache, plan.manifest.request)
    notes = [note for _, manifest in parts.values() for note in manifest.notes if note.startswith(LEFT_OUT)]
    failures = [
        Failure(job.key, DataError(note.removeprefix(f"{LEFT_OUT}{job.where}: "), where=job.where))
        for job in plan.latents
        for note in notes
        if note.startswith(f"{LEFT_OUT}{job.where}: ")
    ]
    failed = {failure.key for failure in (*failures, *plan.failures)}
    require_whole(plan.manifest, cache, parts, failed, progress=progress)
    results: dict[Kind, list[EncodeResult]] = {kind: [] for kind in KINDS}
    report = _finish(config, spec, cache, plan, results | {"latents": [EncodeResult(0, 0, tuple(failures))]})
    remove_parts(parts)
    return report


def _planned(
    config: RunConfig, spec: ModelSpec, cache: Cache, ranks: ProcessGroup, *, progress: bool, part: Part | None = None
) -> CachePlan:
    """What is missing, after the clips of streams, which are encoded as they come."""
    begun = time.perf_counter()
    streamed: list[EncodeResult] = []
    if _streams(config):
        ranks.run_on_main(lambda: require_valid(config, spec))
        streamed = encode_streams(config, spec, cache, ranks, part=part, progress=progress)

    def plan() -> CachePlan:
        require_valid(config, spec)
        return plan_cache(config, spec, cache, progress=progress, part=part)

    return replace(ranks.run_on_main(plan), streamed=tuple(streamed), begun=begun)


def _encoded(
    config: RunConfig, spec: ModelSpec, cache: Cache, ranks: ProcessGroup, plan: CachePlan, *, progress: bool
) -> PrecomputeReport:
    """Make what a plan lacks, and file its manifest."""

    def begin() -> None:
        require_room(plan, cache.root)
        if any(plan.missing.values()):  # should this process die, its entries are still wanted
            cache.save_manifest(plan.manifest.pending(), config.base)

    ranks.run_on_main(begin)
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
    return ranks.run_on_main(lambda: _finish(config, spec, cache, plan, results))


def other_data(where: str) -> CheckpointError:
    """For a run that would go on with other data than it was trained on."""
    return CheckpointError(
        "the training data is not what this run was trained on: clips, captions or their encoding changed",
        where=where,
        fix="restore the dataset to continue, or train anew into another output_dir"
        " (method.init_from continues from the weights alone)",
    )


def _finish(
    config: RunConfig,
    spec: ModelSpec,
    cache: Cache,
    plan: CachePlan,
    results: Mapping[Kind, Sequence[EncodeResult]],
) -> PrecomputeReport:
    """Settle what could not be decoded, file the manifest and count."""
    results = {**results, "latents": [*plan.streamed, *results["latents"], EncodeResult(0, 0, plan.failures)]}
    failures = [failure for one in results["latents"] for failure in one.failures]
    errors = list({str(failure.error): failure.error for failure in failures}.values())  # mirrored clips fail alike
    if config.data.unreadable_clips == "error":
        raise_all(DataError, errors, what="{n} clips could not be encoded; all others are in the cache")
    manifest = _without(plan.manifest, failures)
    if plan.part is None and all(item.holdout for item in manifest.items):
        raise_all(DataError, errors, what="no clip is left to train on; {n} failed")
    manifest = replace(manifest, notes=(*manifest.notes, *_cut_captions(manifest, cache, spec)))
    sizes = {kind: cache.sizes(kind) for kind in KINDS}
    for kind in KINDS:
        for key in manifest.keys(kind) - sizes[kind].keys():
            with suppress(FileNotFoundError):  # a network drive lists late what another machine wrote a moment ago
                sizes[kind][key] = cache.path(kind, key).stat().st_size
    if gone := [f"{kind}/{key}" for kind in KINDS for key in sorted(manifest.keys(kind) - sizes[kind].keys())]:
        what = f"entries went while others were encoded: {named(gone)}"
        raise CacheError(what, where=str(cache.root), fix="run the same command again: it encodes them anew")
    cache.save_manifest(manifest, config.base)
    streamed = sum(one.encoded for one in plan.streamed) + len(plan.failures)
    new = {**plan.missing, "latents": plan.missing["latents"] + streamed}
    return PrecomputeReport(
        manifest=manifest,
        cache_dir=cache.root,
        encoded={kind: sum(one.encoded for one in results[kind]) for kind in KINDS},
        reused={kind: max(0, len(plan.manifest.keys(kind)) - new[kind]) for kind in KINDS},
        bytes=sum(sizes[kind][key] for kind in KINDS for key in manifest.keys(kind)),
        written_bytes=sum(one.bytes for kind in KINDS for one in results[kind]),
        seconds=time.perf_counter() - plan.begun,
        part=plan.part,
    )


def _without(manifest: Manifest, failures: Sequence[Failure]) -> Manifest:
    """The manifest without the clips that failed, counted as unreadable."""
    failed = {failure.key for failure in failures}
    items = tuple(item for item in manifest.items if failed.isdisjoint(item.latents_keys))
    lost = len(manifest.items) - len(items)
    if not lost:
        return manifest
    skipped = {**manifest.skipped, UNREADABLE: manifest.skipped.get(UNREADABLE, 0) + lost}
    notes = dict.fromkeys(f"{LEFT_OUT}{failure.error.where}: {failure.error.what}" for failure in failures)
    return replace(manifest, items=items, skipped=skipped, notes=(*manifest.notes, *notes))


def _cut_captions(manifest: Manifest, cache: Cache, spec: ModelSpec) -> list[str]:
    """A note on captions longer than the model reads."""
    captions = {item.prompt_key: item.caption for item in manifest.items}
    captions |= {key: text for item in manifest.items for text, key in item.variants}
    captions |= {key: prompt for prompt, key in manifest.prompts.items()}
    cut = [text for key, text in captions.items() if cache.prompt_tokens(key) > spec.max_text_seq_length]
    if not cut:
        return []
    shown = named(map(quoted, cut))
    return [f"captions are longer than the {spec.max_text_seq_length} tokens the model reads, and are cut: {shown}"]


# --------------------------------------------------------------------------------------------------------- trusting it


def ensure_cache(
    config: RunConfig,
    spec: ModelSpec,
    *,
    cache: Cache | None = None,
    distributed: ProcessGroup | None = None,
    progress: bool = True,
    continues: str | None = None,
) -> Manifest:
    """The manifest that training reads from, every entry of it in the cache.

    A recorded manifest is trusted when the configuration, the encoders and every source file are what they were. If
    there is none, ``cache.mode: auto`` precomputes and ``require`` raises; ``require`` also accepts that source files
    are not on this machine. What is done is printed on the main process. For as long as the caller reads entries, it
    holds ``cache.in_use``.

    Args:
        config: the run's configuration.
        spec: of its model.
        cache: the run's, which then knows what is packed without reading it again; made anew if None.
        distributed: the processes that take part; those of the launch if None.
        progress: draw progress bars, on the main process.
        continues: the digest of what a run was trained on that goes on: other data are refused before they are encoded,
            but for those of streams.

    Raises:
        CheckpointError: if the data are not what ``continues`` says, and some of it would have to be encoded.
        CacheError: in mode ``require``, naming what differs; or as ``precompute`` does.
        DataError, ModelError: as ``precompute`` does.
    """
    ranks = distributed or ProcessGroup.current()
    cache = cache or Cache(config.cache.dir)
    manifest = ranks.run_on_main(lambda: find_manifest(config, spec, cache))
    if manifest is None:
        progress = progress and ranks.is_main
        plan = _planned(config, spec, cache, ranks, progress=progress)
        if any(plan.missing.values()) and continues not in (None, plan.manifest.digest):
            raise other_data(str(cache.root))
        report = _encoded(config, spec, cache, ranks, plan, progress=progress)
        if ranks.is_main:
            print(report, flush=True)
        manifest = report.manifest
    return manifest
