"""From a media file to its header, and from a header and a plan to pixels; in whichever process calls.

PyAV reads every header. decord decodes plain videos (upright, square pixels, progressive, opaque, SDR) where its list
of frames equals PyAV's and nothing it is known to get wrong is in the way; PyAV decodes the rest. The two give the same
pixels, to a level or two, so which of them it is stands in no cache address. Both decode to RGB at source size (decord
fails on some resize widths); resizing here, frame by frame, keeps memory to a few source frames and one clip.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.core.errors import DataError
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets import video_streams
from finetune.datasets.colour import to_bt709
from finetune.datasets.geometry import MAX_ASPECT_MISMATCH, resize_and_crop
from finetune.datasets.media_files import (
    MAX_FPS,
    MAX_PIXELS,
    as_times,
    check_container,
    check_frame_size,
    check_regular,
    check_times,
)
from finetune.datasets.video_streams import SDR, colours_by_number
from finetune.datasets.worker import too_much_memory

Frame = NDArray[np.uint8]

# --- videos -----------------------------------------------------------------------------------------------------------

_USUAL_FPS = 25.0
"""Of a file that stores neither times nor a rate."""


def probe_file(path: Path) -> VideoProbe:
    """Read a video's header, the time of every frame, and its first frame.

    Height and width are those of the picture on a display: upright, with square pixels.

    Raises:
        DataError: if the file is missing, empty, cut off, without video, beyond the limits of ``media_files``, or if
            its first frame cannot be decoded.
    """
    family = check_container(path)
    stream = video_streams.read_header(path)
    index = video_streams.read_index(path)
    plain = stream.orientation == 1 and not stream.corrections and abs(stream.pixel_aspect - 1) < 1e-6
    height, width = video_streams.shown_hw(stream.height, stream.width, stream.pixel_aspect, stream.orientation)
    check_frame_size(height, width, str(path))
    if index.timed:
        times = as_times([(pts - index.pts[0]) * index.time_base for pts in index.pts])
    else:
        rate = stream.rate or _USUAL_FPS
        times = as_times([number / rate for number in index.pts])
    check_times(times, str(path))
    fps = (len(times) - 1) / times[-1] if times[-1] > 0 else min(stream.rate or 1.0, MAX_FPS)
    reliable = (
        # decord's FFmpeg has no list of allowed formats: what it is given has to begin like one that both know.
        family in ("mp4", "matroska")
        and index.timed
        and not index.open_gop
        and stream.container in video_streams.SEEKABLE
        and stream.video_streams == 1
        and plain
        and height * width * 3 <= DECORD_MAX_FRAME_BYTES
        and decord_agrees(path, times, (height, width))
    )
    decoder = "decord" if reliable else "pyav"
    return VideoProbe(len(times), fps, height, width, times, stream.orientation, decoder, stream.corrections)


def read_clip(path: Path, probe: VideoProbe, plan: ClipPlan) -> Frame:
    """Decode, turn, resize and crop the frames of one clip.

    Args:
        path: the video.
        probe: what ``probe_file`` returned for it; its frame times are not looked at.
        plan: its frames are ascending; repeated ones are decoded once.

    Returns:
        uint8 RGB [3, F, H, W].

    Raises:
        DataError: if one of the frames cannot be decoded, or the file is not the one that was probed.
    """
    check_container(path)
    if len(video_streams.read_index(path).pts) != probe.frames:
        raise DataError("the file has changed since its header was read", where=str(path), fix="run the command again")
    if probe.decoder == "decord":
        try:
            video_streams.check_frames(path, plan.frame_indices, probe)
            frames = read_decord_frames(path, plan.frame_indices, probe.frames, (probe.height, probe.width))
            return _assemble(frames, 1, plan)
        except DecordError:
            # decord opened the file but not this stretch of it. The whole clip is decoded again, so that no clip mixes
            # two decoders; and of a file that is really damaged PyAV has the clearer message.
            probe = replace(probe, decoder="pyav")
    return _assemble(video_streams.read_frames(path, plan.frame_indices, probe), probe.orientation, plan)


def _assemble(frames: Iterable[tuple[int, Frame]], orientation: int, plan: ClipPlan) -> Frame:
    size_hw = (plan.bucket.height, plan.bucket.width)
    pixels = np.empty((3, len(plan.frame_indices), *size_hw), np.uint8)
    positions: dict[int, list[int]] = {}  # in the clip, of each source frame: several where it is repeated
    for position, frame_index in enumerate(plan.frame_indices):
        positions.setdefault(frame_index, []).append(position)
    for frame_index, frame in frames:
        cut = resize_crop(turn_upright(frame, orientation), plan.resize_hw, plan.crop_yx, size_hw)
        pixels[:, positions[frame_index]] = cut.transpose(2, 0, 1)[:, None]
    return pixels


def turn_upright(frame: Frame, orientation: int) -> Frame:
    """Turn and mirror a stored frame [H, W, 3] as one of EXIF's eight orientations asks."""
    if orientation >= 5:
        frame = frame.transpose(1, 0, 2)
    across, down = (-1 if orientation in flipped else 1 for flipped in ((2, 3, 6, 7), (3, 4, 7, 8)))
    return frame[::down, ::across]


