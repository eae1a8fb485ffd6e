"""Which frames of a video, at which size: pure arithmetic from a header to a plan, before a pixel is decoded.

Frames are chosen by presentation time, so a variable frame rate plays at the right speed; the aspect ratio is kept:
resize to cover the bucket, then crop its centre.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema, field_validator

from finetune.core.errors import DataError
from finetune.core.types import CORRECTIONS, Bucket, ClipPlan, CompanionName, Strict, VideoProbe

Span = Literal["head", "center", "uniform", "all"]

TIE_S = 1e-3
"""Two source frames whose distances to a target time differ by no more than this are a tie. Matroska stores times in
whole milliseconds, so a finer comparison would let the container decide which frame is taken."""

MAX_ASPECT_MISMATCH = 8.0
"""A plan that would keep less than 1/8 of the picture is refused: the file or the bucket is not what was meant, and the
resized frame would be that many times larger than the bucket."""

_MAX_FRAMES = 4096

_MAX_SIDE = 8192


def parse_bucket(value: Any) -> Bucket:
    """Read a bucket written as ``"49x480x720"`` (frames x height x width) or ``[49, 480, 720]``.

    Raises:
        ValueError: for anything else, so that pydantic reports it with the field's place.
    """
    if isinstance(value, Bucket):
        return value
    if isinstance(value, str) and (
        match := re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", value)
    ):
        numbers = [int(group) for group in match.groups()]
    elif isinstance(value, list | tuple) and len(value) == 3 and all(type(number) is int for number in value):
        numbers = list(value)
    else:
        raise ValueError(f"a bucket is frames x height x width, such as 49x480x720 or [49, 480, 720]; got {value!r}")
    frames, height, width = numbers
    if not 1 <= frames <= _MAX_FRAMES:
        raise ValueError(f"a bucket has 1 to {_MAX_FRAMES} frames; got {frames}")
    if not (1 <= height <= _MAX_SIDE and 1 <= width <= _MAX_SIDE):
        raise ValueError(f"a bucket's height and width are 1 to {_MAX_SIDE} pixels; got {height}x{width}")
    return Bucket(frames, height, width)


BucketField = Annotated[
    Bucket,
    BeforeValidator(parse_bucket),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^\s*\d+\s*[xX×]\s*\d+\s*[xX×]\s*\d+\s*$"},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 3, "maxItems": 3},
            ],
            "examples": ["49x480x720"],
        }
    ),
]
"""A ``Bucket`` as a configuration field."""


def _as_list(buckets: object) -> object:
    """``buckets: 49x480x720`` is what people write for a list of one."""
    return [buckets] if isinstance(buckets, str) else buckets


class ClipConfig(Strict):
    """How clips are cut out of videos."""

    buckets: Annotated[tuple[BucketField, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    """Shapes that clips are cut to, each ``frames x height x width`` as in ``49x480x720``. A video goes to the bucket
    of the nearest aspect ratio, then the most frames that fit it, then the largest area that needs no enlarging."""
    image_buckets: Annotated[tuple[BucketField, ...] | None, BeforeValidator(_as_list)] = Field(None, min_length=1)
    """Shapes that still images are cut to (sources with ``images: true``), each of one frame as in ``1x480x720``; the
    one of the nearest aspect ratio. Left out: the height and width of each of ``buckets``."""
    fps: float | None = Field(default=None, ge=0.01, le=1000)
    """Frames per second of the training clips. Left out: the model's own rate (8 for CogVideoX, 16 for 1.5)."""
    span: Span = "head"
    """Which part of a video: ``head`` from its start, ``center`` its middle, ``all`` as many clips as fit without
    sharing a frame, ``uniform`` frames spread evenly from the first to the last (this ignores ``fps`` and so changes
    the speed)."""
    short_clips: Literal["error", "skip", "pad"] = "error"
    """What happens to a video too short for every bucket of its shape: stop, leave it out and count it, or repeat its
    last frame."""
    unreadable_clips: Literal["error", "skip"] = "error"
    """What happens to a file whose header or frames cannot be read, and to a row of a dataset whose text cannot be
    used: stop, or leave it out and count it. A row that names a missing file or one outside its folder always stops."""

    @field_validator("image_buckets")
    @classmethod
    def _of_one_frame(cls, buckets: tuple[Bucket, ...] | None) -> tuple[Bucket, ...] | None:
        if more := [str(bucket) for bucket in buckets or () if bucket.frames != 1]:
            raise ValueError(f"a still image has one frame, as in 1x480x720; got {', '.join(more)}")
        return buckets

    @property
    def still_buckets(self) -> tuple[Bucket, ...]:
        """What still images are cut to."""
        sizes = (Bucket(1, bucket.height, bucket.width) for bucket in self.buckets)
        return self.image_buckets or tuple(dict.fromkeys(sizes))


