"""Video headers and frames through PyAV (today's FFmpeg)."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.datasets.media.colour import to_bt709
from finetune.datasets.media.limits import check_frame_count, check_frame_size
from finetune.datasets.media.pyav_file import (
    FIX,
    alpha_decoder,
    as_array,
    decoded,
    failures,
    guarded,
    is_cover,
    opened,
    seek_to,
    undecodable,
    video_stream,
)
from finetune.datasets.media.stated import (
    BT2020_MATRIX,
    ON_BLACK,
    UNSTATED,
    check_unchanged,
    colours_of,
    parity_of,
    stated_corrections,
    stated_orientation,
)
from finetune.errors import DataError
from finetune.types import VideoProbe

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
    """As stored: before it is made upright, and in the pixels of the file, which need not be square."""
    pixel_aspect: float
    orientation: int
    """EXIF's 1 to 8."""
    corrections: tuple[str, ...]
    """Of ``types.CORRECTIONS``."""
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
        orientation = stated_orientation(
            stream, first if alpha_decoder(stream) is None else _opaque(path) or first, where
        )
        return StreamHeader(
            container=container_name,
            height=first.height,
            width=first.width,
            pixel_aspect=_pixel_aspect(stream),
            orientation=orientation or 1,
            corrections=(*_missed_turn(first, orientation or 1), *stated_corrections(stream, first, where)),
            rate=float(stream.average_rate) if stream.average_rate and stream.average_rate > 0 else None,
            video_streams=sum(not is_cover(other) for other in container.streams.video),
        )


def _opaque(path: Path) -> Any:
    """The first frame as FFmpeg's own decoder gives it, with what the container says of it; None if it gives none."""
    with opened(path) as container:
        stream = video_stream(container, str(path))
        return next(guarded(container.decode(stream), str(path)), None)


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


def read_frames(path: Path, frame_indices: Sequence[int], header: VideoProbe) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames, as stored (not turned) and otherwise corrected, one at a time.

    Args:
        path: the video.
        frame_indices: ascending numbers into ``read_index(path).pts``; repeated ones are given once.
        header: its size and what it states, for which the plan was made.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DataError: if a named frame cannot be decoded, is damaged, of another size, or states something else. Damage
            elsewhere in the file does not matter.
    """
    index = read_index(path)
    wanted = sorted(set(frame_indices))
    for attempt in ("seek", "from the start") if index.keyframes else ("from the start",):
        for frame_index, frame in _pass_over(path, index, wanted, header, seek=attempt == "seek"):
            if frame.is_corrupt:
                raise DataError(f"frame {frame_index} is damaged", where=str(path), fix=FIX)
            yield frame_index, _pixels(frame, header, str(path))
            wanted = wanted[1:]
        if not wanted:
            return
    raise DataError(f"frame {wanted[0]} cannot be decoded", where=str(path), fix=FIX)


def check_frames(path: Path, frame_indices: Sequence[int], header: VideoProbe) -> None:
    """Refuse a clip whose picture is not what the first frame is, by the keyframes that its frames rest on.

    decord stretches frames of another size to the first one's shape and says nothing. Args and errors as for
    ``read_frames``.
    """
    index, where = read_index(path), str(path)
    starts: dict[int, int] = {}
    for frame_index in frame_indices:
        starts.setdefault(bisect_right(index.keyframes, index.pts[frame_index]), frame_index)
    with opened(path) as container:
        stream = video_stream(container, where)
        for before, frame_index in starts.items():
            if before:
                seek_to(container, stream, index.keyframes[before - 1], where)
            for frame in islice(decoded(container, stream, where), 1):
                _check_frame(stream, frame, frame_index, header, where)


def _pass_over(
    path: Path, index: Index, wanted: Sequence[int], header: VideoProbe, *, seek: bool
) -> Iterator[tuple[int, Any]]:
    """Yield wanted frames in order until all are found or one is missed (a container may seek too far)."""
    with opened(path) as container:
        where = str(path)
        stream = video_stream(container, where)
        field = parity_of(header)

        def from_here() -> Iterator[tuple[int, Any]]:
            frames = decoded(container, stream, where)
            return enumerate(_deinterlaced(frames, field, stream, where) if field else frames)

        frames = from_here()
        reached: int | None = None
        for frame_index in wanted:
            target = index.pts[frame_index]
            # bwdif has to have seen the frame before.
            before = bisect_right(index.keyframes, index.pts[max(frame_index - 1, 0)] if field else target)
            start = index.keyframes[before - 1] if before else None
            # Going on costs decoding; a seek pays only if a keyframe lies between here and the target.
            if seek and start is not None and (reached is None or start > reached):
                seek_to(container, stream, start, where)
                frames = from_here()
            for count, frame in frames:
                reached = frame.pts if index.timed else count
                if reached is not None and reached >= target:
                    break
            else:
                return
            if reached != target:
                return
            _check_frame(stream, frame, frame_index, header, where)
            yield frame_index, frame


def _deinterlaced(frames: Iterator[Any], field: str, stream: Any, where: str) -> Iterator[Any]:
    """Frames through FFmpeg's bwdif, one for one and with their times. It looks at both neighbours of a frame."""
    from av.filter import Graph

    # Where frames say themselves which of them are interlaced, the others are left as they are.
    options = f"mode=send_frame:parity={field}:deint={'interlaced' if field == 'auto' else 'all'}"
    graph, times = Graph(), deque[Any]()
    first: Any = None

    def filtered() -> Iterator[Any]:
        with suppress(BlockingIOError, EOFError):  # it wants another frame; it has given the last
            while times:
                frame = graph.vpull()
                frame.pts = times.popleft()
                yield frame

    try:
        for frame in frames:
            if first is None:
                first = frame
                size = {"width": frame.width, "height": frame.height, "format": frame.format}
                source = graph.add_buffer(**size, time_base=stream.time_base)
                graph.link_nodes(source, graph.add("bwdif", options), graph.add("buffersink")).configure()
            if (frame.width, frame.height, frame.format.name) != (first.width, first.height, first.format.name):
                raise DataError("the picture changes size or format while it is interlaced", where=where, fix=FIX)
            times.append(frame.pts)
            graph.vpush(frame)
            yield from filtered()
        if first is not None:
            graph.vpush(None)
            yield from filtered()
    except failures() as error:
        raise undecodable(error, where) from None


