"""Video headers and frames through PyAV (today's FFmpeg)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.datasets.media.containers import MAX_PIXELS, check_frame_count, check_frame_size
from finetune.errors import DataError

Frame = NDArray[np.uint8]

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg"
"""Containers that are opened. FFmpeg knows a format by its content, so a playlist or a concat script named ``.mp4``
would otherwise make it read other files, or the network."""

SEEKABLE = ("mov", "matroska")
"""Containers whose keyframe marks can be trusted; in the others frames are decoded from the start. (In MPEG program
streams, P frames carry the mark, and what is decoded after a seek to one is a grey smear without an error.)"""

_FIX = "check that it plays to its end; re-encode it to H.264 in MP4, or leave it out"


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
    with _opened(path) as container:
        stream = _video_stream(container, where)
        first = next(_decoded(container, stream, where), None)
        if first is None:
            raise DataError("no frame can be decoded", where=where, fix=_FIX)
        check_frame_size(first.height, first.width, where)
        return StreamHeader(
            container=container.format.name.split(",")[0],
            height=first.height,
            width=first.width,
            pixel_aspect=float(stream.codec_context.sample_aspect_ratio or 1),
            rotation=_clockwise(first.rotation, where),
            rate=float(stream.average_rate) if stream.average_rate else None,
            video_streams=sum(not _is_cover(other) for other in container.streams.video),
        )


def read_index(path: Path) -> Index:
    """List a video's frames; the last file's list is kept. Raises DataError."""
    status = path.stat()
    return _read_index(path, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _read_index(path: Path, stamp: tuple[int, int]) -> Index:
    import av

    where = str(path)
    shown: set[int] = set()
    keyframes: list[int] = []
    count, timed, open_gop = 0, True, False
    with _opened(path) as container:
        stream = _video_stream(container, where)
        format_name = container.format.name.split(",")[0]
        time_base = float(stream.time_base or 1)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:  # the flush at the end
                    continue
                if packet.is_corrupt:
                    raise DataError("the file is cut off or damaged inside a frame", where=where, fix=_FIX)
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
        except av.FFmpegError as error:
            raise _undecodable(error, where) from None
    if not timed or format_name == "avi":
        return Index(tuple(range(_count_frames(path))), (), open_gop, time_base, timed=False)
    if not shown:
        raise DataError("the video stream has no frames", where=where, fix="leave the file out")
    return Index(
        tuple(sorted(shown)), tuple(sorted(keyframes)) if format_name in SEEKABLE else (), open_gop, time_base, True
    )


def read_frames(path: Path, frame_indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames, as stored (not turned), one at a time.

    Args:
        path: the video.
        frame_indices: ascending numbers into ``read_index(path).pts``; repeated ones are given once.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DataError: if a named frame cannot be decoded or is damaged. Damage elsewhere in the file does not matter.
    """
    index = read_index(path)
    wanted = sorted(set(frame_indices))
    for attempt in ("seek", "from the start") if index.keyframes else ("from the start",):
        for frame_index, frame in _pass_over(path, index, wanted, seek=attempt == "seek"):
            if frame.is_corrupt:
                raise DataError(f"frame {frame_index} is damaged", where=str(path), fix=_FIX)
            yield frame_index, frame.to_ndarray(format="rgb24")
            wanted = wanted[1:]
        if not wanted:
            return
    raise DataError(f"frame {wanted[0]} cannot be decoded", where=str(path), fix=_FIX)


def _pass_over(path: Path, index: Index, wanted: Sequence[int], *, seek: bool) -> Iterator[tuple[int, Any]]:
    """Yield wanted frames in order until all are found or one is missed (a container may seek too far)."""
    with _opened(path) as container:
        stream = _video_stream(container, str(path))
        frames = enumerate(_decoded(container, stream, str(path)))
        reached: int | None = None
        for frame_index in wanted:
            target = index.pts[frame_index]
            before = bisect_right(index.keyframes, target)
            start = index.keyframes[before - 1] if before else None
            # Going on costs decoding; a seek pays only if a keyframe lies between here and the target.
            if seek and start is not None and (reached is None or start > reached):
                container.seek(start, stream=stream, backward=True)
                frames = enumerate(_decoded(container, stream, str(path)))
            for count, frame in frames:
                reached = frame.pts if index.timed else count
                if reached is not None and reached >= target:
                    break
            else:
                return
            if reached != target:
                return
            yield frame_index, frame


def _opened(path: Path) -> Any:
    import av

    av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines name no file; what matters becomes a DataError
    # Tags in another encoding are nobody's concern; from 19 on PyAV takes them as they are and has no such argument.
    # And the whitelist is a *container* option: plain `options` crash PyAV up to 15 on MPEG program streams.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        return av.open(
            str(path), container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}, **lenient
        )
    except (av.FFmpegError, ValueError, OSError) as error:
        raise DataError(
            f"not a video that can be opened ({getattr(error, 'strerror', None) or error})", where=str(path), fix=_FIX
        ) from None


def _is_cover(stream: Any) -> bool:
    """Whether a video stream is an album cover and not a video."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def _video_stream(container: Any, where: str) -> Any:
    """The first real video stream, with a limit on what its decoder may allocate."""
    stream = next((stream for stream in container.streams.video if not _is_cover(stream)), None)
    if stream is None:
        held = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise DataError(f"the file has no video stream; it holds {held}", where=where, fix="leave the file out")
    context = stream.codec_context
    if context is None:
        raise DataError("the video's codec is unknown to FFmpeg", where=where, fix=_FIX)
    if context.height and context.width:
        check_frame_size(context.height, context.width, where)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_count = 2
    return stream


def _decoded(container: Any, stream: Any, where: str) -> Iterator[Any]:
    """``container.decode`` with FFmpeg's errors as ``DataError``."""
    import av

    try:
        yield from container.decode(stream)
    except (av.FFmpegError, ValueError) as error:
        raise _undecodable(error, where) from None


def _count_frames(path: Path) -> int:
    with _opened(path) as container:
        stream = _video_stream(container, str(path))
        return sum(1 for _ in _decoded(container, stream, str(path)))


def _clockwise(counter_clockwise: int, where: str) -> int:
    """Rotation metadata in clockwise degrees, 0 to 270."""
    degrees = -counter_clockwise % 360
    if degrees % 90:
        raise DataError(f"rotation metadata of {degrees} degrees; only quarter turns are read", where=where, fix=_FIX)
    return degrees


def _undecodable(error: Exception, where: str) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"the video cannot be decoded ({reason})", where=where, fix=_FIX)
