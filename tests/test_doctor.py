"""The doctor: each fault it names is made here, and the page shows what training sees, in a browser too."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from browsing import Tab
from decoding import decode, probe
from diffusers import AutoencoderKLCogVideoX
from fuzz import boxes
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from worlds import run_values

import finetune
from finetune.cli.app import OK, USER_ERROR, WARNED
from finetune.cli.main import main
from finetune.cogvideox.components import read_part
from finetune.cogvideox.model_files import known_model
from finetune.config.starting_points import STARTING_POINTS, starting_point, suited, word_on_length
from finetune.core.errors import DataError
from finetune.core.types import Bucket
from finetune.datasets.decode import read_frames
from finetune.datasets.file_memory import FileMemory
from finetune.datasets.geometry import ClipConfig, plan_clips
from finetune.diagnosis import faults, outlook
from finetune.diagnosis import frames as clip_frames
from finetune.diagnosis.page import Bars, Card, Column, Fault, Page, Picture, Table, render
from finetune.diagnosis.report import ClipReport, DoctorReport
from finetune.planner import plan as planner

NOISE = "noise=alls=9:allf=t"

H264 = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "18", "-pix_fmt", "yuv420p"]

WORLD = "mandelbrot=s=96x64:r=8:start_scale=1:end_scale=0.3:end_pts=30"
"""Moves, and has detail everywhere."""


def filmed(filters: str = "null", *, source: str = WORLD, seconds: float = 1.2, after: list[str] = H264) -> list[str]:
    return ["-f", "lavfi", "-i", source, "-t", str(seconds), "-vf", filters, *after]


CLIPS: dict[str, tuple[list[str], str | None]] = {
    "good.mp4": (filmed("hue=h=20"), None),
    "other.mp4": (filmed(source="testsrc2=s=96x64:r=8"), None),
    "black.mp4": (filmed(source="color=black:s=96x64:r=8"), "black"),
    "fades.mp4": (filmed("fade=t=out:st=0.3:d=0.5"), "black frames"),
    "static.mp4": (filmed("loop=loop=20:size=1,hflip,setpts=N/8/TB"), "static"),
    "frozen.mp4": (filmed("trim=end_frame=5,rotate=1,tpad=stop_mode=clone:stop_duration=2"), "frozen"),
    "bars.mp4": (filmed("scale=96:40,vflip,pad=96:64:0:12:black,setsar=1"), "bars"),
    "blurred.mp4": (filmed("transpose=1,transpose=1,gblur=sigma=9,hue=h=90"), "blurred"),
    "flashing.mp4": (filmed("geq=lum='if(mod(N,2),lum(X,Y)/8,235)':cb=128:cr=128"), "flashing"),
    "again.mp4": (filmed("hue=h=20", after=[*H264[:4], "-crf", "30", *H264[6:]]), "near-duplicate"),
    "vfr.mkv": (
        filmed("negate,select='lt(n,6)+not(mod(n,3))'", source=f"{WORLD}:r=24", after=[*H264, "-fps_mode", "vfr"]),
        "variable rate",
    ),
    "fast.mp4": (filmed("negate,vflip", source="testsrc2=s=96x64:r=60"), "high rate"),
    "slow.mp4": (filmed("hflip,vflip", source="mandelbrot=s=96x64:r=4", seconds=2.5), "slow"),
    "small.mp4": (filmed("scale=48:32,negate,hflip"), "enlarged"),
    "tall.mp4": (filmed("transpose=1,scale=64:128,negate"), "cropped"),
    "short.mp4": (filmed(seconds=0.5), "short"),
    "hdr.mkv": (
        filmed("setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc", after=["-c:v", "ffv1"]),
        "HDR",
    ),
    "fields.mkv": (
        filmed("format=yuv420p,setfield=tff,tinterlace=interleave_top,setfield=tff", seconds=3, after=["-c:v", "ffv1"]),
        "interlaced",
    ),
    "glass.webm": (
        filmed("format=yuva420p,geq=lum='lum(X,Y)':a='if(gt(X,48),255,90)'", after=["-c:v", "libvpx-vp9"]),
        "transparent",
    ),
}
"""Name -> how FFmpeg makes it, and the fault that the doctor is to name; None for none worse than a note."""


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clinic")
    for name, (arguments, _) in CLIPS.items():
        boxes.ffmpeg(*arguments, name, cwd=folder)
    boxes.ffmpeg("-display_rotation", "90", "-i", "other.mp4", "-c", "copy", "turned.mp4", cwd=folder)
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:-2000])
    for path in sorted(folder.iterdir()):
        path.with_suffix(".txt").write_text(f"a red circle moving {path.stem}")
    (folder / "good.txt").write_text("a red circle moving left " * 9)
    (folder / "other.txt").write_text("a red \u4e0d\u77e5 circle")
    (folder / "empty.mp4").write_bytes((folder / "other.mp4").read_bytes())
    (folder / "empty.txt").write_text(" ")
    for name in ("fast", "slow"):
        (folder / f"{name}.txt").write_text("a yellow ring")
    return folder


def values(model: Path, clips: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = {"buckets": ["9x64x96"], "short_clips": "skip", "unreadable_clips": "skip", **changes.pop("data", {})}
    return run_values(model, clips, output, data=data, **changes)


@pytest.fixture(scope="module", autouse=True)
def no_planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Predicting memory takes a process and seconds; the planner has tests of its own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("plan")
        patch.setattr(planner, "predict_async", lambda *_, **__: planner.BackgroundPrediction(None, folder, None))
        yield


@pytest.fixture(scope="module")
def report(clinic, tiny_model, tmp_path_factory) -> DoctorReport:
    folder = tmp_path_factory.mktemp("doctor")
    return finetune.doctor(values(tiny_model(), clinic, folder / "run"), page=folder / "page.html", progress=False)


def clip_of(report: DoctorReport, name: str) -> ClipReport:
    (clip,) = (clip for clip in report.clips if Path(clip.name).name == name)
    return clip


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name, (_, fault) in CLIPS.items()),
        ("turned.mp4", "rotated"),
        ("broken.mp4", "undecodable"),
        ("good.mp4", "caption cut"),
        ("other.mp4", "unknown words"),
        ("fast.mp4", "same caption"),
    ],
)
def test_a_fault_is_named(report, name, fault):
    named = {found.name: found for found in clip_of(report, name).faults}
    pictured = {
        "black",
        "black frames",
        "static",
        "frozen",
        "bars",
        "blurred",
        "flashing",
        "variable rate",
        "high rate",
    }
    assert (fault in named) if fault else not set(named) & pictured, named


def test_rows_and_videos_that_are_left_out_are_in_the_report(report):
    (row,) = (clip for clip in report.clips if "empty.txt" in clip.name)
    assert [fault.text for fault in row.faults] == ["the caption is empty"] and not row.bucket
    assert not clip_of(report, "short.mp4").bucket and not clip_of(report, "broken.mp4").bucket
    assert clip_of(report, "good.mp4").cut_caption.startswith((" red", " circle", " moving", " left", "a ", " a"))


def test_what_is_cut_from_a_caption_is_the_rest_of_it(report):
    clip = clip_of(report, "good.mp4")
    assert clip.caption + clip.cut_caption == ("a red circle moving left " * 9).strip()
    cut = next(fault for fault in clip.faults if fault.name == "caption cut")
    assert f"{report.token_limit} are read" in cut.text
    lost = next(fault for fault in clip_of(report, "other.mp4").faults if fault.name == "unknown words")
    assert "\u4e0d\u77e5" in lost.text


def test_every_caption_of_a_clip_is_shown(clinic, tiny_model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(clinic / "good.mp4", clips)
    row = {"file_name": "good.mp4", "caption": "a circle", "captions": ["a red circle", "it moves " * 30]}
    (clips / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    sources = [{"path": str(clips), "trigger": "zkx"}]
    content = values(
        tiny_model(), clips, tmp_path / "run", data={"sources": sources}, validation={"samples": [{"prompt": "a"}]}
    )
    report = finetune.doctor(content, page=tmp_path / "page.html", progress=False)
    (clip,) = report.clips
    assert (clip.caption, clip.variants[0]) == ("zkx a circle", ("zkx a red circle", ""))
    assert clip.variants[1][1].endswith("it moves") and clip.variants[1][0].startswith("zkx it moves")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<p class="caption"') == 3 and f"{clip.variants[1][1]}</s>" in page
    assert any("1 rows of " in note and "caption that is none of their captions" in note for note in report.notes)
    assert "'zkx'" in next(fault.text for fault in report.faults if fault.name == "trigger missing")


def test_the_document_has_what_the_report_has(report):
    document = json.loads(report.to_json())
    assert {clip["name"] for clip in document["clips"]} == {clip.name for clip in report.clips}
    assert document["level"] == "warning" and document["buckets"][0]["bucket"] == "9x64x96"
    assert document["predicted"]["step_s"] > 0 and document["captions"]["limit"] == report.token_limit


def test_faults_of_the_run_are_its_own(report):
    assert {fault.name for fault in report.faults} == {"length", "no holdout", "little kept"}


def test_the_text_counts_each_fault_once(report):
    lines = str(report).splitlines()
    assert sum(" x near-duplicate, such as " in line for line in lines) == 1
    assert any(line.startswith("warning: 1 x flashing, such as") for line in lines)


# ----------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("keep", "changes", "code"),
    [
        (("good", "other"), {"train": {"epochs": 60, "steps": None}, "data": {"holdout": 1}}, OK),
        (("good", "black"), {}, WARNED),
        (("good", "broken"), {"data": {"unreadable_clips": "error"}}, USER_ERROR),
        (("good", "short"), {"data": {"short_clips": "error"}}, USER_ERROR),
        (("broken",), {}, USER_ERROR),
    ],
)
def test_the_exit_code_is_the_worst_that_was_found(clinic, tiny_model, tmp_path, capsys, keep, changes, code):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in keep:
        shutil.copy(clinic / f"{name}.mp4", clips)
        (clips / f"{name}.txt").write_text(f"a red circle {name}")
    config = finetune.load_config(_written(tmp_path, values(tiny_model(), clips, tmp_path / "run", **changes)))
    assert config.data.sources
    words = ["doctor", "--config", str(tmp_path / "run.yaml"), "--output", str(tmp_path / "page.html"), "--json"]
    assert main(words) == code
    document = json.loads(capsys.readouterr().out)
    assert document["level"] == {OK: document["level"], WARNED: "warning", USER_ERROR: "error"}[code]
    assert document["level"] in (None, "note") or code != OK
    assert (tmp_path / "page.html").stat().st_size > 1000


def _written(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "run.yaml").write_text(json.dumps(content))
    return folder / "run.yaml"


# ----------------------------------------------------------------------------------------------------------- likenesses


def test_alike_are_clips_whose_frames_differ_little_in_order():
    draw = np.random.default_rng(0)
    one, other = ([int(value) for value in draw.integers(0, 2**63, 6)] for _ in range(2))
    near = [value ^ 0b111 for value in one]
    pairs = faults.alike([one, other, near, one[::-1], one[:3], []])
    assert [(first, second) for first, second, _ in pairs] == [(0, 2)] and pairs[0][2] == 3
    assert faults.groups(pairs) == {0: [2], 2: [0]}


def test_parts_of_one_video_may_look_alike(tiny_model, tmp_path):
    """Also where ``span: all``, which init proposes for long videos, makes several of each."""
    clips = tmp_path / "clips"
    clips.mkdir()
    boxes.ffmpeg(*filmed("fps=8", source="testsrc2=s=96x64:r=8:d=4", seconds=4), "long.mp4", cwd=clips)
    (clips / "long.txt").write_text("a test card")
    report = finetune.doctor(values(tiny_model(), clips, tmp_path / "run", data={"span": "all"}), progress=False)
    assert len(report.clips) >= 3 and not [
        f for clip in report.clips for f in clip.faults if f.name == "near-duplicate"
    ]
    shutil.copy(clips / "long.mp4", clips / "copy.mp4")
    (clips / "copy.txt").write_text("a test card, again")
    report = finetune.doctor(values(tiny_model(), clips, tmp_path / "run", data={"span": "all"}), progress=False)
    assert [f for clip in report.clips for f in clip.faults if f.name == "near-duplicate"]


def test_a_held_out_clip_that_is_a_training_clip_is_named(clinic, tiny_model, tmp_path):
    for side, name in (("train", "good"), ("kept", "again"), ("train", "other")):
        (tmp_path / side).mkdir(exist_ok=True)
        shutil.copy(clinic / f"{name}.mp4", tmp_path / side)
        (tmp_path / side / f"{name}.txt").write_text(f"a red circle {name}")
    sources = [{"path": str(tmp_path / "train")}, {"path": str(tmp_path / "kept"), "split": "holdout"}]
    content = values(
        tiny_model(),
        tmp_path,
        tmp_path / "run",
        data={"sources": sources, "trigger": "zkx"},
        validation={"samples": [{"prompt": "a zkxing circle"}]},
    )
    report = finetune.doctor(content, progress=False)
    assert {fault.name for fault in report.faults} == {"trigger missing", "length"}
    named = {Path(clip.name).name: {fault.name for fault in clip.faults} for clip in report.clips}
    assert "leak" in named["good.mp4"] and "leak" in named["again.mp4"] and "leak" not in named["other.mp4"]


# --------------------------------------------------------------------------------------------------------------- frames


def test_frames_that_are_called_exact_are_those_of_the_decoded_clip(clinic):
    path = clinic / "tall.mp4"
    header = probe(path)
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(9, 64, 96),)), 8, "")
    inspected = clip_frames.inspect_clip(clip_frames.ClipRequest(path, header, plan, exact=2))
    clip = decode(path, header, plan).pixels.permute(1, 2, 3, 0).numpy()
    exact = [picture for picture in inspected.frames if picture.exact]
    assert len(exact) == 2 and len(inspected.frames) == clip_frames.SHOWN
    for picture in exact:
        pixels = np.asarray(Image.open(io.BytesIO(picture.content)))
        assert np.array_equal(pixels, clip[picture.frame])


@pytest.mark.parametrize("frames", [1, 2, 3, 9, 49, 161])
def test_sampled_frames_go_from_the_first_to_the_last(frames):
    shown, pairs = clip_frames.sampled_positions(frames)
    assert shown[0] == 0 and shown[-1] == frames - 1 and len(shown) <= clip_frames.SHOWN
    assert all(0 <= one < other < frames and other == one + 1 for one, other in pairs)


def test_a_worker_answers_as_this_process_does(clinic):
    header = probe(clinic / "other.mp4")
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(9, 64, 96),)), 8, "")
    sound = clip_frames.ClipRequest(clinic / "other.mp4", header, plan)
    lost = replace(sound, path=clinic / "broken.mp4")
    theirs = list(clip_frames.inspect_clips([sound, lost, sound], workers=1))
    assert theirs[0] == clip_frames.inspect_clip(sound) == theirs[2]
    assert isinstance(theirs[1], DataError) and theirs[1].where == str(lost.path)


def test_frames_between_those_that_are_wanted_are_left_out_and_change_nothing(tmp_path):
    """x264's usual settings: two in three frames are B frames, of which most carry no other."""
    path = tmp_path / "b.mp4"
    boxes.ffmpeg(*filmed(f"null,{NOISE}", seconds=6, after=["-c:v", "libx264", "-pix_fmt", "yuv420p"]), path)
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    assert sum(frame.pict_type == PictureType.B for frame in frames) > 20
    for wanted in ([0, 1, 11, 24, 47], [2], list(range(3, 48, 4))):
        for number, pixels in read_frames(path, wanted, probe(path)):
            assert np.array_equal(pixels, frames[number].to_ndarray(format="rgb24")), number


