"""Which frames of a video, at which size: pure arithmetic from a header to a plan, before a pixel is decoded.

Frames are chosen by presentation time, so a variable frame rate plays at the right speed; the aspect ratio is kept:
resize to cover the bucket, then crop its centre.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from finetune.errors import DataError
from finetune.section import Strict
from finetune.types import Bucket, ClipPlan, VideoProbe

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
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", value)):
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


class ClipConfig(Strict):
    """How clips are cut out of videos."""

    buckets: tuple[BucketField, ...] = Field(min_length=1)
    """Shapes that clips are cut to, each ``frames x height x width`` as in ``49x480x720``. A video goes to the bucket
    of the nearest aspect ratio, then the most frames that fit it, then the largest area that needs no enlarging."""
    fps: float | None = Field(None, gt=0, le=1000)
    """Frames per second of the training clips. Left out: the rate the model was made for (8 for CogVideoX, 16 for 1.5)."""
    span: Span = "head"
    """Which part of a video: ``head`` from its start, ``center`` its middle, ``all`` as many clips as fit without sharing
    a frame, ``uniform`` frames spread evenly from the first to the last (this ignores ``fps`` and so changes the speed)."""
    short_clips: Literal["error", "skip", "pad"] = "error"
    """What happens to a video too short for every bucket of its shape: stop, leave it out and count it, or repeat its
    last frame."""
    unreadable_clips: Literal["error", "skip"] = "error"
    """What happens to a file whose header or frames cannot be read: stop, or leave it out and count it."""


def frame_indices(
    frame_times_s: Sequence[float], frames: int, fps: float, span: Span, *, pad: bool = False
) -> list[tuple[int, ...]]:
    """Choose source frames for clips of ``frames`` frames at ``fps``. See the implementation below."""
    raise NotImplementedError


def choose_bucket(probe: VideoProbe, buckets: Sequence[Bucket], fps: float, span: Span) -> Bucket:
    """The bucket a video is cut to."""
    raise NotImplementedError


def resize_and_crop(source_hw: tuple[int, int], bucket: Bucket) -> tuple[tuple[int, int], tuple[int, int]]:
    """``(resize_hw, crop_yx)``: the smallest size of the source's shape that covers the bucket, and its centre crop."""
    raise NotImplementedError


def plan_clips(probe: VideoProbe, clip: ClipConfig, fps: float, where: str) -> list[ClipPlan]:
    """Plan every clip of one video; empty where ``short_clips: skip`` leaves it out."""
    raise NotImplementedError


def plan_notes(probe: VideoProbe, plan: ClipPlan, fps: float, span: Span) -> tuple[str, ...]:
    """Advice on one plan: repeated frames, padding, enlargement, changed speed. Empty when there is nothing to say."""
    raise NotImplementedError