def frame_indices(
    frame_times_s: Sequence[float], frames: int, fps: float, span: Span, *, pad: bool = False
) -> list[tuple[int, ...]]:
    """Choose the source frames of every clip that one video gives.

    For ``head``, ``center`` and ``all`` frame ``i`` of a clip that starts at ``t0`` is the source frame shown nearest
    to ``t0 + i / fps``; of two equally near (to ``TIE_S``) the earlier. A source slower than ``fps`` repeats frames,
    which keeps its speed. A clip fits if the video's last frame is at most half a target interval before the clip's
    last target time. ``uniform`` divides the time from the first to the last frame evenly, whatever ``fps`` is: 49
    frames of a 97-frame video are 0, 2, ... 96. It fits if the video has at least ``frames`` frames.

    Args:
        frame_times_s: presentation time of every source frame in seconds, strictly ascending.
        frames: frames per clip.
        fps: frames per second of the clip.
        span: see ``ClipConfig.span``.
        pad: give a video too short for one clip a clip all the same: at the target rate as far as it goes (``uniform``:
            every frame once), then its last frame repeated.

    Returns:
        One tuple of ``frames`` source indices per clip, ascending; none for a short video without ``pad``. Two clips of
        ``all`` share no source frame.

    Raises:
        ValueError: for an empty video, or ``frames`` or ``fps`` that are not positive.
    """
    if not frame_times_s or frames < 1 or not fps > 0:
        raise ValueError(f"need source frames, frames >= 1 and fps > 0; got {len(frame_times_s)}, {frames}, {fps}")
    times = frame_times_s
    first, last = times[0], times[-1]
    if span == "uniform":
        if len(times) < frames:
            return [_padded(tuple(range(len(times))), frames)] if pad else []
        interval = (last - first) / max(frames - 1, 1)
        return [tuple(_nearest(times, first + i * interval) for i in range(frames))]

    def fits(start: float) -> bool:
        return _fitting(last - start, fps) >= frames

    def clip_from(begin: int) -> tuple[int, ...]:
        # No frame before its first, which a frame less than TIE_S earlier would tie with.
        return tuple(max(begin, _nearest(times, times[begin] + i / fps)) for i in range(frames))

    if not fits(first):
        if not pad:
            return []
        reached = range(_fitting(last - first, fps))
        return [_padded(tuple(_nearest(times, first + i / fps) for i in reached), frames)]
    if span == "head":
        return [clip_from(0)]
    if span == "center":
        slack = max(0.0, last - first - (frames - 1) / fps)
        # Starting at a source frame, not between two, keeps the frames of a source at the target rate consecutive.
        return [clip_from(_nearest(times, first + slack / 2))]
    clips: list[tuple[int, ...]] = []
    unused = 0  # the first source frame that no clip holds
    while unused < len(times):
        # Starts stay on the grid of whole clips, so that rounding to source frames never adds up to a lost clip.
        due = first + len(clips) * frames / fps
        begin = max(unused, _nearest(times, due))
        if not fits(max(due, times[begin])):
            break
        clips.append(clip_from(begin))
        unused = clips[-1][-1] + 1
    return clips


