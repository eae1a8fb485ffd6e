"""What a media file is by its first bytes, and what its boxes promise, checked before a decoding library believes it.

A download that stopped half-way still opens, and would quietly become a shorter video; a login page saved as ``.mp4``
gives an error that nobody understands; a playlist makes FFmpeg open other files. All of it is seen by looking at the
first bytes and walking the file's boxes, without decoding anything.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from finetune.core.errors import DataError
from finetune.datasets.decode_limits import (
    MAX_BOXES,
    MAX_EDITS,
    MAX_STREAMS,
    check_count,
    check_frame_count,
    check_frame_size,
)

Family = Literal["mp4", "matroska", "avi", "other"]

_TRUNCATED_FIX = "copy or download the file again"

_PARENTS = {b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"moof", b"traf"}

_FIRST_BOXES = {
    *(b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"wide", b"free", b"skip", b"junk", b"uuid"),
    *(b"pnot", b"PICT", b"prfl", b"udta", b"sidx", b"emsg", b"mfra", b"pdin"),
}

_HEAD = 4096

_IMAGES = ((b"\x89PNG\r\n\x1a\n", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"GIF8", "a GIF image"))

_FOREIGN = (
    *_IMAGES,
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"%PDF", "a PDF document"),
    (b"version https://git-lfs", "the pointer of a Git LFS file that was not fetched"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
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
        raise DataError("the file is empty (0 bytes)", where=str(path), fix=_TRUNCATED_FIX)
    return size


def check_container(path: Path) -> Family:
    """Refuse a file that is empty, no video, ends before its own header says, or promises more than is read.

    It knows the insides of MP4/MOV, the outsides of Matroska/WebM and AVI; of other formats only their first bytes.

    Returns:
        Which format the first bytes say it is.

    Raises:
        DataError: naming the file, what it claims and the limit.
    """
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            if head[4:8] in _FIRST_BOXES:
                _Mp4(file, size, path).check()
                return "mp4"
    except OSError as error:
        raise _unreadable(error, path) from None
    if (stated := _stated_size(head)) is not None and stated > size:
        raise _truncated(path, stated, size)
    if foreign := _foreign(head):
        raise DataError(
            f"not a video: it begins like {foreign}", where=str(path), fix="download it again, or take it out"
        )
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    return "avi" if head[:4] == b"RIFF" else "other"


def _foreign(head: bytes) -> str | None:
    """What a file is that is no video, by its first bytes; None if they say nothing."""
    for start, name in _FOREIGN:
        if head.startswith(start):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((name for start, name in _TEXTS if text.startswith(start)), None)


def _unreadable(error: Exception, path: Path) -> DataError:
    return DataError(f"the file cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path))


def _truncated(path: Path, stated: int, size: int) -> DataError:
    return DataError(
        f"the file is cut off: its header speaks of {stated:,} bytes, it has {size:,}",
        where=str(path),
        fix=_TRUNCATED_FIX,
    )


def _stated_size(head: bytes) -> int | None:
    """The size in bytes that an AVI or Matroska header states, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"AVI " and len(head) >= 12:
        return 8 + int(struct.unpack("<I", head[4:8])[0])
    if head[:4] == b"\x1a\x45\xdf\xa3":
        offset, length = _ebml_size(head, 4)
        segment = offset + (length or 0)
        if length is not None and head[segment : segment + 4] == b"\x18\x53\x80\x67":
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


class _Mp4:
    """One walk over the boxes of an MP4 or MOV file."""

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self._file = file
        self._size = size
        self._path = path
        self._frames = 0
        self._tracks = 0
        self._is_video = False

    def check(self) -> None:
        """Raise the DataError of the first claim that is too large, or of a file that is not all there."""
        where, has_index = str(self._path), False
        for count, (kind, start, end) in enumerate(self._boxes(0, self._size)):
            if end > self._size:
                raise _truncated(self._path, end, self._size)
            check_count(count, MAX_BOXES, "boxes", where)
            has_index |= kind == b"moov"
            self._file.seek(start)
            self._check_box(kind, self._file.read(min(44, end - start)), where)
        if not has_index:
            raise DataError(
                "the file has no index (moov): it is cut off, or its recording was never finished",
                where=where,
                fix=_TRUNCATED_FIX,
            )

    def _check_box(self, kind: bytes, body: bytes, where: str) -> None:
        if kind == b"cmov":  # nobody has written one for twenty years, and what it unpacks to is anyone's guess
            raise DataError("its index is compressed (cmov)", where=where, fix="re-encode it, or leave it out")
        if kind == b"trak":
            self._tracks += 1
            self._is_video = False
            check_count(self._tracks, MAX_STREAMS, "tracks", where)
        elif kind == b"hdlr" and len(body) >= 12:
            self._is_video = body[8:12] == b"vide"
        elif kind == b"elst" and len(body) >= 8:
            check_count(_count_at(body, 4), MAX_EDITS, "edits", where)
        elif kind == b"stsd" and self._is_video and len(body) >= 44:
            width, height = struct.unpack(">HH", body[40:44])
            # Some muxers leave zeroes here and the truth in the codec's own header, which is looked at later.
            check_frame_size(max(height, 1), max(width, 1), where)
        elif kind in (b"stsz", b"stz2") and self._is_video and len(body) >= 12:
            self._frames += _count_at(body, 8)
        elif kind == b"trun" and len(body) >= 8:
            self._frames += _count_at(body, 4)
        check_frame_count(self._frames, where)

    def _boxes(self, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
        """Every box from ``start`` to ``end``, depth first: its kind, and the start and end of its body."""
        while start + 8 <= end:
            self._file.seek(start)
            header = self._file.read(16)
            length, kind = struct.unpack(">I4s", header[:8])
            body = start + 8
            if length == 1 and len(header) == 16:
                length, body = struct.unpack(">Q", header[8:])[0], start + 16
            elif length == 0:  # up to the end of the file
                length = end - start
            if length < body - start:  # padding, or a box that would never end
                return
            yield kind, body, start + length
            if kind in _PARENTS and depth < 8:  # moov/trak/mdia/minf/stbl is 5 deep; deeper is nobody's video
                yield from self._boxes(body, min(start + length, end), depth + 1)
            start += length


def _count_at(body: bytes, at: int) -> int:
    return int(struct.unpack_from(">I", body, at)[0])