# --------------------------------------------------------------------------------------------------- what is remembered


def aged(path: Path, seconds: float = 60) -> Path:
    """A file that was written some time ago, as far as one can see."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def unseen(path: Path) -> None:
    """Nothing can be read of a file any more, which looks as it did."""
    status = path.stat()
    path.write_bytes(bytes(status.st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_clips_that_were_seen_are_not_decoded_again_until_they_change(clinic, tiny_model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for name in ("good", "bars"):
        aged(Path(shutil.copy(clinic / f"{name}.mp4", clips)))
        (clips / f"{name}.txt").write_text(f"a red circle {name}")
    content = values(tiny_model(), clips, tmp_path / "run")
    first = finetune.doctor(content, progress=False)
    for name in ("good", "bars"):
        unseen(clips / f"{name}.mp4")
    assert finetune.doctor(content, progress=False).clips == first.clips
    aged(clips / "bars.mp4", 30)
    changed = finetune.doctor(content, progress=False)
    assert clip_of(changed, "good.mp4") == clip_of(first, "good.mp4")
    assert {fault.name for fault in clip_of(changed, "bars.mp4").faults} == {"undecodable"}


def test_what_is_remembered_is_of_one_rule_and_one_question(tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"1")
    aged(file)

    def ask(rule: str, question: str, content: bytes = b"") -> bytes | None:
        with FileMemory(tmp_path / "memory.sqlite", rule) as memory:
            answer = memory.recall(file, question)
            if content:
                memory.remember(file, content, question)
            return answer

    assert ask("a", "how long", b"9 s") is None and ask("a", "how long") == b"9 s"
    assert ask("a", "how wide") is None and ask("b", "how long") is None
    assert ask("b", "how long", b"8 s") is None and ask("b", "how long") == b"8 s"
    file.write_bytes(b"2")  # this very moment: it may change again, and nobody could tell
    assert ask("b", "how long", b"7 s") is None and ask("b", "how long") is None


@pytest.mark.parametrize("harm", ["damaged", "a folder", "locked"])
def test_a_memory_that_cannot_be_used_is_as_good_as_none(tmp_path, harm):
    file, path = tmp_path / "clip.mp4", tmp_path / "memory.sqlite"
    file.write_bytes(b"1")
    aged(file)
    other = None
    if harm == "damaged":
        path.write_bytes(b"no database" * 999)
    elif harm == "a folder":
        path.mkdir()
    else:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
    for expected in (None, b"9 s" if harm == "damaged" else None):
        with FileMemory(path, "rule") as memory:
            assert memory.recall(file) == expected
            memory.remember(file, b"9 s")


class _Lying:
    """A worker whose answer is not what a decoder gives."""

    def __init__(self, change: dict[str, Any], body: bytes = b"") -> None:
        self.change, self.body = change, body

    def ask(self, *_: Any, **__: Any) -> tuple[dict[str, Any], bytearray]:
        measures = {name: [0.0] * 4 for name in ("luma", "bright", "motion", "beside", "flicker", "bars", "hashes")}
        sound = {"measures": {**measures, "sharpness": 1.0}, "places": [[1, 1, 0, False]], "sizes": [0]}
        return {**sound, **self.change}, bytearray(self.body)


@pytest.mark.parametrize(
    "change",
    [{"measures": {}}, {"places": []}, {"sizes": ["x"]}, {"measures": {"luma": [float("nan")]}}, {"sizes": None}],
    ids=str,
)
def test_a_worker_that_talks_nonsense_is_a_fault_of_its_file(clinic, change):
    header = probe(clinic / "other.mp4")
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(9, 64, 96),)), 8, "")
    job = clip_frames.ClipRequest(clinic / "other.mp4", header, plan)
    assert clip_frames.ask(_Lying({}), job).measures.sharpness == 1
    with pytest.raises(DataError, match="answered with nonsense"):
        clip_frames.ask(_Lying(change), job)


# -------------------------------------------------------------------------------------------------------- what it takes


def test_operations_of_the_vae_s_encoder_are_those_that_torch_counts():
    folder, bucket = known_model("5b"), Bucket(49, 480, 720)
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(AutoencoderKLCogVideoX.load_config(folder / "vae"))
        pixels = torch.zeros(1, 3, bucket.frames, bucket.height, bucket.width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(pixels)
    ours = outlook.encode_operations(read_part(folder, "vae"), bucket)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize(("card_gib", "fits", "word"), [(24, True, ": fits"), (18, False, ": does not fit")])
def test_memory_is_compared_with_the_card(report, card_gib, fits, word):
    ours = outlook.with_memory(report.outlook, 18 * 2**30, "18 GiB predicted", card_gib * 2**30)
    assert ours.fits is fits and ours.memory.endswith(word)
    assert outlook.with_memory(report.outlook, None, "not yet", card_gib * 2**30).fits is None


@pytest.mark.parametrize(("seconds", "words"), [(12, "12 s"), (600, "10.0 min"), (9000, "2.5 h"), (3e5, "3.5 days")])
def test_a_duration_is_told_in_its_unit(seconds, words):
    assert outlook.duration(seconds) == words


# ------------------------------------------------------------------------------------------------------ starting points


@pytest.mark.parametrize(
    ("clips", "steps", "batch", "word"),
    [
        *((10, 750, 1, ""), (10, 2000, 1, "learnt by heart"), (10, 750, 2, "learnt by heart"), (10, 100, 1, "little")),
        *((100, 3000, 2, ""), (100, 7500, 1, "learnt by heart"), (10_000, 1875, 16, ""), (10_000, 1875, 1, "little")),
    ],
)
def test_the_word_on_length_is_the_table_s(clips, steps, batch, word):
    advice = word_on_length(clips, steps * batch / clips, steps)
    assert word in advice and bool(word) == bool(advice)


def test_between_two_rows_what_suits_lies_between_them():
    assert [suited(point.clips) for point in STARTING_POINTS] == [
        pytest.approx(point.seen) for point in STARTING_POINTS
    ]
    lows = [suited(clips)[0] for clips in (1, 10, 40, 100, 700, 10_000, 90_000)]
    assert lows == sorted(lows, reverse=True)
    assert [starting_point(clips).clips for clips in (1, 30, 40, 500, 5_000)] == [10, 10, 100, 100, 10_000]


# ---------------------------------------------------------------------------------------- what `finetune init` proposes


def footage_of(folder: Path, *clips: tuple[str, float]) -> Path:
    """A folder of clips, each of a size and seconds."""
    folder.mkdir()
    for number, (size, seconds) in enumerate(clips):
        boxes.ffmpeg(*filmed(source=f"testsrc2=s={size}:r=8", seconds=seconds), folder / f"{number}.mp4")
        (folder / f"{number}.txt").write_text(f"scene {number}: it moves")
    return folder


@pytest.mark.parametrize(
    ("model", "clips", "lines"),
    [
        ("5b", [("180x120", 7)] * 3, ["buckets: [49x480x720]", "keep 100% of the picture", "span: head", "rank: 32"]),
        ("5b", [("90x160", 7), ("180x120", 7)], ["49x768x448", "49x480x720", "holdout: 1 "]),
        ("5b", [("180x120", 7), ("180x120", 3.2)], ["buckets: [49x480x720, 25x480x720]"]),
        ("5b", [("180x120", 13)] * 2, ["span: all", "keep 100% of the picture and 9"]),
        ("5b-i2v", [("90x160", 7)] * 2, ["buckets: [49x480x720]", "keep 38% of", "image: run-images/1.webp"]),
    ],
)
def test_init_proposes_what_suits_the_clips(tmp_path, capsys, monkeypatch, model, clips, lines):
    monkeypatch.chdir(tmp_path)
    footage_of(tmp_path / "clips", *clips)
    assert main(["init", "--model", model, "--data", "clips", "--output", "run.yaml"]) == OK
    text = (tmp_path / "run.yaml").read_text()
    assert not [line for line in lines if line not in text], text
    assert "scene 0: it moves" in text and "the buckets keep" in capsys.readouterr().err
    config = finetune.load_config(tmp_path / "run.yaml")
    assert config.train.steps < 400 and len(config.validation.samples) == 2
    finetune.check(config)


def test_init_writes_the_first_frame_of_a_prompt_s_clip(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    footage_of(tmp_path / "clips", ("180x120", 7))
    assert main(["init", "--model", "5b-i2v", "--data", "clips"]) == OK
    (sample,) = finetune.load_config("run.yaml").validation.samples
    header = probe(tmp_path / "clips" / "0.mp4")
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(49, 480, 720),)), 8, "")
    first = decode(tmp_path / "clips" / "0.mp4", header, plan).pixels[:, 0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(sample.image)), first)


def test_init_measures_what_rows_have_of_a_video(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    footage_of(tmp_path / "clips", ("180x120", 20))
    spans = ["['0:00:00.000', '0:00:07.000']", "['0:00:08.000', '0:00:15.000']"]
    rows = "".join(f'0.mp4,"[{span}]","[\'take {number}\']"\n' for number, span in enumerate(spans))
    (tmp_path / "clips.csv").write_text("videoID,timestamp,caption\n" + rows)
    shutil.move(tmp_path / "clips" / "0.mp4", tmp_path)
    assert main(["init", "--model", "5b", "--data", "clips.csv"]) == OK
    assert "for 2 clips of 2 videos" in capsys.readouterr().err
    assert "keep 100% of the picture and 88% of the seconds of 2 videos" in (tmp_path / "run.yaml").read_text()


def test_init_reads_a_dataset_that_holds_its_media(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clips = footage_of(tmp_path / "clips", ("180x120", 7), ("180x120", 7.5))
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(clips.iterdir()):
            tar.add(file, file.name)
    assert main(["init", "--model", "5b", "--data", "shard.tar"]) == OK
    assert "for 2 clips of 2 videos" in capsys.readouterr().err
    assert finetune.check("run.yaml").dataset.clips[0].sample.video.is_relative_to(tmp_path / "cache-media")


@pytest.mark.parametrize("content", [None, b"no video"], ids=["no clips", "unreadable"])
def test_init_writes_the_usual_where_clips_cannot_be_read(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clips").mkdir()
    if content:
        (tmp_path / "clips" / "a.mp4").write_bytes(content)
        (tmp_path / "clips" / "a.txt").write_text("a scene")
    assert main(["init", "--model", "5b", "--data", "clips"]) == OK
    assert "nothing is proposed for these clips" in capsys.readouterr().err
    assert finetune.load_config("run.yaml").train.steps == 1500


# ------------------------------------------------------------------------------------------------------------- the page

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> ' \" \u202egnp.exe"
)


def picture(level: int, **options: Any) -> Picture:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 12, 3), level, np.uint8)).save(file, "WEBP", lossless=True)
    return Picture(file.getvalue(), 8, 12, **{"label": "a frame", **options})


def hostile_page() -> Page:
    fault = Fault("warning", HOSTILE, HOSTILE, HOSTILE)
    columns = (Column("speed", HOSTILE, "{:.1f}"), Column("name", "name"))
    pictures = [picture(90, exact=True, label=HOSTILE), picture(10, cut=(0.1, 0, 0.8, 1))]
    cards = [
        Card(HOSTILE, HOSTILE, HOSTILE, HOSTILE, pictures, {"speed": 1.5, "name": HOSTILE}, [fault]),
        Card("slow", "a still pond", values={"speed": 0.5, "name": "b"}, faults=[Fault("error", "broken", "cut off")]),
        Card("none", values={"speed": None}),
        Card("fast", values={"speed": 10, "name": "a"}),
    ]
    bars = Bars("lengths", [(0, 10, 3), (10, 20, 0), (20, 30, 1)], limit=20, note=HOSTILE)
    table = Table(HOSTILE, ["a", HOSTILE], [["1", HOSTILE]], HOSTILE)
    return Page(HOSTILE, HOSTILE, cards, columns, [table], [bars], [fault], [HOSTILE])


def test_text_on_a_page_is_only_text():
    html = render(hostile_page())
    assert "\u202e" not in html and "\\u202e" in html
    tags: list[tuple[str, dict[str, str | None]]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(html)
    names = [tag for tag, _ in tags]
    assert names.count("script") == 1 and names.count("img") == 3 and "link" not in names and "a" not in names
    loaded = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(loaded) == 2 and all(str(value).startswith("data:image/webp;base64,") for value in loaded)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]


class Cards(Tab):
    """The doctor's page in a browser."""

    def visible(self) -> list[str]:
        titles: list[str] = self.page.eval_on_selector_all(
            ".card:not([hidden]) h3 bdi", "all => all.map(one => one.textContent)"
        )
        return titles


