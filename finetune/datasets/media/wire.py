"""What a decode worker and its parent say to each other: JSON and raw bytes, each announced and of limited length.

Not pickle: a worker reads strangers' files with libraries in C, and a pickle from a process that such a file has taken
over is a program that the parent would run. Here the parent knows beforehand how many pixels it asked for, and
whatever is not exactly an answer to its question is ``GarbageError``.

A message is a head of two lengths, then a JSON object, then a body of bytes: frame times (float64) or pixels (uint8).
"""

from __future__ import annotations

import json
import math
import os
import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from finetune.datasets.media.limits import (
    MAX_DURATION_S,
    MAX_FPS,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_PIXELS,
    MAX_REQUEST,
    ascending,
)
from finetune.errors import DataError
from finetune.text import shown
from finetune.types import CORRECTIONS, Bucket, ClipPlan, VideoProbe

Frame = NDArray[np.uint8]

_HEAD = struct.Struct("<4sIQ")
_MAGIC = b"ftm1"


class GarbageError(Exception):
    """Bytes that are no message, or a message that is no answer to what was asked."""


@dataclass(frozen=True)
class ProbeRequest:
    """Read a video's header and the times of its frames."""

    path: Path


@dataclass(frozen=True)
class ClipRequest:
    """Decode one planned clip, and the image that stands for its first frame where there is one."""

    path: Path
    header: VideoProbe
    """Without its frame times: a worker does not need them, and an hour of video has 100 000."""
    plan: ClipPlan
    image: Path | None = None


@dataclass(frozen=True)
class ImageRequest:
    """Load a still image, cut to a bucket."""

    path: Path
    bucket: Bucket


Request = ProbeRequest | ClipRequest | ImageRequest


@dataclass(frozen=True)
class Pixels:
    """What was decoded, uint8 RGB."""

    clip: Frame | None
    """[3, F, H, W]"""
    image: Frame | None
    """[3, H, W]"""


Answer = VideoProbe | Pixels | DataError


class BugError(Exception):
    """An error of ours in the worker: its traceback."""


# --- messages ---------------------------------------------------------------------------------------------------------


def send(stream: BinaryIO, message: Mapping[str, Any], *bodies: Any) -> None:
    """Write one message; ``bodies`` are buffers of bytes, written one after another without being copied."""
    header = json.dumps(message).encode("ascii")  # escapes: a file name need not be valid Unicode
    views = [memoryview(body).cast("B") for body in bodies]
    stream.write(_HEAD.pack(_MAGIC, len(header), sum(len(view) for view in views)))
    stream.write(header)
    for view in views:
        stream.write(view)
    stream.flush()


def receive(stream: BinaryIO, most: int) -> tuple[dict[str, Any], int]:
    """Read a message's JSON object of at most ``most`` bytes; its body, so many bytes, is left to be read.

    Raises:
        EOFError: if the stream ends, at once or in the midst of the message.
        GarbageError: if it is no message.
    """
    magic, length, body = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if magic != _MAGIC or length > most:
        raise GarbageError(f"no message: {magic!r}, {length:,} bytes")
    try:
        message = json.loads(_exactly(stream, length))
    except (ValueError, RecursionError) as error:
        raise GarbageError(f"no JSON: {error}") from None
    if not isinstance(message, dict):
        raise GarbageError("no JSON object")
    return message, body


