"""Text, paths and tables from strangers: refused by name, within bounds, and shown without being obeyed."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from decoding import read_parquet_here
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import fails, read

from finetune.cli.main import main
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ConfigError, DataError, FinetuneError, KilledError
from finetune.core.text import shown, text_fault, without_invisible
from finetune.datasets import tables
from finetune.datasets.rows import MAX_CAPTION_CHARS, VIDEO, PathPolicy
from finetune.datasets.samples import CaptionConfig


def write_rows(path: Path, *written: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in written), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """``data/`` with two clips, and beside it a clip and a text that are nobody's business."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "a.png"):
        (folder / name).write_bytes(b"x")
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (tmp_path / "secret.txt").write_text("the secret words")
    return folder


# ------------------------------------------------------------------------------------------------------------ captions

REFUSED = {
    "bell": "a\x07b", "escape": "\x1b[2J", "nul": "a\0b", "delete": "\x7f", "c1": "na\x95ve", "csi": "\x9b31m",
    "half": "half \ud83d", "lost": "lost \ufffd", "none": "\uffff", "none2": "\U0001fffe", "override": "a\u202eb",
    "embedding": "\u202ba", "isolate": "\u2067a\u2069", "tags": "a\U000e0041\U000e0042",
}  # fmt: skip
FINE = {
    "hebrew": "\u05e9\u05dc\u05d5\u05dd world", "arabic": "\u0633\u0644\u0627\u0645", "mark": "a\u200fb",
    "joiner": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "family": "\U0001f468\u200d\U0001f469\u200d",
    "flag": "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f", "combining": "e\u0301" * 20,
    "zalgo": "a" + "\u0301" * 200, "cjk": "\u732b\u304c\u8d70\u308b", "private": "\ue000", "html": "<b>&amp;</b>",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_captions_that_are_not_what_they_show_are_refused(data, name):
    write_rows(
        data / "m.jsonl", {"file_name": "a.mp4", "prompt": "fine"}, {"file_name": "b.mp4", "prompt": REFUSED[name]}
    )
    told = fails(data, {"path": "m.jsonl"})
    assert "the caption is damaged" in told and "m.jsonl:2" in told and "m.jsonl:1" not in told
    kept = read(data, {"path": "m.jsonl"}, skip=True)
    assert [sample.caption for sample in kept.train] == ["fine"] and len(kept.unusable) == 1


@pytest.mark.parametrize("name", FINE)
def test_every_script_and_emoji_is_kept_as_it_is(data, name):
    write_rows(data / "m.jsonl", {"file_name": "a.mp4", "prompt": FINE[name]})
    assert [sample.caption for sample in read(data, {"path": "m.jsonl"}).train] == [FINE[name]]
    assert shown(FINE[name]) == FINE[name]


def test_white_space_is_joined_and_what_nobody_sees_is_dropped(data):
    write_rows(
        data / "m.jsonl", {"file_name": "a.mp4", "prompt": "\ufeffa\tred\r\n\u200bball\u00ad \u2060rolls\u2028on"}
    )
    assert read(data, {"path": "m.jsonl"}).train[0].caption == "a red ball rolls on"
    assert without_invisible("zk\u200bx") == "zkx"
    assert CaptionConfig(trigger="zkx").apply("a zk\u200bx cat") == "a zkx cat", "the trigger word stands there already"


def test_a_caption_too_long_is_that_row_s_fault_and_costs_nothing(data):
    write_rows(
        data / "m.jsonl", {"file_name": "a.mp4", "prompt": "x " * 50_000}, {"file_name": "b.mp4", "prompt": "fine"}
    )
    begun = time.process_time()
    assert "100,000 characters" in fails(data, {"path": "m.jsonl"})
    assert [sample.caption for sample in read(data, {"path": "m.jsonl"}, skip=True).train] == ["fine"]
    (data / "b.txt").write_text("y" * 100_000)
    (data / "a.txt").write_text("z" * MAX_CAPTION_CHARS)
    assert "100,000 bytes" in fails(data, {"kind": "folder", "path": "."})
    assert len(read(data, {"kind": "folder", "path": "."}, skip=True).train) == 1
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    "text", ["word" * 2_500, "\u732b" * MAX_CAPTION_CHARS, "a" + "\u0301" * 9_999, "\U0001f600" * 9_999]
)
def test_the_longest_caption_is_tokenised_in_bounded_time(tiny_model, text):
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(tiny_model("5b") / "tokenizer", local_files_only=True)
    begun = time.process_time()
    found = tokenizer([text], truncation=True, max_length=226, padding="max_length")
    assert len(found["input_ids"][0]) == 226 and time.process_time() - begun < 2


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(st.characters()))
def test_what_passes_can_be_written_shown_and_read_again(text):
    assert shown(shown(text)) == shown(text)
    shown(text).encode("utf-8")
    if text_fault(text) is None:
        text.encode("utf-8")
        assert json.loads(json.dumps(text)) == text