def _fitting(length_s: float, fps: float) -> int:
    """How many frames at ``fps`` a stretch of time gives; the last may lie half an interval behind its end."""
    # The millionth forgives the rounding of times that a container stores as fractions.
    return math.floor(length_s * fps + 0.5 + 1e-6) + 1


def _nearest(times: Sequence[float], target: float) -> int:
    """Index of the time nearest to ``target``; the earlier of a tie."""
    after = bisect_left(times, target)
    if after == 0:
        return 0
    if after == len(times):
        return after - 1
    return after - 1 if target - times[after - 1] <= times[after] - target + TIE_S else after


def _padded(indices: tuple[int, ...], frames: int) -> tuple[int, ...]:
    return (indices + indices[-1:] * (frames - len(indices)))[:frames]


def choose_bucket(probe: VideoProbe, buckets: Sequence[Bucket], fps: float, span: Span) -> Bucket:
    """The bucket that a video is cut to: a pure function of its header.

    1. The nearest aspect ratio: the smallest ``|log(video aspect / bucket aspect)|``, so that twice too wide and twice
       too high are equally far. Shape comes first: a landscape clip is never cropped to portrait to gain frames.
    2. Of those, the most frames that fit; if none fits, the fewest (``short_clips`` then decides).
    3. Of those, the largest area that needs no enlarging; if all enlarge, the smallest.
    4. Of those, the first in the configuration.
    """

    def rank(bucket: Bucket) -> tuple[float, int, float]:
        distance = abs(math.log((probe.width / probe.height) / (bucket.width / bucket.height)))
        fits = bool(frame_indices(probe.frame_times_s, bucket.frames, fps, "uniform" if span == "uniform" else "head"))
        area = bucket.height * bucket.width
        enlarges = bucket.height > probe.height or bucket.width > probe.width
        # Rounded, because equal ratios such as 480/720 and 960/1440 may differ in the last bit of a logarithm.
        return round(distance, 9), -bucket.frames if fits else bucket.frames, area if enlarges else -area

    return min(buckets, key=rank)


