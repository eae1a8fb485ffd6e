"""Surgery on MP4 files: find a box by its path, replace or patch its body, with the sizes of its parents kept true."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg

PARENTS = {b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"dinf", b"moof", b"traf", b"mvex"}


class Box(NamedTuple):
    """One box: ``start`` is where its length stands, ``body`` where its contents begin."""

    path: str
    start: int
    body: int
    end: int


def ffmpeg(*arguments: str | Path, cwd: Path | None = None) -> bytes:
    """Run FFmpeg quietly; what it writes to standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def boxes(content: bytes, start: int = 0, end: int | None = None, prefix: str = "") -> Iterator[Box]:
    """Every box of a sound file, depth first."""
    end = len(content) if end is None else end
    while start + 8 <= end:
        length, kind = struct.unpack_from(">I4s", content, start)
        body = start + 8
        if length == 1:
            (length,), body = struct.unpack_from(">Q", content, body), body + 8
        if length < 8:
            return
        box = Box(prefix + kind.decode("latin-1"), start, body, min(end, start + length))
        yield box
        if kind in PARENTS:
            yield from boxes(content, body, box.end, box.path + "/")
        start = box.end


def find(content: bytes, path: str) -> Box:
    """The first box whose path ends in ``path``, such as ``stbl/stsz``."""
    return next(box for box in boxes(content) if box.path == path or box.path.endswith("/" + path))


def patched(content: bytes, path: str, offset: int, value: bytes) -> bytes:
    """``content`` with ``value`` written over a box's body at ``offset``."""
    at = find(content, path).body + offset
    return content[:at] + value + content[at + len(value) :]


def replaced(content: bytes, path: str, body: bytes) -> bytes:
    """``content`` with another body in a box. The index has to be behind the frames, whose places do not change."""
    return spliced(content, find(content, path), _box(content, find(content, path), body))


def appended(content: bytes, path: str, more: bytes) -> bytes:
    """``content`` with boxes added at the end of a parent."""
    box = find(content, path)
    return replaced(content, path, content[box.body : box.end] + more)


def spliced(content: bytes, box: Box, instead: bytes) -> bytes:
    """``content`` with ``instead`` in the place of a whole box (nothing: the box is taken out)."""
    grown = len(instead) - (box.end - box.start)
    result = bytearray(content)
    for parent in boxes(content):
        if parent.start < box.start and parent.end >= box.end:
            struct.pack_into(">I", result, parent.start, parent.end - parent.start + grown)
    result[box.start : box.end] = instead
    return bytes(result)


def make(kind: bytes, body: bytes) -> bytes:
    """One box."""
    return struct.pack(">I4s", 8 + len(body), kind) + body


def _box(content: bytes, box: Box, body: bytes) -> bytes:
    return make(content[box.start + 4 : box.start + 8], body)


def long_film(picture: bytes, frames: int, timescale: int = 60) -> bytes:
    """A video of ``frames`` frames at ``timescale`` per second, all of them stored once: an intra-only MP4 with its
    index at the end and one frame, repeated by its index.
    """
    size = (
        struct.unpack_from(">I", picture, find(picture, "stsz").body + 4)[0]
        or struct.unpack_from(">I", picture, find(picture, "stsz").body + 12)[0]
    )
    offset = struct.unpack_from(">I", picture, find(picture, "stco").body + 8)[0]
    film = spliced(picture, find(picture, "edts"), b"")
    film = replaced(film, "stsz", struct.pack(">III", 0, size, frames))
    film = replaced(film, "stts", struct.pack(">IIII", 0, 1, frames, 1))
    film = replaced(film, "stsc", struct.pack(">IIIII", 0, 1, 1, 1, 1))
    film = replaced(film, "stco", struct.pack(">II", 0, frames) + struct.pack(">I", offset) * frames)
    return patched(film, "mdhd", 12, struct.pack(">II", timescale, frames))


class Bits:
    """A bit string being written, for the headers of codecs."""

    def __init__(self) -> None:
        self._text = ""

    def u(self, value: int, width: int) -> Bits:
        """An unsigned number of ``width`` bits."""
        self._text += f"{value:0{width}b}"
        return self

    def ue(self, value: int) -> Bits:
        """An unsigned Exp-Golomb code."""
        code = f"{value + 1:b}"
        self._text += "0" * (len(code) - 1) + code
        return self

    def bytes(self) -> bytes:
        """With the stop bit, filled up with zeroes."""
        text = self._text + "1"
        text += "0" * (-len(text) % 8)
        return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def h264_sps(width: int, height: int) -> bytes:
    """A sequence parameter set of H.264 baseline, level 6.2, for a multiple of 16 pixels each way."""
    bits = Bits().ue(0).ue(0).ue(2).ue(1).u(0, 1).ue(width // 16 - 1).ue(height // 16 - 1)
    return b"\x67\x42\xc0\x3e" + bits.u(1, 1).u(1, 1).u(0, 1).u(0, 1).bytes()
