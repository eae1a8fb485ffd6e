"""Videos and images made to harm: each is that file's ``DataError``, in bounded time and memory, and the rest goes on.

Files are made on the spot: FFmpeg writes a small sound one, and its header is patched (``boxes``). One pool of one
worker meets them all, so a worker that a file damages shows in the next test.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import json
import os
import shutil
import socket
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoding import load_image, probe
from fuzz import boxes
from PIL import Image
from waiting import until
from worlds import run_config

from finetune.caching.check import check_dataset
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import DataError
from finetune.core.types import Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets import containers, pictures
from finetune.datasets.decode_pool import DecodeJob, DecodePool, load_fitted_image

"""For any one file here; the slowest takes a fraction of a second on a machine of its own."""
LIMIT_MIB = 700
"""Peak memory of the worker over all of them: what its libraries take, and a frame of nearly the largest size."""

H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-g", "4", "-bf", "0"]


def source(size: str = "64x64", frames: int = 16) -> list[str]:
    return ["-f", "lavfi", "-i", f"testsrc2=s={size}:r=8:d={frames / 8}"]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    sound = ["-f", "lavfi", "-i", "sine=d=2"]
    boxes.ffmpeg(*source(), *H264, "good.mp4", cwd=folder)
    boxes.ffmpeg("-i", "good.mp4", "-c", "copy", "-movflags", "+faststart", "index_first.mp4", cwd=folder)
    boxes.ffmpeg("-i", "good.mp4", *sound, "-c:v", "copy", "-c:a", "aac", "sound.mp4", cwd=folder)
    boxes.ffmpeg(*source(frames=1), "-c:v", "mjpeg", "one.mp4", cwd=folder)
    boxes.ffmpeg("-i", "one.mp4", "cover.png", cwd=folder)
    boxes.ffmpeg(*source(frames=2), "-c:v", "libvpx-vp9", "-cpu-used", "8", "vp9.webm", cwd=folder)
    boxes.ffmpeg("-i", "good.mp4", "-c", "copy", "good.avi", cwd=folder)
    boxes.ffmpeg("-i", "good.mp4", "-c", "copy", "good.ts", cwd=folder)
    boxes.ffmpeg("-i", "good.mp4", "-c", "copy", "good.mkv", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def good(media) -> bytes:
    return (media / "good.mp4").read_bytes()


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(workers=1) as pool:
        yield pool


def peak_mib(pool: DecodePool) -> int:
    (pid,) = pool.pids
    status = Path(f"/proc/{pid}/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024 if status.exists() else 0


def cpu_s(pool: DecodePool) -> float:
    """Seconds of a core that the worker has used, whatever else the machine does."""
    (pid,) = pool.pids
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def outcome(pool: DecodePool, path: Path) -> VideoProbe | DataError | Clip:
    """What becomes of a file that is probed and, if it passes, cut; the worker survives it, in time and small."""
    processes = pool.pids
    (((_, found)),) = pool.probe_many([path])
    if isinstance(found, VideoProbe):
        last = found.frames - 1
        plan = ClipPlan((0, last // 2, last), (64, 64), (0, 0), Bucket(3, 64, 64))
        (((_, found)),) = pool.decode_many([DecodeJob(path, found, plan)])
    assert processes in ([], pool.pids), f"the worker died: {found}"
    assert peak_mib(pool) < LIMIT_MIB
    if isinstance(found, DataError):
        assert found.where == str(path) and found.what and "took longer" not in found.what
    return found


def refused(pool: DecodePool, path: Path, content: bytes | None = None) -> str:
    """Why a file is refused."""
    if content is not None:
        path.write_bytes(content)
    found = outcome(pool, path)
    assert isinstance(found, DataError), found
    return found.what


def test_the_sound_files_pass(media, pool):
    for name in ("good.mp4", "index_first.mp4", "sound.mp4", "one.mp4", "vp9.webm", "good.avi", "good.ts", "good.mkv"):
        found = outcome(pool, media / name)
        assert isinstance(found, Clip) and found.pixels.float().std() > 10, name


# --- what a header claims ---------------------------------------------------------------------------------------------

U32 = struct.Struct(">I")
MATRIX = 40
"""Where ``tkhd`` keeps its 3x3 matrix."""


def matrix(*values: float) -> bytes:
    scaled = (round(value * (2**30 if place % 3 == 2 else 2**16)) for place, value in enumerate(values))
    return struct.pack(">9i", *scaled)


CLAIMS: dict[str, tuple[str, int, bytes, str]] = {
    "frames": ("stsz", 8, U32.pack(10**9), "not a video that can be opened"),
    "most frames": ("stsz", 8, b"\xff" * 4, "not a video that can be opened"),
    "two thousand million parts of a second": ("mdhd", 12, b"\x7f\xff\xff\xff", "frames per second; at most 1000"),
    "years": ("stts", 12, U32.pack(0x7FFFFFFF), "at most 604,800 s"),
    "backwards": ("stts", 12, U32.pack(0xFFFFFF00), "frames per second; at most 1000"),
    "matrix of zeroes": ("tkhd", MATRIX, bytes(36), "squash it to nothing"),
    "turned by 45 degrees": ("tkhd", MATRIX, matrix(0.7, 0.7, 0, -0.7, 0.7, 0, 0, 0, 1), "by no right angle"),
}
HARMLESS: dict[str, tuple[str, int, bytes]] = {
    "frames in the other table": ("stts", 8, U32.pack(10**9)),
    "pixels, where the codec says the truth": ("stsd", 40, b"\xff" * 4),
    "a hundred million edits": ("elst", 4, U32.pack(10**8)),
    "negative length": ("mvhd", 16, b"\xff" * 4),
    "endless length": ("mdhd", 16, b"\x7f\xff\xff\xff"),
    "no parts of a second": ("mdhd", 12, bytes(4)),
    "all frames at once": ("stts", 12, bytes(4)),
    "matrix of ones": ("tkhd", MATRIX, b"\xff" * 36),
    "enlarging matrix": ("tkhd", MATRIX, matrix(1000, 0, 0, 0, 1000, 0, 0, 0, 1)),
    "edit that starts before": ("elst", 12, b"\x80\x00\x00\x00"),
    "edit that starts after": ("elst", 12, b"\x7f\xff\xff\xff"),
    "edit without length": ("elst", 8, bytes(4)),
    "edit a thousand times as fast": ("elst", 16, b"\x7f\xff\xff\xff"),
    "frames inside the index": ("stco", 8, U32.pack(20_000)),
    "frames behind the end": ("stco", 8, b"\xff" * 4),
    "frames of no size": ("stsz", 12, bytes(64)),
    "frames of 4 GiB": ("stsz", 12, b"\xff" * 64),
    "more chunks than there are": ("stco", 4, b"\x0f\xff\xff\xff"),
    "more times than there are": ("stts", 4, b"\x0f\xff\xff\xff"),
    "more keyframes than there are": ("stss", 4, b"\x0f\xff\xff\xff"),
    "four thousand million frames per chunk": ("stsc", 12, b"\xff" * 4),
    "index in another file": ("dref", 8, struct.pack(">I4sI", 12, b"alis", 0)),
    "no codec": ("stsd", 12, bytes(4)),
    "another codec": ("stsd", 12, b"hvc1"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_beyond_the_limits_is_refused(media, pool, good, tmp_path, name):
    path, offset, value, said = CLAIMS[name]
    # Without its edit list, because FFmpeg leaves out what lies outside of it, and so most claims about time.
    plain = good if path == "elst" else boxes.spliced(good, boxes.find(good, "edts"), b"")
    assert said in refused(pool, tmp_path / "liar.mp4", boxes.patched(plain, path, offset, value))


def test_nonsense_that_is_no_danger_gives_a_clip_or_an_error(media, pool, good, tmp_path):
    """FFmpeg reads some of it as was meant. Which is its affair: what counts is that every file comes to an end."""
    results = {}
    for name, change in HARMLESS.items():
        (tmp_path / "odd.mp4").write_bytes(boxes.patched(good, *change))
        found = outcome(pool, tmp_path / "odd.mp4")
        results[name] = found.what if isinstance(found, DataError) else "clip"
    assert {"clip"} < set(results.values())
    for name in ("frames behind the end", "frames of no size", "no codec"):
        assert results[name] != "clip", name


def test_the_canary_of_claims_is_believed_without_the_guard(good, tmp_path, monkeypatch):
    """Two seconds that claim to be centuries: `span: all` would lay clips over all of them."""
    plain = boxes.spliced(good, boxes.find(good, "edts"), b"")
    (tmp_path / "liar.mp4").write_bytes(boxes.patched(plain, "stts", 12, U32.pack(0x7FFFFFFF)))
    with pytest.raises(DataError, match="604,800 s"):
        probe(tmp_path / "liar.mp4")
    monkeypatch.setattr(containers, "check_times", lambda *arguments: None)
    assert probe(tmp_path / "liar.mp4").frame_times_s[-1] > 604_800


def test_sizes_are_those_of_the_pictures_and_not_of_the_container(media, pool, good, tmp_path):
    """The container says 64x64. A few bytes of the codec's own header say 16384x16384."""
    sps, box = boxes.h264_sps(16384, 16384), boxes.find(good, "stsd")
    avcc = good.index(b"avcC", box.body, box.end)
    (length,) = U32.unpack_from(good, avcc - 4)
    old = good[avcc + 4 : avcc - 4 + length]
    (old_sps,) = struct.unpack_from(">H", old, 6)
    new = old[:6] + struct.pack(">H", len(sps)) + sps + old[8 + old_sps :]
    body = good[box.body : avcc - 4] + U32.pack(8 + len(new)) + b"avcC" + new + good[avcc - 4 + length : box.end]
    entry = bytearray(body)
    entry[8:12] = U32.pack(len(body) - 8)  # the length of the sample entry
    assert refused(pool, tmp_path / "h264.mp4", boxes.replaced(good, "stsd", bytes(entry)))

    vp9 = bytearray((media / "vp9.webm").read_bytes())
    at = vp9.index(b"\x49\x83\x42") + 3  # the keyframe's sync code; then four bits, 16 bits of width, 16 of height
    (bits,) = struct.unpack_from(">Q", vp9, at)
    assert (bits >> 44) & 0xFFFF == 63 == (bits >> 28) & 0xFFFF
    struct.pack_into(">Q", vp9, at, bits & ~(0xFFFFFFFF << 28) | 0x3FFF3FFF << 28)
    assert "decoded" in refused(pool, tmp_path / "vp9.webm", bytes(vp9))