def resize_and_crop(source_hw: tuple[int, int], bucket: Bucket) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest size of the source's shape that covers the bucket, and where the bucket is cut from its centre.

    Args:
        source_hw: height and width of the upright source in pixels.
        bucket: the shape to fill.

    Returns:
        ``(resize_hw, crop_yx)``. One side of ``resize_hw`` equals the bucket's, the other is rounded to the nearest
        integer (half up) and never smaller; ``crop_yx`` is the top left corner of the crop, rounded down.
    """
    height, width = source_hw
    if bucket.height * width >= bucket.width * height:  # the source is the wider of the two: its height decides
        resize_hw = bucket.height, (2 * width * bucket.height + height) // (2 * height)
    else:
        resize_hw = (2 * height * bucket.width + width) // (2 * width), bucket.width
    return resize_hw, ((resize_hw[0] - bucket.height) // 2, (resize_hw[1] - bucket.width) // 2)


def part_of(probe: VideoProbe, span_s: tuple[float, float] | None, where: str = "") -> tuple[VideoProbe, int]:
    """The header that a part of a video would have as a file of its own, and the number of its first frame.

    Args:
        probe: the video's header.
        span_s: begin and end in seconds from the video's first frame, the end not included; None for all of it.
        where: for messages.

    Raises:
        DataError: if the video has no frame there.
    """
    if span_s is None:
        return probe, 0
    times = probe.frame_times_s
    first, end = (bisect_left(times, second - TIE_S) for second in span_s)
    if first == end:
        what = f"the video has no frame from {span_s[0]:g} to {span_s[1]:g} s: it lasts {seconds_of(probe):.6g} s"
        raise DataError(what, where=where, fix="correct the span, or check that it is the right video")
    part = tuple(time - times[first] for time in times[first:end])
    return replace(probe, frames=len(part), frame_times_s=part), first


def plan_clips(
    probe: VideoProbe, clip: ClipConfig, fps: float, where: str, span_s: tuple[float, float] | None = None
) -> list[ClipPlan]:
    """Plan every clip of one video, or of a part of it; of a still image, the one clip of one frame.

    Args:
        probe: the video's or image's header.
        clip: buckets, span and policies.
        fps: the rate of the clips: ``clip.fps``, or the model's native rate where that is None.
        where: the file and the row that names it, for messages.
        span_s: see ``part_of``.

    Returns:
        The plans in order of time; none if the video is short and ``short_clips`` is ``skip`` (the caller counts it).

    Raises:
        DataError: if the video is short and ``short_clips`` is ``error``, or if less than 1/``MAX_ASPECT_MISMATCH`` of
            its picture would remain; or if it has no frame in the span.
    """
    probe, first = part_of(probe, span_s, where)
    bucket = choose_bucket(probe, clip.still_buckets if probe.still else clip.buckets, fps, clip.span)
    resize_hw, crop_yx = resize_and_crop((probe.height, probe.width), bucket)
    kept = picture_kept((probe.height, probe.width), bucket)
    if kept * MAX_ASPECT_MISMATCH < 1:
        raise DataError(
            f"the nearest bucket, {bucket}, would keep {kept:.1%} of a picture of {probe.height}x{probe.width}",
            where=where,
            fix="add a bucket nearer to its shape, or leave the file out",
        )
    clips = frame_indices(probe.frame_times_s, bucket.frames, fps, clip.span, pad=clip.short_clips == "pad")
    if not clips and clip.short_clips == "error":
        raise _short(probe, bucket, fps, clip.span, where)
    return [ClipPlan(tuple(first + i for i in indices), resize_hw, crop_yx, bucket) for indices in clips]


def companion_plan(name: CompanionName, probe: VideoProbe, video: VideoProbe, plan: ClipPlan, where: str) -> ClipPlan:
    """How what goes with a video frame for frame is cut, so that it lies over one of the video's clips.

    Frame n of the one belongs to frame n of the other, whatever rates both state. It may be larger or smaller than the
    video, of the same shape. A still mask goes with every frame.

    Args:
        name: what it is.
        probe: its header.
        video: the video's.
        plan: the clip's.
        where: both files and the row that names them, for messages.

    Raises:
        DataError: if its number of frames or its shape is not the video's.
    """
    form, expected = (f"{one.frames} frames of {one.height}x{one.width} at {one.fps:.4g} fps" for one in (probe, video))
    fits = resize_and_crop((probe.height, probe.width), plan.bucket) == (plan.resize_hw, plan.crop_yx)
    if not fits or (probe.frames != video.frames and not (probe.still and name == "mask")):
        raise DataError(
            f"its {'length' if fits else 'shape'} is not that of its video: {form}, and the video has {expected}",
            where=where,
            fix="make it from the video's own frames, all of them, in the same shape (height to width)",
        )
    return replace(plan, frame_indices=(0,) * len(plan.frame_indices)) if probe.still else plan


def _short(probe: VideoProbe, bucket: Bucket, fps: float, span: Span, where: str) -> DataError:
    length_s = probe.frame_times_s[-1] - probe.frame_times_s[0]
    has = probe.frames if span == "uniform" else _fitting(length_s, fps)
    rate = "" if span == "uniform" else f" at {fps:g} fps ({probe.frames} at its own {probe.fps:.4g} fps)"
    return DataError(
        f"clip has {has} frames{rate}; the smallest bucket of its shape, {bucket}, needs {bucket.frames}",
        where=where,
        fix=f"add a bucket of at most {has} frames, or set data.short_clips: skip (or pad)",
    )


def picture_kept(source_hw: tuple[int, int], bucket: Bucket) -> float:
    """The share of a picture that is left when it is cut to a bucket, 0 to 1."""
    (height, width), _ = resize_and_crop(source_hw, bucket)
    return bucket.height * bucket.width / (height * width)


def better_size(
    source_hw: tuple[int, int], bucket: Bucket, multiple: int, takes: Callable[[Bucket], bool]
) -> Bucket | None:
    """The bucket of as many frames and no more pixels that keeps more of a picture; None if none does by 5 %.

    Args:
        source_hw: height and width of the upright source in pixels.
        bucket: what it is cut to so far.
        multiple: sides are multiples of this.
        takes: whether the model takes a bucket.

    Returns:
        The largest that keeps 95 % or more, but at least half of the bucket's pixels; or the one that keeps most.
    """
    pixels = bucket.height * bucket.width
    sizes: list[Bucket] = []
    for height in range(multiple, pixels // multiple + 1, multiple):
        fitting = height * source_hw[1] // (source_hw[0] * multiple) * multiple
        sizes += [Bucket(bucket.frames, height, width) for width in (fitting, fitting + multiple)]
    sizes = [size for size in sizes if 0 < size.height * size.width <= pixels <= 2 * size.height * size.width]

    def rank(size: Bucket) -> tuple[float, int]:
        return min(picture_kept(source_hw, size), 0.95), size.height * size.width

    best = max((size for size in sizes if takes(size)), key=rank, default=None)
    more = best is not None and picture_kept(source_hw, best) >= picture_kept(source_hw, bucket) + 0.05
    return best if more else None


def seconds_of(probe: VideoProbe) -> float:
    """How long a video lasts, its last frame included."""
    return probe.frame_times_s[-1] + 1 / probe.fps


def seconds_kept(probe: VideoProbe, plans: Sequence[ClipPlan], fps: float) -> float:
    """How many seconds of a video its clips show, at most all of them."""
    times = probe.frame_times_s
    shown = sum(times[plan.frame_indices[-1]] - times[plan.frame_indices[0]] + 1 / fps for plan in plans)
    return min(shown, seconds_of(probe))


def seconds_fitting(probe: VideoProbe, frames: int, fps: float, span: Span) -> float:
    """How many seconds clips of ``frames`` frames would show of a video, without choosing them."""
    fitting = _fitting(probe.frame_times_s[-1], fps)
    if span == "uniform":
        return seconds_of(probe) if probe.frames >= frames else 0
    clips = fitting // frames if span == "all" else min(fitting // frames, 1)
    return min(clips * frames / fps, seconds_of(probe))


def is_padded(part: VideoProbe, plan: ClipPlan, fps: float, span: Span) -> bool:
    """Whether a plan of ``plan_clips`` repeats the last frame of a video, or of a part of one, that is too short."""
    return (part.frames if span == "uniform" else _fitting(part.frame_times_s[-1], fps)) < plan.bucket.frames


def plan_notes(
    probe: VideoProbe, plan: ClipPlan, fps: float, span: Span, part: VideoProbe | None = None
) -> tuple[str, ...]:
    """Advice on one plan of ``plan_clips``; empty when there is nothing to say.

    It tells of what is done to a video that is not plain, of frames that are repeated (a source slower than ``fps``, or
    padding), of a picture that is enlarged, and of a speed that ``uniform`` changes by more than a tenth. ``part`` is
    what the plan was made of, where that is not all of the video (``part_of``).
    """
    notes = [CORRECTIONS[name] for name in probe.corrections]
    repeated = len(plan.frame_indices) - len(set(plan.frame_indices))
    if repeated:
        short = is_padded(part or probe, plan, fps, span)
        cause = "the clip is short" if short else f"the video has {probe.fps:.4g} fps"
        notes.append(f"{repeated} of {plan.bucket.frames} frames repeat another: {cause}, {fps:g} fps are wanted")
    scale = max(plan.resize_hw[0] / probe.height, plan.resize_hw[1] / probe.width)
    if scale > 1.001:
        notes.append(f"enlarged {scale:.2f} times from {probe.height}x{probe.width}: detail is lost to training")
    if span == "uniform" and plan.bucket.frames > 1:
        covered_s = probe.frame_times_s[plan.frame_indices[-1]] - probe.frame_times_s[plan.frame_indices[0]]
        speed = covered_s * fps / (plan.bucket.frames - 1)
        if not 0.9 <= speed <= 1.1:
            notes.append(f"plays {speed:.2g} times as fast as filmed, because span is uniform")
    return tuple(notes)
