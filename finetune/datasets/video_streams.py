"""Video files through PyAV: opened under guards, what they state about how they are shown, and their frames."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.types import VideoProbe
from finetune.datasets.colour import to_bt709
from finetune.datasets.media_files import (
    MAX_PIXELS,
    MAX_STREAMS,
    check_frame_count,
    check_frame_size,
)
from finetune.datasets.worker import too_much_memory

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg"
"""Containers that are opened. FFmpeg knows a format by its content, so a playlist or a concat script named ``.mp4``
would otherwise make it read other files, or the network."""

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave transparency out."""

FIX = "check that it plays to its end; re-encode it to H.264 in MP4, or leave it out"


def opened(path: Path) -> Any:
    """Open a container, a context manager. Raises DataError if it is none of ``DEMUXERS``."""
    import av
    from av.sidedata.sidedata import Type as SideDataType

    av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines name no file; what matters becomes a DataError
    kinds: Any = SideDataType
    kinds._missing_ = classmethod(_unknown)
    # Tags in another encoding are nobody's concern; from 19 on PyAV takes them as they are and has no such argument.
    # And the whitelist is a *container* option: plain `options` crash PyAV up to 15 on MPEG program streams.
    lenient = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    guards = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file", "max_streams": str(MAX_STREAMS)}
    try:
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        return av.open(os.path.abspath(path), container_options=guards, **lenient)  # noqa: PTH100 - follows no link
    except failures() as error:
        raise _refusal("not a video that can be opened", error, str(path)) from None


def _unknown(kinds: Any, value: int) -> Any:
    """A kind of side data that PyAV's list lacks and FFmpeg has (EXIF, in 18): without it none of a frame is read."""
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


def video_stream(container: Any, where: str) -> Any:
    """The first real video stream, with a limit on what its decoder may allocate. Raises DataError if there is none."""
    if len(container.streams) > MAX_STREAMS:
        count = f"the file has {len(container.streams):,} streams; at most {MAX_STREAMS:,} are read"
        raise DataError(count, where=where, fix="re-encode it, or leave it out")
    stream = next((stream for stream in container.streams.video if not is_cover(stream)), None)
    if stream is None:
        held = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
        raise DataError(f"the file has no video stream; it holds {held}", where=where, fix="leave the file out")
    context = stream.codec_context
    if context is None:
        raise DataError("the video's codec is unknown to FFmpeg", where=where, fix=FIX)
    if context.height and context.width:
        check_frame_size(context.height, context.width, where)
    context.options = {"max_pixels": str(MAX_PIXELS)}
    context.thread_count = 2
    return stream


def tag(stream: Any, name: str) -> str:
    """A tag of a stream, "" where it has none; Matroska's come in upper case where a file was copied."""
    return next((value for key, value in stream.metadata.items() if key.lower() == name), "")


def is_cover(stream: Any) -> bool:
    """Whether a video stream is an album cover and not a video."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def decoded(container: Any, stream: Any, where: str) -> Iterator[Any]:
    """``container.decode``, with the transparency that WebM keeps apart, and FFmpeg's errors as ``DataError``."""
    name = alpha_decoder(stream)
    return guarded(container.decode(stream) if name is None else _decoded_by(name, container, stream), where)


def alpha_decoder(stream: Any) -> str | None:
    """The decoder of a stream's transparency, where it is another than FFmpeg takes. It gets no side data."""
    return _WITH_ALPHA.get(stream.codec_context.name) if tag(stream, "alpha_mode") == "1" else None


def _decoded_by(name: str, container: Any, stream: Any) -> Iterator[Any]:
    import av

    context: Any = av.CodecContext.create(name, "r")
    for setting in ("options", "thread_count", "color_primaries", "color_trc", "colorspace", "color_range"):
        setattr(context, setting, getattr(stream.codec_context, setting))
    for packet in container.demux(stream):
        yield from context.decode(packet)


def guarded(items: Iterator[Any], where: str) -> Iterator[Any]:
    """Packets or frames, with FFmpeg's errors as ``DataError``."""
    try:
        yield from items
    except failures() as error:
        raise undecodable(error, where) from None


def as_array(frame: Any, layout: str, where: str) -> NDArray[Any]:
    """A frame converted to one of FFmpeg's packed pixel formats, [H, W, C]. Raises DataError."""
    try:
        pixels: NDArray[Any] = frame.to_ndarray(format=layout)
    except failures() as error:
        raise undecodable(error, where) from None
    return pixels


def seek_to(container: Any, stream: Any, start: int, where: str) -> None:
    """Go to the keyframe at or before ``start``, in the stream's time base. Raises DataError."""
    try:
        container.seek(start, stream=stream, backward=True)
    except failures() as error:
        raise undecodable(error, where) from None


