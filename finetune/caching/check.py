"""What is in a dataset, how it would be cut, and what follows from it: every row and every video's header are read.

No pixel of a video is decoded and no weight is loaded. This is what ``finetune check`` prints, and what ``precompute``
begins with.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from finetune.caching.planned_clips import (
    KeptShare,
    PlannedClip,
    clip_labels,
    companions_of,
    kept_by_bucket,
    kept_warnings,
)
from finetune.cogvideox.captions import TOKENIZER_FILES, load_tokenizer, tokenize
from finetune.cogvideox.model_files import local_folder
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.config.starting_points import MOST_SEEN
from finetune.core.errors import DataError, raise_all
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, RowFile, Sample, VideoProbe
from finetune.datasets.cache import Cache
from finetune.datasets.decode_pool import DecodeJob, DecodePool, probe_memory, require_decoder
from finetune.datasets.geometry import (
    ClipConfig,
    plan_clips,
    plan_notes,
)
from finetune.datasets.manifests import WARNING, FileStamp, portable
from finetune.datasets.packed import content_digest, is_ours
from finetune.datasets.parts import Part
from finetune.datasets.rows import MediaPlace, Streamed
from finetune.datasets.samples import captions_of, choose_val_split, read_samples
from finetune.datasets.schedule import Item, StepPlan

TOO_SHORT = "too short"

UNREADABLE = "unreadable"

UNUSABLE = "with unusable text"

_NAMED = 5

_HASHING_THREADS = 4


@dataclass(frozen=True)
class DatasetReport:
    """Every clip of a dataset and what there is to say about it; its text is a table."""

    clips: tuple[PlannedClip, ...]
    skipped: Mapping[str, tuple[str, ...]]
    """What is left out, by reason: videos (``too short``, ``unreadable``), and rows (``with unusable text``)."""
    notes: tuple[str, ...]
    fps: float
    """Of the clips."""
    kept: Mapping[Bucket, KeptShare]
    """How much of pictures and videos the clips show."""
    streamed: Streamed = field(default_factory=Streamed)
    """Of media that came as a stream: those are not on the disk."""

    def __str__(self) -> str:
        videos = len({clip.sample.video for clip in self.clips})
        captions = len({text for clip in self.clips for text in clip.sample.captions})
        stills = len({clip.sample.video for clip in self.clips if clip.probe.still})
        files = f"{videos - stills} videos" + (f" and {stills} still images" if stills else "")
        lines = [f"{len(self.clips)} clips from {files}, {captions} distinct captions, at {self.fps:g} fps"]
        counts = Counter((clip.plan.bucket, clip.holdout) for clip in self.clips)
        for bucket in sorted({bucket for bucket, _ in counts}, key=str):
            length = f" of {bucket.frames / self.fps:.1f} s" if bucket.frames > 1 else " of one frame"
            held_out = counts[bucket, True]
            also = f", {held_out} of them from held-out sources" if held_out else ""
            number = counts[bucket, False] + held_out
            lines.append(f"  bucket {bucket}: {number} clips{length}{also}; {self.kept[bucket]}")
        for reason, names in self.skipped.items():
            lines.append(f"  left out, {reason}: {named(names)}")
        return "\n".join([*lines, *map(note_line, self.notes)])


def row_files_of(config: RunConfig, spec: ModelSpec) -> tuple[RowFile, ...]:
    """What a run reads of a row beside its video and captions."""
    return (*spec.row_files, "mask") if config.objective.masked is not None else spec.row_files


def check_dataset(
    config: RunConfig, spec: ModelSpec, *, progress: bool = True, part: Part | None = None
) -> DatasetReport:
    """Read every source and every video's header, and plan the clips. No weights are loaded.

    Args:
        config: the run's configuration.
        spec: of its model.
        progress: draw a bar.
        part: read all rows, and go on with those alone that are its own.

    Raises:
        DataError: one that lists every row and file that cannot be used, or says that no clip is left.
        ConfigError: if ``cache.decoder`` is not installed.
    """
    require_decoder(config.cache.decoder)
    skip = config.data.unreadable_clips == "skip"
    read = read_samples(
        config.data.sources,
        config.data,
        base=config.base,
        row_files=row_files_of(config, spec),
        skip=skip,
        media=MediaPlace.of(config.cache.dir, part),
    )
    rows = [(sample, False) for sample in read.train] + [(sample, True) for sample in read.holdout]
    streamed = read.streamed.media
    if part is not None:  # of streams it has its own rows alone
        rows = [*part.take([row for row in rows if row[0].video not in streamed]), *_streamed(rows, streamed)]
    fps = config.data.fps or spec.native_fps
    files = {path for sample, _ in rows for path in (sample.video, *(path for _, path in sample.companions))}
    probes = _probe(config, files - streamed.keys(), progress)
    probes |= {path: media.probe for path, media in streamed.items() if media.probe is not None}
    clips: list[PlannedClip] = []
    skipped: dict[str, list[str]] = {TOO_SHORT: [], UNREADABLE: []}
    skipped[UNUSABLE] = [f"{error.where}: {error.what}" for error in read.unusable]
    errors: list[DataError] = []
    advice: Counter[str] = Counter()

    def unreadable(name: str, error: DataError, where: str) -> None:
        if skip:
            skipped[UNREADABLE].append(name)
        else:
            errors.append(DataError(error.what, where=where, fix=error.fix))

    for sample, holdout in rows:
        name = portable(sample.video, config.base)
        probe = probes[sample.video]
        if isinstance(probe, DataError):
            unreadable(name, probe, f"{name} ({sample.where})")
            continue
        try:
            plans = plan_clips(probe, config.data, fps, f"{name} ({sample.where})", sample.span_s)
        except DataError as error:
            errors.append(error)
            continue
        if not plans:
            skipped[TOO_SHORT].append(name)
        try:
            companions = [companions_of(sample, probe, plan, probes, name) for plan in plans]
        except DataError as error:
            unreadable(name, error, error.where or "")
            continue
        for label, plan, own in zip(clip_labels(name, sample, len(plans)), plans, companions, strict=True):
            clip = PlannedClip(label, sample, probe, plan, holdout, own)
            clips.append(clip)
            advice.update(plan_notes(probe, plan, fps, config.data.span, clip.part))

    for video, job in validation_controls(config, spec).items():
        if isinstance(job, DataError):
            errors.append(DataError(job.what, where=f"{video} (validation.samples)", fix=job.fix))
    faults = _image_faults(config, clips, streamed, progress) if spec.image_to_video else {}
    for image in sorted({image for sample in config.validation.samples for image in sample.images}):
        if fault := faults.get((image, sample_bucket(config))):
            errors.append(DataError(fault.what, where=f"{image} (validation.samples)", fix=fault.fix))
    refused = {(clip.sample.where, clip.plan.bucket): clip.sample for clip in clips if clip.first_frame in faults}
    for (where, bucket), row in refused.items():  # once for all clips of a video
        assert row.image is not None
        image, video = portable(row.image, config.base), portable(row.video, config.base)
        unreadable(image, faults[row.image, bucket], f"{image}, first frame of {video} ({where})")
    clips = [clip for clip in clips if clip.first_frame not in faults]

    captions: dict[str, str] = {}
    for sample, _ in rows:
        for text in sample.captions:
            captions.setdefault(text, sample.where)
    for shown in config.validation.samples:
        captions.setdefault(shown.prompt, "validation.samples")
    caption_warnings, caption_errors = check_captions(config, spec, captions)
    raise_all(DataError, [*errors, *caption_errors], what="{n} clips, images or captions cannot be used")
    left_out = {why: tuple(names) for why, names in skipped.items() if names}
    if part is None and not any(not clip.holdout for clip in clips):
        counts = [f"{len(names)} {'rows' if why == UNUSABLE else 'videos'} {why}" for why, names in left_out.items()]
        raise DataError(
            f"no clip is left to train on: {'; '.join(counts) or 'every source is held out'}",
            where=", ".join([name for names in left_out.values() for name in names][:4]),
            fix="mend or replace them (`finetune doctor` says more of each)" if counts else "set split: train on one",
        )
    notes = [*read.notes, *caption_warnings, *(f"{count} clips: {note}" for note, count in advice.most_common())]
    notes += [f"{WARNING}{warning}" for warning in kept_warnings(clips, config.data, spec, fps)]
    return DatasetReport(tuple(clips), left_out, tuple(notes), fps, kept_by_bucket(clips, fps), read.streamed)


def _image_faults(
    config: RunConfig, clips: Iterable[PlannedClip], streamed: Collection[Path], progress: bool
) -> dict[tuple[Path, Bucket], DataError]:
    """First-frame images and validation images that cannot be read or cut to a bucket, each tried as it is encoded; but
    for those that came as a stream: there it is the clip that failed.
    """
    wanted = {clip.first_frame for clip in clips if clip.first_frame and clip.first_frame[0] not in streamed}
    for image in {image for sample in config.validation.samples for image in sample.images}:
        # With a complete cache they may be elsewhere.
        if config.cache.mode == "auto" or image.is_file():
            wanted.add((image, sample_bucket(config)))
    jobs = sorted(wanted, key=str)
    with DecodePool(workers_for(config, len(jobs))) as pool:
        bar = Bar(pool.load_images(jobs), total=len(jobs), desc="reading images", disable=not progress)
        return {job: image for job, image in zip(jobs, bar, strict=True) if isinstance(image, DataError)}


def validation_controls(config: RunConfig, spec: ModelSpec) -> dict[Path, DecodeJob | DataError]:
    """How the control videos of validation prompts are cut, or why they cannot be; none for a model without control.

    Those that are elsewhere while ``cache.mode`` is ``require`` are left out.
    """
    videos = {sample.control for sample in config.validation.samples if sample.control is not None and spec.control}
    if config.cache.mode == "require":
        videos = {video for video in videos if video.is_file()}
    if not videos:
        return {}
    bucket, fps = sample_bucket(config), config.data.fps or spec.native_fps
    cut = ClipConfig(buckets=(bucket,))
    jobs: dict[Path, DecodeJob | DataError] = {}
    with DecodePool(workers_for(config, len(videos))) as pool:
        for video, probe in pool.probe_many(sorted(videos)):
            if not isinstance(probe, DataError) and probe.still and bucket.frames > 1:
                probe = DataError(f"a still image is no control for videos of {bucket}", fix="name a video")
            if isinstance(probe, DataError):
                jobs[video] = probe
                continue
            try:
                jobs[video] = DecodeJob(video, probe, plan_clips(probe, cut, fps, str(video))[0])
            except DataError as error:
                jobs[video] = error
    return jobs


def _streamed(rows: Iterable[tuple[Sample, bool]], streamed: Collection[Path]) -> list[tuple[Sample, bool]]:
    return [row for row in rows if row[0].video in streamed]


def _probe(config: RunConfig, videos: Iterable[Path], progress: bool) -> dict[Path, VideoProbe | DataError]:
    paths = sorted(videos)
    with DecodePool(workers_for(config, len(paths))) as pool, ExitStack() as stack:
        # A check leaves nothing behind: what it read is remembered where there is a cache, and makes none.
        there = config.cache.dir.is_dir()
        memory = stack.enter_context(probe_memory(config.cache.dir)) if there else None
        probes = pool.probe_many(paths, memory)
        return dict(Bar(probes, total=len(paths), desc="reading headers of videos", disable=not progress))


def workers_for(config: RunConfig, jobs: int, processes: int = 1) -> int:
    """How many decode processes to start for ``jobs`` files, where ``processes`` of a launch share the machine."""
    wanted = config.cache.decode_workers
    if wanted is None:
        wanted = max(1, min(4, cpu_cores() // (2 * processes)))
    return min(wanted, jobs)


def cpu_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sample_bucket(config: RunConfig) -> Bucket:
    """The shape of validation videos."""
    return config.validation.bucket or config.data.buckets[0]


def note_line(note: str) -> str:
    """One of a report's notes, for print."""
    return note if note.startswith(WARNING) else f"note: {note}"


