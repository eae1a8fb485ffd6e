"""Datasets in the form that other trainers have them: each is read as it is, and trains like the same clips here."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter

from finetune.caching.check import check_dataset
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import DataError
from finetune.core.types import VideoProbe
from finetune.datasets.geometry import ClipConfig, plan_clips
from finetune.datasets.packed import handle_packed
from finetune.datasets.rows import MediaPlace
from finetune.datasets.samples import CaptionConfig, SourceRead, read_samples
from finetune.datasets.sources import SourceConfig
from finetune.trainers.loop import train

Rows = list[dict[str, str]]

SOURCES = TypeAdapter(tuple[SourceConfig, ...])


def read(base: Path, *written: dict, media: Path | None = None) -> SourceRead:
    sources = SOURCES.validate_python(list(written))
    place = media and MediaPlace(media, base / "records")
    return read_samples(sources, CaptionConfig(), base=base, media=place)


def fault(base: Path, *written: dict, media: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        read(base, *written, media=media)
    return str(caught.value)


def table(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# Each writes the demo clips, which lie in ``folder``, as its project has them, and returns the source.


def as_finetrainers_lists(folder: Path, rows: Rows) -> dict:
    (folder / "prompt.txt").write_text("".join(row["prompt"] + "\n" for row in rows))
    (folder / "videos.txt").write_text("".join(row["file_name"] + "\n" for row in rows))
    return {"path": "."}


def as_finetrainers_pairs(folder: Path, rows: Rows) -> dict:
    for row in rows:
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["prompt"])
    return {"path": "."}


def as_finetrainers_csv(folder: Path, rows: Rows) -> dict:
    table(folder / "metadata.csv", [{"file_name": row["file_name"], "caption": row["prompt"]} for row in rows])
    return {"path": "."}


def as_factory(folder: Path, rows: Rows) -> dict:
    (folder / "prompts.txt").write_text("\n".join(row["prompt"] for row in rows))
    (folder / "videos.txt").write_text("\n".join(row["file_name"] for row in rows))
    return {"path": "."}


def as_videox_fun(folder: Path, rows: Rows) -> dict:
    listed = [{"file_path": row["file_name"], "text": row["prompt"], "type": "video"} for row in rows]
    still = {"file_path": "train/00000002.jpg", "text": "A still.", "type": "image"}
    (folder / "json_of_internal_datasets.json").write_text(json.dumps([*listed, still], indent=2))
    return {"path": "json_of_internal_datasets.json"}


def as_musubi_list(folder: Path, rows: Rows) -> dict:
    lines = [{"video_path": str(folder / row["file_name"]), "caption": row["prompt"]} for row in rows]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "dataset.toml").write_text(
        "[general]\nresolution = [960, 544]\nbatch_size = 1\nenable_bucket = true\n\n"
        f'[[datasets]]\nvideo_jsonl_file = "{folder / "list.jsonl"}"\ncache_directory = "/somewhere"\n'
        'target_frames = [1, 25, 45]\nframe_extraction = "head"\nsource_fps = 30.0\n'
    )
    return {"path": "dataset.toml", "allow_outside": True}


def as_musubi_folder(folder: Path, rows: Rows) -> dict:
    as_finetrainers_pairs(folder, rows)
    (folder / "clips").mkdir()
    for file in [*folder.glob("*.mp4"), *folder.glob("*.txt")]:
        file.rename(folder / "clips" / file.name)
    written = '[general]\ncaption_extension = ".txt"\n[[datasets]]\nvideo_directory = "clips"\n'
    (folder / "dataset.toml").write_text(written)
    return {"path": "dataset.toml"}


def as_openvid(folder: Path, rows: Rows) -> dict:
    """Names in a folder of their own, and columns of scores."""
    (folder / "video").mkdir()
    for row in rows:
        (folder / row["file_name"]).rename(folder / "video" / Path(row["file_name"]).name)
    scores = {"aesthetic score": 5.1, "motion score": 2.2, "temporal consistency score": 0.9, "camera motion": "static"}
    scores |= {"frame": 9, "fps": 8.0, "seconds": 1.1}
    listed = [{"video": Path(row["file_name"]).name, "caption": row["prompt"], **scores} for row in rows]
    table(folder / "data/train/OpenVid-1M.csv", listed)
    return {"kind": "metadata", "path": "data/train/OpenVid-1M.csv", "root": "video"}


LAYOUTS: list[Callable[[Path, Rows], dict]] = [
    *(as_finetrainers_lists, as_finetrainers_pairs, as_finetrainers_csv, as_factory, as_videox_fun),
    *(as_musubi_list, as_musubi_folder, as_openvid),
]


@pytest.fixture
def clips(demo_clips: Path, tmp_path: Path) -> tuple[Path, Rows]:
    """A folder of the demo clips without their list, and its rows."""
    folder = tmp_path / "data"
    shutil.copytree(demo_clips, folder)
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").unlink()
    return folder, sorted((json.loads(line) for line in lines), key=lambda row: row["file_name"])


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    """The weights that the same clips give from a list of our own; filled by who comes first."""
    return {}


def packed(folder: Path, rows: Rows) -> list[dict]:
    """The clips as ``datasets`` holds them, taken out of the folder."""
    cells = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    for row in rows:
        (folder / row["file_name"]).unlink()
    return [{"video": cell, "caption": row["prompt"]} for cell, row in zip(cells, rows, strict=True)]


def as_dataset(folder: Path, rows: Rows) -> Any:
    import datasets

    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    return datasets.Dataset.from_list(packed(folder, rows), features=features)


def as_saved(folder: Path, rows: Rows) -> dict:
    as_dataset(folder, rows).save_to_disk(folder)
    return {"path": "."}


def as_saved_splits(folder: Path, rows: Rows) -> dict:
    import datasets

    parts = datasets.DatasetDict({"train": as_dataset(folder, rows)})
    parts["test"] = parts["train"]
    parts.save_to_disk(folder)
    return {"path": "."}


def as_parquet_bytes(folder: Path, rows: Rows) -> dict:
    (folder / "data").mkdir()
    as_dataset(folder, rows).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return {"path": "."}


def as_parquet_paths(folder: Path, rows: Rows) -> dict:
    import pyarrow
    from pyarrow import parquet

    cells = [{"video": {"bytes": None, "path": row["file_name"]}, "text": row["prompt"]} for row in rows]
    parquet.write_table(pyarrow.Table.from_pylist(cells), folder / "t.parquet")
    return {"kind": "packed", "path": "t.parquet"}


def put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def as_webdataset(folder: Path, rows: Rows) -> dict:
    with tarfile.open(folder / "train-0000.tar", "w") as tar:
        for number, (row, own) in enumerate(zip(packed(folder, rows), rows, strict=True)):
            put(tar, f"{number:06}.mp4", row["video"]["bytes"])
            if number % 2:
                put(tar, f"{number:06}.txt", own["prompt"].encode())
            put(tar, f"{number:06}.json", json.dumps({} if number % 2 else {"caption": own["prompt"]}).encode())
    return {"path": "."}


def as_hub(folder: Path, rows: Rows) -> dict:
    """A dataset in the hub's cache: links into ``blobs``."""
    from huggingface_hub import constants

    store = Path(constants.HF_HUB_CACHE) / "datasets--someone--clips"
    snapshot = store / "snapshots" / ("a" * 40)
    (store / "blobs").mkdir(parents=True)
    (store / "refs").mkdir()
    (store / "refs/main").write_text("a" * 40)
    as_finetrainers_csv(folder, rows)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.move(file, store / "blobs" / str(number))
        snapshot.mkdir(parents=True, exist_ok=True)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return {"kind": "hub", "path": "someone/clips"}