# ----------------------------------------------------------------------------------------------- what a terminal obeys

ATTACK = "\x1b]0;owned\x07\x1b[2J\r\x9b1m\u202e\ud800"


def test_no_message_reaches_the_terminal_raw(data, capsys, monkeypatch):
    write_rows(
        data / "m.jsonl", {"file_name": f"{ATTACK}.mp4", "prompt": "x"}, {f"key{ATTACK}": 1, "file_name": ATTACK}
    )
    config = data / "run.yaml"
    config.write_text(
        "model: {pretrained: x/y}\ndata: {sources: [{path: m.jsonl}], buckets: [9x64x64]}\n"
        'train: {steps: 1}\n"bad\\e[2J": 1\noutput_dir: run\n'
    )
    assert main(["check", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    told += fails(data, {"path": "m.jsonl"}) + fails(
        data, {"kind": "metadata", "path": "m.jsonl", "video_column": ATTACK}
    )
    assert "\\x1b[2J" in told and "\\u202e" in told and "\\ud800" in told
    assert not set(told) & set("\x1b\x07\r\x9b\u202e\ud800"), "raw"
    monkeypatch.setattr("finetune.core.errors.shown", lambda text: text)  # canary: this is where it is done
    assert "\x1b" in str(DataError(ATTACK))


@pytest.mark.parametrize("part", ["what", "where", "fix"])
def test_every_part_of_an_error_is_written_out(part):
    error = FinetuneError(**{"what": "x", **{part: f"a{ATTACK}b\nc"}})
    assert "\x1b" not in str(error) and "\\x1b]0;owned\\x07" in getattr(error, part) and "b\nc" in getattr(error, part)


def test_file_names_that_are_no_text_are_refused(data):
    for name in ("\x1b[31mred.mp4", "two\nlines.mp4", "\u202egpm.4pm.mp4"):
        (data / name).write_bytes(b"x")
        assert "name is damaged" in fails(data, {"kind": "folder", "path": "."})
        (data / name).unlink()


# --------------------------------------------------------------------------------------------------------------- paths

OUTSIDE = {
    "parent": "../secret.mp4", "deep parent": "a/../../secret.mp4", "windows parent": "..\\secret.mp4",
    "absolute": "{tmp}/secret.mp4", "home": "~/secret.mp4", "user": "~root/x.mp4", "drive": "C:\\x.mp4",
    "drive-relative": "C:x.mp4", "unc": "\\\\host\\share\\x.mp4", "unc slashes": "//host/share/x.mp4",
    "device path": "\\\\?\\C:\\x.mp4", "root of drive": "\\x.mp4", "link": "link.mp4", "folder link": "up/secret.mp4",
    "link to link": "link2.mp4",
}  # fmt: skip


@pytest.fixture
def linked(data: Path) -> Path:
    (data / "link.mp4").symlink_to(data.parent / "secret.mp4")
    (data / "link2.mp4").symlink_to("link.mp4")
    (data / "up").symlink_to(data.parent)
    return data


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("layout", ["jsonl", "prompts", "cogkit"])
def test_no_row_leads_out_of_the_folder(linked, name, layout):
    video = OUTSIDE[name].format(tmp=linked.parent)
    if layout == "jsonl":
        write_rows(linked / "m.jsonl", {"file_name": "a.mp4", "prompt": "x"}, {"file_name": video, "prompt": "y"})
        source, place = {"path": "m.jsonl"}, "m.jsonl:2"
    elif layout == "prompts":
        (linked / "prompts.txt").write_text("x\ny\n")
        (linked / "videos.txt").write_text(f"a.mp4\n{video}\n")
        source, place = {"kind": "prompts", "path": "."}, "prompts.txt:2"
    else:
        (linked / "videos").symlink_to(".")  # so that the links above are where CogKit looks
        write_rows(linked / "metadata.jsonl", {"id": 1, "file_name": video, "prompt": "y"})
        source, place = {"kind": "cogkit", "path": "."}, "metadata.jsonl:1"
    told = fails(linked, source)
    assert place in told and any(words in told for words in ("absolute path", "leads out", "link that leads out"))
    assert place in fails(linked, source, skip=True), "such a row stops the run also where bad text is left out"


def test_links_out_of_a_folder_of_clips(linked):
    """A linked clip, a linked image, and a caption that would show another file's words."""
    (linked / "a.txt").write_text("a caption")
    (linked / "link.txt").write_text("a caption")
    (linked / "link2.txt").write_text("a caption")
    assert "link.mp4 is a link that leads out" in fails(linked, {"kind": "folder", "path": "."})
    for name in ("link.mp4", "link2.mp4", "link.txt", "link2.txt", "a.txt"):
        (linked / name).unlink()
    (linked / "a.txt").symlink_to(linked.parent / "secret.txt")
    (linked / "b.txt").write_text("a caption")
    assert "a.txt is a link that leads out" in fails(linked, {"kind": "folder", "path": "."})
    allowed = read(linked, {"kind": "folder", "path": ".", "allow_outside": True})
    assert "the secret words" in [sample.caption for sample in allowed.train], "canary: this is what it guards"


@pytest.mark.parametrize("kind", ["auto", "cogkit", "prompts"])
def test_a_linked_list_in_a_folder_is_not_read(data, kind):
    outside = write_rows(data.parent / "list.jsonl", {"file_name": "a.mp4", "prompt": "x"})
    if kind == "prompts":
        (data / "prompts.txt").symlink_to(data.parent / "secret.txt")
        (data / "videos.txt").write_text("a.mp4\n")
    else:
        (data / "metadata.jsonl").symlink_to(outside)
    assert "is a link that leads out" in fails(data, {"kind": kind, "path": "."})
    assert len(read(data, {"kind": kind, "path": ".", "allow_outside": True}).train) == 1
    if kind == "auto":  # named by the user, it is what the user wants
        assert len(read(data, {"path": "metadata.jsonl"}).train) == 1


def test_links_inside_and_a_linked_folder_are_fine(data):
    (data / "inside.mp4").symlink_to("a.mp4")
    write_rows(data / "metadata.jsonl", {"file_name": "inside.mp4", "prompt": "x"})
    (data.parent / "elsewhere").symlink_to(data)
    assert len(read(data.parent, {"path": "elsewhere"}).train) == 1
    assert len(read(data.parent, {"path": "elsewhere/metadata.jsonl"}).train) == 1


def test_allow_outside_opens_what_it_says_and_no_more(linked):
    names = [f"{linked.parent}/secret.mp4", "../secret.mp4", "link.mp4"]
    write_rows(linked / "m.jsonl", *({"file_name": name, "prompt": name[-5:]} for name in names))
    found = read(linked, {"path": "m.jsonl", "allow_outside": True})
    assert {os.path.realpath(sample.video) for sample in found.train} == {str(linked.parent / "secret.mp4")}
    for name, said in (("~/a.mp4", "absolute"), ("C:\\a.mp4", "absolute"), ("/etc/passwd", "not a known kind")):
        write_rows(linked / "m.jsonl", {"file_name": name, "prompt": "x"})
        assert said in fails(linked, {"path": "m.jsonl", "allow_outside": True})


def test_a_gate_that_allows_does_not_open_for_the_next_source(linked):
    gate = PathPolicy()
    gate.file("link.mp4", linked, VIDEO, "here", allow_outside=True)
    with pytest.raises(DataError, match="leads out"):
        gate.file("link.mp4", linked, VIDEO, "here")


def test_pipes_devices_and_folders_are_no_files(data):
    os.mkfifo(data / "pipe.mp4")
    (data / "null.mp4").symlink_to("/dev/zero")
    (data / "folder.mp4").mkdir()
    write_rows(data / "m.jsonl", *({"file_name": f"{name}.mp4", "prompt": "x"} for name in ("pipe", "null", "folder")))
    told = fails(data, {"path": "m.jsonl", "allow_outside": True})
    assert "is a pipe, not a file" in told and "is a device, not a file" in told and "is a folder, not a file" in told
    assert "3 things" in told


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "m.parquet"])
def test_a_list_that_never_ends_is_not_opened(data, name):
    os.mkfifo(data / name)
    assert "a pipe, not a file" in fails(data, {"kind": "metadata", "path": name})
    (data / name).unlink()
    (data / name).symlink_to("/dev/zero")
    assert "a device, not a file" in fails(data, {"kind": "metadata", "path": name})
    os.mkfifo(data / "prompts.txt")
    (data / "videos.txt").write_text("a.mp4\n")
    assert "a pipe, not a file" in fails(data, {"kind": "prompts", "path": "."})
    os.mkfifo(data / "a.txt")
    assert "a pipe, not a file" in fails(data, {"kind": "folder", "path": "."})


