"""Fuzzing of videos and images: damaged headers and frames through one pool, which has to survive them all.

A case is a file after one byte that says what a row would call it: even a video, odd an image.
"""

from __future__ import annotations

import io
import os
import random
import struct
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from finetune.core.errors import DataError
from finetune.core.types import Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.worker import MEMORY_BYTES

from . import boxes, mutation

VIDEO, IMAGE = b"\0", b"\1"
SECONDS = 12.0
"""By the clock and for each of two requests: what takes longer is a hang, given up by the pool and told as such."""
_BUCKET = Bucket(5, 32, 48)
_PARENT_GROWTH = 256 * 2**20
_CHECK_EVERY = 50


class _World:
    """One folder, one pool, and what they were like before the first case."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-media-"))
        self.pool = DecodePool(workers=1, timeout_s=SECONDS)
        self.good = self.folder / "good.mp4"
        self.good.write_bytes(video_seeds()[0][1:])
        self.cases = 0
        self.resident = 0

    def check(self) -> None:
        """Make sure that a sound file is decoded as ever, and that nothing has grown."""
        assert isinstance(_decoded(self, self.good), Clip), "the pool no longer decodes a sound file"
        worker = _resident(self.pool.pids[0], "VmHWM")
        assert worker < MEMORY_BYTES + 2**30, f"a worker of {worker / 2**20:.0f} MiB"
        here = _resident(os.getpid(), "VmRSS")
        self.resident = self.resident or here
        assert here < self.resident + _PARENT_GROWTH, f"this process grew to {here / 2**20:.0f} MiB"


@cache
def _world() -> _World:
    return _World()


def fuzz_media(data: bytes) -> str:
    """A file is probed and cut, or loaded as an image. Returns ``clip`` or ``image``, or why the file was refused."""
    world = _world()
    if world.cases % _CHECK_EVERY == 0:
        world.check()
    world.cases += 1
    is_image = bool(data[:1]) and data[0] % 2 == 1
    path = world.folder / ("case.png" if is_image else "case.mp4")
    path.write_bytes(data[1:])
    if is_image:
        (found,) = world.pool.load_images([(path, _BUCKET)])
        if not isinstance(found, DataError):
            assert found.shape == (3, _BUCKET.height, _BUCKET.width)
            return "image"
    else:
        found = _decoded(world, path)
        if isinstance(found, Clip):
            assert found.pixels.shape == (3, _BUCKET.frames, _BUCKET.height, _BUCKET.width)
            return "clip"
    assert "longer than" not in found.what, f"a hang: {found.what}"
    assert found.where == str(path), f"the error names {found.where}"
    assert "\x1b" not in str(found), "not fit for a terminal"
    return found.what


def _decoded(world: _World, path: Path) -> Clip | DataError:
    """The result of a short plan; the plan keeps to what ``plan_clips`` could ask for."""
    (((_, header)),) = world.pool.probe_many([path])
    if isinstance(header, DataError):
        return header
    assert isinstance(header, VideoProbe)
    last = header.frames - 1
    indices = (0, last // 3, last // 2, last, last)
    plan = ClipPlan(indices, (_BUCKET.height, _BUCKET.width), (0, 0), _BUCKET)
    (((_, clip)),) = world.pool.decode_many([DecodeJob(path, header, plan)])
    return clip


def _resident(pid: int, what: str) -> int:
    """Bytes of a process by the line ``what`` of its status; 0 where there is no such file."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


# --- seeds ------------------------------------------------------------------------------------------------------------