def _pixels(frame: Any, header: VideoProbe, where: str) -> Frame:
    """RGB of one frame, uint8 [H, W, 3], in the colours of BT.709 and opaque."""
    colours = colours_of(header)
    laid_on_black = ON_BLACK in header.corrections
    if colours:
        layout = "rgba64le" if laid_on_black else "rgb48le"
        if "bt2020" in colours and frame.colorspace == UNSTATED:
            frame.colorspace = BT2020_MATRIX  # swscale would take BT.601
    else:
        layout = "rgba" if laid_on_black else "rgb24"
    stored = as_array(frame, layout, where)
    pixels: Frame = to_bt709(stored[..., :3], *colours) if colours else stored[..., :3]
    if laid_on_black:
        alpha = stored[..., 3:].astype(np.uint32) >> (8 if colours else 0)
        pixels = ((pixels * alpha + 127) // 255).astype(np.uint8)
    return pixels


def _check_frame(stream: Any, frame: Any, frame_index: int, header: VideoProbe, where: str) -> None:
    """Refuse a frame of another size than the first, for which the plan was made, or that states something else."""
    shown = shown_hw(frame.height, frame.width, _pixel_aspect(stream), header.orientation)
    if shown != (header.height, header.width):
        raise DataError(
            f"the picture changes size: {header.height}x{header.width} at first (height x width), "
            f"{shown[0]}x{shown[1]} in frame {frame_index}",
            where=where,
            fix="cut the file where its picture changes, re-encode it, or leave it out",
        )
    check_unchanged(stream, frame, frame_index, header, where)


def shown_hw(height: int, width: int, pixel_aspect: float, orientation: int) -> tuple[int, int]:
    """Height and width of a stored frame once its pixels are square and it is upright."""
    size_hw = height, max(1, round(width * pixel_aspect))
    return size_hw if orientation < 5 else size_hw[::-1]


def _pixel_aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 where the file does not say, or says nonsense.

    What the container says goes before what the codec says, as in FFmpeg and in players.
    """
    ratios = stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio
    return float(next((ratio for ratio in ratios if ratio and ratio > 0), 1))


def _count_frames(path: Path) -> int:
    with opened(path) as container:
        stream = video_stream(container, str(path))
        count = 0
        for _ in decoded(container, stream, str(path)):
            count += 1
            check_frame_count(count, str(path))
        return count


def _missed_turn(frame: Any, orientation: int) -> tuple[str, ...]:
    """A name for the cache address of turns that keep the size: decord, which once decoded these, missed some of them,
    and nobody can tell which.
    """
    keeps_size = orientation == 3 or (orientation in (6, 8) and frame.height == frame.width)
    return ("turned-1",) if keeps_size else ()