# ----------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize(
    ("encoding", "said", "command"),
    [
        ("latin-1", "byte 0xe9", "iconv -f WINDOWS-1252"),
        ("utf-16", "the file is UTF-16 text", "iconv -f UTF-16 "),
        ("utf-16-le", "the file is UTF-16LE text", "iconv -f UTF-16LE"),
        ("utf-16-be", "the file is UTF-16BE text", "iconv -f UTF-16BE"),
        ("utf-32", "the file is UTF-32 text", "iconv -f UTF-32"),
    ],
)
@pytest.mark.parametrize("name", ["m.jsonl", "m.csv", "a.txt"])
def test_other_encodings_are_named_with_the_way_out(data, encoding, said, command, name):
    text = {
        "m.jsonl": '{"file_name": "a.mp4", "prompt": "caf\u00e9 with a view of the sea"}\n',
        "m.csv": "video,caption\na.mp4,caf\u00e9 with a view of the sea\n",
        "a.txt": "caf\u00e9 with a view of the sea\n",
    }[name]
    (data / name).write_bytes(text.encode(encoding))
    (data / "b.mp4").unlink()
    told = fails(data, {"kind": "folder", "path": "."} if name == "a.txt" else {"path": name})
    assert said in told and command in told and name in told


def test_one_bad_byte_is_one_row_and_every_bad_row_is_named(data):
    good, bad = b'{"file_name": "a.mp4", "prompt": "x"}\n', b'{"file_name": "b.mp4", "prompt": "caf\xe9"}\n'
    (data / "m.jsonl").write_bytes(good + bad + b"\n" + bad + b'{"file_name": "b.mp4", "prompt": "a\0b"}\n')
    told = fails(data, {"path": "m.jsonl"})
    assert all(f"m.jsonl:{line}" in told for line in (2, 4, 5)) and "m.jsonl:1" not in told and "is meant" in told
    assert len(read(data, {"path": "m.jsonl"}, skip=True).train) == 1