def test_a_kilobyte_of_av1_that_unfolds_to_36_million_pixels(pool, tmp_path):
    encode = ["-frames:v", "1", "-c:v", "libsvtav1", "-preset", "12", "bomb.mp4"]
    boxes.ffmpeg("-f", "lavfi", "-i", "color=black:s=6000x6000:r=8", *encode, cwd=tmp_path)
    bomb = (tmp_path / "bomb.mp4").read_bytes()
    assert len(bomb) < 4096
    assert "6000x6000" in refused(pool, tmp_path / "bomb.mp4")
    liar = boxes.patched(boxes.patched(bomb, "stsd", 40, struct.pack(">HH", 64, 64)), "tkhd", 76, bytes(8))
    assert refused(pool, tmp_path / "liar.mp4", liar)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("sizes", [("64x64", "1024x1024"), ("1024x1024", "64x64"), ("64x64", "64x96")])
def test_a_picture_that_changes_size(pool, tmp_path, sizes, suffix):
    raw = b"".join(boxes.ffmpeg(*source(size, 4), *H264, "-f", "h264", "-") for size in sizes)
    (tmp_path / "raw.h264").write_bytes(raw)
    copy = ["-c", "copy", "-bsf:v", "dump_extra=freq=k", f"changes.{suffix}"]
    boxes.ffmpeg("-f", "h264", "-r", "8", "-i", "raw.h264", *copy, cwd=tmp_path)
    path = tmp_path / f"changes.{suffix}"
    assert "the picture changes size" in refused(pool, path)
    # What comes before the change is sound, and may be used.
    (((_, header)),) = pool.probe_many([path])
    plan = ClipPlan((0, 1, 2), (64, 64), (0, 0), Bucket(3, 64, 64))
    (((_, clip)),) = pool.decode_many([DecodeJob(path, header, plan)])
    assert isinstance(clip, Clip)


