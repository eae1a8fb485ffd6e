"""One clip out of a video, as an MP4 file's bytes: packets copied where that gives the very frames, else encoded.

Runs in a worker process, which writes no file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.types import VideoProbe
from finetune.datasets.decode import opened, read_frames, read_index, refusing
from finetune.datasets.pictures import resize_crop
from finetune.footage.measure import as_shown

RULE = "h264-crf16-1"
"""Names how clips are encoded; part of a clip's name, so that another rule makes other files."""

_OPTIONS = {"crf": "16", "preset": "medium", "threads": "1", "x264-params": "keyint=48:mbtree=0"}
"""The same frames give the same bytes: one thread, and no macroblock tree (``mbtree``), which in PyAV's x264 depends on
what was in memory before. A keyframe at least every 48 frames, for who seeks."""

_COPIED_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""That every decoder finds in an MP4 file."""

_TIME_BASE = Fraction(1, 90_000)

_TOLERANCE_S = 1e-3

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class CutPlan:
    """One clip. Equal plans on equal bytes give equal files."""

    indices: tuple[int, ...]
    """Source frames, ascending."""
    crop: tuple[int, int, int, int]
    """Top, left, height and width of what is kept, in pixels of the upright source."""
    resize_hw: tuple[int, int]
    """To which what is kept is scaled; even, as video codecs want it."""
    times_s: tuple[float, ...]
    """When each frame is shown, from 0."""


def cut(path: Path, header: VideoProbe, plan: CutPlan) -> tuple[bool, bytes]:
    """Make one clip.

    Args:
        path: the video.
        header: what ``decode.probe_file`` said of it.
        plan: which frames, which part of the picture, and when they are shown.

    Returns:
        Whether its packets were copied, and an MP4 file.

    Raises:
        DataError: if a frame cannot be decoded, a picture not encoded, or PyAV has no H.264 encoder.
    """
    copied = _copy(path, header, plan)
    if copied is not None:
        return True, copied
    with refusing(str(path), "the clip cannot be encoded"):
        return False, _encode(_pictures(path, header, plan), plan)


# --- copied -----------------------------------------------------------------------------------------------------------


def _copy(path: Path, header: VideoProbe, plan: CutPlan) -> bytes | None:
    """The plan's packets in a file of their own; None if that would not be exactly the plan's frames.

    They are, if nothing is changed (picture, speed, corrections), the first frame is a keyframe, and no frame of the
    clip rests on one outside. The copy is decoded, and its first and last frame compared with the video's.
    """
    first, last = plan.indices[0], plan.indices[-1]
    is_plain = not header.corrections and header.orientation == 1
    is_whole = plan.crop == (0, 0, header.height, header.width) and plan.resize_hw == (header.height, header.width)
    if not is_plain or not is_whole or plan.indices != tuple(range(first, last + 1)):
        return None
    index = read_index(path)
    if not index.timed or len(index.pts) != header.frames or index.pts[first] not in index.keyframes:
        return None
    shown_s = [(index.pts[frame] - index.pts[first]) * index.time_base for frame in plan.indices]
    if any(abs(a - b) > _TOLERANCE_S for a, b in zip(shown_s, plan.times_s, strict=True)):
        return None
    with suppress(DataError), refusing(str(path)):  # what cannot be copied may well be encoded
        content = _copied_packets(path, (index.pts[first], index.pts[last]), len(plan.indices))
        if content is not None and _same_ends(content, path, header, plan):
            return content
    return None


def _copied_packets(path: Path, span: tuple[int, int], frames: int) -> bytes | None:
    import av

    target = io.BytesIO()
    with opened(path) as (container, stream):
        aspect = stream.sample_aspect_ratio
        if stream.codec_context.name not in _COPIED_CODECS or (aspect and aspect not in (0, 1)):
            return None
        container.seek(span[0], stream=stream, backward=True)
        with av.open(target, "w", format="mp4") as output:
            copy = output.add_stream_from_template(stream)
            copied, begun, shift = 0, False, 0
            for packet in container.demux(stream):
                if packet.pts is None or packet.dts is None or packet.is_discard:
                    if packet.size == 0:
                        break
                    return None
                if not begun:
                    if packet.pts != span[0]:
                        continue
                    begun, shift = True, packet.dts
                if packet.pts < span[0]:  # shown before the keyframe, stored after it: an open group of pictures
                    return None
                if packet.pts > span[1]:
                    if copied < frames:  # a frame of the clip rests on one behind it
                        return None
                    break
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                output.mux(packet)
                copied += 1
    return target.getvalue() if copied == frames else None


def _same_ends(content: bytes, path: Path, header: VideoProbe, plan: CutPlan) -> bool:
    import av

    ends: list[Any] = []
    count = 0
    with av.open(io.BytesIO(content)) as container:
        for frame in container.decode(video=0):
            count += 1
            if frame.is_corrupt:
                return False
            ends = [*ends[:1], frame.to_ndarray(format="rgb24")]
    if count != len(plan.indices):
        return False
    originals = read_frames(path, (plan.indices[0], plan.indices[-1]), header)
    return all(np.array_equal(copied, original) for copied, (_, original) in zip(ends, originals, strict=True))


# --- encoded ----------------------------------------------------------------------------------------------------------


def _pictures(path: Path, header: VideoProbe, plan: CutPlan) -> Iterator[Frame]:
    """The plan's frames, upright, without bars and scaled, RGB uint8 [H, W, 3]; repeated ones as often as planned."""
    top, left, height, width = plan.crop
    counts = {index: plan.indices.count(index) for index in set(plan.indices)}
    if len(read_index(path).pts) != header.frames:
        raise DataError("the file has changed since it was measured", where=str(path), fix="run the command again")
    for index, frame in read_frames(path, plan.indices, header):
        shown = as_shown(frame, header, (header.height, header.width))[top : top + height, left : left + width]
        picture = resize_crop(shown, plan.resize_hw, (0, 0), plan.resize_hw)
        for _ in range(counts[index]):
            yield picture


def _encode(pictures: Iterator[Frame], plan: CutPlan) -> bytes:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    target = io.BytesIO()
    height, width = plan.resize_hw
    try:
        with av.open(target, "w", format="mp4") as output:
            stream: Any = output.add_stream("libx264", rate=_rate(plan), options=_OPTIONS)
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.time_base = stream.codec_context.time_base = _TIME_BASE
            context = stream.codec_context
            # Stated, so that no decoder has to guess: BT.709, limited range.
            context.color_primaries = context.color_trc = context.colorspace = 1
            context.color_range = int(ColorRange.MPEG)
            for picture, time_s in zip(pictures, plan.times_s, strict=True):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                frame.pts, frame.time_base = round(time_s / _TIME_BASE), _TIME_BASE
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    except av.codec.codec.UnknownCodecError:
        raise DataError(
            "this PyAV has no H.264 encoder (libx264)", fix="install PyAV from PyPI: pip install --force-reinstall av"
        ) from None
    return target.getvalue()


def _rate(plan: CutPlan) -> Fraction:
    """Frames per second, as near to the plan's as a header says it."""
    length_s = plan.times_s[-1]
    rate = (len(plan.times_s) - 1) / length_s if length_s > 0 else 1.0
    return Fraction(rate).limit_denominator(1001)
