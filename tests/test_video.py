"""Probing and decoding, on small real files made by ffmpeg; ``theirs`` is what ffmpeg itself decodes."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from decoding import decode, load_image, probe
from PIL import Image
from waiting import until

from finetune.core.errors import DataError, KilledError
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets import containers, decode_pool, pictures
from finetune.datasets.decode_pool import DecodeJob, DecodePool, fit_image
from finetune.datasets.geometry import ClipConfig, plan_clips, resize_and_crop
from finetune.datasets.pictures import resize_crop

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
HEIGHT, WIDTH, FRAMES, FPS = 64, 96, 60, 30

# Luma tells the frame, blue the column and red the row; mild enough that no colour leaves the RGB cube.
LUMA_FIRST, LUMA_STEP = 60, 2.3
PATTERN = f"geq=lum='{LUMA_FIRST}+{LUMA_STEP}*N':cb='110+0.3*X':cr='115+0.4*Y'"


def lavfi(size: str = f"{WIDTH}x{HEIGHT}", pixels: str = "yuv420p", seconds: float = FRAMES / FPS) -> list[str]:
    return ["-f", "lavfi", "-i", f"color=black:s={size}:r={FPS}:d={seconds},format={pixels},{PATTERN}"]


H264 = ["-c:v", "libx264", "-qp", "8"]
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"

# name -> (ffmpeg arguments, frames, (height, width), EXIF's orientation)
USUAL = (FRAMES, (HEIGHT, WIDTH), 1)
FILES: dict[str, tuple[list[str], int, tuple[int, int], int]] = {
    "cfr.mp4": ([*lavfi(), *H264, "-bf", "2", "-g", "12"], *USUAL),
    "cfr.mkv": ([*lavfi(), *H264, "-bf", "2", "-g", "12"], *USUAL),
    "moov_first.mov": ([*lavfi(), *H264, "-g", "12", "-movflags", "+faststart"], *USUAL),
    "vp9.webm": ([*lavfi(), "-c:v", "libvpx-vp9", "-crf", "8", "-cpu-used", "8", "-g", "20"], *USUAL),
    "intra.mov": ([*lavfi(), "-c:v", "mjpeg", "-q:v", "2"], *USUAL),
    "rotate90.mp4": (
        ["-display_rotation", "-90", "-i", "cfr.mp4", "-c", "copy"],
        FRAMES,
        (WIDTH, HEIGHT),
        6,
    ),
    "rotate180.mp4": (
        ["-display_rotation", "180", "-i", "cfr.mp4", "-c", "copy"],
        FRAMES,
        (HEIGHT, WIDTH),
        3,
    ),
    "rotate270.mp4": (
        ["-display_rotation", "90", "-i", "cfr.mp4", "-c", "copy"],
        FRAMES,
        (WIDTH, HEIGHT),
        8,
    ),
    "odd.mp4": ([*lavfi("97x65", "yuv444p", 1), *H264], FPS, (65, 97), 1),
    "vfr.mp4": (
        [*lavfi(), "-vf", "select='lt(n,20)+not(mod(n,3))'", "-fps_mode", "vfr", *H264],
        33,
        (HEIGHT, WIDTH),
        1,
    ),
    "sound.mp4": ([*lavfi(), "-f", "lavfi", "-i", "sine=d=3", *H264, "-c:a", "aac"], *USUAL),
    # What some decoders cannot open, or get wrong:
    "av1.mp4": ([*lavfi(), "-c:v", "libsvtav1", "-preset", "12", "-crf", "10"], *USUAL),
    "av1_rotated.mp4": (
        ["-display_rotation", "-90", "-i", "av1.mp4", "-c", "copy"],
        FRAMES,
        (WIDTH, HEIGHT),
        6,
    ),
    "open_gop.mp4": ([*lavfi(), *H264, "-x264-params", OPEN_GOP], *USUAL),
    "open_gop_hevc.mp4": ([*lavfi(), "-c:v", "libx265", "-x265-params", f"{OPEN_GOP}:log-level=none"], *USUAL),
    "edit_list.mp4": (["-ss", "0.5", "-i", "cfr.mp4", "-c", "copy"], 45, (HEIGHT, WIDTH), 1),
    "stream.ts": ([*lavfi(), *H264, "-bf", "2", "-g", "12"], *USUAL),
    "program.mpg": ([*lavfi(), "-c:v", "mpeg2video", "-q:v", "2", "-bf", "2", "-g", "12"], *USUAL),
    "b_frames.avi": ([*lavfi(), *H264, "-bf", "2", "-g", "12"], *USUAL),
    "wide_pixels.mp4": ([*lavfi(), "-vf", "setsar=2/1", *H264], FRAMES, (HEIGHT, 2 * WIDTH), 1),
    "two_videos.mkv": (["-i", "cfr.mp4", "-i", "odd.mp4", "-map", "0", "-map", "1", "-c", "copy"], *USUAL),
}


def ffmpeg(*arguments: str, cwd: Path) -> bytes:
    done = subprocess.run(
        [FFMPEG, "-hide_banner", "-loglevel", "error", "-y", *arguments], cwd=cwd, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    for name, (arguments, *_) in FILES.items():
        ffmpeg(*arguments, name, cwd=folder)
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", "audio_only.mp4", cwd=folder)
    (folder / "zero.mp4").touch()
    for name, cut in (
        ("cfr.mp4", "cut_before_index.mp4"),
        ("moov_first.mov", "cut_in_frames.mov"),
        ("cfr.mkv", "cut.mkv"),
        ("b_frames.avi", "cut.avi"),
    ):
        content = (folder / name).read_bytes()
        (folder / cut).write_bytes(content[: len(content) * 6 // 10])
    (folder / "text.mp4").write_text("this is no video\n" * 50)
    # FFmpeg knows these by their content and would open the files that they name.
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile cfr.mp4\n")
    (folder / "playlist.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nstream.ts\n#EXT-X-ENDLIST\n")
    return folder


def theirs_all(path: Path) -> np.ndarray:
    """Every frame as ffmpeg shows it: upright, uint8 [F, H, W, 3]."""
    raw = ffmpeg(
        "-i",
        path.name,
        "-map",
        "0:v:0",
        "-fps_mode",
        "passthrough",
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
        cwd=path.parent,
    )
    height, width = FILES[path.name][2]
    if path.name == "wide_pixels.mp4":
        width //= 2
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def whole(probed: VideoProbe, indices: tuple[int, ...]) -> ClipPlan:
    """A plan that neither resizes nor crops."""
    return ClipPlan(indices, (probed.height, probed.width), (0, 0), Bucket(len(indices), probed.height, probed.width))


@pytest.mark.parametrize("name", FILES)
def test_probe(media, name):
    _, count, size, orientation = FILES[name]
    ours = probe(media / name)
    assert (ours.frames, (ours.height, ours.width), ours.orientation) == (count, size, orientation)
    assert ours.corrections == (("turned-1",) if orientation == 3 else ())
    assert len(ours.frame_times_s) == count and ours.frame_times_s[0] == 0
    assert all(a < b for a, b in zip(ours.frame_times_s, ours.frame_times_s[1:], strict=False))
    if name != "vfr.mp4":
        assert ours.fps == pytest.approx(FPS, rel=2e-3)
        assert np.abs(np.array(ours.frame_times_s) - np.arange(count) / FPS).max() <= 1e-3


@pytest.mark.parametrize("name", [name for name in FILES if name != "wide_pixels.mp4"])
def test_frames_are_ffmpegs(media, name):
    path = media / name
    theirs = theirs_all(path)
    probed = probe(path)
    assert len(theirs) == probed.frames
    last = probed.frames - 1
    # In one go; with jumps over groups of pictures; one far frame first, then an earlier clip from the same reader.
    for indices in (tuple(range(0, last + 1, 4)), (11, 12, 13, 25, last), (last, last), (1, 2)):
        ours = decode(path, probed, whole(probed, indices)).pixels
        assert ours.dtype == torch.uint8 and ours.shape == (3, len(indices), probed.height, probed.width)
        difference = np.abs(ours.permute(1, 2, 3, 0).numpy().astype(int) - theirs[list(indices)].astype(int))
        # Neighbouring frames differ by 2.7 levels everywhere, so a wrong frame cannot hide in the mean.
        assert difference.mean() < 1, f"frames {indices}: mean difference {difference.mean((1, 2, 3)).round(1)}"


def test_pixels_that_are_not_square_become_square(media):
    path = media / "wide_pixels.mp4"
    ours = decode(path, probe(path), whole(probe(path), (30,))).pixels[:, 0].permute(1, 2, 0).numpy()
    theirs = np.asarray(Image.fromarray(theirs_all(path)[30]).resize((2 * WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 1


@pytest.mark.parametrize("name", ["cfr.mp4", "vfr.mp4", "av1.mp4", "rotate90.mp4"])
def test_a_planned_clip_shows_the_frames_of_its_times(media, name):
    """30 fps (or variable) to 8 fps, read back from the luma of the pixels."""
    path = media / name
    probed = probe(path)
    (plan,) = plan_clips(probed, ClipConfig(buckets=["13x32x48"]), 8, name)
    pixels = decode(path, probed, plan).pixels
    assert pixels.shape == (3, 13, 32, 48)

    def luma(rgb) -> np.ndarray:
        """BT.601 luma, mean over the picture; planes first."""
        return np.tensordot([0.299, 0.587, 0.114], np.asarray(rgb, dtype=float).mean((-2, -1)), 1)

    every_frame = luma(theirs_all(media / "cfr.mp4").transpose(3, 0, 1, 2))  # of the 30 fps source, none dropped
    shown = np.abs(luma(pixels)[:, None] - every_frame).argmin(1)
    gap_s = 3 / FPS if name == "vfr.mp4" else 1 / FPS  # vfr.mp4 keeps only every third frame after 0.67 s
    assert np.abs(shown / FPS - np.arange(13) / 8).max() <= gap_s / 2 + 1e-3


def test_resizing_is_antialiased_bicubic_and_the_crop_is_in_place(media):
    path = media / "odd.mp4"
    probed = probe(path)
    bucket = Bucket(2, 24, 48)
    resize_hw, crop_yx = resize_and_crop((probed.height, probed.width), bucket)
    ours = decode(path, probed, ClipPlan((3, 20), resize_hw, crop_yx, bucket)).pixels
    source = torch.from_numpy(theirs_all(path)[[3, 20]].copy()).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(source, resize_hw, mode="bicubic", antialias=True)
    theirs = theirs[..., crop_yx[0] : crop_yx[0] + 24, crop_yx[1] : crop_yx[1] + 48].transpose(0, 1)
    assert ours.shape == theirs.shape == (3, 2, 24, 48)
    assert (ours.int() - theirs.int()).abs().float().mean() < 1


def test_resizing_filters_noise_as_torch_does():
    """A video's smooth pictures do not tell a filter from none."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    ours = resize_crop(noise, (24, 40), (2, 5), (20, 30)).astype(int)
    source = torch.from_numpy(noise).permute(2, 0, 1)[None]
    for mode, antialias, same in (("bicubic", True, True), ("bicubic", False, False), ("nearest", False, False)):
        theirs = torch.nn.functional.interpolate(source, (24, 40), mode=mode, antialias=antialias)[0, :, 2:22, 5:35]
        off = np.abs(ours - theirs.permute(1, 2, 0).numpy())
        assert (off.max() <= 2) == same, (mode, off.max())


