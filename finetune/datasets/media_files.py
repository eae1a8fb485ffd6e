"""What a media file may be and may claim, looked at before a decoding library acts on it.

A download that stopped half-way still opens, and would quietly become a shorter video; a login page saved as ``.mp4``
gives an error that nobody understands; a playlist makes FFmpeg open other files; a few hundred bytes can promise a
thousand million frames. What no check here foresees is held by the limits of the process that decodes
(``worker``).
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Literal

from finetune.core.errors import DataError

MAX_FRAMES = 2_000_000
"""More frames than nine hours at 60 per second: a longer video is refused."""

MAX_PIXELS = 2**25
"""Pixels of one frame or image: a little more than 8K UHD (7680x4320). A larger one is refused."""

MAX_FPS = 1000.0
"""The most that a configuration can ask for, and more than cameras play back at."""

MAX_DURATION_S = 7 * 24 * 3600.0
"""A week. ``span: all`` lays clips over the whole length, so a false time stamp would cost memory, not only sense."""

MAX_STREAMS = 128
"""Tracks of any kind in one file; a film with every language has fifty."""

# --- claims -----------------------------------------------------------------------------------------------------------


def check_frame_size(height: int, width: int, where: str) -> None:
    """Refuse a picture without area, or with more than ``MAX_PIXELS``, before memory is taken for it."""
    if height < 1 or width < 1 or height * width > MAX_PIXELS:
        raise DataError(
            f"a picture of {height}x{width} (height x width) is outside what is read: 1 to {MAX_PIXELS:,} pixels",
            where=where,
            fix="scale it down first, or leave it out",
        )


def check_frame_count(frames: int, where: str) -> None:
    """Refuse more than ``MAX_FRAMES`` frames."""
    if frames > MAX_FRAMES:
        raise DataError(
            f"the header promises {frames:,} frames; at most {MAX_FRAMES:,} are read",
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


def as_times(values: Sequence[float]) -> Sequence[float]:
    """Times as ``VideoProbe`` holds them: eight bytes each instead of thirty-two, for hours of video."""
    return array("d", values)


# --- first bytes ------------------------------------------------------------------------------------------------------

Family = Literal["mp4", "matroska", "avi", "other"]

_MP4_BOXES = {
    *(b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"junk", b"uuid"),
    *(b"pnot", b"PICT", b"prfl", b"udta", b"sidx", b"emsg", b"mfra", b"pdin"),
}
"""What an MP4 or MOV file may begin with."""

_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"

_FOREIGN = (
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "the pointer of a Git LFS file that was not fetched"),
)

_TEXTS = (
    (b"#extm3u", "a playlist"),
    (b"ffconcat", "a concat script"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<mpd", "a streaming manifest"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"{", "a JSON document"),
)

_COPY_AGAIN = "copy or download the file again"


def check_regular(path: Path) -> int:
    """The size of a file that can be read to its end; an empty one, a pipe or a device is refused.

    Raises:
        DataError: naming the file.
    """
    try:
        if not path.is_file():  # asked before opening, because opening a named pipe would wait for ever
            raise DataError("there is no such file" if not path.exists() else "not a regular file", where=str(path))
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        raise _unreadable(error, path) from None
    if size == 0:
        raise DataError("the file is empty (0 bytes)", where=str(path), fix=_COPY_AGAIN)
    return size


def check_container(path: Path) -> Family:
    """Refuse a file that is empty, no video, or ends before its own header says.

    Returns:
        Which format the first bytes say it is.

    Raises:
        DataError: naming the file.
    """
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(4096)
            family = _family(head)
            stated = _mp4_size(file, path) if family == "mp4" else _stated_size(head)
    except OSError as error:
        raise _unreadable(error, path) from None
    if stated is not None and stated > size:
        raise DataError(
            f"the file is cut off: its header speaks of {stated:,} bytes, it has {size:,}",
            where=str(path),
            fix=_COPY_AGAIN,
        )
    if family != "mp4" and (foreign := _foreign(head)):
        raise DataError(
            f"not a video: it begins like {foreign}", where=str(path), fix="download it again, or take it out"
        )
    return family


def _family(head: bytes) -> Family:
    if head[4:8] in _MP4_BOXES:
        return "mp4"
    if head.startswith(_EBML):
        return "matroska"
    return "avi" if head.startswith(b"RIFF") else "other"


def _foreign(head: bytes) -> str | None:
    """What a file is that is no video, by its first bytes; None if they say nothing."""
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "a WebP image"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    named = ((head, start, name) for start, name in _FOREIGN), ((text, start, name) for start, name in _TEXTS)
    return next((name for group in named for content, start, name in group if content.startswith(start)), None)


def _unreadable(error: Exception, path: Path) -> DataError:
    return DataError(f"the file cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path))


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
        raise DataError(
            "the file has no index (moov): it is cut off, or its recording was never finished",
            where=str(path),
            fix=_COPY_AGAIN,
        )
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
