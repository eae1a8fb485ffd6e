"""Dataset layouts, and what is refused: every layout is one case of the same tests."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from decoding import read_parquet_here
from pydantic import TypeAdapter, ValidationError

from finetune.core.collector import collector_paused
from finetune.core.errors import DataError
from finetune.datasets.samples import CaptionConfig, SourceRead, read_samples, source_files
from finetune.datasets.sources import SourceConfig

CAPTIONS = ["A red ball, rolling.", "NA", 'She says "go" in 2024-01-01']
CLIPS = ["clips/a.mp4", "clips/b.mp4", "clips/deep/a.mp4"]
NFC, NFD = "caf\u00e9", "cafe\u0301"
"""One word in the two forms that Unicode has for it; macOS stores file names in the second."""
SOURCES = TypeAdapter(tuple[SourceConfig, ...])


def sources(*written: dict) -> tuple:
    return SOURCES.validate_python(list(written))


def read(base: Path, *written: dict, image_to_video: bool = False, skip: bool = False) -> SourceRead:
    return read_samples(
        sources(*written), CaptionConfig(), row_files=("image",) if image_to_video else (), base=base, skip=skip
    )


def fails(base: Path, *written: dict, **more: bool) -> str:
    with pytest.raises(DataError) as caught:
        read(base, *written, **more)
    return str(caught.value)


def put(path: Path, content: str | bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path: Path, rows: list) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def _parquet_here(monkeypatch: pytest.MonkeyPatch) -> None:
    read_parquet_here(monkeypatch)  # test_hostile_text has the real thing


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A dataset's folder with three clips and three images, but no captions yet."""
    for clip in CLIPS:
        put(tmp_path / clip)
        put((tmp_path / clip).with_suffix(".png"))
    return tmp_path


def rows(columns: tuple[str, str, str] = ("file_name", "prompt", "image")) -> list[dict[str, str]]:
    return [
        dict(zip(columns, (c, t, c.replace("mp4", "png")), strict=True)) for c, t in zip(CLIPS, CAPTIONS, strict=True)
    ]


# Each layout writes the same three rows and returns its source; ``path`` alone must be recognised too.


def as_jsonl(base: Path) -> dict:
    jsonl(base / "metadata.jsonl", rows())
    return {"kind": "metadata", "path": "metadata.jsonl"}


def as_csv(base: Path) -> dict:
    import csv

    with (base / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["video", "caption", "image_path"])
        writer.writeheader()
        writer.writerows(rows(("video", "caption", "image_path")))
    return {"kind": "metadata", "path": "metadata.csv"}


def as_parquet(base: Path) -> dict:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows(("video_path", "text", "image"))), base / "metadata.parquet")
    return {"kind": "metadata", "path": "metadata.parquet"}


def as_prompts(base: Path) -> dict:
    put(base / "prompts.txt", "\n".join(CAPTIONS) + "\n")
    put(base / "videos.txt", "\n".join(CLIPS) + "\n\n \u00a0\n")
    put(base / "images.txt", "\n".join(clip.replace("mp4", "png") for clip in CLIPS))
    return {"kind": "prompts", "path": "."}


def as_folder(base: Path) -> dict:
    for clip, caption in zip(CLIPS, CAPTIONS, strict=True):
        put((base / clip).with_suffix(".txt"), caption + "\n")
    return {"kind": "folder", "path": "."}


def as_cogkit(base: Path) -> dict:
    """CogKit's image-to-video layout, its three files in three different orders."""
    order = [2, 0, 1]
    for clip in CLIPS:
        put(base / "train" / "videos" / clip)
        put(base / "train" / "images" / clip.replace("mp4", "png"))
    jsonl(base / "train/metadata.jsonl", [{"id": i, "prompt": CAPTIONS[i]} for i in range(3)])
    jsonl(base / "train/videos/metadata.jsonl", [{"file_name": CLIPS[i], "id": i} for i in order])
    jsonl(
        base / "train/images/metadata.jsonl",
        [{"file_name": CLIPS[i].replace("mp4", "png"), "id": i} for i in reversed(order)],
    )
    return {"kind": "cogkit", "path": "."}


