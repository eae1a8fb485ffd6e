"""Video files to pixels, through PyAV: opening them, what they state of their frames, and the frames.

A playlist makes FFmpeg open other files, so only the formats of ``DEMUXERS`` are opened. What no check foresees is held
by the limits of the process that decodes (``worker``).
"""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.types import ClipPlan, VideoProbe
from finetune.datasets import containers
from finetune.datasets.pictures import (
    BT2020_MATRIX,
    HDR,
    MAX_PIXELS,
    SDR,
    UNSTATED,
    Frame,
    check_frame_size,
    colours_by_number,
    read_image,
    resize_crop,
    to_bt709,
    turn_upright,
)
from finetune.datasets.worker import too_much_memory

FIX = "check that it plays to its end; re-encode it to H.264 in MP4, or leave it out"

# --- opening ----------------------------------------------------------------------------------------------------------

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg"
"""Containers that are opened. FFmpeg knows a format by its content, so a playlist or a concat script named ``.mp4``
would otherwise make it read other files, or the network."""

_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these leave transparency out."""


@contextmanager
def refusing(where: str, what: str = "the video cannot be decoded") -> Iterator[None]:
    """What PyAV raises of a damaged file (FFmpeg's errors, and its own of numbers and names in it) as ``DataError``."""
    import av

    try:
        yield
    except (av.FFmpegError, ValueError, ArithmeticError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError):  # FFmpeg's own is one too
            raise too_much_memory(where) from None
        reason = f"{getattr(error, 'strerror', None) or error}" or type(error).__name__
        raise DataError(f"{what} ({reason:.300})", where=where, fix=FIX) from None


@contextmanager
def opened(path: Path, threads: int = 2) -> Iterator[tuple[Any, Any]]:
    """A container and its first real video stream, with a limit on what its decoder may allocate.

    Args:
        path: the file.
        threads: of the decoder. For one frame, starting a second takes longer than the frame.

    Raises:
        DataError: if the file is none of ``DEMUXERS``, or has no video stream that FFmpeg knows.
    """
    import av
    from av.sidedata.sidedata import Type as SideDataType
    from av.stream import Disposition

    where = str(path)
    av.logging.set_level(av.logging.PANIC)  # FFmpeg's own lines name no file; what matters becomes a DataError
    kinds: Any = SideDataType
    kinds._missing_ = classmethod(_unknown)
    # Tags in another encoding are nobody's concern; from 19 on PyAV takes them as they are and has no such argument.
    # And the whitelist is a *container* option: plain `options` crash PyAV up to 15 on MPEG program streams.
    lenient: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
    guards = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file", "max_streams": str(containers.MAX_STREAMS)}
    with refusing(where, "not a video that can be opened"):
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        container = av.open(os.path.abspath(path), container_options=guards, **lenient)  # noqa: PTH100 - follows no link
    with container:
        if len(container.streams) > containers.MAX_STREAMS:
            what = f"the file has {len(container.streams):,} streams; at most {containers.MAX_STREAMS:,} are read"
            raise DataError(what, where=where, fix="re-encode it, or leave it out")
        videos = [video for video in container.streams.video if not video.disposition & Disposition.attached_pic]
        if not videos:  # an album cover is none
            held = ", ".join(sorted({other.type for other in container.streams})) or "nothing"
            raise DataError(f"the file has no video stream; it holds {held}", where=where, fix="leave the file out")
        stream: Any = videos[0]
        context = stream.codec_context
        if context is None:
            raise DataError("the video's codec is unknown to FFmpeg", where=where, fix=FIX)
        if context.height and context.width:
            check_frame_size(context.height, context.width, where)
        context.options = {"max_pixels": str(MAX_PIXELS)}
        # Threads by slice, PyAV's default. With threads by frame, closing a container with frames under way deadlocks.
        context.thread_count = threads
        yield container, stream


def _unknown(kinds: Any, value: int) -> Any:
    """A kind of side data that PyAV's list lacks and FFmpeg has (EXIF, in 18): without it none of a frame is read."""
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


def _tag(stream: Any, name: str) -> str:
    """A tag of a stream, "" where it has none; Matroska's come in upper case where a file was copied."""
    return next((value for key, value in stream.metadata.items() if key.lower() == name), "")


def _alpha_decoder(stream: Any) -> str | None:
    """The decoder of a stream's transparency, where it is another than FFmpeg takes. It gets no side data."""
    return _WITH_ALPHA.get(stream.codec_context.name) if _tag(stream, "alpha_mode") == "1" else None


def _decoded(
    packets: Iterable[Any], stream: Any, where: str, decoder_name: str | None, needed: Collection[int] | None = None
) -> Iterator[Any]:
    """The frames in a stream's packets, by FFmpeg's decoder or one of ``_WITH_ALPHA``. Raises DataError.

    With ``needed``, frames that no other frame rests on are left out but for those of these times: two in five of what
    x264 makes, and the others are the same without them.
    """
    import av

    with refusing(where):
        decoder, context = stream, stream.codec_context
        if decoder_name is not None:
            decoder = context = av.CodecContext.create(decoder_name, "r")
            for name in ("options", "thread_count", "color_primaries", "color_trc", "colorspace", "color_range"):
                setattr(decoder, name, getattr(stream.codec_context, name))
        skipped = ""
        for packet in packets:
            if needed is not None and skipped != (skipped := "DEFAULT" if packet.pts in needed else "NONREF"):
                context.skip_frame = skipped
            yield from decoder.decode(packet)


# --- what is stated: orientation, fields, transparency, colours -------------------------------------------------------

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

_OTHER_TRANSFERS = {8: "linear light", 9: "logarithmic light", 10: "logarithmic light", 17: "SMPTE ST 428"}

_OTHER_MATRICES = {
    **{8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "Y'D'zD'x", 12: "derived from its primaries"},
    **{13: "derived from its primaries", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-R", 17: "YCgCo-R"},
}

_DOLBY_VISION = ("dvh1", "dvhe", "dva1", "dvav", "dav1")

_HEVC_ALPHA = b"\x4e\x01\xa5"
"""How the message begins that says what the second layer of a stream is for (alpha channel information SEI)."""

_FIELD_ORDERS = {2: "tff", 3: "bff", 4: "tff", 5: "bff"}
"""FFmpeg's AVFieldOrder, as stored and as shown: TT, BB, TB, BT."""


def _stated_orientation(stream: Any, frame: Any, where: str) -> int | None:
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
    degrees = _tag(stream, "rotate")
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


def _stated_corrections(stream: Any, frame: Any, where: str) -> tuple[str, ...]:
    """Which of ``types.CORRECTIONS`` the first frame needs.

    Raises:
        DataError: for colours, fields or transparency that are not read, with what converts them.
    """
    is_hevc = stream.codec_context.name == "hevc"
    if is_hevc and _HEVC_ALPHA in (stream.codec_context.extradata or b""):
        what = "HEVC with transparency, which FFmpeg leaves out, so that what is hidden would be shown"
        fix = f"export it as ProRes 4444; or, if nothing in it is hidden, {_convert(where, 'null')}"
        raise DataError(what, where=where, fix=fix)
    if is_hevc and frame.interlaced_frame:
        what = "interlaced HEVC, in which each field is a picture of its own"
        raise DataError(what, where=where, fix=_convert(where, "weave,bwdif"))
    # PyAV tells what the container says from 18.1 on.
    order = _FIELD_ORDERS.get(int(getattr(stream.codec_context, "field_order", 0)))
    parity = "auto" if frame.interlaced_frame else order
    colours = _stated_colours(stream, frame, where)
    return (
        *([f"bwdif-{parity}-1"] if parity else []),
        *(["-".join((*colours, "1"))] if colours else []),
        *([ON_BLACK] if _is_transparent(frame, where) else []),
    )


def _stated_colours(stream: Any, frame: Any, where: str) -> tuple[str, str] | None:
    """Transfer (``pq``, ``hlg``, ``sdr``) and primaries (``bt709``, ``bt2020``, ``p3``) of what is not SDR of BT.709.

    None where it is: so is taken what states nothing, and the primaries of SD, which differ by a few levels. HDR and
    the matrix of BT.2020 without primaries mean those of BT.2020.

    Raises:
        DataError: for colours that are not read, with the command that converts them.
    """
    transfer, primaries, matrix = int(frame.color_trc), int(frame.color_primaries), int(frame.colorspace)
    dolby_vision = any(side.type.name.startswith("DOVI") for side in frame.side_data)
    if transfer == UNSTATED and (dolby_vision or stream.codec_context.codec_tag in _DOLBY_VISION):
        raise DataError(
            "Dolby Vision without an HDR10, HLG or SDR base (profile 5): its colours mean nothing to other decoders",
            where=where,
            fix="take another version of it, or convert it with a Dolby Vision player's export or ffmpeg's libplacebo",
        )
    colours = colours_by_number(transfer, primaries, matrix)
    if matrix in _OTHER_MATRICES and not frame.format.is_rgb:
        what = f"its colours are stored as {_OTHER_MATRICES[matrix]}, which is not read"
        matrix_read = "2020_ncl" if "bt2020" in colours else "709"
        raise DataError(what, where=where, fix=_convert(where, f"zscale=m={matrix_read}"))
    if transfer in _OTHER_TRANSFERS:
        what = f"its colours are in {_OTHER_TRANSFERS[transfer]}, which is not read"
        raise DataError(what, where=where, fix=_convert(where, "zscale=pin=709:p=709:t=709:m=709"))
    return None if colours == SDR else colours


def _is_transparent(frame: Any, where: str) -> bool:
    if frame.format.has_palette:
        return bool((_as_array(frame, "rgba", where)[..., 3] < 255).any())
    return any(component.is_alpha for component in frame.format.components)


def _convert(where: str, filters: str) -> str:
    encode = "-c:v libx265 -crf 12 -c:a copy"
    return f'convert it: ffmpeg -i "{Path(where).name}" -vf "{filters},format=yuv420p10le" {encode} converted.mp4'


def _parity_of(header: VideoProbe) -> str:
    """The parity with which frames are made progressive: ``auto`` (what each frame says), ``tff``, ``bff``; or ""."""
    return next((name.split("-")[1] for name in header.corrections if name.startswith("bwdif")), "")


def _colours_of(header: VideoProbe) -> tuple[str, str] | None:
    """As ``_stated_colours``, of the whole file."""
    names = (name.split("-") for name in header.corrections)
    return next(((name[0], name[1]) for name in names if name[0] in ("sdr", *HDR.values())), None)


def _check_frame(stream: Any, frame: Any, frame_index: int, header: VideoProbe, where: str) -> None:
    """Refuse a frame of another size than the first, for which the plan was made, or that states something else."""
    shown = _shown_hw(frame.height, frame.width, _pixel_aspect(stream), header.orientation)
    changes = {
        f"the picture changes size: {header.height}x{header.width} at first (height x width), "
        f"{shown[0]}x{shown[1]}": shown != (header.height, header.width),
        "its orientation changes": _stated_orientation(stream, frame, where) not in (None, header.orientation),
        "its colours change": _stated_colours(stream, frame, where) != _colours_of(header),
        "it becomes transparent": _is_transparent(frame, where) and ON_BLACK not in header.corrections,
        "it becomes interlaced": frame.interlaced_frame and not _parity_of(header),
    }
    for change, happens in changes.items():
        if happens:
            fix = "cut the file where it changes, re-encode it, or leave it out"
            raise DataError(f"{change} in frame {frame_index}", where=where, fix=fix)


# --- headers ----------------------------------------------------------------------------------------------------------

SEEKABLE = ("mov", "matroska")
"""Containers whose keyframe marks can be trusted; in the others frames are decoded from the start. (In MPEG program
streams, P frames carry the mark, and what is decoded after a seek to one is a grey smear without an error.)"""

_USUAL_FPS = 25.0
"""Of a file that stores neither times nor a rate."""


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


def probe_file(path: Path) -> VideoProbe:
    """Read a video's header, the time of every frame, and its first frame.

    Height and width are those of the picture on a display: upright, with square pixels.

    Raises:
        DataError: if the file is missing, empty, cut off, without video, beyond the limits, or if its first frame
            cannot be decoded.
    """
    where = str(path)
    containers.check_container(path)
    with opened(path, threads=1) as (container, stream):
        alpha_decoder = _alpha_decoder(stream)
        listing = _Listing(where)
        # In one pass: opening a file takes as long as everything else about it.
        packets = listing.passing(container.demux(stream))
        first = next(_decoded(packets, stream, where, alpha_decoder), None)
        if first is None:
            raise DataError("no frame can be decoded", where=where, fix=FIX)
        check_frame_size(first.height, first.width, where)
        orientation = _stated_orientation(stream, (alpha_decoder and _without_alpha(path)) or first, where) or 1
        corrections = (*_missed_turn(first, orientation), *_stated_corrections(stream, first, where))
        height, width = _shown_hw(first.height, first.width, _pixel_aspect(stream), orientation)
        rate = float(stream.average_rate) if stream.average_rate and stream.average_rate > 0 else None
        index = listing.index(path, container, stream, packets)
    check_frame_size(height, width, where)
    # Eight bytes each instead of thirty-two, for hours of video.
    if index.timed:
        times = array("d", ((pts - index.pts[0]) * index.time_base for pts in index.pts))
    else:
        times = array("d", (number / (rate or _USUAL_FPS) for number in index.pts))
    containers.check_times(times, where)
    fps = (len(times) - 1) / times[-1] if times[-1] > 0 else min(rate or 1.0, containers.MAX_FPS)
    return VideoProbe(len(times), fps, height, width, times, orientation, corrections)


def _without_alpha(path: Path) -> Any:
    """The first frame as FFmpeg's own decoder gives it, with what the container says of it; None if it gives none."""
    with opened(path) as (container, stream):
        return next(_decoded(container.demux(stream), stream, str(path), None), None)


def _missed_turn(frame: Any, orientation: int) -> tuple[str, ...]:
    """A name for the cache address of turns that keep the size: decord, which once decoded these, missed some of them,
    and nobody can tell which.
    """
    keeps_size = orientation == 3 or (orientation in (6, 8) and frame.height == frame.width)
    return ("turned-1",) if keeps_size else ()


def _shown_hw(height: int, width: int, pixel_aspect: float, orientation: int) -> tuple[int, int]:
    """Height and width of a stored frame once its pixels are square and it is upright."""
    size_hw = height, max(1, round(width * pixel_aspect))
    return size_hw if orientation < 5 else size_hw[::-1]


def _pixel_aspect(stream: Any) -> float:
    """Width of a pixel over its height; 1 where the file does not say, or says nonsense.

    What the container says goes before what the codec says, as in FFmpeg and in players.
    """
    ratios = stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio
    return float(next((ratio for ratio in ratios if ratio and ratio > 0), 1))


def read_index(path: Path) -> Index:
    """List a video's frames; the last file's list is kept. Raises DataError."""
    status = path.stat()
    return _read_index(path, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _read_index(path: Path, stamp: tuple[int, int]) -> Index:
    where = str(path)
    with opened(path) as (container, stream):
        listing = _Listing(where)
        return listing.index(path, container, stream, listing.passing(container.demux(stream)))


class _Listing:
    """What the packets of a stream tell of its frames as they go by."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._shown: set[int] = set()
        self._keyframes: list[int] = []
        self._count, self._timed, self._open_gop, self._cut_off = 0, True, False, False

    def passing(self, packets: Iterable[Any]) -> Iterator[Any]:
        """The same packets, each listed."""
        for packet in packets:
            if packet.size:  # the flush at the end has none
                self._add(packet)
            yield packet

    def _add(self, packet: Any) -> None:
        self._cut_off |= packet.is_corrupt
        self._count += 1
        containers.check_frame_count(self._count, self._where)
        if packet.pts is None:
            self._timed = False
            return
        if packet.is_keyframe:
            self._keyframes.append(packet.pts)
        elif self._keyframes and packet.pts < self._keyframes[-1]:
            self._open_gop = True
        if not packet.is_discard:  # frames that an edit list hides are decoded, never shown
            self._shown.add(packet.pts)

    def index(self, path: Path, container: Any, stream: Any, packets: Iterator[Any]) -> Index:
        """The index, after the rest of the ``packets`` has gone by. Raises DataError."""
        with refusing(self._where):
            for _ in packets:
                if self._cut_off:
                    break
        if self._cut_off:
            raise DataError("the file is cut off or damaged inside a frame", where=self._where, fix=FIX)
        format_name = container.format.name.split(",")[0]
        timed = self._timed and format_name != "avi"
        pts = sorted(self._shown) if timed else range(_count_frames(path))
        if not pts:
            raise DataError("the video stream has no frames", where=self._where, fix="leave the file out")
        starts = sorted(self._keyframes) if timed and format_name in SEEKABLE else ()
        return Index(tuple(pts), tuple(starts), self._open_gop, float(stream.time_base or 1), timed)


def _count_frames(path: Path) -> int:
    count = 0
    with opened(path) as (container, stream):
        for _ in _decoded(container.demux(stream), stream, str(path), _alpha_decoder(stream)):
            count += 1
            containers.check_frame_count(count, str(path))
    return count


# --- frames -----------------------------------------------------------------------------------------------------------


def read_clip(path: Path, probe: VideoProbe, plan: ClipPlan) -> Frame:
    """Decode, turn, resize and crop the frames of one clip, holding one source frame at a time.

    Args:
        path: the video, or the still image.
        probe: what was read of its header (``probe_file``); its frame times are not looked at.
        plan: its frames are ascending; repeated ones are decoded once.

    Returns:
        uint8 RGB [3, F, H, W].

    Raises:
        DataError: if one of the frames cannot be decoded, or the file is not the one that was probed.
    """
    if not probe.still:
        containers.check_container(path)
    frames = read_frames(path, plan.frame_indices, probe)
    return fitted(((number, turn_upright(frame, probe.orientation)) for number, frame in frames), plan)


def fitted(frames: Iterable[tuple[int, Frame]], plan: ClipPlan) -> Frame:
    """Cut the frames of a clip, uint8 RGB [3, F, H, W], out of numbered upright pixels [H, W, 3]."""
    size_hw = (plan.bucket.height, plan.bucket.width)
    pixels = np.empty((3, len(plan.frame_indices), *size_hw), np.uint8)
    for frame_index, frame in frames:
        cut = resize_crop(frame, plan.resize_hw, plan.crop_yx, size_hw)
        cut = cut[:, ::-1] if plan.flip else cut
        pixels[:, np.equal(plan.frame_indices, frame_index)] = cut.transpose(2, 0, 1)[:, None]
    return pixels


def read_frames(
    path: Path, frame_indices: Sequence[int], header: VideoProbe, *, short_side: int | None = None
) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames, as stored (not turned) and otherwise corrected, one at a time.

    Args:
        path: the video, or the still image, which is given upright.
        frame_indices: ascending numbers into ``read_index(path).pts``; repeated ones are given once.
        header: its size and what it states, for which the plan was made.
        short_side: larger pictures are scaled down to so many pixels by FFmpeg, before their colours are converted;
            for who looks at every frame of a long video. Never for training: FFmpeg's scaling differs by version.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DataError: if a named frame cannot be decoded, is damaged, of another size, or states something else, or if the
            file is not the one that was probed. Damage elsewhere in the file does not matter.
    """
    changed = DataError("the file has changed since its header was read", where=str(path), fix="run the command again")
    if header.still:
        picture = read_image(path)
        if picture.shape[:2] != (header.height, header.width):
            raise changed
        yield 0, picture
        return
    index = read_index(path)
    if len(index.pts) != header.frames:
        raise changed
    wanted = sorted(set(frame_indices))
    done = 0
    for seek in (True, False) if index.keyframes else (False,):
        for frame_index, frame in _pass_over(path, index, wanted[done:], header, seek=seek):
            if frame.is_corrupt:
                raise DataError(f"frame {frame_index} is damaged", where=str(path), fix=FIX)
            yield frame_index, _pixels(frame, header, str(path), short_side)
            done += 1
        if done == len(wanted):
            return
    raise DataError(f"frame {wanted[done]} cannot be decoded", where=str(path), fix=FIX)


def _pass_over(
    path: Path, index: Index, wanted: Sequence[int], header: VideoProbe, *, seek: bool
) -> Iterator[tuple[int, Any]]:
    """Yield wanted frames in order until all are found or one is missed (a container may seek too far)."""
    where, parity = str(path), _parity_of(header)
    # Where keyframe marks can be trusted a packet is a whole frame, too. bwdif has to see every frame.
    needed = {index.pts[number] for number in wanted} if seek and not parity else None
    with opened(path) as (container, stream):

        def from_here() -> Iterator[tuple[int, Any]]:
            frames = _decoded(container.demux(stream), stream, where, _alpha_decoder(stream), needed)
            return enumerate(_deinterlaced(frames, parity, stream, where) if parity else frames)

        frames = from_here()
        reached: int | None = None
        for frame_index in wanted:
            target = index.pts[frame_index]
            # bwdif has to have seen the frame before.
            before = bisect_right(index.keyframes, index.pts[max(frame_index - 1, 0)] if parity else target)
            start = index.keyframes[before - 1] if before else None
            # Going on costs decoding; a seek pays only if a keyframe lies between here and the target.
            if seek and start is not None and (reached is None or start > reached):
                with refusing(where):
                    container.seek(start, stream=stream, backward=True)
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


def _deinterlaced(frames: Iterator[Any], parity: str, stream: Any, where: str) -> Iterator[Any]:
    """Frames through FFmpeg's bwdif, one for one and with their times. It looks at both neighbours of a frame."""
    from av.filter import Graph

    # Where frames say themselves which of them are interlaced, the others are left as they are.
    options = f"mode=send_frame:parity={parity}:deint={'interlaced' if parity == 'auto' else 'all'}"
    graph, times = Graph(), deque[Any]()
    first: Any = None

    def filtered() -> Iterator[Any]:
        with suppress(BlockingIOError, EOFError):  # it wants another frame; it has given the last
            while times:
                frame = graph.vpull()
                frame.pts = times.popleft()
                yield frame

    with refusing(where):
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


def _pixels(frame: Any, header: VideoProbe, where: str, short_side: int | None) -> Frame:
    """RGB of one frame, uint8 [H, W, 3], in the colours of BT.709 and opaque."""
    colours = _colours_of(header)
    laid_on_black = ON_BLACK in header.corrections
    if colours:
        layout = "rgba64le" if laid_on_black else "rgb48le"
        if "bt2020" in colours and frame.colorspace == UNSTATED:
            frame.colorspace = BT2020_MATRIX  # swscale would take BT.601
    else:
        layout = "rgba" if laid_on_black else "rgb24"
    size: dict[str, int] = {}
    if short_side is not None and (smaller := min(frame.height, frame.width)) > short_side:
        size = {name: max(1, round(getattr(frame, name) * short_side / smaller)) for name in ("height", "width")}
    stored = _as_array(frame, layout, where, **size)
    pixels: Frame = to_bt709(stored[..., :3], *colours) if colours else stored[..., :3]
    if laid_on_black:
        alpha = stored[..., 3:].astype(np.uint32) >> (8 if colours else 0)
        pixels = ((pixels * alpha + 127) // 255).astype(np.uint8)
    return pixels


def _as_array(frame: Any, layout: str, where: str, **size: int) -> NDArray[Any]:
    """A frame converted to one of FFmpeg's packed pixel formats, [H, W, C]. Raises DataError."""
    with refusing(where):
        pixels: NDArray[Any] = frame.to_ndarray(format=layout, **size)
    return pixels