PACKED: list[Callable[[Path, Rows], dict]] = [
    *(as_saved, as_saved_splits, as_parquet_bytes, as_parquet_paths, as_webdataset, as_hub),
]


@pytest.mark.parametrize("layout", [*LAYOUTS, *PACKED])
def test_a_layout_trains_unchanged(clips, layout, tiny_run, reference, tmp_path, monkeypatch):
    folder, rows = clips
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def weights(name: str, source: dict) -> str:
        return train(tiny_run(name, data={"sources": [source]}, train={"steps": 1, "seed": 7})).weights

    if not reference:
        listed = folder / "sorted.jsonl"
        listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reference["weights"] = weights("ours", {"path": str(listed)})
        listed.unlink()
    source = layout(folder, rows)
    found = read(folder, source, media=tmp_path / "cache-media")
    assert [sample.caption for sample in found.train] == [row["prompt"] for row in rows]
    assert len(found.notes) == (layout in (as_videox_fun, as_musubi_list))
    absolute = ("path", "root") if layout is not as_hub else ()
    paths = {name: str(folder / source[name]) for name in absolute if name in source}
    assert weights("theirs", {**source, **paths}) == reference["weights"] != ""


# --- still images -----------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Rows:
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (60, 40), (80 * number, 9, 99)).save(folder / f"{number}.png")
    return [{"file_name": f"{number}.png", "prompt": f"picture {number}"} for number in range(3)]