LAYOUTS: list[Callable[[Path], dict]] = [as_jsonl, as_csv, as_parquet, as_prompts, as_folder, as_cogkit]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("named", [True, False])
def test_every_layout_gives_the_same_samples(base, layout, named):
    written = layout(base)
    if not named:
        del written["kind"]
    found = read(base, {**written, "repeats": 2.5}, image_to_video=True)
    assert found.holdout == () and found.notes == ()
    assert [sample.caption for sample in found.train] == CAPTIONS
    root = base / "train/videos" if layout is as_cogkit else base
    images = base / "train/images" if layout is as_cogkit else base
    assert [sample.video for sample in found.train] == [root / clip for clip in CLIPS]
    assert [sample.image for sample in found.train] == [images / clip.replace("mp4", "png") for clip in CLIPS]
    assert all(sample.repeats == 2.5 and sample.video.is_file() for sample in found.train)
    assert len({sample.where for sample in found.train}) == 3 and not any(str(base) in s.where for s in found.train)
    assert all(sample.image is None for sample in read(base, written).train), "images are for image-to-video only"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["prompt", None])
def test_a_list_of_captions_is_further_ones(base, kind, column):
    several = [["a", "b b"], None, ["c"]]
    wanted = [("x a", "x b b"), ("x",), ("x c",)]
    values = [{"file_name": clip, "captions": texts} for clip, texts in zip(CLIPS, several, strict=True)]
    if column:
        values = [{**value, column: "first"} for value in values]
        wanted = [("x first", "x a", "x b b"), ("x first",), ("x first", "x c")]
    else:
        values, wanted = [values[0], values[2]], [wanted[0], wanted[2]]
    if kind == "jsonl":
        jsonl(base / "rows.jsonl", values)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(values), base / "rows.parquet")
    found = read_samples(sources({"path": f"rows.{kind}"}), CaptionConfig(trigger="x"), base=base)
    assert [sample.captions for sample in found.train] == wanted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_it_depends_on(base, layout):
    written = layout(base)
    files = source_files(sources(written), base)
    assert files and all(file.exists() for file in files)
    assert source_files(sources({"path": written["path"]}), base) == files
    assert not {file.suffix for file in files} & {".mp4", ".png"}
    if layout is as_folder:
        assert {base, base / "clips", base / "clips/deep", base / "clips/b.txt"} <= set(files)
    else:
        assert all(file.is_file() for file in files)
        # Whatever is not named must not matter: an edit of every named file is an edit of the samples.
        for file in files:
            kept = file.read_bytes()
            file.write_bytes(b"")
            with pytest.raises(DataError):
                read(base, written, image_to_video=True)
            file.write_bytes(kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("break_it", ["missing", "empty"])
def test_every_layout_finds_a_bad_file(base, layout, break_it):
    written = layout(base)
    target = base / ("train/videos" if layout is as_cogkit else "") / CLIPS[1]
    target.unlink()
    if break_it == "empty":
        target.touch()
    elif layout is as_folder:
        assert len(read(base, written).train) == 2, "a folder holds what it holds"
        return
    message = fails(base, written)
    place = {as_jsonl: "metadata.jsonl:2", as_csv: "metadata.csv:3", as_parquet: "metadata.parquet, row 2"}
    place |= {as_prompts: "prompts.txt:2", as_folder: "b.txt", as_cogkit: "metadata.jsonl:2"}
    assert place[layout] in message and str(target) in message


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("layout", [as_jsonl, as_csv, as_prompts, as_folder])
def test_byte_order_marks_and_line_ends(base, layout, ending, mark):
    written = layout(base)
    for file in (file for file in source_files(sources(written), base) if file.is_file()):
        file.write_bytes(mark + file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", ending.encode()))
    assert [sample.caption for sample in read(base, written).train] == CAPTIONS


@pytest.mark.parametrize("layout", [as_jsonl, as_csv, as_prompts, as_folder, as_cogkit])
@pytest.mark.parametrize(("bad", "message"), [(b"caf\xe9", "not UTF-8 (byte 0xe9)"), (b"a\0b", "NUL")])
def test_text_that_is_no_text(base, layout, bad, message):
    written = layout(base)
    files = [file for file in source_files(sources(written), base) if file.is_file()]
    file = files[0]
    file.write_bytes(file.read_bytes() + b"\n" + bad)
    line = file.read_bytes().count(b"\n") + 1
    told = fails(base, written)
    assert message in told and f"{file}:{line}" in told


def test_jsonl_lines_are_counted_with_blank_ones(base):
    put(
        base / "m.jsonl",
        '\n{"file_name": "clips/a.mp4", "prompt": "x"}\n\n\n{"file_name": "clips/gone.mp4", "prompt": "y"}\n',
    )
    assert f"{base / 'm.jsonl'}:5" in fails(base, {"path": "m.jsonl"})
    put(base / "clips/gone.mp4")
    assert [sample.where for sample in read(base, {"path": "m.jsonl"}).train] == ["m.jsonl:2", "m.jsonl:5"]


def test_every_broken_json_line_is_named(base):
    good = '{"file_name": "clips/a.mp4", "prompt": "x"}\n'
    put(
        base / "m.jsonl",
        good + '{"file_name": "clips/a.mp4", "prompt": "x"\n' + good + "[1, 2]\n" + good + "{'a': 1}\n",
    )
    message = fails(base, {"path": "m.jsonl"})
    assert all(f"m.jsonl:{line}" in message for line in (2, 4, 6)) and "m.jsonl:3" not in message
    assert "3 things" in message


def test_a_caption_of_another_type_is_that_row_s_fault(base):
    jsonl(base / "m.jsonl", [*rows(), {"file_name": CLIPS[0], "prompt": 7}])
    assert "m.jsonl:4" in fails(base, {"path": "m.jsonl"})


def test_other_columns_may_hold_anything(base):
    extra = [{"n": 1, "tags": ["a"]}, {"n": 2.5, "tags": None}, {"fps": {"x": [1]}, "n": "three"}]
    jsonl(base / "m.jsonl", [row | more for row, more in zip(rows(), extra, strict=True)])
    found = read(base, {"path": "m.jsonl"}).train
    assert [sample.caption for sample in found] == CAPTIONS and found[2].where == "m.jsonl:3"


def test_captions_that_look_like_dates_or_numbers_stay_text(base):
    jsonl(base / "m.jsonl", [{"file_name": CLIPS[0], "prompt": "2024-01-01"}, {"file_name": CLIPS[1], "prompt": "12"}])
    assert [sample.caption for sample in read(base, {"path": "m.jsonl"}).train] == ["2024-01-01", "12"]
    put(base / "m.csv", "video,caption\nclips/a.mp4,None\nclips/b.mp4,007\n")
    assert [sample.caption for sample in read(base, {"path": "m.csv"}).train] == ["None", "007"]


def lists() -> dict[str, tuple[str, list[str]]]:
    """Ways to write three rows as JSON, and the lines they then stand on."""
    return {
        "list.json": (json.dumps(rows()), ["1", "1", "1"]),
        "list.jsonl": ("\ufeff\n" + json.dumps(rows(), indent=1) + "\n", ["3", "8", "13"]),
        "lines.json": ("\n".join(map(json.dumps, rows())), ["1", "2", "3"]),
        "spread.jsonl": ("\n".join(json.dumps(row, indent=1) for row in rows()), ["1", "6", "11"]),
        "comma.json": ("[" + ",\n".join(map(json.dumps, rows())) + ",]", ["1", "2", "3"]),
        "long.json": (json.dumps([{**row, "other": "x" * 600_000} for row in rows()]), ["1", "1", "1"]),
    }


@pytest.mark.parametrize("name", lists())
def test_json_is_read_as_a_list_and_as_lines(base, name):
    content, places = lists()[name]
    put(base / name, content)
    found = read(base, {"path": name}).train
    assert [sample.caption for sample in found] == CAPTIONS
    assert [sample.where for sample in found] == [f"{name}:{place}" for place in places]


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (json.dumps(rows(), indent=1)[:-3], "Expecting ',' delimiter", 16),
        ("[\n" + json.dumps(rows()[0]) + "\n" + json.dumps(rows()[1]) + "]", "a comma is missing", 3),
        ("[" + json.dumps(rows()[0]) + ",\n", "the list is not closed", 1),
        ("[" + json.dumps(rows()[0]) + "]\n[1]", "something follows the list", 2),
        ('[\n"a.mp4"]', "not a JSON object", 2),
        ('[{"a": 1,\n"a": 2}]', "the key 'a' stands twice", 1),
        ("[" * 100_000, "nested too deeply", 1),
        ('{\n "clips/a.mp4": "a red ball"\n}', "the columns are: clips/a.mp4", None),
        ("[]", "no rows", None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_list_that_is_broken_is_one_error(base, content, message, line):
    for name in ("m.json", "m.jsonl"):
        put(base / name, content)
        with collector_paused():  # other tests' objects would be taken apart where Python's stack ends
            told = fails(base, {"path": name})
        assert message in told and (f"{name}:{line}" if line else name) in told and told.count("fix:") <= 1


def test_a_folder_s_json_is_its_rows_unless_another_table_is(base):
    put(base / "metadata.json", json.dumps(rows()))
    assert len(read(base, {"path": "."}).train) == 3
    jsonl(base / "metadata.jsonl", rows()[:1])
    assert len(read(base, {"path": "."}).train) == 1


def test_csv_rows_know_their_line(base):
    put(base / "m.csv", 'video,caption\nclips/a.mp4,"two\nlines"\n\nclips/b.mp4,\nclips/gone.mp4,x\n')
    message = fails(base, {"path": "m.csv"})
    assert "m.csv:5" in message and "m.csv:6" in message and "caption is empty" in message
    put(base / "m.csv", 'video,caption\nclips/a.mp4,"two\nlines"\n')
    assert read(base, {"path": "m.csv"}).train[0].caption == "two lines"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("video,caption\nclips/a.mp4,red, green\nclips/b.mp4,x\n", "m.csv:2"),  # pandas would move the columns
        ("video,caption\nclips/a.mp4,x\nclips/b.mp4\n", "m.csv:3"),
        ('video,caption\nclips/a.mp4,"never closed\n', "not valid CSV"),
        ("video,video\nclips/a.mp4,x\n", "same name"),
        ("video,caption\n", "no rows"),
        ("", "no rows"),
        ("video;caption\nclips/a.mp4;x\n", "the columns are: video;caption"),
    ],
)
def test_broken_csv(base, content, message):
    put(base / "m.csv", content)
    assert message in fails(base, {"path": "m.csv"})


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
@pytest.mark.parametrize("content", [b"", b"garbage\n"])
def test_broken_tables(base, name, content):
    put(base / name, content)
    assert name in fails(base, {"path": name})


def test_columns_named_and_found(base):
    table = jsonl(
        base / "m.jsonl", [{"file_name": CLIPS[0], "prompt": "short", "text": "long", "still": "clips/a.png", "n": "x"}]
    )
    message = fails(base, {"path": "m.jsonl"})
    assert "prompt and text could both be meant" in message and "caption_column" in message
    named = {"kind": "metadata", "path": str(table), "caption_column": "text", "image_column": "still"}
    (sample,) = read(base, named, image_to_video=True).train
    assert sample.caption == "long" and sample.image == base / "clips/a.png"
    assert "no column 'txet'" in fails(base, {**named, "caption_column": "txet"})
    jsonl(base / "m.jsonl", [{"clip": CLIPS[0], "prompt": "x"}])
    assert "the columns are: clip, prompt" in fails(base, {"path": "m.jsonl"})


def test_root_says_where_names_start(base):
    jsonl(base / "lists/m.jsonl", [{"file_name": CLIPS[0], "prompt": "x"}])
    assert "no file" in fails(base, {"path": "lists/m.jsonl"})
    (sample,) = read(base, {"kind": "metadata", "path": "lists/m.jsonl", "root": "."}).train
    assert sample.video == base / CLIPS[0]


def test_prompt_files_of_different_length(base):
    as_prompts(base)
    put(base / "prompts.txt", "one\ntwo\n")
    message = fails(base, {"path": "."})
    assert "prompts.txt 2, videos.txt 3, images.txt 3" in message


BLANK = {"empty": "", "spaces": "  \t", "no-break": "\u00a0\u3000", "unseen": "\ufeff\u200b", "crlf": "\r"}


@pytest.mark.parametrize("blank", BLANK)
@pytest.mark.parametrize("name", ["prompts.txt", "videos.txt", "images.txt"])
def test_a_blank_line_between_lines_that_pair_is_an_error(base, name, blank):
    """Equal counts of lines with text prove nothing: each file may have its blank line elsewhere."""
    as_prompts(base)
    lines = (base / name).read_text().split("\n")
    (base / name).write_bytes("\n".join([lines[0], BLANK[blank], *lines[2:]]).encode())
    message = fails(base, {"kind": "prompts", "path": "."})
    assert f"{base / name}:2" in message and "the line is blank" in message


def test_blank_lines_of_every_file_are_told_together_and_shift_no_pair(base):
    put(base / "prompts.txt", "A\n\nC\nD\n")
    put(base / "videos.txt", f"\n{CLIPS[0]}\n{CLIPS[1]}\n\n{CLIPS[2]}\n")
    message = fails(base, {"kind": "prompts", "path": "."})
    assert all(f"{place}" in message for place in ("prompts.txt:2", "videos.txt:1", "videos.txt:4"))
    put(base / "prompts.txt", b"A\nB\ncaf\xe9\nC".replace(b"caf\xe9", b"X"))
    put(base / "videos.txt", f"{CLIPS[0]}\n\ufeff{CLIPS[1]} \n{CLIPS[2]}\n{CLIPS[0]}".encode())
    pairs = [(sample.caption, sample.video.name) for sample in read(base, {"kind": "prompts", "path": "."}).train]
    assert pairs == [("A", "a.mp4"), ("B", "b.mp4"), ("X", "a.mp4"), ("C", "a.mp4")]


def test_cogkit_text_to_video(base):
    jsonl(base / "metadata.jsonl", rows()[:2])
    assert len(read(base, {"kind": "cogkit", "path": "."}).train) == 2


def test_cogkit_ids_must_pair(base):
    as_cogkit(base)
    jsonl(
        base / "train/metadata.jsonl",
        [{"id": 0, "prompt": "x"}, {"id": 0, "prompt": "y"}, {"prompt": "z"}, {"id": 9, "prompt": "v"}],
    )
    message = fails(base, {"kind": "cogkit", "path": "train"})
    for told in (
        "id 0 is there twice",
        "metadata.jsonl:2",
        "no id",
        "metadata.jsonl:3",
        "id '9' is not in videos",
        "id '1' has no prompt",
    ):
        assert told in message


def test_cogkit_without_images_means_the_first_frame(base):
    as_cogkit(base)
    jsonl(base / "train/images/metadata.jsonl", [{"file_name": CLIPS[0].replace("mp4", "png"), "id": 0}])
    images = [sample.image for sample in read(base, {"path": "."}, image_to_video=True).train]
    assert images[0] is not None and images[1:] == [None, None]
    (base / "train/images/metadata.jsonl").unlink()
    assert [sample.image for sample in read(base, {"path": "."}, image_to_video=True).train] == [None] * 3


def test_folder_wants_a_caption_for_every_clip(base):
    as_folder(base)
    (base / "clips/b.txt").unlink()
    put(base / "clips/deep/a.txt", " \n")
    message = fails(base, {"path": "clips"})
    assert "there is no b.txt beside it" in message and "caption is empty" in message


def test_folder_notes_what_it_leaves_out(base):
    as_folder(base)
    put(base / ".cache/x.mp4")
    put(base / ".git/index")
    put(base / "clips/._a.mp4")
    put(base / "clips/README.txt", "about"), put(base / "clips/poster.png")
    for name in ("a.rmvb", "b.rmvb", "b.json", "LICENCE"):
        put(base / "clips" / name)
    found = read(base, {"path": "."})
    assert len(found.train) == 3 and len(found.notes) == 4
    kinds, hidden, strays, images = found.notes
    assert kinds.startswith("4 files") and "2 .rmvb, 1 without ending, 1 .json" in kinds
    assert hidden.startswith("1 videos") and ".cache/x.mp4" in hidden
    assert "README.txt" in strays and images == f"1 images in {base} belong to no clip, such as poster.png"
    for clip in base.rglob("*.mp4"):
        clip.unlink()
    assert "2 .rmvb" in fails(base, {"path": "."}) and "2 .rmvb" in fails(base, {"kind": "folder", "path": "."})


@pytest.mark.parametrize(
    ("video", "caption", "image"),
    [
        ("IMG_1.MP4", "IMG_1.TXT", "IMG_1.JPG"),
        ("IMG_1.MP4", "img_1.txt", "Img_1.jfif"),
        (f"{NFC}.mp4", f"{NFD}.txt", f"{NFD.upper()}.AVIF"),
        ("a.b.mp4", "a.b.TXT", "A.B.gif"),
    ],
)
def test_folder_finds_what_is_spelled_otherwise(base, video, caption, image):
    folder = put(base / "new" / video).parent
    put(folder / caption, "a caption"), put(folder / image)
    for written in ({"path": "new"}, {"kind": "folder", "path": "new"}):
        (sample,) = read(base, written, image_to_video=True).train
        assert (sample.video.name, sample.caption, sample.image.name) == (video, "a caption", image)


def test_folder_takes_the_exact_name_first(base):
    """Two clips whose names differ in case only keep their own captions."""
    for name in ("a", "A"):
        put(base / "new" / f"{name}.mp4"), put(base / "new" / f"{name}.txt", f"caption of {name}")
    found = read(base, {"path": "new"})
    assert {sample.video.stem: sample.caption for sample in found.train} == {n: f"caption of {n}" for n in "aA"}
    put(base / "new/a.TXT", "another")
    assert "a.TXT and a.txt could both belong to it" in fails(base, {"path": "new"})


def test_folder_asks_which_image_is_meant(base):
    as_folder(base)
    put(base / "clips/a.JPG"), put(base / "clips/b.heic"), (base / "clips/b.png").unlink()
    message = fails(base, {"path": "."}, image_to_video=True)
    assert "a.JPG and a.png could both belong to it" in message
    assert "clips/b.heic is not a known kind of image" in message and "2 things" in message
    assert len(read(base, {"path": "."}).train) == 3, "images are for image-to-video only"


def linked_clips(base: Path) -> Path:
    """``data/`` with one clip, a folder beside it, and every kind of link to folders."""
    for folder in ("data", "data/.store/more", "elsewhere/deep"):
        put(base / folder / "x.mp4"), put(base / folder / "x.txt", f"from {folder}")
    (base / "data/inside").symlink_to(".store/more")
    (base / "data/again").symlink_to(base / "data/.store/more")
    (base / "data/loop").symlink_to(".")
    (base / "data/up").symlink_to("..")
    (base / "data/out").symlink_to(base / "elsewhere")
    (base / "data/gone").symlink_to("nowhere")
    return base / "data"


@pytest.mark.parametrize("kind", ["auto", "folder"])
def test_linked_folders_are_read_once_or_named(tmp_path, kind):
    base, data = tmp_path, linked_clips(tmp_path)
    message = fails(base, {"kind": kind, "path": "data"})
    assert "up is a link to a folder outside" in message and "out is a link to a folder outside" in message
    assert "gone is a link that leads nowhere" in message and "3 things" in message
    (data / "gone").unlink()
    found = read(base, {"kind": kind, "path": "data", "allow_outside": True})
    real = [os.path.realpath(sample.video) for sample in found.train]
    assert len(set(real)) == len(real) == 3
    (note,) = found.notes  # up leads to elsewhere, and out to it again; again and inside are one folder; and the loop
    assert note.startswith("3 links in") and "lead to a folder that is read already" in note
    for link in ("up", "out"):
        (data / link).unlink()
    found = read(base, {"kind": kind, "path": "data"})
    assert sorted(sample.caption for sample in found.train) == ["from data", "from data/.store/more"]
    assert data / found.train[0].video.parent.relative_to(data) in source_files(sources({"path": "data"}), base)


def test_a_folder_that_cannot_be_listed_is_named(base, monkeypatch):
    as_folder(base)
    listed = os.scandir

    def refuse(place):
        if Path(place).name == "deep":
            raise PermissionError(13, "Permission denied")
        return listed(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "the folder cannot be read: Permission denied" in fails(base, {"path": "."})


def test_badly_encoded_names_are_told_together(base):
    as_folder(base)
    for name in (b"\xff.mp4", b"\xfe.txt", b"clips/\xe9.mp4", b"\xfd/x.mp4"):
        path = os.path.join(os.fsencode(base), name)  # noqa: PTH118
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    message = fails(base, {"path": "."})
    assert "4 things" in message and message.count("name is damaged") == 4 and "a folder's name" in message
    assert "it holds U+DCFF" in message and message.encode("utf-8")
    jsonl(base / "m.jsonl", [{"file_name": f"{name}.mp4", "prompt": "x"} for name in ("\udcff", "\udce9")])
    assert fails(base, {"path": "m.jsonl"}).count("name is damaged") == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: None, "no dataset that is known"),
        (lambda base: (as_prompts(base), as_jsonl(base)), "prompts (.*) or metadata"),
        (lambda base: (as_folder(base), as_csv(base)), "metadata (.*) or folder"),
    ],
)
def test_what_cannot_be_recognised(base, make, message):
    make(base)
    with pytest.raises(DataError, match=message.replace("(", r"\(").replace(")", r"\)")):
        read(base, {"path": "."})


