"""What is in a dataset, and how it would be cut: every row and every video's header, no pixel and no weight."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from finetune.caching.captions import check_captions
from finetune.caching.kept import Kept, kept_by_bucket, kept_warnings
from finetune.caching.request import sample_bucket
from finetune.config import RunConfig
from finetune.datasets.manifest import WARNING, portable
from finetune.datasets.sources import read_samples
from finetune.datasets.video import DecodePool
from finetune.errors import DataError, raise_all
from finetune.facts import Facts
from finetune.geometry import plan_clips, plan_notes
from finetune.progress import Bar
from finetune.types import Bucket, ClipPlan, Sample, VideoProbe

TOO_SHORT = "too short"
UNREADABLE = "unreadable"
UNUSABLE = "with unusable text"

_NAMED = 5


@dataclass(frozen=True)
class PlannedClip:
    """One clip that training would see."""

    name: str
    """The video relative to the configuration's folder, and ``#2`` for the second clip cut from it."""
    sample: Sample
    probe: VideoProbe
    plan: ClipPlan
    holdout: bool
    """Whether its source is held out; ``data.holdout`` may hold out more."""

    @property
    def where(self) -> str:
        """For messages: the clip and the row that names it."""
        return f"{self.name} ({self.sample.where})"


@dataclass(frozen=True)
class DatasetReport:
    """Every clip of a dataset and what there is to say about it; its text is a table."""

    clips: tuple[PlannedClip, ...]
    skipped: Mapping[str, tuple[str, ...]]
    """What is left out, by reason: videos (``too short``, ``unreadable``), and rows (``with unusable text``)."""
    notes: tuple[str, ...]
    fps: float
    """Of the clips."""
    kept: Mapping[Bucket, Kept]
    """How much of pictures and videos the clips show."""

    def __str__(self) -> str:
        videos = len({clip.sample.video for clip in self.clips})
        captions = len({clip.sample.caption for clip in self.clips})
        lines = [f"{len(self.clips)} clips from {videos} videos, {captions} distinct captions, at {self.fps:g} fps"]
        counts = Counter((clip.plan.bucket, clip.holdout) for clip in self.clips)
        for bucket in sorted({bucket for bucket, _ in counts}, key=str):
            seconds = bucket.frames / self.fps
            held = counts[bucket, True]
            also = f", {held} of them from held-out sources" if held else ""
            number = counts[bucket, False] + held
            lines.append(f"  bucket {bucket}: {number} clips of {seconds:.1f} s{also}; {self.kept[bucket]}")
        for reason, names in self.skipped.items():
            lines.append(f"  left out, {reason}: {named(names)}")
        return "\n".join([*lines, *map(note_line, self.notes)])


def check_dataset(config: RunConfig, facts: Facts, *, progress: bool = True) -> DatasetReport:
    """Read every source and every video's header, and plan the clips. No weights are loaded.

    Args:
        config: the run's configuration.
        facts: of its model.
        progress: draw a bar.

    Raises:
        DataError: one that lists every row and file that cannot be used, or says that no clip is left.
    """
    skip = config.data.unreadable_clips == "skip"
    read = read_samples(
        config.data.sources, config.data, image_to_video=facts.image_to_video, base=config.base, skip=skip
    )
    fps = config.data.fps or facts.native_fps
    probes = _probe(config, {sample.video for sample in (*read.train, *read.holdout)}, progress)
    clips: list[PlannedClip] = []
    skipped: dict[str, list[str]] = {TOO_SHORT: [], UNREADABLE: []}
    skipped[UNUSABLE] = [f"{error.where}: {error.what}" for error in read.unusable]
    errors: list[DataError] = []
    advice: Counter[str] = Counter()
    rows = [(sample, False) for sample in read.train] + [(sample, True) for sample in read.holdout]
    for sample, holdout in rows:
        name = portable(sample.video, config.base)
        probe = probes[sample.video]
        if isinstance(probe, DataError):
            if skip:
                skipped[UNREADABLE].append(name)
            else:
                errors.append(DataError(probe.what, where=f"{name} ({sample.where})", fix=probe.fix))
            continue
        try:
            plans = plan_clips(probe, config.data, fps, f"{name} ({sample.where})")
        except DataError as error:
            errors.append(error)
            continue
        if not plans:
            skipped[TOO_SHORT].append(name)
        for number, plan in enumerate(plans, start=1):
            label = name if len(plans) == 1 else f"{name}#{number}"
            clips.append(PlannedClip(label, sample, probe, plan, holdout))
            advice.update(plan_notes(probe, plan, fps, config.data.span))
    clips = _with_sound_images(clips, config, facts, skipped[UNREADABLE] if skip else None, errors, progress)
    captions: dict[str, str] = {}
    for sample, _ in rows:
        captions.setdefault(sample.caption, sample.where)
    for shown in config.validation.samples:
        captions.setdefault(shown.prompt, "validation.samples")
    findings = check_captions(config, facts, captions)
    errors += findings.errors
    raise_all(DataError, errors, what="{n} clips, images or captions cannot be used")
    if not any(not clip.holdout for clip in clips):
        counts = {
            why: f"{len(names)} {'rows' if why == UNUSABLE else 'videos'} {why}" for why, names in skipped.items()
        }
        reasons = "; ".join(counts[why] for why, names in skipped.items() if names)
        raise DataError(f"no clip is left to train on: {reasons or 'every source is held out'}")
    left_out = {why: tuple(names) for why, names in skipped.items() if names}
    notes = [*read.notes, *findings.notes, *(f"{count} clips: {note}" for note, count in advice.most_common())]
    notes += [f"{WARNING}{said}" for said in kept_warnings(clips, config.data, facts, fps)]
    return DatasetReport(tuple(clips), left_out, tuple(notes), fps, kept_by_bucket(clips, fps))