def as_image_folder(folder: Path, rows: Rows) -> dict:
    """Hugging Face's: ``metadata.jsonl`` beside the images."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": "."}


def as_image_column(folder: Path, rows: Rows) -> dict:
    table(folder / "metadata.csv", [{"image": row["file_name"], "text": row["prompt"]} for row in rows])
    return {"path": "."}


def as_pairs(folder: Path, rows: Rows) -> dict:
    for row in rows:
        (folder / row["file_name"]).with_suffix(".txt").write_text(row["prompt"])
    return {"path": "."}


def as_musubi_images(folder: Path, rows: Rows) -> dict:
    as_pairs(folder, rows)
    (folder / "images").mkdir()
    for file in [*folder.glob("*.png"), *folder.glob("*.txt")]:
        file.rename(folder / "images" / file.name)
    (folder / "d.toml").write_text('[[datasets]]\nimage_directory = "images"\n')
    return {"path": "d.toml"}


def as_musubi_image_list(folder: Path, rows: Rows) -> dict:
    lines = [{"image_path": row["file_name"], "caption": row["prompt"]} for row in rows]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "d.toml").write_text('[[datasets]]\nimage_jsonl_file = "list.jsonl"\n')
    return {"path": "d.toml"}


def as_videox_fun_images(folder: Path, rows: Rows) -> dict:
    listed = [{"file_path": row["file_name"], "text": row["prompt"], "type": "image"} for row in rows]
    (folder / "list.json").write_text(json.dumps(listed))
    return {"path": "list.json"}


def as_image_parquet(folder: Path, rows: Rows) -> dict:
    import datasets

    cells = [{"bytes": (folder / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    listed = [{"image": cell, "text": row["prompt"]} for cell, row in zip(cells, rows, strict=True)]
    for row in rows:
        (folder / row["file_name"]).unlink()
    datasets.Dataset.from_list(listed, features=features).to_parquet(folder / "train-0.parquet")
    return {"path": "."}


def as_image_tar(folder: Path, rows: Rows) -> dict:
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for row in rows:
            put(tar, row["file_name"], (folder / row["file_name"]).read_bytes())
            put(tar, f"{Path(row['file_name']).stem}.txt", row["prompt"].encode())
            (folder / row["file_name"]).unlink()
    return {"path": "."}


STILLS: list[Callable[[Path, Rows], dict]] = [
    *(as_image_folder, as_image_column, as_pairs, as_musubi_images, as_musubi_image_list, as_videox_fun_images),
    *(as_image_parquet, as_image_tar),
]


@pytest.mark.parametrize("layout", STILLS)
def test_still_images_are_read_where_a_source_asks_for_them(tmp_path, layout):
    folder, media = tmp_path / "stills", tmp_path / "media"
    rows = pictures(folder)
    contents = [(folder / row["file_name"]).read_bytes() for row in rows]
    source = layout(folder, rows)
    found = read(folder, {**source, "images": True}, media=media)
    assert [sample.caption for sample in found.train] == [row["prompt"] for row in rows] and not found.notes
    assert [sample.video.read_bytes() for sample in found.train] == contents
    assert "fix" in fault(folder, source, media=media), "unasked, there is no training clip"


def test_a_column_of_images_may_be_named_and_has_to_hold_names(tmp_path):
    folder, media = tmp_path / "stills", tmp_path / "media"
    rows = pictures(folder)
    table(folder / "m.csv", [{"drawing": row["file_name"], "text": row["prompt"]} for row in rows])
    source = {"kind": "metadata", "path": "m.csv", "image_column": "drawing"}
    assert len(read(folder, {**source, "images": True}).train) == 3
    assert "none of the usual columns" in fault(folder, source)
    as_image_parquet(folder, rows)
    assert "kind: packed" in fault(folder, {"path": "train-0.parquet", "images": True})
    assert len(read(folder, {"kind": "packed", "path": "train-0.parquet", "images": True}, media=media).train) == 3


def test_a_list_of_both_gives_both(clips):
    folder, rows = clips
    source = as_videox_fun(folder, rows)
    assert "images: true" in read(folder, source).notes[0]
    Image.new("RGB", (60, 40)).save(folder / "still.jpg")
    (folder / "json_of_internal_datasets.json").write_text(
        (folder / "json_of_internal_datasets.json").read_text().replace("train/00000002.jpg", "still.jpg")
    )
    found = read(folder, {**source, "images": True})
    assert [sample.video.suffix for sample in found.train] == [*[".mp4"] * len(rows), ".jpg"] and not found.notes


# --- time spans -------------------------------------------------------------------------------------------------------

PANDA = {
    "videoID": "---4IxR2xOg",
    "url": "https://www.youtube.com/watch?v=---4IxR2xOg",
    "timestamp": "[['0:00:00.000', '0:00:00.600'], ['0:00:00.500', '0:00:01.300']]",
    "caption": "['A news anchor, standing.', \"A man's work.\"]",
    "matching_score": "[0.453857421875, 0.44873046875]",
}


def test_spans_of_panda_70m_train_unchanged(clips, tiny_run):
    folder, rows = clips
    shutil.move(folder / rows[0]["file_name"], folder / "---4IxR2xOg.mp4")
    table(folder / "panda70m_testing.csv", [PANDA])
    found = read(folder, {"path": "panda70m_testing.csv"})
    assert [(sample.caption, sample.span_s) for sample in found.train] == [
        ("A news anchor, standing.", (0.0, 0.6)),
        ("A man's work.", (0.5, 1.3)),
    ]
    assert found.notes == () and len({sample.where for sample in found.train}) == 2
    source = {"path": str(folder / "panda70m_testing.csv")}
    config = tiny_run(data={"sources": [source], "fps": 16}, train={"steps": 1, "seed": 7})
    report = check_dataset(config, read_spec(config.model.pretrained), progress=False)
    assert [clip.plan.frame_indices for clip in report.clips] == [
        (0, 0, 1, 1, 2, 2, 3, 3, 4),
        (4, 4, 5, 5, 6, 6, 7, 7, 8),
    ]
    assert [clip.name.rpartition("@")[2] for clip in report.clips] == ["0s", "0.5s"]
    assert "90% of the seconds" in str(report), "of the span, not of the video"
    assert train(config).step == 1


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        (["start", "end"], {"start": "0.5", "end": "1.25"}),
        (["Start_timestamp", "End_timestamp"], {"Start_timestamp": "00:00:00.500", "End_timestamp": "00:01.25"}),
        (["timestamp"], {"timestamp": "('0:0:0.5', 1.25)"}),
        (["span"], {"span": "[0.5, 1.25]"}),
    ],
)
def test_spans_are_written_in_many_ways(clips, columns, values):
    folder, rows = clips
    table(folder / "m.csv", [{"file": rows[0]["file_name"], "text": "a, b", **values}])
    source = {"kind": "spans", "path": "m.csv", "span_columns": columns}
    (sample,) = read(folder, {**source, "video_column": "file", "caption_column": "text"}).train
    assert (sample.span_s, sample.caption) == ((0.5, 1.25), "a, b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timestamp": "[['0:00:01', '0:00:02']]"}, "1 spans and 2 captions"),
        ({"timestamp": "[['0:00:01', '0:00:01'], [1, 2]]"}, "no time span"),
        ({"timestamp": "[[2, 1], [1, 2]]"}, "no time span"),
        ({"timestamp": "[['nan', 1], [1, 2]]"}, "no time span"),
        ({"timestamp": "__import__('os')"}, "no time span"),
        ({"timestamp": "[" * 5000}, "no time span"),
        ({"timestamp": "[[0, 1], [1, 2]]", "caption": "one text"}, "one caption"),
        ({"videoID": "../a"}, "leads out"),
        ({"videoID": "gone"}, "gone.mp4"),
    ],
)
def test_spans_that_cannot_be_used(clips, change, message):
    folder, rows = clips
    shutil.copy(folder / rows[0]["file_name"], folder / "---4IxR2xOg.mp4")
    table(folder / "m.csv", [{**PANDA, **change}])
    told = fault(folder, {"path": "m.csv"})
    assert message in told and "m.csv:2" in told


def test_a_span_is_planned_as_a_file_of_its_own():
    """Frames are the span's alone, whatever ``span`` is, and one that lies outside the video is an error."""
    probe = VideoProbe(80, 8.0, 64, 64, [number / 8 for number in range(80)], 1)
    for span, begins in {"head": [16], "center": [21], "all": [16, 25]}.items():
        config = ClipConfig(buckets=("9x64x64",), span=span)
        plans = plan_clips(probe, config, 8.0, "", (2.0, 4.375))
        assert [plan.frame_indices for plan in plans] == [tuple(range(begin, begin + 9)) for begin in begins]
    with pytest.raises(DataError, match="no frame from 20 to 21 s"):
        plan_clips(probe, ClipConfig(buckets=("9x64x64",)), 8.0, "", (20.0, 21.0))
    with pytest.raises(DataError, match="needs 9"):
        plan_clips(probe, ClipConfig(buckets=("9x64x64",)), 8.0, "", (2.0, 2.5))