_SOURCE = ["-f", "lavfi", "-i", "testsrc2=s=64x48:r=8:d=1"]
_ENCODED: dict[str, list[str]] = {
    "h264.mp4": ["-c:v", "libx264", "-bf", "2", "-g", "4"],
    "first.mp4": ["-c:v", "libx264", "-g", "4", "-movflags", "+faststart"],
    "fragments.mp4": ["-c:v", "libx264", "-g", "4", "-movflags", "frag_keyframe+empty_moov"],
    "mpeg4.mp4": ["-c:v", "mpeg4"],
    "mjpeg.mov": ["-c:v", "mjpeg"],
    "hevc.mp4": ["-c:v", "libx265", "-x265-params", "log-level=none"],
    "av1.mp4": ["-c:v", "libsvtav1", "-preset", "12"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-cpu-used", "8"],
    "h264.mkv": ["-c:v", "libx264", "-g", "4"],
    "mpeg4.avi": ["-c:v", "mpeg4"],
    "h264.ts": ["-c:v", "libx264", "-g", "4"],
    "mpeg2.mpg": ["-c:v", "mpeg2video"],
    "h264.flv": ["-c:v", "libx264"],
    "wmv.wmv": ["-c:v", "wmv2"],
    "moving.gif": [],
}


@cache
def video_seeds() -> list[bytes]:
    """Eight small frames in every container that is read, and one that is not."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in _ENCODED.items():
            boxes.ffmpeg(*_SOURCE, *arguments, name, cwd=Path(folder))
            found.append(VIDEO + (Path(folder) / name).read_bytes())
    return found


@cache
def image_seeds() -> list[bytes]:
    """A small picture in every format that is read, and one that is not."""
    from PIL import Image

    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    wanted: tuple[tuple[str, dict[str, object]], ...] = (
        ("PNG", {"exif": exif}),
        ("PNG", {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"save_all": True, "append_images": [picture.rotate(90)]}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("AVIF", {}),
        ("GIF", {}),
        ("ICO", {}),
    )
    found = []
    for form, options in wanted:
        buffer = io.BytesIO()
        picture.save(buffer, form, **options)
        found.append(IMAGE + buffer.getvalue())
    return found


def seeds() -> list[bytes]:
    """Videos and images."""
    return [*video_seeds(), *image_seeds()]


# --- mutation ---------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x10000, 10**9, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutate(source: random.Random, pool: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """A new case: mostly numbers and boxes changed where they stand, sometimes the damage that any document gets."""
    if source.random() < 0.25:
        return mutation.mutate(source, pool, tokens)
    case = bytearray(source.choice(pool))
    for _ in range(source.choice((1, 1, 1, 2, 3, 6))):
        if len(case) < 2:  # removing and cutting can leave nothing to change
            break
        source.choice(_CHANGES)(source, case, pool)
    return bytes(case[: mutation.MAX_CASE])


def _number(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    """Overwrite a number; headers are at the front, or in MP4 at the end."""
    width = source.choice((1, 2, 2, 4, 4, 4, 8))
    near = source.choice((len(case), len(case), 600))
    at = source.randrange(max(1, min(near, len(case)) - width))
    if source.random() < 0.4:
        at = max(1, len(case) - 1 - at)
    value = source.choice(_NUMBERS) if source.random() < 0.7 else source.getrandbits(32)
    packed = (value & ((1 << 8 * width) - 1)).to_bytes(width, source.choice(("big", "little")))
    case[at : at + width] = packed[: len(case) - at]


def _box(source: random.Random, case: bytearray) -> boxes.Box | None:
    found = list(boxes.boxes(bytes(case), 1)) if case[5:9] in (b"ftyp", b"moov", b"mdat", b"free") else []
    return source.choice(found[:2000]) if found else None


def _field(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    """Overwrite an aligned number in the body of a box."""
    box = _box(source, case)
    if box is None or box.end - box.body < 4:
        return _number(source, case, pool)
    at = box.body + 4 * source.randrange(min(40, (box.end - box.body) // 4))
    struct.pack_into(">I", case, at, source.choice(_NUMBERS))


def _length(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    if box := _box(source, case):
        near = (box.end - box.start) + source.randrange(-16, 17)
        struct.pack_into(">I", case, box.start, source.choice((*_NUMBERS, max(0, near))))


def _kind(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    one, other = _box(source, case), _box(source, case)
    if one and other:
        case[one.start + 4 : one.start + 8] = case[other.start + 4 : other.start + 8]


def _copy(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    one, other = _box(source, case), _box(source, case)
    if one and other and one.end - one.start < 4096:
        case[other.start : other.start] = bytes(case[one.start : one.end]) * source.choice((1, 1, 2, 50))


def _remove(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    if box := _box(source, case):
        del case[box.start : box.end]


def _noise(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    """Random bytes in a stretch: the frames, mostly, because they are most of a file."""
    at = source.randrange(1, max(2, len(case)))
    case[at : at + source.randrange(1, 40)] = source.randbytes(source.randrange(1, 40))


def _cut(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    del case[source.randrange(1, len(case) + 1) :]


def _graft(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    """The rest of another file, from about the same place."""
    other = source.choice(pool)
    at = source.randrange(1, max(2, min(len(case), len(other))))
    case[at:] = other[at:]


def _flip(source: random.Random, case: bytearray, pool: Sequence[bytes]) -> None:
    case[source.randrange(1, max(2, len(case))) % len(case)] ^= 1 << source.randrange(8)


Change = Callable[[random.Random, bytearray, Sequence[bytes]], None]
_CHANGES: tuple[Change, ...] = (
    *(_number, _number, _number, _field, _field, _field, _field),
    *(_length, _kind, _copy, _remove, _noise, _cut, _graft, _flip, _flip),
)


def close() -> None:
    """End the worker and remove what was written."""
    import shutil

    if _world.cache_info().currsize:
        _world().pool.close()
        shutil.rmtree(_world().folder, ignore_errors=True)
        _world.cache_clear()