def _with_sound_images(
    clips: list[PlannedClip],
    config: RunConfig,
    facts: Facts,
    left_out: list[str] | None,
    errors: list[DataError],
    progress: bool,
) -> list[PlannedClip]:
    """The clips whose first-frame images can be read and fit; others go to ``left_out``, or to ``errors`` if None.

    Validation images are read too. Each image is decoded, once for every size it is cut to, as it will be encoded.
    """
    if not facts.image_to_video:
        return clips
    wanted = {(clip.sample.image, clip.plan.bucket) for clip in clips if clip.sample.image is not None}
    shown = {sample.image for sample in config.validation.samples if sample.image is not None}
    if config.cache.mode == "require":  # they may be elsewhere
        shown = {image for image in shown if image.is_file()}
    jobs = sorted(wanted | {(image, sample_bucket(config)) for image in shown}, key=str)
    with DecodePool(workers_for(config, len(jobs))) as pool:
        found = pool.load_images(jobs)
        bar = Bar(found, total=len(jobs), desc="reading images", disable=not progress)
        faults = {job: image for job, image in zip(jobs, bar, strict=True) if isinstance(image, DataError)}
    for path in sorted(shown):
        if fault := faults.get((path, sample_bucket(config))):
            errors.append(DataError(fault.what, where=f"{path} (validation.samples)", fix=fault.fix))
    sound, told = [], set()
    for clip in clips:
        fault = faults.get((clip.sample.image, clip.plan.bucket)) if clip.sample.image is not None else None
        if fault is None:
            sound.append(clip)
        elif (clip.sample.where, clip.plan.bucket) not in told:  # once for all clips of a video
            told.add((clip.sample.where, clip.plan.bucket))
            image = portable(clip.sample.image, config.base)
            if left_out is None:
                where = f"{image}, first frame of {portable(clip.sample.video, config.base)} ({clip.sample.where})"
                errors.append(DataError(fault.what, where=where, fix=fault.fix))
            else:
                left_out.append(image)
    return sound


def _probe(config: RunConfig, videos: Iterable[Path], progress: bool) -> dict[Path, VideoProbe | DataError]:
    paths = sorted(videos)
    with DecodePool(workers_for(config, len(paths))) as pool:
        found = pool.probe_many(paths)
        return dict(Bar(found, total=len(paths), desc="reading headers of videos", disable=not progress))


def workers_for(config: RunConfig, jobs: int, processes: int = 1) -> int:
    """How many decode processes to start for ``jobs`` files, where ``processes`` of a launch share the machine."""
    wanted = config.cache.decode_workers
    if wanted is None:
        wanted = max(1, min(4, cpu_cores() // (2 * processes)))
    return min(wanted, jobs)


def cpu_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def note_line(note: str) -> str:
    """One of a report's notes, for print."""
    return note if note.startswith(WARNING) else f"note: {note}"


def named(names: Iterable[str]) -> str:
    """A count and the first few names, for messages."""
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return f"{len(listed)} ({', '.join(listed[:_NAMED])}{more})"