def named(names: Iterable[str]) -> str:
    """A count and the first few names, for messages."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{len(listed)} ({', '.join(listed[:_NAMED])}{more})"


# ------------------------------------------------------------------------------------------------------------ captions


MOST_UNKNOWN = 0.5
"""Part of a caption's own characters; above it, what is left is no description of a clip."""


def check_captions(
    config: RunConfig, spec: ModelSpec, captions: Mapping[str, str]
) -> tuple[list[str], list[DataError]]:
    """Read captions with the model's own tokenizer, where it is on this machine; nothing is fetched.

    T5 was made for English and knows the letters of a few more languages. Each run of characters that it does not know
    becomes one and the same unknown mark, so that whole captions become equal.

    Returns:
        Warnings; and, only with ``data.unreadable_captions: error``, the captions that the model cannot tell apart.

    Args:
        config: the run's configuration.
        spec: of its model.
        captions: each caption as it is trained on, and where it is written.

    Raises:
        ModelError: if the tokenizer is there and cannot be loaded.
    """
    folder = local_folder(config.model.pretrained, config.model.revision)
    if folder is None or not any((folder / "tokenizer" / name).is_file() for name in TOKENIZER_FILES):
        where = "its tokenizer is not on this machine (precompute does it, before it encodes anything)"
        return [f"captions were not compared with what the model can read: {where}"], []
    tokenizer = load_tokenizer(config.model)
    added = [captions_of(source, config.data) for source in config.data.sources]
    texts = list(captions)
    unknown: dict[str, float] = {}
    by_tokens: dict[tuple[int, ...], list[str]] = {}
    for first in range(0, len(texts), 1_000):
        batch = texts[first : first + 1_000]
        for text, tokens in zip(batch, tokenize(tokenizer, batch, spec), strict=True):
            if tokens.unknown:
                own = _letters(text) - max(_letters(one.added_to(text)) for one in added)
                unknown[text] = min(1.0, tokens.unknown / max(1, own))
            by_tokens.setdefault(tokens.ids, []).append(text)
    alike = [group for group in by_tokens.values() if len(group) > 1]
    mostly = {text: part for text, part in unknown.items() if part > MOST_UNKNOWN}
    warnings = []
    if unknown:
        worst = max(unknown, key=unknown.__getitem__)
        share = f" ({len(mostly)} of them for the most part)" if mostly else ""
        warnings.append(
            f"{WARNING}{len(unknown)} of {len(texts)} captions hold characters that the model's text encoder does not"
            f" know, and reads as one unknown mark{share}: such as {quoted(worst)},"
            f" {unknown[worst]:.0%} unknown"
        )
    if alike:
        warnings.append(
            f"{WARNING}{sum(map(len, alike))} different captions are not different to the model, which reads the same"
            f" tokens (at most {spec.max_text_seq_length}) for {quoted(alike[0][0])} and {quoted(alike[0][1])}"
        )
    if config.data.unreadable_captions == "warn":
        return warnings, []
    reasons = {text: f"{part:.0%} of the caption is unknown" for text, part in mostly.items()}
    for text in (text for group in alike for text in group if text in unknown):
        reasons.setdefault(text, "the caption is another's, but for characters that are unknown")
    fix = "write it in English, or set data.unreadable_captions: warn"
    return warnings, [
        DataError(f"{what} to the model's text encoder: {quoted(text)}", where=captions[text], fix=fix)
        for text, what in reasons.items()
    ]


