"""From measurements to clips: which seconds of a video are kept, which are dropped, and why. Pure arithmetic.

A video's spans tile it: the first begins at 0, each begins where the one before ends, the last ends with the video.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from finetune.core.types import Strict
from finetune.datasets.geometry import frame_indices, seconds_of
from finetune.footage.cutting import CutPlan
from finetune.footage.measure import Footage

Reason = Literal[
    "unreadable",
    "copy",
    "black",
    "frozen",
    "flash",
    "short",
    "resolution",
    "static",
    "shaky",
    "blurred",
    "text",
    "duplicate",
    "score",
]
"""Why seconds are dropped."""


class Limits(Strict):
    """What footage has to be to become a clip, without its black bars; ``None`` switches a limit off."""

    min_short_side: int | None = Field(240, ge=1)
    """Pixels of the picture's shorter side, without bars."""
    black: float | None = Field(10.0, ge=0, le=255)
    """Frames with a mean luma (0 to 255) below this are cut away."""
    frozen_s: float | None = Field(0.8, gt=0)
    """Seconds in which nothing changes are cut away, if there are so many on end."""
    flash: float | None = Field(40.0, gt=0, le=255)
    """Up to three frames whose mean luma is so many levels off from both neighbours are cut away."""
    min_motion: float | None = Field(0.3, ge=0)
    """Mean optical flow, in percent of the picture's width per second."""
    max_motion: float | None = Field(None, gt=0)
    """The same: more is too fast, or a camera that shakes."""
    min_sharpness: float | None = Field(15.0, ge=0)
    """Variance of the Laplacian at 360 pixels; photographers call 100 sharp."""
    max_text: float | None = Field(0.03, ge=0, le=1)
    """Share of the picture that looks like lines of letters: subtitles, titles."""
    duplicate_bits: float | None = Field(6.0, ge=0, le=64)
    """Two clips whose perceptual hashes (64 bits a frame) differ by no more bits on average are the same."""


class ClipShape(Strict):
    """What clips are cut to."""

    frames: int = Field(49, ge=1, le=4096)
    """Of a clip at ``fps``."""
    fps: float = Field(8.0, ge=0.01, le=1000)
    """Frames per second: the model's."""
    min_frames: int | None = Field(None, ge=1, le=4096)
    """What is left of a scene becomes a shorter clip if it has so many; None for whole clips only."""
    keep_fps: bool = False
    """Keep each source's own frames in the files, where ``fps`` only says how long a clip is; a trainer chooses frames
    by their time. Exact cuts are then copied without being encoded again."""
    short_side: int | None = Field(1080, ge=16, le=8192)
    """Larger pictures are scaled down to this; None for never."""
    crop_bars: bool = True
    """Cut away black bars."""

    @model_validator(mode="after")
    def _shorter_is_shorter(self) -> ClipShape:
        if self.min_frames is not None and self.min_frames > self.frames:
            raise ValueError(f"min_frames is {self.min_frames}, which is more than a whole clip's {self.frames}")
        return self