@pytest.fixture
def tab(browser, tmp_path) -> Iterator[Cards]:
    (tmp_path / "page.html").write_text(render(hostile_page()), encoding="utf-8")
    tab = Cards(browser, tmp_path / "page.html")
    yield tab
    tab.page.close()


def test_a_page_sorts_and_filters_without_a_server(tab):
    first, *_ = tab.visible()
    assert first.startswith("</script>") and "\\u202e" in first
    tab.page.select_option("#sort", "speed")
    assert tab.visible() == ["slow", first, "fast", "none"]
    tab.page.select_option("#sort", "-speed")
    assert tab.visible() == ["fast", first, "slow", "none"]
    tab.page.select_option("#sort", "faults")
    assert tab.visible()[:2] == ["slow", first]
    tab.page.click("[data-fault=broken]")
    assert tab.visible() == ["slow"] and tab.page.text_content("#count") == "1 of 4"
    tab.page.click("[data-fault=broken]")
    tab.page.fill("#words", "POND")
    assert tab.visible() == ["slow"]
    tab.page.fill("#words", "")
    tab.page.click(".opens")
    assert (
        tab.page.is_visible("dialog img")
        and tab.page.evaluate("document.querySelector('dialog img').naturalWidth") == 12
    )
    assert tab.noise == [] and "</script>" in tab.page.title()