def test_thousands_of_tracks(pool, good, tmp_path):
    track = boxes.find(good, "trak")
    content = boxes.appended(good, "moov", good[track.start : track.end] * 5000)
    assert "more memory" in refused(pool, tmp_path / "many.mp4", content)


def test_a_track_without_frames(pool, good, tmp_path):
    empty = good
    for table, size in (("stsz", 12), ("stts", 8), ("stsc", 8), ("stco", 8), ("stss", 8)):
        body = bytes(size)
        empty = boxes.replaced(empty, table, body)
    assert "frame" in refused(pool, tmp_path / "empty.mp4", empty)


def test_sound_that_claims_a_thousand_million_samples(media, pool, tmp_path):
    """No guard knows this one: FFmpeg takes 48 bytes for each. What refuses it is the worker's own limit."""
    sound = (media / "sound.mp4").read_bytes()
    track = [box for box in boxes.boxes(sound) if box.path == "moov/trak"][1]
    table = next(box for box in boxes.boxes(sound, track.body, track.end) if box.path.endswith("stsz"))
    U32.pack_into(liar := bytearray(sound), table.body + 8, 10**9)
    U32.pack_into(liar, table.body + 4, 1)
    (tmp_path / "sound.mp4").write_bytes(liar)
    outcome(pool, tmp_path / "sound.mp4")