# --- musubi-tuner's TOML ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[datasets]]\nimage_directory = "x"\n', "set images: true"),
        ('[[datasets]]\nvideo_directory = "."\ncontrol_directory = "x"\n', "control_directory"),
        ('[[datasets]]\nvideo_directory = "."\ncaption_extension = ".caption"\n', "only .txt"),
        ('[[datasets]]\nvideo_directory = "."\nnum_repeats = 0\n', "num_repeats is 0"),
        ('[[datasets]]\nvideo_directory = ".."\n', "leads out"),
        ("[[datasets]]\n", "wants one of video_directory"),
        ("[general]\nresolution = [1, 2]\n", "no list of"),
        ("[[datasets]\n", "not valid TOML"),
    ],
)
def test_musubi_files_that_cannot_be_used(clips, text, message):
    folder, rows = clips
    as_finetrainers_pairs(folder, rows)
    (folder / "d.toml").write_text(text)
    assert message in fault(folder, {"path": "d.toml"})


def test_musubi_repeats_multiply_the_source_s(clips):
    folder, rows = clips
    as_finetrainers_pairs(folder, rows)
    (folder / "d.toml").write_text('[[datasets]]\nvideo_directory = "."\nnum_repeats = 3\n')
    assert {sample.repeats for sample in read(folder, {"path": "d.toml", "repeats": 0.5}).train} == {1.5}