def test_paths_that_are_no_dataset(base):
    assert "no such file or folder" in fails(base, {"path": "nowhere"})
    assert "no dataset" in fails(base, {"path": CLIPS[0]})
    for kind in ("prompts", "cogkit", "folder", "metadata"):
        assert "nowhere" in fails(base, {"kind": kind, "path": "nowhere"})


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ("circle.mp4", "cannot be read|no file"),
        ("clips/gone.mp4", "no file"),
        ("clips\\gone.mp4", "no file"),
        ("$CLIPS/a.mp4", "no variable is filled in"),
        ("clips/empty.mp4", "empty"),
        ("folder.mp4", "a folder, not a file"),
        ("clips/a.png", r"is a still image[\s\S]*set images: true"),
        ("clips/a", "not a known kind of video"),
        ("x" * 5000 + ".mp4", "5,004 characters"),
        ("x" * 500 + ".mp4", "cannot be read: File name too long"),
        ("clips/\ud800.mp4", "U\\+D800"),
        ("clips/a\0.mp4", "damaged"),
        ("", "missing"),
        (None, "missing"),
        (["clips/a.mp4"], "not a path"),
        (7, "not a path"),
    ],
)
def test_videos_that_are_refused(base, video, message):
    """Those that lead out of their folder are in test_hostile_text."""
    put(base / "data/clips/a.mp4"), (base / "data/folder.mp4").mkdir()
    put(base / "data/clips/empty.mp4", b"")
    put(base / "data/clips/a.png")
    (base / "data/circle.mp4").symlink_to(base / "data/circle.mp4")
    jsonl(base / "data/m.jsonl", [{"file_name": video, "prompt": "x"}])
    with pytest.raises(DataError, match=message) as caught:
        read(base, {"path": "data/m.jsonl"})
    assert caught.value.where.endswith("m.jsonl:1") and caught.value.fix


