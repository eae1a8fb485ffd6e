"""Frames to files: mp4, animated GIF, and PNG sheets that put videos side by side.

Frames are uint8 RGB ``[F, H, W, 3]`` here, the layout of every image library, not the ``[C, F, H, W]`` of tensors.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from finetune.core.errors import FinetuneError
from finetune.core.files import atomic_write_bytes

if TYPE_CHECKING:
    from PIL import Image, ImageDraw


Frames = npt.NDArray[np.uint8]
"""One video, uint8 RGB, [F, H, W, 3]."""

_GAP = 4

_BACKGROUND = (255, 255, 255)

_INK = (20, 20, 20)

_FONT_SIZE = 14

_LEAST_CELL = 96
"""Cells narrower than this many pixels are enlarged by a whole factor, so that a 64-pixel video can be seen."""


def write_mp4(path: Path, frames: Frames, fps: float) -> Path:
    """Write an H.264 file that every player opens (yuv420p), whole or not at all.

    yuv420p halves the colour planes, so an odd height or width is made even by repeating the last row or column.

    Args:
        path: ends in ``.mp4``; an existing file is replaced.
        frames: uint8 [F, H, W, 3].
        fps: frames per second.

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
            output_params=["-crf", "17", "-movflags", "+faststart"],
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
    for label, videos in rows:
        if len(videos) != len(headings):
            raise ValueError(f"{label!r} has {len(videos)} videos for {len(headings)} headings")
        for frames in videos:
            _check_frames(frames)
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    strips = [(label, [_strip(frames, columns) for frames in videos]) for label, videos in rows]
    group_width = max(strip.width for _, group in strips for strip in group)
    line = _FONT_SIZE + 2 * _GAP
    top = line if any(headings) else 0
    width = len(headings) * (group_width + 3 * _GAP) + _GAP
    height = top + sum(line + max(strip.height for strip in group) + _GAP for _, group in strips)
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)

    def left(group: int) -> int:
        return _GAP + group * (group_width + 3 * _GAP)

    for group, heading in enumerate(headings):
        draw.text((left(group), _GAP), _fitted(draw, heading, group_width, font), fill=_INK, font=font)
    y = top
    for label, videos_strips in strips:
        draw.text((_GAP, y + _GAP), _fitted(draw, label, width - 2 * _GAP, font), fill=_INK, font=font)
        y += line
        for group, strip in enumerate(videos_strips):
            sheet.paste(strip, (left(group), y))
        y += max(strip.height for strip in videos_strips) + _GAP
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())
    return path


def _strip(frames: Frames, columns: int) -> Image.Image:
    """Up to ``columns`` frames in one row, each pixel enlarged by a whole factor where frames are tiny."""
    from PIL import Image

    count = min(columns, len(frames))
    chosen = frames[np.linspace(0, len(frames) - 1, count).round().astype(int)]
    factor = -(-_LEAST_CELL // chosen.shape[2])
    big = chosen.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = big.shape[1:3]
    strip = Image.new("RGB", (count * (width + _GAP) - _GAP, height), _BACKGROUND)
    for column, frame in enumerate(big):
        strip.paste(Image.fromarray(frame), (column * (width + _GAP), 0))
    return strip


def _fitted(draw: ImageDraw.ImageDraw, text: str, width: int, font: object) -> str:
    """``text`` on one line, cut with an ellipsis where it is wider than ``width`` pixels."""
    text = " ".join(text.split())
    if draw.textlength(text, font=font) <= width:  # type: ignore[arg-type]
        return text
    while text and draw.textlength(text + "...", font=font) > width:  # type: ignore[arg-type]
        text = text[:-1]
    return text + "..."


def _check_frames(frames: Frames) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are uint8 [F, H, W, 3]; got {frames.dtype} {list(frames.shape)}")
