"""What a media file says of its own size, checked before a decoding library believes it.

A few hundred bytes of a header can promise a thousand million frames, for which a demuxer reserves an index entry each;
and a download that stopped half-way still opens, and would quietly become a shorter video. Both are seen by walking the
file's boxes, without decoding anything.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from finetune.errors import DataError

MAX_FRAMES = 2_000_000
"""More frames than nine hours at 60 per second: a longer video is refused."""

MAX_PIXELS = 2**25
"""Pixels of one frame or image: a little more than 8K UHD (7680x4320). A larger one is refused."""

_TRUNCATED_FIX = "copy or download the file again"
_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_MAX_BOXES = 1_000_000


def check_container(path: Path) -> None:
    """Refuse a file that is empty, ends before its own header says, or promises more than this package reads.

    It knows MP4/MOV, Matroska/WebM and AVI; of other formats only emptiness is seen here.

    Raises:
        DataError: naming the file.
    """
    try:
        if not path.is_file():  # asked before opening, because opening a named pipe would wait for ever
            raise DataError("there is no such file" if not path.exists() else "not a regular file", where=str(path))
        size = path.stat().st_size
        if size == 0:
            raise DataError("the file is empty (0 bytes)", where=str(path), fix=_TRUNCATED_FIX)
        with path.open("rb") as file:
            head = file.read(64)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"styp"):
                _check_mp4(file, size, path)
            elif (stated := _stated_size(head)) is not None and stated > size:
                raise _truncated(path, stated, size)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None


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


def _truncated(path: Path, stated: int, size: int) -> DataError:
    return DataError(
        f"the file is cut off: its header speaks of {stated:,} bytes, it has {size:,}",
        where=str(path),
        fix=_TRUNCATED_FIX,
    )


def _stated_size(head: bytes) -> int | None:
    """The size in bytes that an AVI or Matroska header states, or None."""
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
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


def _check_mp4(file: BinaryIO, size: int, path: Path) -> None:
    frames, is_video, has_index = 0, False, False
    for count, (kind, start, end) in enumerate(_boxes(file, 0, size)):
        if end > size:
            raise _truncated(path, end, size)
        if count > _MAX_BOXES:
            raise DataError("the header has more boxes than any video needs", where=str(path), fix=_TRUNCATED_FIX)
        has_index |= kind == b"moov"
        file.seek(start)
        body = file.read(min(44, end - start))
        if kind == b"hdlr" and len(body) >= 12:
            is_video = body[8:12] == b"vide"
        elif kind == b"stsd" and is_video and len(body) >= 44:
            width, height = struct.unpack(">HH", body[40:44])
            # Some muxers leave zeroes here and the truth in the codec's own header, which is looked at later.
            check_frame_size(max(height, 1), max(width, 1), str(path))
        elif kind in (b"stsz", b"stz2") and is_video and len(body) >= 12:
            frames += int(struct.unpack(">I", body[8:12])[0])
        elif kind == b"trun" and len(body) >= 8:
            frames += int(struct.unpack(">I", body[4:8])[0])
        check_frame_count(frames, str(path))
    if not has_index:
        raise DataError(
            "the file has no index (moov): it is cut off, or its recording was never finished",
            where=str(path),
            fix=_TRUNCATED_FIX,
        )


def _boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Every box from ``start`` to ``end``, depth first: its kind, and the start and end of its body."""
    while start + 8 <= end:
        file.seek(start)
        header = file.read(16)
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
            yield from _boxes(file, body, min(start + length, end), depth + 1)
        start += length
