"""The clips that would be cut from a dataset's videos: what goes with each, and how much of the videos they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import DataError
from finetune.core.types import Bucket, ClipPlan, Companion, Sample, VideoProbe
from finetune.datasets.geometry import (
    ClipConfig,
    Span,
    better_size,
    companion_plan,
    part_of,
    picture_kept,
    seconds_fitting,
    seconds_kept,
    seconds_of,
)


@dataclass(frozen=True)
class PlannedClip:
    """One clip that training would see."""

    name: str
    """The video relative to the configuration's folder, ``@12.5s`` for the part of it that begins there, and ``#2`` for
    the second clip cut from it."""
    sample: Sample
    probe: VideoProbe
    plan: ClipPlan
    holdout: bool
    """Whether its source is held out; ``data.holdout`` may hold out more."""
    companions: tuple[Companion, ...] = ()
    """What goes with it frame for frame."""

    @property
    def first_frame(self) -> tuple[Path, Bucket] | None:
        """The image that stands for its first frame, and what it is cut to."""
        return None if self.sample.image is None else (self.sample.image, self.plan.bucket)

    @property
    def part(self) -> VideoProbe:
        """The header of what its row has of the video: all of it, or a span."""
        return part_of(self.probe, self.sample.span_s)[0]

    @property
    def where(self) -> str:
        """For messages: the clip and the row that names it."""
        return f"{self.name} ({self.sample.where})"


def clip_labels(name: str, sample: Sample, count: int) -> list[str]:
    """What the clips of one row are called (``PlannedClip.name``); ``name`` is its video's."""
    label = name if sample.span_s is None else f"{name}@{sample.span_s[0]:g}s"
    return [label] if count == 1 else [f"{label}#{number}" for number in range(1, count + 1)]


def companions_of(
    sample: Sample, video: VideoProbe, plan: ClipPlan, probes: Mapping[Path, VideoProbe | DataError], name: str
) -> tuple[Companion, ...]:
    """What goes with one clip of a row frame for frame.

    Args:
        sample: the row.
        video: the header of its video.
        plan: of the clip.
        probes: the headers of the row's files.
        name: of the video, for messages.

    Raises:
        DataError: for what cannot be read or does not fit.
    """
    companions = []
    for kind, path in sample.companions:
        probe, where = probes[path], f"{path}, {kind} of {name} ({sample.where})"
        if isinstance(probe, DataError):
            raise DataError(probe.what, where=where, fix=probe.fix)
        companions.append(Companion(kind, path, probe, companion_plan(kind, probe, video, plan, where)))
    return tuple(companions)


# ---------------------------------------------------------------------------------------------------- how much is kept


ENOUGH = 0.8
"""Of pictures or seconds: if less is kept, there is a warning."""

_MOST_SIZES = 3
"""Of one bucket, that are named as better."""


@dataclass(frozen=True)
class KeptShare:
    """Shares of 0 to 1, of the clips of one bucket."""

    picture: float
    """The mean over the clips."""
    seconds: float | None
    """Of all videos that the clips were cut from, together; None for still images alone, which have no seconds."""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{self.picture:.0%} of the picture is kept"
        return f"{self.picture:.0%} of the picture and {self.seconds:.0%} of the seconds are kept"


def kept_by_bucket(clips: Iterable[PlannedClip], fps: float) -> dict[Bucket, KeptShare]:
    """What clips at ``fps`` keep, by bucket."""
    return {bucket: _kept_share(group, fps) for bucket, group in _by_bucket(clips).items()}


def kept_warnings(clips: Iterable[PlannedClip], data: ClipConfig, spec: ModelSpec, fps: float) -> list[str]:
    """Where less than ``ENOUGH`` is kept, and what this model takes that would keep more."""
    warnings = []
    for bucket, group in _by_bucket(clips).items():
        warnings += _picture_warnings(bucket, group, spec)
        share = _kept_share(group, fps).seconds
        if share is not None and share < ENOUGH:
            moving = [clip for clip in group if not clip.probe.still]
            warnings.append(_seconds_warning(bucket, moving, share, (data, spec, fps)))
    return warnings


