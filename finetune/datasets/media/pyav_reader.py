"""Video headers and frames through PyAV (today's FFmpeg)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.datasets.media.limits import check_frame_count, check_frame_size
from finetune.datasets.media.pyav_file import (
    FIX,
    decoded,
    failures,
    guarded,
    is_cover,
    opened,
    seek_to,
    undecodable,
    video_stream,
)
from finetune.errors import DataError

Frame = NDArray[np.uint8]

SEEKABLE = ("mov", "matroska")
"""Containers whose keyframe marks can be trusted; in the others frames are decoded from the start. (In MPEG program
streams, P frames carry the mark, and what is decoded after a seek to one is a grey smear without an error.)"""


class StreamHeader(NamedTuple):
    """What PyAV says of the first real video stream, and of its first decoded frame."""

    container: str
    """FFmpeg's first name of the format: ``mov`` for MP4 too, ``matroska`` for WebM too."""
    height: int
    width: int
    """As stored: before rotation, and in the pixels of the file, which need not be square."""
    pixel_aspect: float
    rotation: int
    rate: float | None
    video_streams: int


class Index(NamedTuple):
    """Which frames a video stream has, read from its packets without decoding them."""

    pts: tuple[int, ...]
    """Presentation times of the shown frames in units of ``time_base``, ascending; frame numbers if not ``timed``."""
    keyframes: tuple[int, ...]
    """Ascending times that decoding may start at; empty where it must start at the beginning."""
    open_gop: bool
    """Whether frames shown before a keyframe are stored after it."""
    time_base: float
    timed: bool
    """False where the container stores no presentation times (AVI): then frames are counted."""


def read_header(path: Path) -> StreamHeader:
    """Open a video and decode its first frame. Raises DataError."""
    where = str(path)
    with opened(path) as container:
        stream = video_stream(container, where)
        container_name = container.format.name.split(",")[0]
        if container_name in SEEKABLE:  # MP4 tells it twice: FFmpeg counts by one table, decord reserves by the other
            check_frame_count(stream.frames, where)
        first = next(decoded(container, stream, where), None)
        if first is None:
            raise DataError("no frame can be decoded", where=where, fix=FIX)
        check_frame_size(first.height, first.width, where)
        return StreamHeader(
            container=container_name,
            height=first.height,
            width=first.width,
            pixel_aspect=_pixel_aspect(stream),
            rotation=_rotation(first, where),
            rate=float(stream.average_rate) if stream.average_rate and stream.average_rate > 0 else None,
            video_streams=sum(not is_cover(other) for other in container.streams.video),
        )