def test_the_policy_of_a_page_holds_where_escaping_would_not(browser, tmp_path):
    html = render(hostile_page()).replace(
        "<main>", "<main><script>document.title = 'owned'</script><img src='http://a.test/x'>"
    )
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    tab = Tab(browser, tmp_path / "page.html")
    refused = [line for line in tab.noise if "Content Security Policy" in line]
    assert tab.page.title() != "owned" and any("script" in line for line in refused)
    assert any("http://a.test/x" in line for line in refused)
    tab.page.close()


PIXELS = """image => image.decode().then(() => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [canvas.height, canvas.width, [...context.getImageData(0, 0, canvas.width, canvas.height).data]];
})"""


def test_a_browser_shows_the_pixels_that_training_sees(browser, report, clinic, tmp_path):
    tab = Cards(browser, report.page)
    assert len(tab.visible()) == len(report.clips) and tab.noise == []
    tab.page.screenshot(path=tmp_path / "page.png")
    assert len(np.unique(np.asarray(Image.open(tmp_path / "page.png")))) > 50
    tab.page.click("[data-fault=bars]")
    (card,) = tab.page.query_selector_all(".card:not([hidden])")
    assert "bars.mp4" in card.text_content()
    height, width, data = card.query_selector("img.exact").evaluate(PIXELS)
    shown = np.array(data, np.uint8).reshape(height, width, 4)[..., :3]
    header = probe(clinic / "bars.mp4")
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(9, 64, 96),)), 8, "")
    assert np.array_equal(shown, decode(clinic / "bars.mp4", header, plan).pixels[:, 0].permute(1, 2, 0).numpy())
    tab.page.close()