@pytest.mark.parametrize(
    ("written", "there"),
    [
        ("v\\a.mp4", "v/a.mp4"),
        ("V/A.mp4", "v/a.mp4"),
        (f"{NFC}/{NFC}.mp4", f"{NFD}/{NFD}.mp4"),
        (f"{NFD}\\{NFD}.mp4", f"{NFC}/{NFC}.mp4"),
        (".\\v\\Stra\u00dfe.mp4", "v/STRASSE.mp4"),
    ],
)
def test_a_name_that_is_spelled_otherwise_means_its_file(base, written, there):
    put(base / there)
    jsonl(base / "m.jsonl", [{"file_name": written, "prompt": "x"}])
    (sample,) = read(base, {"path": "m.jsonl"}).train
    assert sample.video == base / there
    put((base / there).with_name((base / there).name.swapcase()))
    if (base / written.replace("\\", "/")).is_file():
        assert read(base, {"path": "m.jsonl"}).train[0].video.name == Path(written.replace("\\", "/")).name
    else:
        assert "no file" in fails(base, {"path": "m.jsonl"}), "two files could be meant"


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (None, "empty"),
        ("", "empty"),
        (" \n\t", "empty"),
        (7, "int, not text"),
        (["a"], "list, not text"),
        ("x" * 10_001, "10,001 characters"),
        ("bell \x07", "U\\+0007 at character 6"),
    ],
)
def test_captions_that_are_refused(base, caption, message):
    jsonl(base / "m.jsonl", [{"file_name": CLIPS[0], "prompt": caption}])
    with pytest.raises(DataError, match=message) as caught:
        read(base, {"path": "m.jsonl"})
    assert caught.value.where.endswith("m.jsonl:1")