def failures() -> tuple[type[Exception], ...]:
    """What PyAV raises of a damaged file: FFmpeg's errors, and what it says itself of numbers and names in it."""
    import av

    return av.FFmpegError, ValueError, ArithmeticError, OSError, MemoryError


def undecodable(error: Exception, where: str) -> DataError:
    """What one of ``failures`` means to the user."""
    return _refusal("the video cannot be decoded", error, where)


def _refusal(what: str, error: Exception, where: str) -> DataError:
    if isinstance(error, MemoryError):  # FFmpeg's own is one too
        return too_much_memory(where)
    reason = f"{getattr(error, 'strerror', None) or error}" or type(error).__name__
    return DataError(f"{what} ({reason:.300})", where=where, fix=FIX)


# ----------------------------------------------------------- what is stated: orientation, fields, transparency, colours

ON_BLACK = "on-black-1"

_ORIENTATIONS: Mapping[tuple[int, ...], int] = {
    # the display matrix's a, b, c, d: a stored pixel right of another is shown (a, b) from it, one below (c, d)
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}

_QUARTER_TURNS = {0: 1, 90: 6, 180: 3, 270: 8}

# Numbers of ITU-T H.273, which FFmpeg uses too.
_HDR = {16: "pq", 18: "hlg"}

_OTHER_TRANSFERS = {8: "linear light", 9: "logarithmic light", 10: "logarithmic light", 17: "SMPTE ST 428"}

_WIDE = {9: "bt2020", 11: "p3", 12: "p3"}

SDR = "sdr", "bt709"

UNSTATED = 2

BT2020_MATRIX = 9