def test_an_image_condition_is_shown_and_a_bad_one_named(clinic, tiny_model, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("other", "fast"):
        shutil.copy(clinic / f"{name}.mp4", folder)
        (folder / f"{name}.txt").write_text(f"a red circle {name}")
    Image.new("RGB", (96, 64), (200, 30, 30)).save(folder / "other.png")
    (folder / "fast.png").write_bytes(b"no picture")
    content = values(tiny_model("5b-i2v"), folder, tmp_path / "run", data={"buckets": ["9x64x64"], "holdout": 0})
    report = finetune.doctor(content, progress=False)
    image = clip_of(report, "other.mp4").pictures[1]
    assert image.label == "first-frame image, exact"
    assert np.asarray(Image.open(io.BytesIO(image.content)))[0, 0].tolist() == [200, 30, 30]
    assert {fault.name for fault in clip_of(report, "fast.mp4").faults} >= {"undecodable"}


def test_the_vae_shows_what_it_loses(clinic, tiny_model, tmp_path):
    (tmp_path / "clips").mkdir()
    shutil.copy(clinic / "other.mp4", tmp_path / "clips")
    (tmp_path / "clips" / "other.txt").write_text("a red circle")
    report = finetune.doctor(values(tiny_model(), tmp_path / "clips", tmp_path / "run"), vae=True, progress=False)
    (clip,) = report.clips
    assert 0 < clip.values["psnr"] < 20 and "lost in the VAE" in {fault.name for fault in clip.faults}
    original, ours = (np.asarray(Image.open(io.BytesIO(one.content)), np.float64) for one in clip.pictures[-2:])
    psnr = 10 * np.log10(255**2 / np.mean((original - ours) ** 2))
    assert f"{psnr:.1f} dB" in clip.pictures[-1].label and clip.pictures[-1].exact
    header = probe(clinic / "other.mp4")
    (plan,) = plan_clips(header, ClipConfig(buckets=(Bucket(9, 64, 96),)), 8, "")
    frames = decode(clinic / "other.mp4", header, plan).pixels.permute(1, 2, 3, 0).numpy()
    assert any(np.array_equal(frame, original) for frame in frames)