BROKEN = {
    "audio_only.mp4": "no video stream; it holds audio",
    "zero.mp4": "empty",
    "cut_before_index.mp4": "cut off",
    "cut_in_frames.mov": "cut off",
    "cut.mkv": "cut off",
    "cut.avi": "cut off",
    "text.mp4": "not a video",
    "concat.mp4": "a concat script",
    "playlist.mp4": "a playlist",
    "missing.mp4": "no such file",
    ".": "not a regular file",
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(media, name):
    with pytest.raises(DataError, match=BROKEN[name]) as caught:
        probe(media / name)
    assert caught.value.where == str(media / name)


def test_the_concat_canary_would_open_without_the_guard(media):
    import av

    with av.open(str(media / "concat.mp4")) as container:
        assert container.format.name == "concat"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(DataError, match="not a regular file"):
        probe(tmp_path / "pipe.mp4")


def damaged(media: Path, tmp_path: Path) -> Path:
    """``cfr.mp4`` with nonsense where frames 24 to 35 (the third group of pictures) are stored."""
    import av

    with av.open(str(media / "cfr.mp4")) as container:
        packets = [p for p in container.demux(video=0) if p.size and 24 <= p.pts * float(p.time_base) * FPS + 0.5 < 36]
        spans = [(packet.pos, packet.size) for packet in packets]
    content = bytearray((media / "cfr.mp4").read_bytes())
    for position, size in spans:
        content[position : position + size] = b"\xff" * size
    (tmp_path / "damaged.mp4").write_bytes(content)
    return tmp_path / "damaged.mp4"


def test_damage_matters_only_where_the_plan_goes(media, tmp_path):
    path = damaged(media, tmp_path)
    probed = probe(path)
    ours = decode(path, probed, whole(probed, (3, 50))).pixels.permute(1, 2, 3, 0).numpy()
    theirs = theirs_all(media / "cfr.mp4")[[3, 50]]
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 1
    with pytest.raises(DataError, match=r"decoded|damaged") as caught:
        decode(path, probed, whole(probed, (3, 28)))
    assert caught.value.where == str(path)


def test_a_file_that_changed_since_its_probe(media, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes((media / "cfr.mp4").read_bytes())
    probed = probe(path)
    path.write_bytes((media / "odd.mp4").read_bytes())
    with pytest.raises(DataError, match="changed"):
        decode(path, probed, whole(probed, (0, 1)))


def test_boxes_within_boxes_within_boxes_end(tmp_path):
    depth = 20_000
    content = b"".join(struct.pack(">I4s", 8 * (depth - i), b"moov") for i in range(depth))
    (tmp_path / "deep.mp4").write_bytes(content)
    with pytest.raises(DataError):
        probe(tmp_path / "deep.mp4")


def test_limits_hold_where_the_container_says_nothing(media, monkeypatch):
    monkeypatch.setattr(containers, "MAX_FRAMES", 59)
    with pytest.raises(DataError, match="more than 59 frames"):
        probe(media / "cfr.mkv")
    monkeypatch.setattr(pictures, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match="64x96"):
        probe(media / "cfr.mkv")


MEMORY = """
import sys
from pathlib import Path
from finetune.datasets.decode import probe_file, read_clip, read_frames
from finetune.core.types import Bucket, ClipPlan

def peak_mib():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

path = Path(sys.argv[1])
header = probe_file(path)
read_clip(path, header, ClipPlan(tuple(range(0, 150, 10)), (64, 114), (0, 0), Bucket(15, 64, 96)))
if sys.argv[2] == "whole":
    frames = list(read_frames(path, range(150), header))
print(peak_mib())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_video(tmp_path):
    clip = tmp_path / "720p.mp4"  # 150 frames of 2.6 MiB in one group of pictures: 400 MiB if they were all held
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        "testsrc2=s=1280x720:r=30:d=5",
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        clip.name,
        cwd=tmp_path,
    )

    def peak_mib(what: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(clip), what], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    ours = peak_mib("read")
    assert ours < 300
    assert peak_mib("whole") > ours + 150  # canary: frames that are held are seen


# --- worker processes -------------------------------------------------------------------------------------------------


def jobs_of(media: Path, names: list[str]) -> list[DecodeJob]:
    config = ClipConfig(buckets=["9x32x48"])
    probes = [probe(media / name) for name in names]
    plans = [plan_clips(probed, config, 8, name)[0] for name, probed in zip(names, probes, strict=True)]
    return [DecodeJob(media / name, *pair) for name, *pair in zip(names, probes, plans, strict=True)]


CRASHING_WORKER = """
import os, signal, time
from finetune.datasets import decode, decode_pool, worker
real = decode.read_clip
def read_clip(path, header, cut):
    if "crash" in path.name:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "wait" in path.name:
        (path.parent / f"{os.getpid()}.waits").touch()
        if "once" not in path.name or len(list(path.parent.glob("*.waits"))) == 1:
            time.sleep(600)
    if "hang" in path.name:
        time.sleep(10**6)
    if "bug" in path.name:
        raise ZeroDivisionError("a bug of ours")
    return real(path, header, cut)
decode.read_clip = read_clip
worker.serve(decode_pool.handle)
"""


@pytest.fixture
def crashing_worker(tmp_path, monkeypatch):
    (tmp_path / "crashing_worker.py").write_text(CRASHING_WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decode_pool, "WORKER", "import crashing_worker")


def named(job: DecodeJob, folder: Path, name: str) -> DecodeJob:
    (folder / name).write_bytes(job.path.read_bytes())
    return replace(job, path=folder / name)


def test_workers_give_what_this_process_gives_in_order(media):
    jobs = jobs_of(media, ["cfr.mp4", "av1.mp4", "rotate90.mp4", "vfr.mp4", "odd.mp4"])
    with DecodePool(workers=0) as here, DecodePool(workers=2) as pool:
        theirs = list(here.decode_many(jobs))
        ours = list(pool.decode_many(jobs))
        assert [job for job, _ in ours] == jobs
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            assert torch.equal(a.pixels, b.pixels) and a.pixels.is_contiguous()
            a.pixels.add_(1)  # writable: the consumer owns it
        paths = [media / name for name in ("cfr.mp4", "zero.mp4", "av1.mp4")]
        probes = dict(pool.probe_many(paths))
        assert list(probes) == paths
        assert probes[paths[0]] == probe(paths[0]) and probes[paths[2]] == probe(paths[2])
        assert isinstance(probes[paths[1]], DataError) and "empty" in probes[paths[1]].what


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unusable_file_is_one_result_among_others(media, tmp_path, workers):
    good, bad = jobs_of(media, ["cfr.mp4", "odd.mp4"])
    bad = named(bad, tmp_path, "gone.mp4")
    bad.path.unlink()
    with DecodePool(workers) as pool:
        results = [result for _, result in pool.decode_many([good, bad, good])]
    assert isinstance(results[1], DataError) and results[1].where == str(bad.path)
    assert all(result.pixels.shape == (3, 9, 32, 48) for result in (results[0], results[2]))


def test_a_worker_that_crashes_costs_its_file_only(media, tmp_path, crashing_worker):
    (good,) = jobs_of(media, ["cfr.mp4"])
    crash = named(good, tmp_path, "crash.mp4")
    with DecodePool(workers=2) as pool:
        results = [result for _, result in pool.decode_many([good, crash, good, crash, crash, good, good])]
    died = [isinstance(result, DataError) for result in results]
    assert died == [False, True, False, True, True, False, False]
    assert "SIGSEGV" in results[1].what and results[1].where == str(crash.path)


@pytest.mark.parametrize(("name", "kills"), [("wait_once.mp4", 1), ("wait.mp4", 2)])
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_is_killed_from_outside_blames_no_file(media, tmp_path, crashing_worker, name, kills, signal_):
    (good,) = jobs_of(media, ["cfr.mp4"])
    job = named(good, tmp_path, name)

    def kill() -> None:
        for number in range(1, kills + 1):
            while len(waiting := list(tmp_path.glob("*.waits"))) < number:
                time.sleep(0.01)
            os.kill(int(max(waiting, key=lambda path: path.stat().st_mtime_ns).stem), signal_)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with DecodePool(workers=1) as pool:
        if kills == 1:
            (((_, clip)),) = pool.decode_many([job])
            assert clip.pixels.shape == (3, 9, 32, 48)
        else:
            with pytest.raises(KilledError, match=rf"killed twice \({signal_.name}\).*memory") as caught:
                list(pool.decode_many([job]))
            assert caught.value.where == str(job.path) and not isinstance(caught.value, DataError)
        assert len(list(tmp_path.glob("*.waits"))) == 2
        (((_, clip)),) = pool.decode_many([good])  # the pool goes on
        assert clip.pixels.shape == (3, 9, 32, 48)
    killer.join()


def test_a_bug_in_a_worker_is_no_data_error(media, tmp_path, crashing_worker):
    (good,) = jobs_of(media, ["cfr.mp4"])
    with DecodePool(workers=1) as pool, pytest.raises(RuntimeError, match=r"failed at .*bug\.mp4[\s\S]*a bug of ours"):
        list(pool.decode_many([named(good, tmp_path, "bug.mp4")]))


def test_a_worker_that_cannot_start_says_why(media, monkeypatch):
    monkeypatch.setattr(decode_pool, "WORKER", "import no_such_worker_module")
    with DecodePool(workers=1) as pool, pytest.raises(RuntimeError, match="no_such_worker_module"):
        list(pool.probe_many([media / "cfr.mp4"]))


def test_a_worker_that_is_killed_when_it_starts_is_no_bug(media, monkeypatch):
    monkeypatch.setattr(decode_pool, "WORKER", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with DecodePool(workers=1) as pool, pytest.raises(KilledError, match=r"when it started \(SIGKILL\)"):
        list(pool.probe_many([media / "cfr.mp4"]))


def test_a_worker_that_died_idle_blames_no_file(media):
    with DecodePool(workers=1) as pool:
        assert not isinstance(next(pool.probe_many([media / "cfr.mp4"]))[1], DataError)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        until(lambda: ") Z " in Path(f"/proc/{pid}/stat").read_text(), "the worker is dead")
        assert not isinstance(next(pool.probe_many([media / "cfr.mp4"]))[1], DataError)


def test_no_more_clips_are_in_flight_than_asked_for(media):
    (job,) = jobs_of(media, ["cfr.mp4"])
    drawn = 0

    def endless():
        nonlocal drawn
        while True:
            drawn += 1
            yield job

    with DecodePool(workers=2, in_flight=3) as pool:
        results = pool.decode_many(endless())
        for taken in range(1, 6):
            next(results)
            assert drawn <= taken + 2  # the one just given, and two that are being decoded
        results.close()


def test_closing_ends_processes_and_threads(media, tmp_path, crashing_worker):
    (good,) = jobs_of(media, ["cfr.mp4"])
    before = threading.active_count()
    pool = DecodePool(workers=2)
    results = pool.decode_many([good, *[named(good, tmp_path, "hang.mp4")] * 5])
    next(results)
    processes = pool.pids
    pool.close()
    pool.close()
    assert len(processes) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in processes)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError):
        next(pool.decode_many([good]))


def test_nothing_heavy_is_imported_before_it_is_needed():
    worker = "import finetune.datasets.decode_pool, finetune.datasets.worker, sys"
    here = "import finetune.datasets.decode_pool, finetune.datasets.sources, finetune.datasets.geometry, sys"
    for code, forbidden in ((worker, "torch datasets av decord"), (here, "av decord datasets diffusers")):
        check = f"{code}; print(sorted(set('{forbidden}'.split()) & set(sys.modules)))"
        assert (
            subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "[]\n"
        )
    canary = "import torch, sys; print(sorted({'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", canary], capture_output=True, text=True).stdout == "['torch']\n"


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture() -> np.ndarray:
    y, x = np.mgrid[0:20, 0:30]
    return np.stack([8 * x, 12 * y, 4 * (x + y)], -1).astype(np.uint8)


def test_load_image_is_upright_rgb(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "plain.png")
    ours = load_image(tmp_path / "plain.png")
    assert ours.dtype == torch.uint8 and ours.shape == (3, 20, 30) and ours.is_contiguous()
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), picture)


def test_transparency_is_laid_on_black(tmp_path, picture):
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    Image.fromarray(np.concatenate([picture, alpha], -1)).save(tmp_path / "alpha.png")
    ours = load_image(tmp_path / "alpha.png").permute(1, 2, 0).numpy()
    assert (ours[:10] == 0).all() and np.array_equal(ours[10:], picture[10:])


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    ours = load_image(tmp_path / "deep.png")
    assert np.array_equal(ours[0].numpy().ravel(), np.arange(256)) and torch.equal(ours[0], ours[2])


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, picture, mode):
    name = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image = Image.fromarray(picture).convert(mode)
    image.save(name)
    with Image.open(name) as stored:
        theirs = np.asarray(stored.convert("RGB"))
    assert np.array_equal(load_image(name).permute(1, 2, 0).numpy(), theirs)


def test_broken_images_are_named(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "whole.png")
    cases = {
        "text.png": b"no image",
        "zero.png": b"",
        "cut.png": (tmp_path / "whole.png").read_bytes()[:60],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_image(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        load_image(tmp_path / "missing.png")


def test_an_image_is_fitted_by_the_rule_of_frames(media):
    path = media / "odd.mp4"
    probed = probe(path)
    bucket = Bucket(1, 24, 48)
    (plan,) = plan_clips(probed, ClipConfig(buckets=[str(bucket)]), 8, "x")
    still = decode(path, probed, whole(probed, (0,))).pixels[:, 0]
    assert torch.equal(fit_image(still, bucket), decode(path, probed, plan).pixels[:, 0])
    same = fit_image(still, Bucket(1, probed.height, probed.width))
    assert torch.equal(same, still)


def test_real_clips():
    if "FINETUNE_REAL_CLIPS" not in os.environ:
        pytest.skip("set FINETUNE_REAL_CLIPS to a folder with cogvideox_samples/ and steamboat_willie/")
    folder = Path(os.environ["FINETUNE_REAL_CLIPS"])
    clips = sorted(folder.rglob("*.mp4"))
    assert len(clips) == 8
    with DecodePool(workers=2) as pool:
        probes = dict(pool.probe_many(clips))
        for path, probed in probes.items():
            assert (probed.frames, probed.fps) == (
                (195, 30.0) if "steamboat" in str(path) else (49, pytest.approx(8.0))
            )
        config = ClipConfig(buckets=["49x64x96"])
        jobs = [DecodeJob(p, q, plan_clips(q, config, 8, str(p))[0]) for p, q in probes.items()]
        for _, clip in pool.decode_many(jobs):
            assert clip.pixels.shape == (3, 49, 64, 96) and clip.pixels.float().std() > 10