def resize_crop(frame: Frame, resize_hw: tuple[int, int], crop_yx: tuple[int, int], size_hw: tuple[int, int]) -> Frame:
    """Resize an RGB frame [H, W, 3] with an antialiased bicubic filter, then crop it to ``size_hw``.

    The filter is Pillow's, in fixed-point arithmetic: the same pixels on every processor.
    """
    (top, left), (height, width) = crop_yx, size_hw
    if frame.shape[:2] != resize_hw:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        frame = np.asarray(picture.resize((resize_hw[1], resize_hw[0]), Image.Resampling.BICUBIC))
    return frame[top : top + height, left : left + width]


# --- decord -----------------------------------------------------------------------------------------------------------
#
# It gives *wrong* frames without an error after a seek into an open group of pictures (x265's default), in transport
# streams, and where an edit list hides frames; `probe_file` keeps it from those. It also decodes ahead without limit
# while nobody reads: a reader left idle in a 7 s clip of 1080p held 1.3 GB. So a reader here lives for one batch, a
# batch has a size, and large pictures go to PyAV.

DECORD_MAX_FRAME_BYTES = 8 * 2**20
"""1080p has 6 MiB. Of larger frames a batch would hold so few that most of the time went into seeking."""

_BATCH_BYTES = 256 * 2**20

_TIME_TOLERANCE_S = 1e-3


class DecordError(Exception):
    """decord cannot do it: it is missing, or cannot open the file, or failed at a frame."""


def decord_agrees(path: Path, frame_times_s: Sequence[float], size_hw: tuple[int, int]) -> bool:
    """Whether decord opens the file and lists the same frames: as many, at the same times, of the same upright size."""
    try:
        reader = open_decord(path)
        if len(reader) != len(frame_times_s) or tuple(reader[0].shape[:2]) != size_hw:
            return False
        starts_s = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0].astype(np.float64)
    except DecordError:
        return False
    except _decord_failures():
        return False
    # decord's times are float32: past two hours their step is itself half a millisecond.
    tolerance_s = _TIME_TOLERANCE_S + 1e-6 * frame_times_s[-1]
    return bool(np.all(np.abs(starts_s - starts_s[0] - np.asarray(frame_times_s)) <= tolerance_s))


def read_decord_frames(
    path: Path, frame_indices: Sequence[int], frames: int, size_hw: tuple[int, int]
) -> Iterator[tuple[int, Frame]]:
    """Decode the named frames upright (decord turns them itself), a batch at a time.

    Args:
        path: a video that ``decord_agrees`` accepted.
        frame_indices: ascending frame numbers; repeated ones are given once.
        frames: how many frames the file had when it was probed.
        size_hw: height and width of its upright frames, which decide how many are in a batch.

    Yields:
        The frame's number and its RGB pixels, uint8 [H, W, 3].

    Raises:
        DecordError: if decord cannot.
    """
    remaining = sorted(set(frame_indices))
    step = max(1, _BATCH_BYTES // (size_hw[0] * size_hw[1] * 3))
    for start in range(0, len(remaining), step):
        batch = remaining[start : start + step]
        reader = open_decord(path)
        if len(reader) != frames:
            raise DecordError(f"{len(reader)} frames, not {frames}")
        try:
            pixels = reader.get_batch(batch).asnumpy()
        except _decord_failures() as error:
            raise DecordError(str(error)) from error
        if pixels.shape[1:3] != size_hw:
            raise DecordError(f"frames of {pixels.shape[1:3]}, not {size_hw}")
        del reader  # before the consumer takes its time
        yield from zip(batch, pixels, strict=True)


def open_decord(path: Path) -> Any:
    """A ``decord.VideoReader``. Raises DecordError."""
    try:
        import decord
    except (ImportError, OSError) as error:  # there is no wheel for Arm
        raise DecordError(f"decord is not installed: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # Absolute, because FFmpeg takes what stands before a colon for a protocol.
        return decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0), num_threads=2)  # noqa: PTH100
    except _decord_failures() as error:
        raise DecordError(str(error)) from error


def _decord_failures() -> tuple[type[Exception], ...]:
    """What decord raises: its own class, but also RuntimeError for a file, AssertionError for a frame count,
    UnicodeError for a name that is not UTF-8.
    """
    import decord

    return decord.DECORDError, RuntimeError, AssertionError, IndexError, OSError, UnicodeError