def _letters(text: str) -> int:
    return sum(not character.isspace() for character in text)


def quoted(text: str) -> str:
    """A caption for a message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


# ----------------------------------------------------------------------------------------------------------- val split


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
        bar = Bar(pool.map(stamp, ordered), total=len(ordered), desc="reading files", disable=not progress)
        stamps = dict(zip(ordered, bar, strict=True))
    errors = [one for one in stamps.values() if isinstance(one, DataError)]
    raise_all(DataError, errors, what="{n} files cannot be read")
    return {path: one for path, one in stamps.items() if isinstance(one, FileStamp)}


def split_clips(clips: Sequence[PlannedClip], identities: Mapping[Path, str], val_split: float) -> tuple[bool, ...]:
    """Whether each clip is kept out of training: by its source, or because ``data.holdout`` takes its video.

    Args:
        clips: of the whole dataset.
        identities: what tells one video from another, by file: the digest of its bytes, so that copies are one video.
        val_split: ``data.holdout``. Still images are taken only where there are no videos: a loss over both would
            measure neither.
    """
    offered = [clip for clip in clips if not clip.holdout]
    offered = [clip for clip in offered if not clip.probe.still] or offered
    chosen = choose_val_split([identities[clip.sample.video] for clip in offered], val_split)
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
    if not config.data.holdout:
        return {video: str(video) for video in gives}
    # What came out of a dataset is named by its digest, and of a stream only the name is left.
    media = MediaPlace.of(config.cache.dir).folder
    named = {video: content_digest(video.name) for video in gives if video.parent == media and is_ours(video.name)}
    files = gives.keys() - named.keys()
    sizes = {video.stat().st_size for video in files}
    alike = len({frozenset(given.items()) for given in gives.values()}) == 1
    if alike and len(sizes) == len(gives):
        return {video: str(video) for video in gives}
    stamps = stamp_files(files, Cache(config.cache.dir), progress)
    return {**named, **{video: stamp.digest for video, stamp in stamps.items()}}


# --------------------------------------------------------------------------------- derived numbers, each with its unit


def run_advice(config: RunConfig, plan: StepPlan, steps: int, *, val_videos: int) -> list[str]:
    """What a person should know of a run's length and of what it is measured on, before the first step.

    Args:
        config: the run's configuration.
        plan: over its training clips.
        steps: in all.
        val_videos: number of different videos that are kept out of training.
    """
    advice = []
    val_split = config.data.holdout
    if not val_videos and (val_split or any(source.split == "holdout" for source in config.data.sources)):
        why = (
            f"data.holdout is {val_split:g}, and no video can be spared"
            if val_split
            else "none of the held-out sources is left"
        )
        advice.append(f"no clip is held out, so no held-out loss is measured and overfitting stays unseen: {why}")
    elif 1 <= val_videos < val_split:
        advice.append(
            f"data.holdout asks for {val_split:g} videos, and {val_videos} can be kept out: training needs one"
        )
    epochs = steps / plan.steps_per_epoch
    times = epochs * max(item.repeats for item in plan.items)
    if times > MOST_SEEN:
        advice.append(
            f"{len(plan.items)} clips for {steps} steps are {epochs:.5g} epochs: what is seen {times:.5g} times is"
            f" learnt by heart. Lower train.steps to {max(1, round(steps * MOST_SEEN / times))} or less, or add clips"
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
        identities: of their videos, from ``identities``.
    """
    in_val = split_clips(clips, identities, config.data.holdout)
    training = list(compress(clips, (not val for val in in_val)))
    val_videos = {identities[clip.sample.video] for clip in compress(clips, in_val)}
    train = config.train
    plan = StepPlan(
        items=tuple(Item(clip.plan.bucket, clip.sample.repeats) for clip in training),
        seed=train.seed,
        batch_size=train.batch_size,
        micro_batches=train.accumulation,
    )
    steps = train.steps or plan.steps_for_epochs(train.epochs or 1)
    some = {
        "mirrored half of the time": sum(clip.sample.random_flip for clip in training),
        "with a mask": sum("mask" in dict(clip.sample.companions) for clip in training),
        "for prior preservation": sum(clip.sample.prior for clip in training),
    }
    of_them = ", ".join(f"{count} of them {how}" for how, count in some.items() if count)
    together = f" / {config.parallel.context}" if config.parallel.context > 1 else ""
    numbers = [
        ("model", f"{config.model.pretrained}, {spec.task}, {spec.num_layers} blocks, dtype {config.model.dtype}"),
        *(("bucket", _size(spec, bucket)) for bucket in sorted({clip.plan.bucket for clip in clips}, key=str)),
        ("clips", f"{len(training)} to train on{f' ({of_them})' if of_them else ''}, {sum(in_val)} held out"),
        (
            "effective batch",
            f"{train.batch_size} x {train.accumulation} accumulation, times the number of processes{together}",
        ),
        ("epoch", f"{plan.samples_per_epoch} clips with repeats, {plan.steps_per_epoch:.2f} steps on one process"),
        ("steps", f"{steps}, {steps / plan.steps_per_epoch:.2f} epochs on one process"),
        ("method", config.method.kind),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("output", str(config.output_dir)),
    ]
    return numbers, run_advice(config, plan, steps, val_videos=len(val_videos))


def _size(spec: ModelSpec, bucket: Bucket) -> str:
    channels, frames, height, width = spec.latent_shape(bucket)
    padding = spec.front_padding(frames)
    padded = f" + {padding} in front" if padding else ""
    shape = f"{channels} channels x {frames}{padded} frames x {height} x {width}"
    return f"{bucket}: latents of {shape}, {spec.tokens(bucket):,} tokens with text"