def fill(stream: BinaryIO, buffer: Any) -> None:
    """Read exactly as many bytes as ``buffer`` holds, into it. Raises EOFError if there are fewer."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{done:,} of {len(view):,} bytes")
        done += count


def _exactly(stream: BinaryIO, length: int) -> bytes:
    buffer = bytearray(length)
    fill(stream, buffer)
    return bytes(buffer)


# --- questions --------------------------------------------------------------------------------------------------------


def write_request(stream: BinaryIO, request: Request, number: int) -> None:
    """Ask a worker. The answer repeats ``number``, so that one that nobody waits for is not taken for the next."""
    message: dict[str, Any] = {"number": number, "task": type(request).__name__, "path": os.fspath(request.path)}
    if isinstance(request, ClipRequest):
        header, plan = request.header, request.plan
        message |= {
            "header": _header(header),
            "indices": plan.frame_indices,
            "cut": [*plan.resize_hw, *plan.crop_yx],
            "bucket": _listed(plan.bucket),
            "image": None if request.image is None else os.fspath(request.image),
        }
    elif isinstance(request, ImageRequest):
        message["bucket"] = _listed(request.bucket)
    send(stream, message)


def read_request(stream: BinaryIO) -> tuple[Request, int]:
    """What the parent asks, and its number. Its word is taken: a worker trusts the process that started it."""
    message, _ = receive(stream, MAX_REQUEST)
    return _request(message), message["number"]


def _request(message: Mapping[str, Any]) -> Request:
    path = Path(message["path"])
    if message["task"] == "ProbeRequest":
        return ProbeRequest(path)
    bucket = Bucket(*message["bucket"])
    if message["task"] == "ImageRequest":
        return ImageRequest(path, bucket)
    frames, fps, height, width, orientation, decoder, corrections = message["header"]
    header = VideoProbe(frames, fps, height, width, (), orientation, decoder, tuple(corrections))
    resize_height, resize_width, top, left = message["cut"]
    plan = ClipPlan(tuple(message["indices"]), (resize_height, resize_width), (top, left), bucket)
    return ClipRequest(path, header, plan, None if message["image"] is None else Path(message["image"]))


def answer_bytes(request: Request) -> int:
    """The pixels that answer a request; 0 where it is no pixels that are asked for."""
    if isinstance(request, ProbeRequest):
        return 0
    if isinstance(request, ImageRequest):
        return 3 * request.bucket.height * request.bucket.width
    bucket = request.plan.bucket
    return 3 * bucket.height * bucket.width * (len(request.plan.frame_indices) + (request.image is not None))


# --- answers ----------------------------------------------------------------------------------------------------------


def write_answer(stream: BinaryIO, answer: Answer | BugError, number: int) -> None:
    """Answer the request of that number."""
    if isinstance(answer, VideoProbe):
        message = {"number": number, "kind": "probe", "header": _header(answer)}
        send(stream, message, array("d", answer.frame_times_s))
    elif isinstance(answer, Pixels):
        bodies = [np.ascontiguousarray(part) for part in (answer.clip, answer.image) if part is not None]
        send(stream, {"number": number, "kind": "pixels"}, *bodies)
    elif isinstance(answer, DataError):
        parts = [part[: MAX_MESSAGE // 64] for part in (answer.what, answer.where, answer.fix)]
        send(stream, {"number": number, "kind": "unusable", "error": parts})
    else:
        send(stream, {"number": number, "kind": "bug", "traceback": str(answer)[-MAX_MESSAGE // 16 :]})


def read_answer(stream: BinaryIO, request: Request, number: int) -> Answer:
    """What the worker answers to request ``number``, checked as if a stranger had sent it.

    Raises:
        EOFError: if the stream ends before the answer does.
        GarbageError: if it is no answer to this request.
        BugError: if the worker met an error of ours.
    """
    message, length = receive(stream, MAX_MESSAGE)
    kind = message.get("kind")
    if message.get("number") != number:
        raise GarbageError("an answer to another request")
    if kind in ("unusable", "bug"):
        if length:
            raise GarbageError(f"{length:,} bytes after an error")
        if kind == "bug":
            raise BugError(_text(message.get("traceback")))
        return _error(message.get("error"), request)
    if kind == "probe" and isinstance(request, ProbeRequest):
        return _probe(stream, message.get("header"), length)
    if kind == "pixels" and not isinstance(request, ProbeRequest):
        return _pixels(stream, request, length)
    raise GarbageError(f"{str(kind)[:50]!r} is no answer to {type(request).__name__}")


def _error(parts: Any, request: Request) -> DataError:
    if not isinstance(parts, list) or len(parts) != 3:
        raise GarbageError("an error is three texts")
    what, where, fix = map(_text, parts)
    if not what:
        raise GarbageError("an error without words")
    image = request.image if isinstance(request, ClipRequest) else None
    about = {shown(str(path)) for path in (request.path, image) if path}
    return DataError(what, where=where if where in about else str(request.path), fix=fix)


def _probe(stream: BinaryIO, header: Any, length: int) -> VideoProbe:
    if length % 8 or not 8 <= length <= 8 * MAX_FRAMES:
        raise GarbageError(f"{length:,} bytes of frame times")
    if not isinstance(header, list) or len(header) != 7:
        raise GarbageError("a header is seven values")
    frames, fps, height, width, orientation, decoder, corrections = header
    whole = all(type(number) is int for number in (frames, height, width, orientation))
    if not whole or not isinstance(fps, int | float) or isinstance(fps, bool):
        raise GarbageError(f"a header of {[type(value).__name__ for value in header]}")
    sizes = 1 <= height <= MAX_PIXELS and 1 <= width <= MAX_PIXELS and height * width <= MAX_PIXELS
    if frames != length // 8 or not sizes or not 0 < fps <= 2 * MAX_FPS or not 1 <= orientation <= 8:
        raise GarbageError(f"no header of a video: {frames}, {fps}, {height}x{width}, {orientation}")
    if decoder not in ("decord", "pyav"):
        raise GarbageError("no decoder of ours")
    if not isinstance(corrections, list) or not all(name in list(CORRECTIONS) for name in corrections):
        raise GarbageError("no corrections of ours")
    times = array("d", bytes(length))
    fill(stream, times)
    if not math.isfinite(times[-1]) or times[-1] > MAX_DURATION_S or not ascending(times):
        raise GarbageError("frame times that do not ascend")
    return VideoProbe(frames, float(fps), height, width, times, orientation, decoder, tuple(corrections))


def _pixels(stream: BinaryIO, request: ClipRequest | ImageRequest, length: int) -> Pixels:
    expected = answer_bytes(request)
    if length != expected:
        raise GarbageError(f"{length:,} bytes of pixels, not {expected:,}")
    clip: Frame | None = None
    bucket = request.bucket if isinstance(request, ImageRequest) else request.plan.bucket
    size_hw = bucket.height, bucket.width
    if isinstance(request, ClipRequest):
        clip = np.empty((3, len(request.plan.frame_indices), *size_hw), np.uint8)
        fill(stream, clip)
    image: Frame | None = None
    if isinstance(request, ImageRequest) or request.image is not None:
        image = np.empty((3, *size_hw), np.uint8)
        fill(stream, image)
    return Pixels(clip, image)


def _header(header: VideoProbe) -> list[Any]:
    """Everything of it but its times."""
    size = header.height, header.width
    return [header.frames, header.fps, *size, header.orientation, header.decoder, list(header.corrections)]


def _listed(bucket: Bucket) -> list[int]:
    return [bucket.frames, bucket.height, bucket.width]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise GarbageError(f"{type(value).__name__} where a text belongs")
    return value