@dataclass(frozen=True)
class Span:
    """Seconds of a source that share a fate."""

    start_s: float
    end_s: float
    reason: Reason | None = None
    """None: kept."""
    value: float | None = None
    """What was measured."""
    limit: float | None = None
    """What it was compared with."""
    detail: str = ""
    plan: CutPlan | None = None
    """Of what is kept."""
    scores: dict[str, float] = field(default_factory=dict)
    hashes: tuple[int, ...] = ()
    """Perceptual hashes of the clip's samples."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end_s - self.start_s

    def dropped(self, reason: Reason, value: float | None, limit: float | None, detail: str = "") -> Span:
        """The same seconds, dropped."""
        return replace(self, reason=reason, value=value, limit=limit, detail=detail, plan=None)


def spans_of(footage: Footage, shape: ClipShape, limits: Limits) -> list[Span]:
    """Cut one video into spans, by its own measurements alone.

    Bad frames divide a scene; each of what remains gives as many clips as fit, one after the other, and what is left
    over is short.
    """
    times = np.append(np.asarray(footage.header.frame_times_s), seconds_of(footage.header))
    marks = _marks(footage, limits)
    edges = np.flatnonzero(marks[1:] != marks[:-1]) + 1
    bounds = sorted({0, footage.frames, *footage.cuts.tolist(), *edges.tolist()})
    spans: list[Span] = []
    for begin, end in pairwise(bounds):
        span = Span(float(times[begin]), float(times[end]))
        mark = _MARKS[marks[begin]]
        if mark is not None:
            spans.append(span.dropped(mark, *_mark_value(footage, limits, mark, begin, end)))
        else:
            spans += _scene_spans(footage, shape, limits, (begin, end), times)
    if footage.frames < footage.header.frames:
        rest = Span(float(times[footage.frames]), float(times[-1]))
        spans.append(rest.dropped("unreadable", None, None, footage.fault))
    return spans


# --- bad frames -------------------------------------------------------------------------------------------------------

_MARKS: tuple[Reason | None, ...] = (None, "black", "frozen", "flash")

FROZEN_CHANGE = 0.05
"""Levels of mean luma difference: a codec repeats a frame with less, and a camera on a tripod has more noise."""

_FLASH_FRAMES = 3


def _marks(footage: Footage, limits: Limits) -> NDArray[np.int8]:
    """For every frame its place in ``_MARKS``."""
    marks = np.zeros(footage.frames, np.int8)
    if limits.flash is not None:
        marks[_flashes(footage.luma, limits.flash)] = _MARKS.index("flash")
    if limits.frozen_s is not None:
        still = np.append(footage.change[1:] <= FROZEN_CHANGE, False)  # each frame with the next
        still |= np.insert(still[:-1], 0, False)
        times = np.append(np.asarray(footage.header.frame_times_s), seconds_of(footage.header))
        for begin, end in _runs(still):
            if times[end] - times[begin] >= limits.frozen_s:
                marks[begin:end] = _MARKS.index("frozen")
    if limits.black is not None:
        marks[footage.luma < limits.black] = _MARKS.index("black")
    return marks


def _runs(flags: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Begin and end of every stretch that is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    yield from ((int(begin), int(end)) for begin, end in edges.reshape(-1, 2))


def _flashes(luma: NDArray[np.float32], levels: float) -> NDArray[np.bool_]:
    """Frames that are brighter or darker than the frames before and after a short stretch, which are alike."""
    flags = np.zeros(len(luma), bool)
    for length in range(1, min(_FLASH_FRAMES, len(luma) - 2) + 1):
        before, after = luma[: -length - 1, None], luma[length + 1 :, None]
        inside = np.lib.stride_tricks.sliding_window_view(luma[1:-1], length)
        off = np.minimum(np.abs(inside - before), np.abs(inside - after)).min(axis=1)
        starts = 1 + np.flatnonzero((off >= levels) & (np.abs(after - before)[:, 0] < levels / 2))
        for step in range(length):
            flags[starts + step] = True
    return flags


def _mark_value(
    footage: Footage, limits: Limits, mark: Reason, begin: int, end: int
) -> tuple[float | None, float | None]:
    luma = footage.luma[begin:end]
    if mark == "black":
        return float(luma.max()), limits.black
    if mark == "flash":
        return float(np.abs(luma - footage.luma[begin - 1]).max()), limits.flash
    times = (*footage.header.frame_times_s, seconds_of(footage.header))
    return times[end] - times[begin], limits.frozen_s


# --- clips ------------------------------------------------------------------------------------------------------------


def _scene_spans(
    footage: Footage, shape: ClipShape, limits: Limits, frames: tuple[int, int], times: NDArray[np.float64]
) -> Iterator[Span]:
    """The spans of a stretch of good frames of one scene: clips, and what is left over."""
    begin, end = frames
    scene = Span(float(times[begin]), float(times[end]))
    crop = _crop(footage, shape, frames)
    short_side = min(crop[2:])
    if limits.min_short_side is not None and short_side < limits.min_short_side:
        yield scene.dropped("resolution", short_side, limits.min_short_side)
        return
    scene_times = times[begin : end + 1].tolist()
    clips = _clips(scene_times, shape)
    starts = [begin + clip[0] for clip in clips]
    for number, clip in enumerate(clips):
        start_s = float(times[starts[number]])
        if number == 0 and starts[0] > begin:
            yield _left_over(scene.start_s, start_s, shape)
        is_last = number + 1 == len(clips)
        end_s = float(times[begin + _frame_after(clip, scene_times, shape) if is_last else starts[number + 1]])
        chosen = tuple(begin + index for index in clip)
        yield _judged(footage, shape, limits, Span(start_s, end_s), (chosen, crop))
    done_s = end_s if clips else scene.start_s
    if done_s < scene.end_s:
        yield _left_over(done_s, scene.end_s, shape)


def _clips(times: Sequence[float], shape: ClipShape) -> list[tuple[int, ...]]:
    """Frames of every clip that a scene gives.

    Args:
        times: of its frames, and when it ends.
        shape: of clips.
    """
    clips = frame_indices(times[:-1], shape.frames, shape.fps, "all")
    if shape.min_frames is not None:
        rest = times[_frame_after(clips[-1], times, shape) if clips else 0 : -1]
        for frames in range(shape.frames - 1, shape.min_frames - 1, -1):
            # The longest that fits; never more than one, or it would not be the longest.
            if rest and (last := frame_indices(rest, frames, shape.fps, "head")):
                return [*clips, tuple(len(times) - 1 - len(rest) + index for index in last[0])]
    return clips


def _frame_after(clip: tuple[int, ...], times: Sequence[float], shape: ClipShape) -> int:
    """The frame that is shown when a clip is over; the scene's end if there is none."""
    over_s = times[clip[0]] + len(clip) / shape.fps - 1e-6  # a millionth forgives rounding
    return min(max(bisect_left(times, over_s), clip[-1] + 1), len(times) - 1)