_OTHER_MATRICES = {
    **{8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "Y'D'zD'x", 12: "derived from its primaries"},
    **{13: "derived from its primaries", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"},
}

_DOLBY_VISION = ("dvh1", "dvhe", "dva1", "dvav", "dav1")

_HEVC_ALPHA = b"\x4e\x01\xa5"
"""How the message begins that says what the second layer of a stream is for (alpha channel information SEI)."""

_BOTTOM_FIRST = (3, 5)  # FFmpeg's AVFieldOrder: 2 to 5 are interlaced, as stored and as shown: TT, BB, TB, BT


def stated_orientation(stream: Any, frame: Any, where: str) -> int | None:
    """How a frame is made upright, by EXIF's numbers; None where it does not say.

    FFmpeg attaches to a frame what the container (MOV's matrix, Matroska's projection) or the stream (H.264's and
    HEVC's display orientation, EXIF in Motion JPEG) says. Of what is only a tag, ``rotate`` is heeded: FFmpeg up to 4
    left it in place of MOV's matrix when it copied a video into Matroska.

    Raises:
        DataError: if it is none of the eight.
    """
    for side in frame.side_data:
        if side.type.name == "DISPLAYMATRIX":
            return _orientation(np.frombuffer(bytes(side), "<i4", 5).tolist(), where)
    degrees = tag(stream, "rotate")
    if not re.fullmatch(r"-?[0-9]{1,4}", degrees):
        return None
    if int(degrees) % 360 not in _QUARTER_TURNS:
        what = f"a tag that turns the picture by {int(degrees)} degrees; only quarter turns are read"
        raise DataError(what, where=where)
    return _QUARTER_TURNS[int(degrees) % 360]


def _orientation(matrix: list[int], where: str) -> int:
    a, b, _, c, d = matrix
    across, along = (abs(b), abs(c)), (abs(a), abs(d))
    for straight, other, key in ((along, across, (a, 0, 0, d)), (across, along, (0, b, c, 0))):
        if 50 * max(other) <= min(straight) > 0:  # a degree; how large entries are is a matter of the pixels' aspect
            return _ORIENTATIONS[tuple((entry > 0) - (entry < 0) for entry in key)]
    what = f"metadata that turn the picture by no right angle, or squash it to nothing ({a}, {b}, {c}, {d})"
    raise DataError(what, where=where, fix=FIX)


def stated_corrections(stream: Any, frame: Any, where: str) -> tuple[str, ...]:
    """Which of ``types.CORRECTIONS`` a frame needs.

    Raises:
        DataError: for colours, fields or transparency that are not read, with what converts them.
    """
    colours = stated_colours(stream, frame, where)
    converted = ["-".join((*colours, "1"))] if colours else []
    if stream.codec_context.name == "hevc" and _HEVC_ALPHA in (stream.codec_context.extradata or b""):
        raise DataError(
            "HEVC with transparency, which FFmpeg leaves out, so that what is hidden would be shown",
            where=where,
            fix=f"export it as ProRes 4444; or, if nothing in it is hidden, {_convert(where, 'null')}",
        )
    return (*_fields(stream, frame, where), *converted, *_transparency(frame, where))


def check_unchanged(stream: Any, frame: Any, frame_index: int, header: VideoProbe, where: str) -> None:
    """Refuse a frame that states something else than the first frame did, for which the file is read.

    Raises:
        DataError: naming the frame and what changes.
    """
    colours = stated_colours(stream, frame, where)
    changes = {
        "its orientation changes": stated_orientation(stream, frame, where) not in (None, header.orientation),
        "its colours change": colours != colours_of(header),
        "it becomes transparent": bool(set(_transparency(frame, where)) - set(header.corrections)),
        "it becomes interlaced": frame.interlaced_frame and not parity_of(header),
    }
    for change, happens in changes.items():
        if happens:
            fix = "cut the file where it changes, re-encode it, or leave it out"
            raise DataError(f"{change} in frame {frame_index}", where=where, fix=fix)


def parity_of(header: VideoProbe) -> str:
    """The parity with which frames are made progressive: ``auto`` (what each frame says), ``tff``, ``bff``; or ""."""
    return next((name.split("-")[1] for name in header.corrections if name.startswith("bwdif")), "")


def _fields(stream: Any, frame: Any, where: str) -> tuple[str, ...]:
    if frame.interlaced_frame:
        if stream.codec_context.name == "hevc":
            raise DataError(
                "interlaced HEVC, in which each field is a picture of its own",
                where=where,
                fix=_convert(where, "weave,bwdif"),
            )
        return ("bwdif-auto-1",)
    order = int(getattr(stream.codec_context, "field_order", 0))  # PyAV tells it from 18.1 on
    if order < 2:
        return ()
    return ("bwdif-bff-1",) if order in _BOTTOM_FIRST else ("bwdif-tff-1",)


def colours_of(header: VideoProbe) -> tuple[str, str] | None:
    """As ``stated_colours``, of the whole file."""
    names = (name.split("-") for name in header.corrections)
    return next(((name[0], name[1]) for name in names if name[0] in ("sdr", *_HDR.values())), None)


def stated_colours(stream: Any, frame: Any, where: str) -> tuple[str, str] | None:
    """Transfer (``pq``, ``hlg``, ``sdr``) and primaries (``bt709``, ``bt2020``, ``p3``) of what is not SDR of BT.709.

    None where it is: so is taken what states nothing, and the primaries of SD, which differ by a few levels. HDR and
    the matrix of BT.2020 without primaries mean those of BT.2020.

    Raises:
        DataError: for colours that are not read, with the command that converts them.
    """
    transfer, primaries, matrix = int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace)
    if transfer == UNSTATED and (stream.codec_context.codec_tag in _DOLBY_VISION or _has_dolby_vision(frame)):
        raise DataError(
            "Dolby Vision without an HDR10, HLG or SDR base (profile 5): its colours mean nothing to other decoders",
            where=where,
            fix="take another version of it, or convert it with a Dolby Vision player's export or ffmpeg's libplacebo",
        )
    colours = colours_by_number(transfer, primaries, matrix)
    if matrix in _OTHER_MATRICES and not frame.format.is_rgb:
        matrix_read = "2020_ncl" if "bt2020" in colours else "709"
        raise DataError(
            f"its colours are stored as {_OTHER_MATRICES[matrix]}, which is not read",
            where=where,
            fix=_convert(where, f"zscale=m={matrix_read}"),
        )
    if transfer in _OTHER_TRANSFERS:
        raise DataError(
            f"its colours are in {_OTHER_TRANSFERS[transfer]}, which is not read",
            where=where,
            fix=_convert(where, "zscale=pin=709:p=709:t=709:m=709"),
        )
    return None if colours == SDR else colours


def colours_by_number(transfer: int, primaries: int, matrix: int) -> tuple[str, str]:
    """Transfer and primaries as ``colour.to_bt709`` names them, by the numbers of H.273."""
    gamut = _WIDE.get(primaries, "bt709")
    if primaries == UNSTATED and (transfer in _HDR or matrix in (BT2020_MATRIX, 10)):
        gamut = "bt2020"
    return _HDR.get(transfer, "sdr"), gamut


def _transparency(frame: Any, where: str) -> tuple[str, ...]:
    if frame.format.has_palette:
        transparent = bool((as_array(frame, "rgba", where)[..., 3] < 255).any())
    else:
        transparent = any(component.is_alpha for component in frame.format.components)
    return (ON_BLACK,) if transparent else ()


def _has_dolby_vision(frame: Any) -> bool:
    return any(side.type.name.startswith("DOVI") for side in frame.side_data)


def _convert(where: str, filters: str) -> str:
    encode = "-c:v libx265 -crf 12 -c:a copy"
    return f'convert it: ffmpeg -i "{Path(where).name}" -vf "{filters},format=yuv420p10le" {encode} converted.mp4'


# --------------------------------------------------------------------------------------------------- headers and frames

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