def test_times_that_wrap_are_put_in_order(media, pool, tmp_path):
    shift = f"{2**33 / 90000 - 1.0:.3f}"  # MPEG counts 33 bits of 1/90000 s
    boxes.ffmpeg("-i", media / "good.ts", "-c", "copy", "-output_ts_offset", shift, "wraps.ts", cwd=tmp_path)
    (((_, found)),) = pool.probe_many([tmp_path / "wraps.ts"])
    assert (
        isinstance(found, VideoProbe)
        and found.frames == 16
        and found.frame_times_s[-1] == pytest.approx(15 / 8, abs=1e-3)
    )


def test_a_film_of_an_hour_is_read_in_linear_time(media, pool, tmp_path):
    """100 000 frames at 60 per second, listed, and cut at the far end."""
    picture = (media / "one.mp4").read_bytes()
    took = {}
    for frames in (10_000, 100_000):
        path = tmp_path / f"{frames}.mp4"
        path.write_bytes(boxes.long_film(picture, frames))
        before = cpu_s(pool)
        (((_, found)),) = pool.probe_many([path])
        took[frames] = cpu_s(pool) - before
        assert isinstance(found, VideoProbe) and (found.frames, round(found.fps)) == (frames, 60)
        assert isinstance(outcome(pool, path), Clip)
    assert took[100_000] < 30 * max(took[10_000], 0.1), took
    assert memoryview(found.frame_times_s).nbytes == 8 * 100_000


# --- what is cut off, or turned in on itself --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good.mp4", "index_first.mp4"])
def test_cut_at_every_box(media, pool, tmp_path, name):
    whole = (media / name).read_bytes()
    places = sorted({place for box in boxes.boxes(whole) for place in (box.start, box.start + 4, box.body, box.end)})
    cuts = [place for place in places if place < len(whole)]
    assert len(cuts) > 40
    for place in cuts:
        told = refused(pool, tmp_path / "cut.mp4", whole[:place])
        assert any(word in told for word in ("cut off", "empty", "no index", "not a video", "decoded")), (place, told)