def test_lists_of_two_names_are_ambiguous(clips):
    folder, rows = clips
    as_finetrainers_lists(folder, rows)
    (folder / "captions.txt").write_text("x")
    assert "prompt.txt and captions.txt could both be meant" in fault(folder, {"kind": "prompts", "path": "."})


# --- media inside datasets --------------------------------------------------------------------------------------------


def test_packed_media_are_written_once_and_again_where_one_is_gone(clips, tmp_path, monkeypatch):
    folder, rows = clips
    source, media = as_saved(folder, rows), tmp_path / "media"
    first = read(folder, source, media=media).train
    assert len({sample.video for sample in first}) == len(rows) == len(list(media.glob("*.mp4")))
    with monkeypatch.context() as patch:
        patch.setattr("finetune.datasets.packed.Worker.ask", lambda *_, **__: pytest.fail("it was read again"))
        assert read(folder, source, media=media).train == first
    first[0].video.unlink()
    assert read(folder, source, media=media).train == first and first[0].video.is_file()
    assert "no folder for the media" in fault(folder, source)


def test_what_killed_readers_left_is_removed_when_it_is_old(clips, tmp_path):
    folder, rows = clips
    source, media = as_parquet_bytes(folder, rows), tmp_path / "media"
    media.mkdir()
    old, young = media / ".unpacked-old", media / ".unpacked-young"
    for file in (old, young):
        file.write_bytes(b"half a video")
    os.utime(old, (time.time() - 7200,) * 2)
    read(folder, source, media=media)
    assert not old.exists() and young.exists(), "which another process may be writing"


