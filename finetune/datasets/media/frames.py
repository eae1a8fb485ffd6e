"""From a file to a header, and from a header and a plan to pixels; decord or PyAV, chosen per file.

PyAV reads every header. decord decodes where its list of frames equals PyAV's and nothing it is known to get wrong is
in the way; PyAV decodes the rest. Both decode to RGB at source size (decord fails on some resize widths); resizing
here, frame by frame, keeps memory to a few source frames and one clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.datasets.media import decord_reader, pyav_reader
from finetune.datasets.media.containers import check_container, check_frame_size
from finetune.errors import DataError
from finetune.types import ClipPlan, VideoProbe

Frame = NDArray[np.uint8]


def probe_file(path: Path) -> VideoProbe:
    """Read a video's header, the time of every frame, and its first frame.

    Height and width are those of the picture on a display: upright, with square pixels.

    Raises:
        DataError: if the file is missing, empty, cut off, without video, beyond the limits of ``containers``, or if its
            first frame cannot be decoded.
    """
    check_container(path)
    stream = pyav_reader.read_header(path)
    index = pyav_reader.read_index(path)
    square = abs(stream.pixel_aspect - 1) < 1e-6
    height, width = stream.height, max(1, round(stream.width * stream.pixel_aspect))
    check_frame_size(height, width, str(path))
    if stream.rotation in (90, 270):
        height, width = width, height
    if index.timed:
        times = tuple((pts - index.pts[0]) * index.time_base for pts in index.pts)
    else:
        times = tuple(number / (stream.rate or 25.0) for number in index.pts)
    fps = (len(times) - 1) / times[-1] if times[-1] > 0 else stream.rate or 1.0
    reliable = (
        index.timed
        and not index.open_gop
        and stream.container in pyav_reader.SEEKABLE
        and stream.video_streams == 1
        and square
        and height * width * 3 <= decord_reader.MAX_FRAME_BYTES
        and decord_reader.agrees(path, times, (height, width))
    )
    return VideoProbe(len(times), fps, height, width, times, stream.rotation, "decord" if reliable else "pyav")


def read_clip(path: Path, header: VideoProbe, plan: ClipPlan) -> Frame:
    """Decode, turn, resize and crop the frames of one clip.

    Args:
        path: the video.
        header: what ``probe_file`` returned for it; its frame times are not looked at.
        plan: its frames are ascending; repeated ones are decoded once.

    Returns:
        uint8 RGB [3, F, H, W].

    Raises:
        DataError: if one of the frames cannot be decoded, or the file is not the one that was probed.
    """
    check_container(path)
    if header.decoder == "decord":
        try:
            frame_bytes = header.height * header.width * 3
            return _assemble(decord_reader.read_frames(path, plan.frame_indices, header.frames, frame_bytes), 0, plan)
        except decord_reader.DecordError:
            # decord opened the file but not this stretch of it. The whole clip is decoded again, so that no clip mixes
            # two decoders; and of a file that is really damaged PyAV has the clearer message.
            return read_clip(path, replace(header, decoder="pyav"), plan)
    if len(pyav_reader.read_index(path).pts) != header.frames:
        raise DataError("the file has changed since its header was read", where=str(path), fix="run the command again")
    return _assemble(pyav_reader.read_frames(path, plan.frame_indices), header.rotation, plan)


def read_image(path: Path) -> Frame:
    """Load a still image as upright RGB, uint8 [H, W, 3].

    EXIF orientation is applied; transparency is laid on black; 16-bit grey is scaled, not clipped.

    Raises:
        DataError: if the file is not an image, is damaged, or is beyond the limits of ``containers``.
    """
    check_container(path)
    where, fix = str(path), "save it again as PNG or JPEG, or leave it out"
    try:
        with Image.open(path) as image:
            check_frame_size(image.height, image.width, where)  # from the header, before the pixels are read
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith(("I", "F")):
                return _grey(np.asarray(upright), where)
            if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, (0, 0, 0, 255)), upright)
            return np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"not an image that can be read ({error})", where=where, fix=fix) from None


def _grey(values: NDArray[np.generic], where: str) -> Frame:
    """Grey wider than 8 bits. Pillow's own conversion clips at 255, which turns a 16-bit image white."""
    if not np.issubdtype(values.dtype, np.integer) or values.min() < 0 or values.max() > 65535:
        raise DataError("grey values are not 0 to 65535", where=where, fix="save the image with 8 bits per channel")
    return np.repeat(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)


def fit(frame: Frame, resize_hw: tuple[int, int], crop_yx: tuple[int, int], size_hw: tuple[int, int]) -> Frame:
    """Resize an RGB frame [H, W, 3] with an antialiased bicubic filter, then crop it to ``size_hw``.

    The filter is Pillow's, in fixed-point arithmetic: the same pixels on every processor.
    """
    (top, left), (height, width) = crop_yx, size_hw
    if frame.shape[:2] != resize_hw:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        frame = np.asarray(picture.resize((resize_hw[1], resize_hw[0]), Image.Resampling.BICUBIC))
    return frame[top : top + height, left : left + width]


def _assemble(frames: Iterable[tuple[int, Frame]], rotation: int, plan: ClipPlan) -> Frame:
    size_hw = (plan.bucket.height, plan.bucket.width)
    pixels = np.empty((3, len(plan.frame_indices), *size_hw), np.uint8)
    slots = _slots(plan.frame_indices)
    for frame_index, frame in frames:
        upright = np.rot90(frame, -(rotation // 90))
        pixels[:, slots[frame_index]] = fit(upright, plan.resize_hw, plan.crop_yx, size_hw).transpose(2, 0, 1)[:, None]
    return pixels


def _slots(frame_indices: Sequence[int]) -> dict[int, list[int]]:
    """Where in the clip each source frame goes; more than once where it is repeated."""
    slots: dict[int, list[int]] = {}
    for slot, frame_index in enumerate(frame_indices):
        slots.setdefault(frame_index, []).append(slot)
    return slots