# -------------------------------------------------------------------------------------------------- tables of all kinds


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"prompt": "x", "prompt": "y"}', "the key 'prompt' stands twice"),
        ('{"n": ' + "9" * 5_000 + "}", "not usable JSON"),
        ('"x"', "not a JSON object"),
        ('{"x": "' + "y" * tables.MAX_LINE_CHARS + '"}', "more than 1,048,576 characters"),
        ("NaN", "not a JSON object"),
        ('{"x": "\t"}', "Invalid control character"),
    ],
)
def test_lines_of_hostile_json(data, line, said):
    (data / "m.jsonl").write_text(f'{{"file_name": "a.mp4", "prompt": "x"}}\n{line}\n')
    begun = time.process_time()
    told = fails(data, {"path": "m.jsonl"})
    assert said in told and "m.jsonl:2" in told and len(told) < 1_000
    assert len(read(data, {"path": "m.jsonl"}, skip=True).train) == 1
    assert time.process_time() - begun < 2


def test_hostile_values_in_columns_nobody_reads_do_not_matter(data):
    row = {"file_name": "a.mp4", "prompt": "x", "n": float("nan"), "m": 10**300, "deep": [[[{"\ud800": "\0"}]]]}
    write_rows(data / "m.jsonl", row)
    assert len(read(data, {"path": "m.jsonl"}).train) == 1