@pytest.mark.parametrize(
    "length", [(0, b""), (1, b"\xff" * 8), (1, bytes(8)), (2, b""), (7, b""), (8, b""), (9, b""), (0xFFFFFFFF, b"")]
)
@pytest.mark.parametrize("path", ["moov", "trak", "stbl", "stsz", "stsd"])
def test_boxes_that_contain_themselves_or_never_end(pool, good, tmp_path, path, length):
    box = boxes.find(good, path)
    number, large = length
    content = good[: box.start] + U32.pack(number) + good[box.start + 4 : box.body] + large + good[box.body :]
    (tmp_path / "loop.mp4").write_bytes(content)
    outcome(pool, tmp_path / "loop.mp4")


def test_a_compressed_index_is_refused(pool, good, tmp_path):
    bomb = zlib.compress(bytes(10**6))
    body = boxes.make(b"dcom", b"zlib") + boxes.make(b"cmvd", b"\xff" * 4 + bomb)
    content = boxes.replaced(good, "moov", boxes.make(b"cmov", body))
    assert "more memory" in refused(pool, tmp_path / "packed.mov", content)


# --- what is no video -------------------------------------------------------------------------------------------------


def test_files_without_moving_pictures(media, pool, tmp_path):
    sine = ["-f", "lavfi", "-i", "sine=d=1"]
    boxes.ffmpeg(*sine, "-c:a", "aac", "sound.mp4", cwd=tmp_path)
    maps = ["-i", media / "cover.png", "-map", "0", "-map", "1", "-c:a", "aac"]
    cover = [*maps, "-c:v", "png", "-disposition:v", "attached_pic"]
    boxes.ffmpeg(*sine, *cover, "cover.mp4", cwd=tmp_path)
    (tmp_path / "words.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    boxes.ffmpeg("-i", "words.srt", "-c:s", "mov_text", "words.mp4", cwd=tmp_path)
    for name, holds in (("sound", "audio"), ("cover", "audio"), ("words", "subtitle")):
        told = refused(pool, tmp_path / f"{name}.mp4")
        assert "no video stream" in told and holds in told


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(10**7))
    return buffer.getvalue()


