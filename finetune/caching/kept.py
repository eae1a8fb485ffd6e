"""How much of a dataset's pictures and seconds its clips keep, by bucket, and which bucket would keep more."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.facts import Facts
from finetune.geometry import ClipConfig, Span, better_size, picture_kept, seconds_fitting, seconds_kept, seconds_of
from finetune.types import Bucket, ClipPlan, VideoProbe

if TYPE_CHECKING:
    from finetune.caching.report import PlannedClip

ENOUGH = 0.8
"""Of pictures or seconds: if less is kept, there is a warning."""

_MOST_SIZES = 3
"""Of one bucket, that are named as better."""


@dataclass(frozen=True)
class Kept:
    """Shares of 0 to 1, of the clips of one bucket."""

    picture: float
    """The mean over the clips."""
    seconds: float
    """Of all videos that the clips were cut from, together."""

    def __str__(self) -> str:
        return f"{self.picture:.0%} of the picture and {self.seconds:.0%} of the seconds are kept"


def kept_by_bucket(clips: Iterable[PlannedClip], fps: float) -> dict[Bucket, Kept]:
    """What clips at ``fps`` keep, by bucket."""
    return {bucket: _kept(those, fps) for bucket, those in _by_bucket(clips).items()}


def kept_warnings(clips: Iterable[PlannedClip], data: ClipConfig, facts: Facts, fps: float) -> list[str]:
    """Where less than ``ENOUGH`` is kept, and what this model takes that would keep more."""
    warnings = []
    for bucket, those in _by_bucket(clips).items():
        warnings += _of_pictures(bucket, those, facts)
        if _kept(those, fps).seconds < ENOUGH:
            warnings.append(_of_seconds(bucket, those, data, facts, fps))
    return warnings


def _of_pictures(bucket: Bucket, clips: Sequence[PlannedClip], facts: Facts) -> list[str]:
    cropped: dict[Bucket | None, list[tuple[int, int]]] = {}
    better: dict[float, Bucket | None] = {}  # by shape: a web dataset has thousands of sizes
    for clip in clips:
        source_hw = clip.probe.height, clip.probe.width
        if picture_kept(source_hw, bucket) < ENOUGH:
            shape = round(clip.probe.width / clip.probe.height, 2)
            if shape not in better:
                better[shape] = better_size(source_hw, bucket, facts.size_multiple, lambda b: _takes(facts, b))
            cropped.setdefault(better[shape], []).append(source_hw)
    warnings = []
    ordered = sorted(cropped.items(), key=lambda pair: -len(pair[1]))
    for size, sources in ordered[:_MOST_SIZES]:
        example = max(sources, key=sources.count)
        told = f"bucket {bucket} keeps {_mean(sources, bucket):.0%} of the picture of {len(sources)} clips"
        told += f" of {example[0]}x{example[1]}" + (" and others" if len(set(sources)) > 1 else "")
        more = f"{size} would keep {_mean(sources, size):.0%}" if size else "this model takes no size that keeps more"
        warnings.append(f"{told} (height x width): {more}")
    if rest := sum(len(sources) for _, sources in ordered[_MOST_SIZES:]):
        warnings.append(f"bucket {bucket} keeps less than {ENOUGH:.0%} of the picture of {rest} clips of more shapes")
    return warnings


def _of_seconds(bucket: Bucket, clips: Sequence[PlannedClip], data: ClipConfig, facts: Facts, fps: float) -> str:
    probes = [probe for probe, _ in _videos(clips)]
    share = _kept(clips, fps).seconds

    def kept(frames: int, span: Span) -> float:
        return sum(seconds_fitting(probe, frames, fps, span) for probe in probes) / sum(map(seconds_of, probes))

    # Of clips not half as long motion would be lost, which is what a video is for.
    sizes = (Bucket(n, bucket.height, bucket.width) for n in range(bucket.frames // 2, facts.sample_frames + 1))
    takes = [size for size in sizes if size.frames and _takes(facts, size)]
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
    told = f"bucket {bucket} keeps {share:.0%} of the seconds of {len(probes)} videos"
    return f"{told}: {' and '.join(more) or 'no bucket of this model would keep more'}"


def _kept(clips: Sequence[PlannedClip], fps: float) -> Kept:
    bucket = clips[0].plan.bucket
    videos = _videos(clips)
    seconds = sum(seconds_kept(probe, plans, fps) for probe, plans in videos)
    return Kept(
        picture=_mean([(clip.probe.height, clip.probe.width) for clip in clips], bucket),
        seconds=seconds / sum(seconds_of(probe) for probe, _ in videos),
    )


def _by_bucket(clips: Iterable[PlannedClip]) -> dict[Bucket, list[PlannedClip]]:
    grouped: dict[Bucket, list[PlannedClip]] = {}
    for clip in sorted(clips, key=lambda clip: str(clip.plan.bucket)):
        grouped.setdefault(clip.plan.bucket, []).append(clip)
    return grouped


def _videos(clips: Iterable[PlannedClip]) -> list[tuple[VideoProbe, list[ClipPlan]]]:
    """Each row's video, with the clips that were cut from it."""
    grouped: dict[str, tuple[VideoProbe, list[ClipPlan]]] = {}
    for clip in clips:
        grouped.setdefault(f"{clip.sample.where}\n{clip.sample.video}", (clip.probe, []))[1].append(clip.plan)
    return list(grouped.values())


def _mean(sources: Sequence[tuple[int, int]], bucket: Bucket) -> float:
    return sum(picture_kept(source_hw, bucket) for source_hw in sources) / len(sources)


def _takes(facts: Facts, bucket: Bucket) -> bool:
    return not facts.check_bucket(bucket)