@pytest.mark.parametrize("name", ["/etc/a.mp4", "../a.mp4", "x/../../a.mp4", "~/a.mp4"])
def test_hostile_names_in_tars_are_refused(tmp_path, name):
    folder = tmp_path
    with tarfile.open(folder / "a.tar", "w") as tar:
        put(tar, name, b"x")
    assert "is refused" in fault(folder, {"path": "a.tar"}, media=tmp_path / "media")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_members_that_are_no_files_are_refused(tmp_path, kind):
    folder = tmp_path
    with tarfile.open(folder / "a.tar", "w") as tar:
        member = tarfile.TarInfo("a.mp4")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    assert "is refused" in fault(folder, {"path": "a.tar"}, media=tmp_path / "media")


@pytest.mark.parametrize("name", ["a.tar", "a.arrow", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100])
def test_damaged_datasets_are_named(tmp_path, name, content):
    folder = tmp_path
    (folder / name).write_bytes(content)
    told = fault(folder, {"kind": "packed", "path": name}, media=tmp_path / "media")
    assert name in told and "fix:" in told


def test_a_hub_dataset_leads_nowhere_else(clips, tmp_path, monkeypatch):
    folder, rows = clips
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "out.mp4").write_bytes(b"x")
    outside = [{"file_name": name, "prompt": "x"} for name in (str(tmp_path / "out.mp4"), "../../../../out.mp4")]
    source = as_hub(folder, [*rows, *outside])
    told = fault(folder, source)
    assert "is an absolute path" in told and "leads out of" in told and "2 things" in told
    assert "cannot be downloaded" in fault(folder, {"kind": "hub", "path": "someone/else"})


def test_a_damaged_caption_of_a_tar_costs_its_row_alone(clips, tmp_path):
    folder, rows = clips
    video = (folder / rows[0]["file_name"]).read_bytes()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("0.json", b"{no json"), ("1.txt", b"\xff\xfe"), ("2.txt", b"a red ball")):
            put(tar, f"{name[0]}.mp4", video)
            put(tar, name, content)
    told = fault(folder, {"path": "a.tar"}, media=tmp_path / "media")
    assert "a.tar, row 1" in told and "a.tar, row 2" in told and "row 3" not in told


def test_columns_of_a_dataset_on_the_hub_are_chosen(clips, tmp_path, monkeypatch):
    folder, rows = clips
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source = as_hub(folder, rows)
    (metadata,) = (tmp_path / "hub").rglob("metadata.csv")
    listed = [{"file_name": row["file_name"], "caption": "short", "prompt": row["prompt"]} for row in rows]
    table(metadata.resolve(), listed)
    assert "could both be meant" in fault(folder, source)
    (sample, *_) = read(folder, {**source, "caption_column": "prompt"}).train
    assert sample.caption == rows[0]["prompt"]


def test_media_are_on_the_disk_before_they_are_named(clips, tmp_path, monkeypatch):
    """Or a power cut would leave rows whose videos are empty."""
    folder, rows = clips
    as_parquet_bytes(folder, rows)
    (file,) = (folder / "data").glob("*.parquet")
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    handle_packed({"path": file, "media": tmp_path, "columns": [None] * 3, "images": False})
    assert calls == ["fsync", "replace"] * len(rows)