def test_bad_images_are_refused_where_they_are_used(base):
    jsonl(
        base / "m.jsonl",
        [{"file_name": CLIPS[0], "prompt": "x", "image": image} for image in ("clips/gone.png", "clips/a.mp4")],
    )
    assert len(read(base, {"path": "m.jsonl"}).train) == 2
    message = fails(base, {"path": "m.jsonl"}, image_to_video=True)
    assert "gone.png" in message and "not a known kind of image" in message


def test_all_that_is_wrong_is_told_at_once(base):
    jsonl(
        base / "m.jsonl", [{"file_name": "gone.mp4", "prompt": ""}, *rows(), {"file_name": "../x.mp4", "prompt": "x"}]
    )
    put(base / "n.csv", "video,caption\nclips/a.mp4,one,two\n")
    message = fails(base, {"path": "m.jsonl"}, {"path": "nowhere"}, {"path": "n.csv"})
    for told in ("m.jsonl:1", "caption is empty", "no file", "m.jsonl:5", "nowhere", "n.csv:2", "5 things"):
        assert told in message
    assert "m.jsonl:2" not in message


def test_splits_are_kept_apart(base):
    jsonl(base / "train.jsonl", rows()[:2])
    jsonl(base / "held.jsonl", rows()[2:])
    found = read(base, {"path": "train.jsonl"}, {"path": "held.jsonl", "split": "holdout"})
    assert (len(found.train), len(found.holdout)) == (2, 1)
    jsonl(base / "held.jsonl", rows()[1:])
    message = fails(base, {"path": "train.jsonl"}, {"path": "held.jsonl", "split": "holdout"})
    assert "held out" in message and "held.jsonl:1" in message and "train.jsonl:2" in message
    assert "no training clip" in fails(base, {"path": "held.jsonl", "split": "holdout"})