def _picture_warnings(bucket: Bucket, clips: Sequence[PlannedClip], spec: ModelSpec) -> list[str]:
    cropped: dict[Bucket | None, list[tuple[int, int]]] = {}
    better: dict[float, Bucket | None] = {}  # by shape: a web dataset has thousands of sizes
    for clip in clips:
        source_hw = clip.probe.height, clip.probe.width
        if picture_kept(source_hw, bucket) < ENOUGH:
            shape = round(clip.probe.width / clip.probe.height, 2)
            if shape not in better:
                better[shape] = better_size(source_hw, bucket, spec.size_multiple, lambda b: _takes(spec, b))
            cropped.setdefault(better[shape], []).append(source_hw)
    warnings = []
    ordered = sorted(cropped.items(), key=lambda pair: -len(pair[1]))
    for size, sources in ordered[:_MOST_SIZES]:
        example = max(sources, key=sources.count)
        subject = f"bucket {bucket} keeps {_mean(sources, bucket):.0%} of the picture of {len(sources)} clips"
        subject += f" of {example[0]}x{example[1]}" + (" and others" if len(set(sources)) > 1 else "")
        named_size = f"{size} in data.image_buckets" if clips[0].probe.still else str(size)
        more = (
            f"{named_size} would keep {_mean(sources, size):.0%}"
            if size
            else "this model takes no size that keeps more"
        )
        warnings.append(f"{subject} (height x width): {more}")
    if rest := sum(len(sources) for _, sources in ordered[_MOST_SIZES:]):
        warnings.append(f"bucket {bucket} keeps less than {ENOUGH:.0%} of the picture of {rest} clips of more shapes")
    return warnings


def _seconds_warning(
    bucket: Bucket, clips: Sequence[PlannedClip], share: float, run: tuple[ClipConfig, ModelSpec, float]
) -> str:
    data, spec, fps = run
    probes = [clip.part for clip, _ in _videos(clips)]

    def kept(frames: int, span: Span) -> float:
        return sum(seconds_fitting(probe, frames, fps, span) for probe in probes) / sum(map(seconds_of, probes))

    # Of clips not half as long motion would be lost, which is what a video is for.
    sizes = (Bucket(n, bucket.height, bucket.width) for n in range(bucket.frames // 2, spec.sample_frames + 1))
    takes = [size for size in sizes if size.frames and _takes(spec, size)]
    spans: list[tuple[str, Span]] = [("", data.span), ("data.span: all", "all")]
    options: dict[str, float] = {}
    for name, span in spans:
        options[name] = kept(bucket.frames, span)
        best = max(takes, key=lambda size: kept(size.frames, span), default=bucket)
        options[f"{name} with {best}" if name else str(best)] = kept(best.frames, span)
    more, reached = [], share
    for name, option in options.items():
        if name and option >= reached + 0.05:  # the least change first, a greater one if it keeps more still
            more.append(f"{name} would keep {option:.0%}")
            reached = option
    subject = f"bucket {bucket} keeps {share:.0%} of the seconds of {len(probes)} videos"
    return f"{subject}: {' and '.join(more) or 'no bucket of this model would keep more'}"


def _kept_share(clips: Sequence[PlannedClip], fps: float) -> KeptShare:
    bucket = clips[0].plan.bucket
    videos = _videos(clip for clip in clips if not clip.probe.still)
    seconds = sum(seconds_kept(clip.probe, plans, fps) for clip, plans in videos)
    return KeptShare(
        picture=_mean([(clip.probe.height, clip.probe.width) for clip in clips], bucket),
        seconds=seconds / sum(seconds_of(clip.part) for clip, _ in videos) if videos else None,
    )


def _by_bucket(clips: Iterable[PlannedClip]) -> dict[Bucket, list[PlannedClip]]:
    grouped: dict[Bucket, list[PlannedClip]] = {}
    for clip in sorted(clips, key=lambda clip: str(clip.plan.bucket)):
        grouped.setdefault(clip.plan.bucket, []).append(clip)
    return grouped


def _videos(clips: Iterable[PlannedClip]) -> list[tuple[PlannedClip, list[ClipPlan]]]:
    """The first clip of each row, with the plans of all that were cut from its video."""
    grouped: dict[str, tuple[PlannedClip, list[ClipPlan]]] = {}
    for clip in clips:
        grouped.setdefault(f"{clip.sample.where}\n{clip.sample.video}", (clip, []))[1].append(clip.plan)
    return list(grouped.values())


def _mean(sources: Sequence[tuple[int, int]], bucket: Bucket) -> float:
    return sum(picture_kept(source_hw, bucket) for source_hw in sources) / len(sources)


def _takes(spec: ModelSpec, bucket: Bucket) -> bool:
    return not spec.check_bucket(bucket)