def test_too_many_columns_rows_and_faults(data, monkeypatch):
    write_rows(data / "m.jsonl", {f"k{n}": 1 for n in range(2_000)})
    assert "more than 1,000 different keys" in fails(data, {"path": "m.jsonl"})
    (data / "m.csv").write_text(",".join(f"c{n}" for n in range(2_000)) + "\n")
    assert "more than 1,000 columns" in fails(data, {"path": "m.csv"})
    (data / "m.csv").write_text(",".join(f"{'c' * 200}{n}" for n in range(500)) + "\n" + "," * 499 + "\n")
    assert "and 480 more" in (told := fails(data, {"path": "m.csv"})) and len(told) < 2_000
    (data / "m.jsonl").write_text("not json\n" * (tables.MAX_FAULTS + 2))
    assert "more than 10,000 rows cannot be read" in fails(data, {"path": "m.jsonl"})
    (data / "videos.txt").write_text("a.mp4\n")
    for lines in (b"caf\xe9\n" * (tables.MAX_FAULTS + 2), b"x" + b"\n" * (tables.MAX_FAULTS + 3) + b"y"):
        (data / "prompts.txt").write_bytes(lines)
        assert "more than 10,000 lines that cannot be read" in fails(data, {"kind": "prompts", "path": "."})
    (data / "prompts.txt").write_text("x" + "\n" * (tables.MAX_FAULTS + 3))
    read(data, {"kind": "prompts", "path": "."})  # at the end, any number is left out
    write_rows(data / "m.jsonl", *[{"file_name": "gone.mp4", "prompt": "x"}] * 20)
    monkeypatch.setattr("finetune.datasets.samples.MAX_FAULTS", 5)
    assert "too much is wrong" in fails(data, {"path": "m.jsonl"})
    monkeypatch.setattr(tables, "MAX_ROWS", 10)
    assert "more than 10 rows" in fails(data, {"path": "m.jsonl"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('video,caption\na.mp4,"' + "x" * 200_000 + '"\n', "field limit"),
        ('video,caption\na.mp4,"never closed\n' + "b.mp4,x\n" * 100_000, "field limit"),
        ("video,caption\n" + "," * 500_000 + "\n", "the row has 500001 fields"),
        ('video,caption\na.mp4,"x"y\n', "not valid CSV"),
        ("video,caption\na.mp4,\x1b[2J\n", "the caption is damaged"),
    ],
)
def test_csv_bombs(data, content, said):
    (data / "m.csv").write_text(content)
    begun = time.process_time()
    told = fails(data, {"path": "m.csv"})
    assert said in told and "m.csv" in told and time.process_time() - begun < 3


def test_a_line_without_end_takes_no_memory(data):
    with (data / "m.jsonl").open("wb") as file:
        for _ in range(48):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        told = fails(data, {"path": "m.jsonl"})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than 1,048,576 characters" in told and peak < 24 * 2**20


def test_a_file_too_large_is_not_opened(data, monkeypatch):
    with (data / "m.jsonl").open("wb") as file:
        file.truncate(tables.MAX_FILE_BYTES + 1)  # a hole: it takes no room
    monkeypatch.setattr(Path, "open", lambda *arguments, **options: pytest.fail("opened"))
    assert "1,073,741,825 bytes" in fails(data, {"path": "m.jsonl"})