def test_duplicates_are_noted_and_second_captions_are_not(base):
    jsonl(base / "m.jsonl", [*rows(), rows()[0], {"file_name": CLIPS[1], "prompt": "another view of it"}])
    found = read(base, {"path": "m.jsonl"})
    assert len(found.train) == 5
    assert found.notes == ("1 rows have the video and caption of another row, such as: m.jsonl:4 repeats m.jsonl:1",)


@pytest.mark.parametrize(
    ("options", "caption", "expected"),
    [
        ({}, "  a \n cat\t ", "a cat"),
        ({"caption_prefix": "Film. ", "caption_suffix": ", grainy"}, "a cat", "Film. a cat, grainy"),
        ({"trigger": "zkx"}, "a cat", "zkx a cat"),
        ({"trigger": "zkx"}, "a zkx cat", "a zkx cat"),
        ({"trigger": "zkx"}, "Zkx, a cat", "zkx Zkx, a cat"),
        ({"trigger": "zkx"}, "a zkxing cat", "zkx a zkxing cat"),
        ({"trigger": "zkx"}, "(zkx), a cat", "(zkx), a cat"),
        ({"trigger": "zkx"}, "my_zkx", "zkx my_zkx"),
        ({"trigger": "c++ [style]"}, "in c++ [style]", "in c++ [style]"),
        ({"trigger": "zkx", "caption_prefix": "By zkx: "}, "a cat", "By zkx: a cat"),
        ({"trigger": "zkx", "caption_prefix": "Film. "}, "a cat", "zkx Film. a cat"),
        ({"trigger": " zkx "}, "a cat", "zkx a cat"),
    ],
)
def test_what_is_added_to_captions(options, caption, expected):
    config = CaptionConfig(**options)
    assert config.apply(caption) == expected
    if not options.get("caption_prefix") and not options.get("caption_suffix"):
        assert config.apply(config.apply(caption)) == expected