def test_what_is_called_a_video_and_is_something_else(media, pool, good, tmp_path):
    cover = (media / "cover.png").read_bytes()
    gif = io.BytesIO()
    Image.new("RGB", (64, 64)).save(gif, "GIF")
    for content, name in (
        (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page"),
        (b"\n <HTML>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"#EXTM3U\n", "a playlist"),
        (b"\xef\xbb\xbfffconcat version 1.0\n", "a concat script"),
        (b'<?xml version="1.0"?><MPD>', "an XML document"),
        (cover, "a PNG image"),
        (cover + zipped(), "a PNG image"),
        (gif.getvalue(), "a GIF image"),
        (zipped(), "a zip archive"),
        (zipped() + good, "a zip archive"),
    ):
        assert name in refused(pool, tmp_path / "film.mp4", content)
    assert "cut off" in refused(pool, tmp_path / "film.mp4", good + zipped())
    # A zip archive in a box of its own is a sound video, and nobody unpacks it.
    (tmp_path / "film.mp4").write_bytes(good + boxes.make(b"free", zipped()))
    assert isinstance(outcome(pool, tmp_path / "film.mp4"), Clip)


class Opened:
    """Counts how often files of one folder are opened, by any process (Linux's inotify)."""

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
        self._notes = self._libc.inotify_init1(os.O_NONBLOCK)
        assert self._libc.inotify_add_watch(self._notes, os.fsencode(folder), 0x20) >= 0  # IN_OPEN

    def names(self) -> list[str]:
        """Of the files that were opened since the last call."""
        try:
            events = os.read(self._notes, 1 << 16)
        except BlockingIOError:
            return []
        found = []
        while events:
            (length,) = struct.unpack_from("I", events, 12)
            found.append(events[16 : 16 + length].rstrip(b"\0").decode())
            events = events[16 + length :]
        return found


@pytest.fixture
def lure(media, tmp_path) -> Iterator[tuple[Opened, Path, list[str], str]]:
    """A folder with a video whose opening is seen, and a local web server that tells whether anybody came."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "video.ts").write_bytes((media / "good.ts").read_bytes())
    visits: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            while True:
                try:
                    visitor, _ = server.accept()
                except OSError:
                    return
                visits.append("visit")
                visitor.close()

        threading.Thread(target=answer, daemon=True).start()
        yield Opened(secret), secret / "video.ts", visits, f"http://127.0.0.1:{server.getsockname()[1]}/video.ts"
        server.shutdown(socket.SHUT_RDWR)


def scripts(target: str) -> dict[str, bytes]:
    """What makes FFmpeg open ``target``."""
    hls = f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n"
    mpd = (
        '<?xml version="1.0"?>'
        '<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT2S"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    sdp = f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\na=control:{target}\nm=video 9 RTP/AVP 33\n"
    concat = f"ffconcat version 1.0\nfile '{target}'\n"
    return {"hls": hls.encode(), "concat": concat.encode(), "dash": mpd.encode(), "sdp": sdp.encode()}


@pytest.mark.skipif(not hasattr(os, "O_NONBLOCK") or os.uname().sysname != "Linux", reason="inotify is Linux's")
@pytest.mark.parametrize("guard", ["both", "the list of formats alone"])
def test_no_file_makes_another_be_opened(pool, tmp_path, lure, monkeypatch, guard):
    opened, video, visits, address = lure
    tried = 0
    for target in (str(video), f"file:{video}", os.path.relpath(video, tmp_path), address):
        for name, script in scripts(target).items():
            path = tmp_path / f"{name}.mp4"
            path.write_bytes(script)
            if guard == "both":
                refused(pool, path)
            else:  # in this process, where the first guard can be taken away
                monkeypatch.setattr(containers, "_foreign", lambda head: None)
                with pytest.raises(DataError):
                    probe(path)
            tried += 1
    assert tried == 16
    assert opened.names() == [] and visits == []


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="inotify is Linux's")
def test_the_canary_of_the_lure_sees_what_an_unguarded_ffmpeg_opens(tmp_path, lure):
    import av

    opened, video, visits, address = lure
    (tmp_path / "here.mp4").write_bytes(scripts(str(video))["concat"])
    (tmp_path / "there.m3u8").write_bytes(scripts(address)["hls"])
    with av.open(str(tmp_path / "here.mp4"), options={"safe": "0"}):
        pass
    with pytest.raises(av.FFmpegError):
        av.open(str(tmp_path / "there.m3u8"), options={"protocol_whitelist": "file,http,tcp"})
    until(lambda: visits, "the address is visited")
    assert "video.ts" in opened.names()


@pytest.mark.parametrize(
    "name", ["http:x.mp4", "concat:a|b.mp4", "%03d.mp4", "-i.mp4", "a\nb.mp4", "\udcff.mp4", "data:,x.mp4"]
)
def test_names_that_are_instructions_elsewhere(pool, good, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(good)
    (((_, found)),) = pool.probe_many([Path(name).absolute()])
    assert isinstance(found, VideoProbe)
    assert probe(Path(name)).frames == 16


# --- images -----------------------------------------------------------------------------------------------------------


def png(width: int, height: int, *chunks: tuple[bytes, bytes], data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return U32.pack(len(body)) + kind + body + U32.pack(zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    more = b"".join(chunk(*one) for one in chunks)
    pixels = zlib.compress(data or bytes((1 + 3 * width) * height if width * height < 10**6 else 100))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def webp(kind: bytes, body: bytes) -> bytes:
    return (
        b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBP" + kind + struct.pack("<I", len(body)) + body + bytes(64)
    )


def saved(form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 100, 50)).save(buffer, form, **options)
    return buffer.getvalue()


def tiff_of(width: int, height: int) -> bytes:
    kinds = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 278: height, 279: 64}
    tags = [(tag, 4 if value > 65535 else 3, value) for tag, value in kinds.items()]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(68)


def bmp_of(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 200, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


BOMBS: dict[str, tuple[bytes, str]] = {
    "png.png": (png(50_000, 50_000), "a picture larger than is read"),
    "apng.png": (png(60_000, 60_000, (b"acTL", struct.pack(">II", 10**9, 0))), "a picture larger than is read"),
    "text.png": (png(8, 8, *[(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**7)))] * 9), "not an image"),
    "profile.png": (png(8, 8, (b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8)))), "not an image"),
    "line.png": (png(10**6, 1, data=bytes(1 + 3 * 10**6)), "would keep"),
    "extended.webp": (webp(b"VP8X", b"\2\0\0\0" + b"\xff\xff\xff" + b"\xff\xff\xff"), "16777216x16777216"),
    "lossy.webp": (webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383)), "16383x16383"),
    "lossless.webp": (webp(b"VP8L", b"\x2f" + struct.pack("<I", 0x0FFFFFFF)), "16384x16384"),
    "wide.bmp": (bmp_of(60_000, 60_000), "a picture larger than is read"),
    "large.tif": (tiff_of(60_000, 60_000), "a picture larger than is read"),
    "screen.gif": (saved("GIF").replace(b"GIF87a\x20\0\x20\0", b"GIF87a\xff\xff\xff\xff"), "a picture larger"),
    "frame.gif": (saved("GIF").replace(b",\0\0\0\0\x20\0\x20\0", b",\0\0\0\0\xff\xff\xff\xff"), "a picture larger"),
    "large.avif": (saved("AVIF").replace(b"\0\0\0\x20" * 2, b"\0\0\x75\x30" * 2), "not an image"),
    "program.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", "not an image"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not an image"),
    "archive.png": (zipped(), "not an image"),
    "page.jpg": (b"<!DOCTYPE html><html>", "not an image"),
    "icon.png": (saved("ICO"), "not an image"),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_bomb_is_refused(pool, tmp_path, name):
    content, said = BOMBS[name]
    assert len(content) < 2 * 10**5
    (tmp_path / name).write_bytes(content)
    processes = pool.pids
    (found,) = pool.load_images([(tmp_path / name, Bucket(1, 32, 32))])
    assert peak_mib(pool) < LIMIT_MIB
    assert processes in ([], pool.pids), f"the worker died: {found}"
    assert isinstance(found, DataError) and said in found.what and found.where == str(tmp_path / name)


def test_a_video_is_no_image_and_a_warning_is_no_limit(media, pool, tmp_path, recwarn):
    (found,) = pool.load_images([(media / "good.mp4", Bucket(1, 32, 32))])
    assert isinstance(found, DataError)
    (tmp_path / "large.png").write_bytes(png(10_000, 10_000))  # Pillow warns of it, and reads it
    with pytest.raises(DataError, match="10000x10000"):
        load_image(tmp_path / "large.png")
    assert not [warning for warning in recwarn if issubclass(warning.category, Image.DecompressionBombWarning)]


def test_junk_beside_a_picture_does_not_matter(pool, tmp_path):
    """EXIF and profiles of nonsense, a zip archive behind the picture, and a JPEG called PNG."""
    exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\xff\xff\xff\xff\0\0\0\0" * 40
    files = {
        "exif.jpg": saved("JPEG", exif=exif),
        "profile.jpg": saved("JPEG", icc_profile=os.urandom(5000)),
        "polyglot.png": saved("PNG") + zipped(),
        "jpeg.png": saved("JPEG"),
        "photo.jfif": saved("JPEG"),
        "photo.avif": saved("AVIF", quality=95),
        "animation.gif": saved("GIF", save_all=True, append_images=[Image.new("RGB", (32, 32))]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = list(pool.load_images((tmp_path / name, Bucket(1, 16, 16)) for name in files))
    assert all(isinstance(image, torch.Tensor) for image in found), found
    for image in found:
        assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100.0, 50.0])).abs().max() < 6


def test_the_canary_of_the_image_formats(tmp_path, monkeypatch):
    (tmp_path / "icon.png").write_bytes(saved("ICO"))
    monkeypatch.setattr(pictures, "IMAGE_FORMATS", None)
    assert load_image(tmp_path / "icon.png").shape == (3, 32, 32)


def test_an_image_goes_with_its_clip_and_through_a_worker(media, pool, tmp_path):
    path = media / "good.mp4"
    header, plan = probe(path), ClipPlan((0, 1), (64, 64), (16, 0), Bucket(2, 32, 64))
    images = media / "cover.png", tmp_path / "gone.png"
    jobs = [DecodeJob(path, header, plan, image) for image in images]
    (_, clip), (_, error) = pool.decode_many(jobs)
    assert isinstance(clip, Clip) and clip.image is not None and clip.image.shape == (3, 32, 64)
    assert torch.equal(clip.image, load_fitted_image(media / "cover.png", plan.bucket))
    assert isinstance(error, DataError) and error.where == str(tmp_path / "gone.png")
    with pytest.raises(DataError, match="no such file"):
        load_fitted_image(tmp_path / "gone.png", plan.bucket)


# --- a dataset that holds some of them --------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["error", "skip"])
def test_hostile_rows_are_named_and_the_rest_goes_on(good, demo_clips, tmp_path, policy):
    folder = tmp_path / "clips"
    shutil.copytree(demo_clips, folder)
    hostile = {
        "frames.mp4": boxes.patched(good, "stsz", 8, U32.pack(10**9)),
        "page.mp4": b"<!DOCTYPE html><html>",
        "list.mp4": scripts("/etc/passwd")["concat"],
    }
    with (folder / "metadata.jsonl").open("a") as rows:
        for name, content in hostile.items():
            (folder / name).write_bytes(content)
            rows.write(json.dumps({"file_name": name, "prompt": "a ball"}) + "\n")
    data = {"unreadable_clips": policy}
    config = run_config(known_model("2b"), folder, tmp_path / "run", data=data, cache={"decode_workers": 1})
    spec = read_spec(str(known_model("2b")))
    if policy == "skip":
        report = check_dataset(config, spec, progress=False)
        assert len(report.clips) == 4 and {Path(name).name for name in report.skipped["unreadable"]} == set(hostile)
        return
    with pytest.raises(DataError, match="3 clips, images or captions cannot be used") as caught:
        check_dataset(config, spec, progress=False)
    told = str(caught.value)
    for name, said in (("frames", "can be opened"), ("page", "a web page"), ("list", "a concat script")):
        assert f"{name}.mp4 (" in told and said in told
    assert all(f"metadata.jsonl:{line}" in told for line in (5, 6, 7))


def test_the_fuzz_target_sees_a_pool_that_is_broken(monkeypatch):
    from fuzz import media as target

    try:
        assert target.fuzz_media(target.video_seeds()[0]) == "clip"
        assert target.fuzz_media(target.image_seeds()[0]) == "image"
        assert "web page" in target.fuzz_media(target.VIDEO + b"<html>")
        broken = DataError("no frame", where="elsewhere")
        monkeypatch.setattr(target, "_decoded", lambda world, path: broken)
        with pytest.raises(AssertionError, match="elsewhere"):
            target.fuzz_media(target.VIDEO)
        with pytest.raises(AssertionError, match="no longer decodes"):
            target._world().check()
        monkeypatch.undo()
        monkeypatch.setattr(target, "_resident", lambda pid, what: 2**40)
        with pytest.raises(AssertionError, match="a worker of"):
            target._world().check()
    finally:
        target.close()


def test_the_worker_met_them_all(media, pool):
    """Last in this file: the same process, if it was never replaced, still decodes, and never grew."""
    assert isinstance(outcome(pool, media / "good.mp4"), Clip)