def cpu_of(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def many_rows(data: Path, count: int) -> None:
    (data / "m.jsonl").write_text(
        "".join(f'{{"file_name": "a.mp4", "prompt": "caption {number}"}}\n' for number in range(count))
    )


def test_rows_cost_the_same_however_many_there_are(data):
    many_rows(data, 500)
    read(data, {"path": "m.jsonl"})
    took = []
    for count in (4_000, 16_000):
        many_rows(data, count)
        took.append(cpu_of(lambda: read(data, {"path": "m.jsonl"})) / count)
    assert took[1] < 2.5 * took[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_million_rows(data):
    many_rows(data, 1_000_000)
    print(f"a million rows: {cpu_of(lambda: read(data, {'path': 'm.jsonl'})):.0f} s of one core")


def test_rows_left_out_are_counted_and_named_by_check(demo_clips, tmp_path):
    from worlds import run_config

    from finetune.caching.check import check_dataset

    listed = (demo_clips / "metadata.jsonl").read_text().splitlines()
    clips = tmp_path / "clips"
    clips.mkdir()
    for video in demo_clips.glob("*.mp4"):
        (clips / video.name).write_bytes(video.read_bytes())
    bad = json.loads(listed[0]) | {"prompt": "a\x1b[2Jb"}
    (clips / "metadata.jsonl").write_text("\n".join([json.dumps(bad), "not json", *listed[1:]]))
    spec = read_spec(str(known_model("5b")))
    strict = run_config(known_model("5b"), clips, tmp_path / "run")
    with pytest.raises(DataError, match="2 things are wrong"):
        check_dataset(strict, spec, progress=False)
    lenient = run_config(known_model("5b"), clips, tmp_path / "run", data={"unreadable_clips": "skip"})
    report = check_dataset(lenient, spec, progress=False)
    assert len(report.clips) == len(listed) - 1
    assert "left out, with unusable text: 2 (" in str(report) and "\x1b" not in str(report)
    assert "metadata.jsonl:1" in str(report) and "metadata.jsonl:2" in str(report)


# ------------------------------------------------------------------------------------------------------------- parquet


def parquet_bytes(columns: dict[str, Any], **options: Any) -> bytes:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, **options)
    return buffer.getvalue()


def test_parquet_is_read_in_a_process_of_its_own_and_its_death_is_an_error(data, monkeypatch):
    (data / "m.parquet").write_bytes(parquet_bytes({"file_name": ["a.mp4"], "prompt": ["x\u05d0"], "n": [1]}))
    assert read(data, {"path": "m.parquet"}).train[0].caption == "x\u05d0"
    before = set(sys.modules)
    # Written by mutation: pyarrow ends the process over it, past anything that Python could catch.
    (data / "m.parquet").write_bytes((Path(__file__).parent / "fuzz" / "aborts.parquet").read_bytes())
    assert "the Parquet reader crashed (SIGABRT) on this file" in fails(data, {"path": "m.parquet"})
    assert "pyarrow.parquet" not in set(sys.modules) - before
    monkeypatch.setattr(tables, "PARQUET_TIMEOUT_S", 0.05)
    assert "took longer than 0.05 s" in fails(data, {"path": "m.parquet"})


def test_a_reader_that_is_killed_from_outside_is_started_again_and_blames_no_file(data, monkeypatch, tmp_path):
    (data / "m.parquet").write_bytes(parquet_bytes({"file_name": ["a.mp4"], "prompt": ["x"]}))
    killed = (
        "import os, signal; from finetune.datasets import worker; "
        f"open('{tmp_path}/runs', 'a').write('x'); worker.serve(lambda fields: os.kill(os.getpid(), signal.SIGKILL))"
    )
    monkeypatch.setattr(tables, "PARQUET_WORKER", killed)
    with pytest.raises(KilledError, match=r"killed twice \(SIGKILL\)") as caught:
        read(data, {"path": "m.parquet"})
    assert caught.value.where == str(data / "m.parquet") and (tmp_path / "runs").read_text() == "xx"


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    read_parquet_here(monkeypatch)


def test_parquet_takes_no_orders_from_the_file(data, _here):
    """What HF datasets makes of a column by default: an image, opened at the path or address that the row names."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    text = datasets.Value("string")
    features = datasets.Features({"file_name": text, "prompt": text, "image": datasets.Image()})
    image = pyarrow.array(
        [{"bytes": None, "path": "/nowhere/x.png"}],
        type=pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}),
    )
    table = pyarrow.table({"file_name": ["a.mp4"], "prompt": ["x"], "image": image})
    parquet.write_table(table.cast(features.arrow_schema), data / "m.parquet")
    found = read(data, {"path": "m.parquet"}, image_to_video=True)
    assert "the column image of" in found.notes[0] and found.train[0].image is None
    named = {"kind": "metadata", "path": "m.parquet", "image_column": "image"}
    assert "the column image holds struct" in fails(data, named)
    with pytest.raises(FileNotFoundError, match=r"/nowhere/x\.png"):  # canary: left to itself it obeys
        list(datasets.Dataset.from_parquet(str(data / "m.parquet"), streaming=True, cache_dir=str(data.parent / "c")))


def test_parquet_claims_are_checked_before_they_are_believed(data, _here, monkeypatch):
    big = parquet_bytes({"file_name": ["a.mp4"] * 1_000, "prompt": ["x" * 1_000] * 1_000}, compression="zstd")
    (data / "m.parquet").write_bytes(big)
    assert len(big) < 10_000 and len(read(data, {"path": "m.parquet"}).train) == 1_000
    monkeypatch.setattr(tables, "MAX_ROWS", 999)
    assert "1,000 rows; 1 to 999 are read" in fails(data, {"path": "m.parquet"})
    monkeypatch.undo()


def test_parquet_text_that_unfolds(data, _here, monkeypatch):
    options = {"compression": "zstd"}
    monkeypatch.setattr(tables, "MAX_FILE_BYTES", 100_000)
    table = {"file_name": ["a.mp4"] * 500, "prompt": ["x" * 1_000] * 500}
    (data / "m.parquet").write_bytes(parquet_bytes(table, use_dictionary=False, **options))
    assert "its text unfolds to" in (told := fails(data, {"path": "m.parquet"})) and "bytes; at most 100,000" in told
    (data / "m.parquet").write_bytes(parquet_bytes(table, use_dictionary=True, **options))  # one copy, told 500 times
    assert "unfolds to more than 100,000 characters" in fails(data, {"path": "m.parquet"})


@pytest.mark.parametrize(
    "columns", [{"file_name": ["a.mp4"], "prompt": [7]}, {"file_name": [["a.mp4"]], "prompt": ["x"]}]
)
def test_parquet_columns_that_are_no_text(data, _here, columns):
    (data / "m.parquet").write_bytes(parquet_bytes(columns))
    assert "not text" in fails(data, {"path": "m.parquet"})


# ------------------------------------------------------------------------------------------------- names on the way out


def test_a_video_s_tag_is_one_line_of_text(tmp_path, monkeypatch):
    import numpy as np

    from finetune.config.schema import TrackingConfig
    from finetune.trainers.tracking import Tracker

    seen: list[Any] = []
    writer = SimpleNamespace(
        file_writer=SimpleNamespace(add_summary=lambda summary, step: seen.append(summary)), flush=lambda: None
    )
    accelerator = SimpleNamespace(
        is_main_process=True,
        project_dir=str(tmp_path),
        log_with=["tensorboard"],
        init_trackers=lambda *arguments, **more: None,
        get_tracker=lambda name, unwrap: writer,
    )
    tracker = Tracker(TrackingConfig(), accelerator, settings={})
    tracker.log_video("samples/00 a\nb\x1b[2J\u202e", np.zeros((1, 8, 8, 3), np.uint8), 1, 8)
    assert seen[0].value[0].tag == "samples/00 a b\\x1b[2J\\u202e"


def test_a_starting_configuration_cannot_be_written_into(tmp_path):
    from finetune.cli.init import write_starter

    with pytest.raises(ConfigError, match="damaged"):
        write_starter(model="5b", method="lora", card_gib=None, clips=Path("x\ny: 1"), output=tmp_path / "run.yaml")
    output = tmp_path / "a run; true.yaml"
    write_starter(model="5b", method="lora", card_gib=None, clips=Path("it's"), output=output)
    assert f"finetune doctor --config '{output}'" in output.read_text()
    from finetune.config.schema import load_config

    assert load_config(output).data.sources[0].path.name == "it's"