# --- still images -----------------------------------------------------------------------------------------------------

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
"""What Pillow may take a file for. It knows forty formats by their content, whatever a file is called; one of them
(EPS) runs another program."""

_FIX = "save it again as PNG or JPEG, or leave it out"


def read_image(path: Path) -> Frame:
    """Load a still image as upright RGB, uint8 [H, W, 3].

    EXIF orientation is applied; HDR and wide colours that AVIF or PNG state by number become SDR; transparency is laid
    on black; 16-bit grey is scaled, not clipped. Of an animation the first picture is taken.

    Raises:
        DataError: if the file is not an image of ``IMAGE_FORMATS``, is damaged, or is too large.
    """
    where = str(path)
    check_regular(path)
    try:
        _check_webp_canvas(path)
        with warnings.catch_warnings():
            # Pillow only warns between its limit and twice that; our own limit, below both, is checked right after.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=IMAGE_FORMATS)
        with image:
            check_frame_size(image.height, image.width, where)  # from the header, before the pixels are read
            return _to_rgb(image, _stated_colours(path, image.format), where)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        what = f"a picture larger than is read, at most {MAX_PIXELS:,} pixels ({error})"
        raise DataError(what, where=where, fix=_FIX) from None
    except MemoryError:
        raise too_much_memory(where) from None
    except Exception as error:  # of a damaged file Pillow's parsers raise anything: struct.error, KeyError, EOFError...
        reason = str(error) or type(error).__name__
        raise DataError(f"not an image that can be read ({reason:.300})", where=where, fix=_FIX) from None


def read_fitted_image(path: Path, bucket: Bucket) -> Frame:
    """Load a still image and cut it to a bucket's height and width by the rule of frames.

    Returns:
        uint8 RGB [3, bucket.height, bucket.width].

    Raises:
        DataError: as ``read_image``, or if too little of the picture would remain.
    """
    fitted = fit_to_bucket(read_image(path), bucket, str(path))
    return np.ascontiguousarray(fitted.transpose(2, 0, 1))


def fit_to_bucket(picture: Frame, bucket: Bucket, where: str) -> Frame:
    """Resize a picture [H, W, 3] to cover a bucket and crop its centre. Raises DataError for another shape altogether.

    A picture one pixel high and a million wide is small; enlarged until it covers a bucket it fills the memory.
    """
    height, width = picture.shape[:2]
    resize_hw, crop_yx = resize_and_crop((height, width), bucket)
    kept = bucket.height * bucket.width / (resize_hw[0] * resize_hw[1])
    if kept * MAX_ASPECT_MISMATCH < 1:
        raise DataError(
            f"{bucket} would keep {kept:.1%} of a picture of {height}x{width}",
            where=where,
            fix="cut the picture to the clip's shape, or leave it out",
        )
    return resize_crop(picture, resize_hw, crop_yx, (bucket.height, bucket.width))


def _stated_colours(path: Path, kind: str | None) -> tuple[str, str]:
    """What an AVIF's ``colr`` box or a PNG's ``cICP`` chunk says; SDR of BT.709 where there is none."""
    with path.open("rb") as file:
        head = file.read(2**16)
    name, size = {"AVIF": (b"colrnclx", 2), "PNG": (b"\0\0\0\4cICP", 1)}.get(kind or "", (b"", 0))
    at = head.find(name) + len(name)
    if not size or name not in head or len(head) < at + 3 * size:
        return SDR
    primaries, transfer, matrix = (int.from_bytes(head[at + i * size : at + (i + 1) * size], "big") for i in range(3))
    return colours_by_number(transfer, primaries, matrix)


def _to_rgb(image: Image.Image, colours: tuple[str, str], where: str) -> Frame:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return _wide_grey(np.asarray(upright), where)
    transparent = upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info
    if transparent:
        upright = upright.convert("RGBA")
    if colours != SDR:
        alpha = upright.getchannel("A") if transparent else None
        upright = Image.fromarray(to_bt709(np.asarray(upright.convert("RGB"), np.uint16) * 256, *colours))
        if alpha is not None:
            upright.putalpha(alpha)
    if transparent:
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, (0, 0, 0, 255)), upright)
    return np.asarray(upright.convert("RGB"))


def _wide_grey(values: NDArray[np.generic], where: str) -> Frame:
    """Grey wider than 8 bits. Pillow's own conversion clips at 255, which turns a 16-bit image white."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise DataError("grey values are not 0 to 65535", where=where, fix="save the image with 8 bits per channel")
    return np.repeat(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def _check_webp_canvas(path: Path) -> None:
    """Refuse a WebP image by the canvas its header states: Pillow up to 12 allocates that, twice, to open the file."""
    with path.open("rb") as file:
        head = file.read(30)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return
    if head[12:16] == b"VP8X":
        width, height = (1 + int.from_bytes(head[at : at + 3], "little") for at in (24, 27))
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(head[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    check_frame_size(height, width, str(path))