def _left_over(start_s: float, end_s: float, shape: ClipShape) -> Span:
    needed = (shape.min_frames or shape.frames) / shape.fps
    return Span(start_s, end_s).dropped("short", end_s - start_s, needed)


def _judged(
    footage: Footage,
    shape: ClipShape,
    limits: Limits,
    span: Span,
    cut: tuple[tuple[int, ...], tuple[int, int, int, int]],
) -> Span:
    """A clip, or its seconds dropped by the first limit that it does not keep."""
    indices, crop = cut
    first, last = np.searchsorted(footage.samples, (indices[0], indices[-1] + 1)).tolist()
    inside = slice(first, last)
    # The flow into the first sample comes from before the clip.
    scores = {
        "motion": _mean(footage.motion[first + 1 : last]),
        "sharpness": _mean(footage.sharpness[inside]),
        "text": _mean(footage.text[inside]),
    }
    span = replace(span, scores={name: round(value, 4) for name, value in scores.items() if value is not None})
    checks: list[tuple[Reason, str, float | None, int]] = [
        ("static", "motion", limits.min_motion, 1),
        ("shaky", "motion", limits.max_motion, -1),
        ("blurred", "sharpness", limits.min_sharpness, 1),
        ("text", "text", limits.max_text, -1),
    ]
    for reason, name, limit, sign in checks:
        value = span.scores.get(name)
        if limit is not None and value is not None and sign * value < sign * limit:
            return span.dropped(reason, value, limit)
    hashes = tuple(footage.hashes[inside].tolist())
    return replace(span, plan=_cut_plan(footage, shape, span, indices, crop), hashes=hashes)


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _crop(footage: Footage, shape: ClipShape, frames: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a scene's picture without the bars that all its samples have, even numbers."""
    height, width = footage.header.height, footage.header.width
    top = bottom = left = right = 0
    first, last = np.searchsorted(footage.samples, frames).tolist()
    bars = footage.bars[first:last]
    if shape.crop_bars and len(bars):
        sides = bars.min(axis=0).tolist()
        # Thin ones are what is left of a scan or an analogue signal; the row next to a bar is half of it.
        least = height / 100, height / 100, width / 100, width / 100
        top, bottom, left, right = (side + 1 if side >= most else 0 for side, most in zip(sides, least, strict=True))
        if (height - top - bottom) * (width - left - right) * _LEAST_PICTURE < height * width:
            top = bottom = left = right = 0
    kept_height, kept_width = (max(1, n) // 2 * 2 or 1 for n in (height - top - bottom, width - left - right))
    return top, left, kept_height, kept_width


_LEAST_PICTURE = 5
"""A scene that shows something only in less than this part of its picture is dark, and has no bars."""


def _cut_plan(
    footage: Footage, shape: ClipShape, span: Span, indices: tuple[int, ...], crop: tuple[int, int, int, int]
) -> CutPlan:
    size_hw = crop[2:]
    if shape.short_side is not None and min(size_hw) > shape.short_side:
        scale = shape.short_side / min(size_hw)
        size_hw = tuple(max(2, 2 * round(side * scale / 2)) for side in size_hw)  # type: ignore[assignment]
    if shape.keep_fps:
        times = footage.header.frame_times_s
        indices = tuple(range(indices[0], int(np.searchsorted(times, span.end_s))))
        return CutPlan(indices, crop, size_hw, tuple(times[index] - times[indices[0]] for index in indices))
    return CutPlan(indices, crop, size_hw, tuple(number / shape.fps for number in range(len(indices))))