def read_index(path: Path) -> Index:
    """List a video's frames; the last file's list is kept. Raises DataError."""
    status = path.stat()
    return _read_index(path, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _read_index(path: Path, stamp: tuple[int, int]) -> Index:
    where = str(path)
    shown: set[int] = set()
    keyframes: list[int] = []
    count, timed, open_gop = 0, True, False
    with opened(path) as container:
        stream = video_stream(container, where)
        format_name = container.format.name.split(",")[0]
        time_base = float(stream.time_base or 1)
        for packet in guarded(container.demux(stream), where):
            if packet.size == 0:  # the flush at the end
                continue
            if packet.is_corrupt:
                raise DataError("the file is cut off or damaged inside a frame", where=where, fix=FIX)
            count += 1
            check_frame_count(count, where)
            if packet.pts is None:
                timed = False
                continue
            if packet.is_keyframe:
                keyframes.append(packet.pts)
            elif keyframes and packet.pts < keyframes[-1]:
                open_gop = True
            if not packet.is_discard:  # frames that an edit list hides are decoded, never shown
                shown.add(packet.pts)
    timed = timed and format_name != "avi"
    pts = sorted(shown) if timed else range(_count_frames(path))
    if not pts:
        raise DataError("the video stream has no frames", where=where, fix="leave the file out")
    starts = sorted(keyframes) if timed and format_name in SEEKABLE else ()
    return Index(tuple(pts), tuple(starts), open_gop, time_base, timed)


def read_frames(path: Path, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames, as stored (not turned), one at a time.

    Args:
        path: the video.
        frame_indices: ascending numbers into ``read_index(path).pts``; repeated ones are given once.
        size_hw: the size of the first frame, before rotation and with square pixels, which the plan was made for.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DataError: if a named frame cannot be decoded, is damaged or of another size. Damage elsewhere in the file
            does not matter.
    """
    index = read_index(path)
    wanted = sorted(set(frame_indices))
    for attempt in ("seek", "from the start") if index.keyframes else ("from the start",):
        for frame_index, frame in _pass_over(path, index, wanted, size_hw, seek=attempt == "seek"):
            if frame.is_corrupt:
                raise DataError(f"frame {frame_index} is damaged", where=str(path), fix=FIX)
            yield frame_index, _pixels(frame, str(path))
            wanted = wanted[1:]
        if not wanted:
            return
    raise DataError(f"frame {wanted[0]} cannot be decoded", where=str(path), fix=FIX)


def check_sizes(path: Path, frame_indices: Sequence[int], size_hw: tuple[int, int]) -> None:
    """Refuse a clip whose picture is not as large as the first frame, by the keyframes that its frames rest on.

    decord stretches such frames to the first one's shape and says nothing. Args and errors as for ``read_frames``.
    """
    index, where = read_index(path), str(path)
    starts: dict[int, int] = {}
    for frame_index in frame_indices:
        starts.setdefault(bisect_right(index.keyframes, index.pts[frame_index]), frame_index)
    with opened(path) as container:
        stream = video_stream(container, where)
        pixel_aspect = _pixel_aspect(stream)
        for before, frame_index in starts.items():
            if before:
                seek_to(container, stream, index.keyframes[before - 1], where)
            for frame in islice(decoded(container, stream, where), 1):
                _check_size(frame, frame_index, pixel_aspect, size_hw, where)


def _pass_over(
    path: Path, index: Index, wanted: Sequence[int], size_hw: tuple[int, int], *, seek: bool
) -> Iterator[tuple[int, Any]]:
    """Yield wanted frames in order until all are found or one is missed (a container may seek too far)."""
    with opened(path) as container:
        where = str(path)
        stream = video_stream(container, where)
        pixel_aspect = _pixel_aspect(stream)
        frames = enumerate(decoded(container, stream, where))
        reached: int | None = None
        for frame_index in wanted:
            target = index.pts[frame_index]
            before = bisect_right(index.keyframes, target)
            start = index.keyframes[before - 1] if before else None
            # Going on costs decoding; a seek pays only if a keyframe lies between here and the target.
            if seek and start is not None and (reached is None or start > reached):
                seek_to(container, stream, start, where)
                frames = enumerate(decoded(container, stream, where))
            for count, frame in frames:
                reached = frame.pts if index.timed else count
                if reached is not None and reached >= target:
                    break
            else:
                return
            if reached != target:
                return
            _check_size(frame, frame_index, pixel_aspect, size_hw, where)
            yield frame_index, frame


def _pixels(frame: Any, where: str) -> Frame:
    try:
        pixels: Frame = frame.to_ndarray(format="rgb24")
    except failures() as error:
        raise undecodable(error, where) from None
    return pixels


def _check_size(frame: Any, frame_index: int, pixel_aspect: float, size_hw: tuple[int, int], where: str) -> None:
    """Refuse a frame of another size than the first, for which the plan was made."""
    shown_hw = frame.height, max(1, round(frame.width * pixel_aspect))
    if shown_hw != size_hw:
        raise DataError(
            f"the picture changes size: {size_hw[0]}x{size_hw[1]} at first (height x width), "
            f"{shown_hw[0]}x{shown_hw[1]} in frame {frame_index}",
            where=where,
            fix="cut the file where its picture changes, re-encode it, or leave it out",
        )


def _pixel_aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 where the file does not say, or says nonsense."""
    ratio = stream.codec_context.sample_aspect_ratio
    return float(ratio) if ratio and ratio > 0 else 1.0


def _count_frames(path: Path) -> int:
    with opened(path) as container:
        stream = video_stream(container, str(path))
        count = 0
        for _ in decoded(container, stream, str(path)):
            count += 1
            check_frame_count(count, str(path))
        return count


def _rotation(frame: Any, where: str) -> int:
    """Rotation metadata in clockwise degrees, 0 to 270."""
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(side), "<i4", 5).tolist()
            if a * d <= b * c:  # FFmpeg would call a mirror half a turn, and make up degrees for zeroes
                raise DataError("metadata that mirror the picture, or squash it to nothing", where=where, fix=FIX)
    degrees = -frame.rotation % 360
    if degrees % 90:
        raise DataError(f"rotation metadata of {degrees} degrees; only quarter turns are read", where=where, fix=FIX)
    return int(degrees)
