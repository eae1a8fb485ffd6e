"""What a video file may claim, and whether its first bytes are a video's, whole: before FFmpeg opens it.

A download that stopped half-way still opens, and would quietly become a shorter video; a login page saved as ``.mp4``
gives an error that nobody understands; a few hundred bytes can promise a thousand million frames.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from finetune.core.errors import DataError
from finetune.datasets.pictures import COPY_AGAIN, check_regular, unreadable

# --- claims -----------------------------------------------------------------------------------------------------------

MAX_FRAMES = 2_000_000
"""More frames than nine hours at 60 per second: a longer video is refused."""

MAX_FPS = 1000.0
"""The most that a configuration can ask for, and more than cameras play back at."""

MAX_DURATION_S = 7 * 24 * 3600.0
"""A week. ``span: all`` lays clips over the whole length, so a false time stamp would cost memory, not only sense."""

MAX_STREAMS = 128
"""Tracks of any kind in one file; a film with every language has fifty."""


def check_frame_count(frames: int, where: str) -> None:
    """Refuse more than ``MAX_FRAMES``. Raises DataError."""
    if frames > MAX_FRAMES:
        raise DataError(
            f"the file has more than {MAX_FRAMES:,} frames, the most that are read",
            where=where,
            fix="split the video into shorter files, or leave it out",
        )


def check_times(times_s: Sequence[float], where: str) -> None:
    """Refuse presentation times that no camera made: not ascending from zero, over a week, or too close together.

    Args:
        times_s: of every frame, in seconds from the first.
        where: the file.
    """
    last = times_s[-1]
    fault = ""
    if not math.isfinite(last) or last > MAX_DURATION_S:
        fault = f"span {last:.4g} s; at most {MAX_DURATION_S:,.0f} s (a week) are read"
    elif len(times_s) - 1 > max(MAX_FPS * last, 0):
        rate = (len(times_s) - 1) / last if last > 0 else math.inf
        fault = f"say {rate:.4g} frames per second; at most {MAX_FPS:g} are read"
    elif times_s[0] != 0 or any(a >= b for a, b in pairwise(times_s)):
        fault = "do not ascend"
    if fault:
        fix = "re-encode it with a constant frame rate, or leave it out"
        raise DataError(f"its time stamps {fault}", where=where, fix=fix)


# --- first bytes ------------------------------------------------------------------------------------------------------

_MP4_BOXES = {
    *(b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"junk", b"uuid"),
    *(b"pnot", b"PICT", b"prfl", b"udta", b"sidx", b"emsg", b"mfra", b"pdin"),
}
"""What an MP4 or MOV file may begin with."""

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"

_FOREIGN: Mapping[str, bytes | tuple[bytes, ...]] = {
    "a PNG image": b"\x89PNG\r\n\x1a\n",
    "a JPEG image": b"\xff\xd8\xff",
    "a GIF image": b"GIF8",
    "a BMP image": b"BM",
    "a TIFF image": (b"II*\0", b"MM\0*"),
    "a zip archive": (b"PK\x03\x04", b"PK\x05\x06"),
    "a gzip archive": b"\x1f\x8b",
    "a 7-Zip archive": b"7z\xbc\xaf\x27\x1c",
    "a RAR archive": b"Rar!",
    "a PDF document": b"%PDF",
    "the pointer of a Git LFS file that was not fetched": b"version https://git-lfs",
}

_TEXTS: Mapping[str, bytes | tuple[bytes, ...]] = {
    "a playlist": b"#extm3u",
    "a concat script": b"ffconcat",
    "a web page": (b"<!doctype html", b"<html"),
    "a streaming manifest": b"<mpd",
    "an SVG drawing": b"<svg",
    "an XML document": b"<?xml",
    "a JSON document": b"{",
}
"""After white space and in any case."""


def check_container(path: Path) -> None:
    """Refuse a file that is empty, no video, or ends before its own header says. Raises DataError."""
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            is_mp4 = head[4:8] in _MP4_BOXES
            stated = _mp4_size(file, path) if is_mp4 else _stated_size(head)
    except OSError as error:
        raise unreadable(error, path) from None
    if stated is not None and stated > size:
        what = f"the file is cut off: its header speaks of {stated:,} bytes, it has {size:,}"
        raise DataError(what, where=str(path), fix=COPY_AGAIN)
    if not is_mp4 and (foreign := _foreign(head)):
        what = f"not a video: it begins like {foreign}"
        raise DataError(what, where=str(path), fix="download it again, or take it out")


def is_mp4_or_matroska(path: Path) -> bool:
    """Whether a file begins like one of these, whatever FFmpeg takes it for."""
    with path.open("rb") as file:
        head = file.read(8)
    return head[4:] in _MP4_BOXES or head.startswith(_EBML)


def _foreign(head: bytes) -> str | None:
    """What a file is that is no video, by its first bytes; None if they say nothing."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    named = [name for name, starts in _FOREIGN.items() if head.startswith(starts)]
    named += [name for name, starts in _TEXTS.items() if text.startswith(starts)]
    return next(iter(named), None)


def _mp4_size(file: BinaryIO, path: Path) -> int:
    """Where the last of an MP4 file's outermost boxes ends. Raises DataError if none of them is the index."""
    start, end, has_index = 0, file.seek(0, 2), False
    while start + 8 <= end:
        file.seek(start)
        length, kind, long_length = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        if length == 1:
            length = long_length
        elif length == 0:  # up to the end of the file
            length = end - start
        if length < 8:  # padding
            break
        has_index |= kind == b"moov"
        start += length
    if start <= end and not has_index:
        what = "the file has no index (moov): it is cut off, or its recording was never finished"
        raise DataError(what, where=str(path), fix=COPY_AGAIN)
    return start


def _stated_size(head: bytes) -> int | None:
    """The size in bytes that an AVI or Matroska header states, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return 8 + int.from_bytes(head[4:8], "little")
    if head.startswith(_EBML):
        offset, length = _ebml_size(head, 4)
        segment = offset + (length or 0)
        if length is not None and head[segment : segment + 4] == _SEGMENT:
            offset, length = _ebml_size(head, segment + 4)
            return None if length is None else offset + length
    return None


def _ebml_size(head: bytes, at: int) -> tuple[int, int | None]:
    """Where the element's body starts and how long it is; None for the "unknown" of a live recording."""
    width = 9 - head[at].bit_length() if at < len(head) and head[at] else 0
    if not 1 <= width <= 8 or at + width > len(head):
        return at, None
    value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return at + width, None if value == (1 << 7 * width) - 1 else value
