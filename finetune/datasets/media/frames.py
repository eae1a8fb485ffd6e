"""From a file to a header, and from a header and a plan to pixels; decord or PyAV, chosen per file.

PyAV reads every header. decord decodes plain videos (upright, square pixels, progressive, opaque, SDR) where its list
of frames equals PyAV's and nothing it is known to get wrong is in the way; PyAV decodes the rest. The two give the same
pixels, to a level or two, so which of them it is stands in no cache address. Both decode to RGB at source size (decord
fails on some resize widths); resizing here, frame by frame, keeps memory to a few source frames and one clip.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finetune.datasets.media import decord_reader, pyav_reader
from finetune.datasets.media.containers import check_container
from finetune.datasets.media.limits import MAX_FPS, as_times, check_frame_size, check_times
from finetune.datasets.media.pictures import read_image
from finetune.errors import DataError
from finetune.types import Bucket, ClipPlan, VideoProbe

Frame = NDArray[np.uint8]

_USUAL_FPS = 25.0
"""Of a file that stores neither times nor a rate."""


def probe_file(path: Path) -> VideoProbe:
    """Read a video's header, the time of every frame, and its first frame.

    Height and width are those of the picture on a display: upright, with square pixels.

    Raises:
        DataError: if the file is missing, empty, cut off, without video, beyond ``limits``, or if its first frame
            cannot be decoded.
    """
    family = check_container(path)
    stream = pyav_reader.read_header(path)
    index = pyav_reader.read_index(path)
    plain = stream.orientation == 1 and not stream.corrections and abs(stream.pixel_aspect - 1) < 1e-6
    height, width = pyav_reader.shown_hw(stream.height, stream.width, stream.pixel_aspect, stream.orientation)
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
        and stream.container in pyav_reader.SEEKABLE
        and stream.video_streams == 1
        and plain
        and height * width * 3 <= decord_reader.MAX_FRAME_BYTES
        and decord_reader.agrees(path, times, (height, width))
    )
    decoder = "decord" if reliable else "pyav"
    return VideoProbe(len(times), fps, height, width, times, stream.orientation, decoder, stream.corrections)


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
    where = str(path)
    if len(pyav_reader.read_index(path).pts) != header.frames:
        raise DataError("the file has changed since its header was read", where=where, fix="run the command again")
    if header.decoder == "decord":
        try:
            shown_hw = header.height, header.width
            pyav_reader.check_frames(path, plan.frame_indices, header)
            return _assemble(decord_reader.read_frames(path, plan.frame_indices, header.frames, shown_hw), 1, plan)
        except decord_reader.DecordError:
            # decord opened the file but not this stretch of it. The whole clip is decoded again, so that no clip mixes
            # two decoders; and of a file that is really damaged PyAV has the clearer message.
            return read_clip(path, replace(header, decoder="pyav"), plan)
    return _assemble(pyav_reader.read_frames(path, plan.frame_indices, header), header.orientation, plan)


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
    # Brings pydantic, half a second, which a worker that only meets videos need not wait for.
    from finetune.geometry import MAX_ASPECT_MISMATCH, resize_and_crop

    height, width = picture.shape[:2]
    resize_hw, crop_yx = resize_and_crop((height, width), bucket)
    kept = bucket.height * bucket.width / (resize_hw[0] * resize_hw[1])
    if kept * MAX_ASPECT_MISMATCH < 1:
        raise DataError(
            f"{bucket} would keep {kept:.1%} of a picture of {height}x{width}",
            where=where,
            fix="cut the picture to the clip's shape, or leave it out",
        )
    return fit(picture, resize_hw, crop_yx, (bucket.height, bucket.width))


def fit(frame: Frame, resize_hw: tuple[int, int], crop_yx: tuple[int, int], size_hw: tuple[int, int]) -> Frame:
    """Resize an RGB frame [H, W, 3] with an antialiased bicubic filter, then crop it to ``size_hw``.

    The filter is Pillow's, in fixed-point arithmetic: the same pixels on every processor.
    """
    (top, left), (height, width) = crop_yx, size_hw
    if frame.shape[:2] != resize_hw:
        picture = Image.fromarray(np.ascontiguousarray(frame))
        frame = np.asarray(picture.resize((resize_hw[1], resize_hw[0]), Image.Resampling.BICUBIC))
    return frame[top : top + height, left : left + width]


def upright(frame: Frame, orientation: int) -> Frame:
    """Turn and mirror a stored frame [H, W, 3] as one of EXIF's eight orientations asks."""
    if orientation >= 5:
        frame = frame.transpose(1, 0, 2)
    across, down = (-1 if orientation in flipped else 1 for flipped in ((2, 3, 6, 7), (3, 4, 7, 8)))
    return frame[::down, ::across]


def _assemble(frames: Iterable[tuple[int, Frame]], orientation: int, plan: ClipPlan) -> Frame:
    size_hw = (plan.bucket.height, plan.bucket.width)
    pixels = np.empty((3, len(plan.frame_indices), *size_hw), np.uint8)
    slots = _slots(plan.frame_indices)
    for frame_index, frame in frames:
        cut = fit(upright(frame, orientation), plan.resize_hw, plan.crop_yx, size_hw)
        pixels[:, slots[frame_index]] = cut.transpose(2, 0, 1)[:, None]
    return pixels


def _slots(frame_indices: Sequence[int]) -> dict[int, list[int]]:
    """Where in the clip each source frame goes; more than once where it is repeated."""
    slots: dict[int, list[int]] = {}
    for slot, frame_index in enumerate(frame_indices):
        slots.setdefault(frame_index, []).append(slot)
    return slots
