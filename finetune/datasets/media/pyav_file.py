"""A video file opened with PyAV, and the guards on it: which formats, which files, how large, and what it may raise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from finetune.datasets.media.limits import MAX_PIXELS, MAX_STREAMS, check_count, check_frame_size, too_much_memory
from finetune.errors import DataError

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
    check_count(len(container.streams), MAX_STREAMS, "streams", where)
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