@pytest.mark.parametrize(
    "bad", [{"trigger": "a\nb"}, {"caption_prefix": "\x00"}, {"caption_suffix": "a\u2028b"}, {"prefix": "x"}]
)
def test_bad_caption_configs_are_refused(bad):
    with pytest.raises(ValidationError):
        CaptionConfig(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "tar", "path": "x"},
        {"path": "x", "repeat": 2},
        {"path": "x", "repeats": 0},
        {"kind": "metadata"},
        {"path": "x", "split": "test"},
        {"path": "x", "video_column": "a"},
    ],
)
def test_bad_source_configs_are_refused(bad):
    with pytest.raises(ValidationError):
        sources(bad)


def test_a_source_config_survives_its_own_dump(base):
    for layout in LAYOUTS:
        written = sources(layout(base))
        assert SOURCES.validate_python(SOURCES.dump_python(written, mode="json")) == written
    assert SOURCES.json_schema()


@pytest.mark.parametrize("layout", [as_jsonl, as_csv, as_parquet])
def test_reading_touches_neither_network_nor_home(base, layout, monkeypatch, tmp_path_factory):
    import datasets

    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "cache")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *arguments: pytest.fail("the network was used"))
    with pytest.raises(pytest.fail.Exception):
        socket.create_connection(("127.0.0.1", 9))
    before = datasets.utils.logging.get_verbosity()
    assert len(read(base, layout(base)).train) == 3
    assert list(home.rglob("*")) == []
    assert datasets.utils.logging.get_verbosity() == before


def test_real_datasets():
    if "FINETUNE_REAL_CLIPS" not in os.environ:
        pytest.skip("set FINETUNE_REAL_CLIPS to a folder with cogvideox_samples/ and steamboat_willie/")
    folder = Path(os.environ["FINETUNE_REAL_CLIPS"])
    found = read(
        folder, {"path": "cogvideox_samples"}, {"path": "steamboat_willie", "split": "holdout"}, image_to_video=True
    )
    assert (len(found.train), len(found.holdout), found.notes) == (3, 5, ())
    assert found.train[0].caption.startswith("A black and white cat") and found.train[0].video.name == "kitten.mp4"
    assert len(read(folder, {"kind": "cogkit", "path": "steamboat_willie"}).train) == 5
