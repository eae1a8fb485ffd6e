"""Frames to files: mp4, animated GIF, and PNG sheets that put videos side by side.

Frames are uint8 RGB ``[F, H, W, 3]`` here, the layout of every image library, not the ``[C, F, H, W]`` of tensors.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune.core.errors import FinetuneError
from finetune.core.files import atomic_write_bytes

Frames = npt.NDArray[np.uint8]
"""One video, uint8 RGB, [F, H, W, 3]."""

_GAP = 4

_WHITE = 255

_INK = (20, 20, 20)

_FONT_SIZE = 14

_LEAST_CELL = 96
"""Cells narrower than this many pixels are enlarged by a whole factor, so that a 64-pixel video can be seen."""

_MOST_CELL = 320
"""Cells wider than this are made smaller in a sheet: six of a 720p video would be wider than any screen."""

_MOST_WIDTH = 3840
"""Of a grid that plays: what players decode in hardware."""


def write_mp4(path: Path, frames: Frames, fps: float, metadata: Mapping[str, str] | None = None) -> Path:
    """Write an H.264 file that every player opens (yuv420p), whole or not at all.

    yuv420p halves the colour planes, so an odd height or width is made even by repeating the last row or column.

    Args:
        path: ends in ``.mp4``; an existing file is replaced.
        frames: uint8 [F, H, W, 3].
        fps: frames per second.
        metadata: tags of the container that MP4 knows, such as ``title`` and ``comment``.

    Raises:
        ValueError: for frames of another type or shape, or another suffix.
        FinetuneError: when ffmpeg fails or the disk is full.
    """
    _check_frames(frames)
    if path.suffix != ".mp4":
        raise ValueError(f"{path.name} does not end in .mp4")
    if not fps > 0:
        raise ValueError(f"fps is {fps}")
    import imageio_ffmpeg

    height, width = frames.shape[1:3]
    even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = [word for name, text in (metadata or {}).items() for word in ("-metadata", f"{name}={text}")]
    # ffmpeg chooses the container by the suffix, so the partial file keeps it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial.mp4")
    try:
        writer = imageio_ffmpeg.write_frames(
            str(partial),
            (even.shape[2], even.shape[1]),
            fps=fps,
            codec="libx264",
            pix_fmt_out="yuv420p",
            quality=None,
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-crf", "17", "-movflags", "+faststart", *tags],
        )
        writer.send(None)
        try:
            for frame in even:
                writer.send(np.ascontiguousarray(frame))
        finally:
            writer.close()
        if not partial.is_file() or partial.stat().st_size == 0:
            raise OSError("ffmpeg wrote nothing")
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise FinetuneError(
            "the video could not be written",
            where=f"{path}: {error}",
            fix="check that the disk has room and that the folder can be written to",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def gif_bytes(frames: Frames, fps: float) -> bytes:
    """An animated GIF that repeats for ever; times are rounded to its whole hundredths of a second.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: frames per second; browsers play nothing faster than 50.

    Raises:
        ValueError: for frames of another type or shape.
    """
    _check_frames(frames)
    from PIL import Image

    first, *rest = (Image.fromarray(frame) for frame in frames)
    buffer = io.BytesIO()
    first.save(buffer, format="GIF", save_all=True, append_images=rest, duration=max(20, round(100 / fps) * 10), loop=0)
    return buffer.getvalue()


def contact_sheet(rows: Sequence[tuple[str, Frames]], path: Path, *, columns: int = 6) -> Path:
    """A PNG with one labelled row per video: ``columns`` frames spread evenly from the first to the last.

    Raises:
        ValueError: for no rows, or frames of another type or shape.
    """
    return side_by_side([(label, [frames]) for label, frames in rows], [""], path, columns=columns)


def side_by_side(
    rows: Sequence[tuple[str, Sequence[Frames]]], headings: Sequence[str], path: Path, *, columns: int = 4
) -> Path:
    """A PNG that compares: one labelled row per prompt, and in it one group of ``columns`` frames per heading.

    Args:
        rows: (label, one video per heading); videos may differ in size and length.
        headings: such as ``["base", "with the adapter"]``; all empty for no heading line.
        path: the PNG, written whole or not at all.
        columns: frames per video, spread evenly from the first to the last; a shorter video shows all it has.

    Raises:
        ValueError: for no rows, a row with another number of videos than headings, or frames of another type or shape.
    """
    if not rows or not headings:
        raise ValueError("there is no video to show")
    strips = []
    for label, videos in rows:
        if len(videos) != len(headings):
            raise ValueError(f"{label!r} has {len(videos)} videos for {len(headings)} headings")
        strips.append([_strip(frames, columns) for frames in videos])
    group_width = max(strip.shape[1] for group in strips for strip in group)
    lines = [_beside([_text_line(heading, group_width) for heading in headings], group_width)] if any(headings) else []
    for (label, _), group in zip(rows, strips, strict=True):
        lines += [_text_line(label, group_width * len(headings)), _beside(group, group_width)]
    from PIL import Image

    width = max(line.shape[1] for line in lines)
    buffer = io.BytesIO()
    Image.fromarray(np.vstack([_widened(line, width) for line in lines])).save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())
    return path


def labelled_grid(cells: Sequence[tuple[str, Frames]], *, columns: int = 4) -> Frames:
    """Videos beside each other as one, each below its label; after every ``columns`` of them begins another line.

    Args:
        cells: (label, video), all of one size and length.
        columns: the most in one line, which is no wider than ``_MOST_WIDTH``.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        ValueError: for videos that differ in size or length, or none.
    """
    if len({frames.shape for _, frames in cells}) != 1:
        raise ValueError("the videos of a grid are of one size and length")
    large = [(label, _enlarged(frames)) for label, frames in cells]
    width = large[0][1].shape[2] + 2 * _GAP
    columns = max(1, min(columns, _MOST_WIDTH // width))
    images = []
    for label, frames in large:
        line = np.broadcast_to(_text_line(label, width), (len(frames), _FONT_SIZE + 2 * _GAP, width, 3))
        padded = np.pad(frames, ((0, 0), (0, _GAP), (_GAP, _GAP), (0, 0)), constant_values=_WHITE)
        images.append(np.concatenate([line, padded], axis=1))
    images += [np.full_like(images[0], _WHITE)] * (-len(images) % columns if len(images) > columns else 0)
    lines = [np.concatenate(images[first : first + columns], axis=2) for first in range(0, len(images), columns)]
    grid: Frames = np.concatenate(lines, axis=1)
    return grid


def _enlarged(frames: Frames) -> Frames:
    factor = -(-_LEAST_CELL // frames.shape[2])
    large: Frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    return large


def _reduced(frames: Frames) -> Frames:
    from PIL import Image

    size = _MOST_CELL, max(1, round(frames.shape[1] * _MOST_CELL / frames.shape[2]))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS)) for frame in frames])


def _strip(frames: Frames, columns: int) -> Frames:
    """Up to ``columns`` frames in one row, enlarged by a whole factor where they are tiny, smaller where large."""
    _check_frames(frames)
    frames = frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)]
    large = _enlarged(frames) if frames.shape[2] <= _MOST_CELL else _reduced(frames)
    gaps = ((0, 0), (0, _GAP), (0, _GAP), (0, 0))
    strip: Frames = np.concatenate(np.pad(large, gaps, constant_values=_WHITE), axis=1)
    return strip


def _text_line(text: str, width: int) -> Frames:
    """``text`` on one line, cut off where it is wider than ``width`` pixels."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, _FONT_SIZE + 2 * _GAP), (_WHITE, _WHITE, _WHITE))
    font = ImageFont.load_default(_FONT_SIZE)
    ImageDraw.Draw(image).text((_GAP, _GAP), " ".join(text.split()), fill=_INK, font=font)
    return np.asarray(image)


def _beside(images: Sequence[Frames], width: int) -> Frames:
    """Images in one row, each widened to ``width``, all as high as the highest."""
    height = max(image.shape[0] for image in images)
    heights = [((0, height - image.shape[0]), (0, 0), (0, 0)) for image in images]
    padded = [np.pad(image, pad, constant_values=_WHITE) for image, pad in zip(images, heights, strict=True)]
    return np.hstack([_widened(image, width + 2 * _GAP) for image in padded])


def _widened(image: Frames, width: int) -> Frames:
    return np.pad(image, ((0, 0), (0, width - image.shape[1]), (0, 0)), constant_values=_WHITE)


def _check_frames(frames: Frames) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [F, H, W, 3]; got {frames.dtype} {list(frames.shape)}")
