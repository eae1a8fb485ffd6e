"""Datasets read as streams: what the same clips give as files, with a bounded part of them on the disk at a time."""

from __future__ import annotations

import importlib
import io
import json
import os
import signal
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from PIL import Image
from worlds import merged, run_values

from finetune.caching import streaming
from finetune.caching.check import check_dataset, identities
from finetune.caching.precompute import PrecomputeReport, ensure_cache, merge_parts, precompute
from finetune.cogvideox.spec import read_spec
from finetune.config.schema import RunConfig
from finetune.core.errors import CacheError, DataError, FinetuneError
from finetune.datasets import cache_admin, stream_worker, streams
from finetune.datasets.cache import Cache
from finetune.datasets.cache_transfer import export_cache
from finetune.datasets.manifests import KINDS, Manifest, read_content
from finetune.datasets.parts import Part, share_out
from finetune.diagnosis.doctor import DoctorOptions, doctor
from finetune.trainers.loop import train

Clip = tuple[bytes, Any]
"""A video's bytes and its caption."""


@pytest.fixture(scope="module")
def clips(demo_clips: Path) -> list[Clip]:
    rows = map(json.loads, (demo_clips / "metadata.jsonl").read_text().splitlines())
    return [((demo_clips / row["file_name"]).read_bytes(), row["prompt"]) for row in rows]


def as_files(folder: Path, clips: list[Clip]) -> dict[str, Any]:
    for number, (video, caption) in enumerate(clips):
        (folder / f"{number}.mp4").write_bytes(video)
        with (folder / "metadata.jsonl").open("a") as table:
            table.write(json.dumps({"file_name": f"{number}.mp4", "prompt": caption}) + "\n")
    return {"path": str(folder / "metadata.jsonl")}


def as_parquet(folder: Path, clips: list[Clip], files: int = 1) -> dict[str, Any]:
    """Parquet as the hub has it, two rows to a row group."""
    import datasets

    features = datasets.Features({"video": datasets.Video(decode=False), "caption": datasets.Value("string")})
    for number in range(files):
        rows = [
            {"video": video and {"bytes": video, "path": None}, "caption": text} for video, text in clips[number::files]
        ]
        table = datasets.Dataset.from_list(rows, features=features)
        table.to_parquet(folder / f"train-{number:05}-of-{files:05}.parquet", batch_size=2)
    return {"kind": "packed", "path": str(folder)}


def as_tars(folder: Path, clips: list[Clip], files: int = 2) -> dict[str, Any]:
    for number in range(files):
        with tarfile.open(folder / f"{number:04}.tar", "w") as tar:
            for place, (video, caption) in enumerate(clips[number::files]):
                # Samples of different kinds: a caption beside the video, or in its JSON.
                ending, text = (".txt", caption) if place % 2 else (".json", json.dumps({"caption": caption}))
                for name, content in ((f"{place:03}.mp4", video), (f"{place:03}{ending}", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"kind": "packed", "path": str(folder)}


@dataclass
class Home:
    """A folder with a dataset, a configuration and a cache."""

    folder: Path
    model: Path
    source: dict[str, Any]
    room: str = "0.01MB"

    def config(self, **changes: Any) -> RunConfig:
        values = run_values(self.model, Path("none"), Path("run"))
        source = {**self.source, **({"stream_room": self.room} if self.room else {})}
        values["cache"] |= {"dir": "cache", "decode_workers": 0}
        values["data"] |= {"buckets": ["9x32x32"], "sources": [source]}
        return RunConfig.from_dict(merged(values, changes), base=self.folder)

    def precompute(self, part: str = "", **changes: Any) -> PrecomputeReport:
        chosen = Part.parse(part) if part else None
        return precompute(self.config(**changes), progress=False, part=chosen)

    @property
    def cache(self) -> Cache:
        return Cache(self.folder / "cache")

    @property
    def manifest(self) -> Manifest:
        (path,) = self.cache.manifest_paths()
        return Manifest.from_content(read_content(path), self.folder)

    @property
    def media(self) -> list[Path]:
        """What lies on the disk of the dataset's media."""
        return [path for path in (self.folder / "cache-media").rglob("*") if path.is_file() and path.suffix != ".lock"]

    def entries(self) -> dict[str, bytes]:
        return {f"{kind}/{key}": self.cache.content(kind, key) for kind in KINDS for key in self.cache.keys(kind)}


Make = Callable[..., Home]


class ReaderHere:
    """A dataset reader in this process and as fresh as one of its own, which takes two seconds to start."""

    def __init__(self, *_: str) -> None:
        self._module = importlib.reload(stream_worker)

    def ask(self, path: Path, fields: dict[str, Any], **_: float) -> tuple[dict[str, Any], bytearray]:
        answer, body = self._module.handle_stream(json.loads(json.dumps({**fields, "path": path}, default=os.fspath)))
        return json.loads(json.dumps(answer)), bytearray(b"".join(body))

    def close(self) -> None:
        """Nothing runs."""


@pytest.fixture(autouse=True)
def reader_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "own_reader" not in request.fixturenames:
        monkeypatch.setattr(streams, "Worker", ReaderHere)


@pytest.fixture
def own_reader() -> None:
    """The test has readers in processes of their own, as users have."""


@pytest.fixture
def home(tmp_path: Path, tiny_model: Callable[..., Path], clips: list[Clip]) -> Make:
    def make(layout: Callable[..., dict[str, Any]], rows: list[Clip] | None = None, **options: Any) -> Home:
        folder = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
        (folder / "data").mkdir(parents=True)
        room = {"room": options.pop("room")} if "room" in options else {}
        return Home(folder, tiny_model("5b"), layout(folder / "data", rows or clips, **options), **room)

    return make


@pytest.fixture(scope="module")
def reference(tmp_path_factory: Any, tiny_model: Callable[..., Path], clips: list[Clip]) -> Home:
    """The same clips as files, in the order of one Parquet file."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "data").mkdir()
    made = Home(folder, tiny_model("5b"), as_files(folder / "data", clips), room="")
    made.precompute()
    return made


def seen(manifest: Manifest) -> list[tuple[Any, ...]]:
    """What training takes of a manifest."""
    return [(item.latents_key, item.prompt_key, item.caption, item.repeats, item.holdout) for item in manifest.items]


def watch_media(made: Home, most: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the bytes of media on the disk whenever a clip is stored or recorded."""

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            most.append(sum(path.stat().st_size for path in made.media))
            return work(*arguments, **options)

        return counting

    monkeypatch.setattr(Cache, "write_latents", watched(Cache.write_latents))
    monkeypatch.setattr(streaming, "append", watched(streaming.append))


# ------------------------------------------------------------------------------------------------------- the same cache


@pytest.mark.usefixtures("own_reader")
@pytest.mark.parametrize("layout", [as_parquet, as_tars])
def test_a_stream_gives_the_entries_of_the_same_clips_as_files_within_its_room(home, reference, layout, monkeypatch):
    made: Home = home(layout)
    most: list[int] = []
    watch_media(made, most, monkeypatch)
    report = made.precompute()
    assert made.entries() == reference.entries()
    assert sorted(seen(made.manifest)) == sorted(seen(reference.manifest)) and made.manifest.complete
    assert report.encoded == {"latents": 4, "prompts": 5, "images": 0} and not any(report.reused.values())
    assert len(most) > 1 and 0 < max(most) <= 0.01 * 2**20 and made.media == []
    assert report.packed is not None and report.packed.entries == 9 and not made.cache.files("latents")


@pytest.mark.parametrize(("layout", "files"), [(as_parquet, 1), (as_tars, 2)])
def test_parts_make_what_one_command_makes(home, reference, layout, files):
    """Two parts take whole files where there are two, and every second row of one."""
    made: Home = home(layout, files=files)
    first = made.precompute("2/2")
    assert first.part is not None and 0 < first.encoded["latents"] < 4
    with pytest.raises(DataError, match="not been read to their end"):
        merge_parts(made.config(), progress=False)
    assert cache_admin.gc(made.cache, grace_s=0).entries == 0
    last = made.precompute("1/2")
    assert last.part is None and made.entries() == reference.entries()
    assert sorted(seen(made.manifest)) == sorted(seen(reference.manifest))
    alone: Home = home(layout, files=files)
    alone.precompute()
    assert seen(alone.manifest) == seen(made.manifest), "in the same order"
    assert alone.manifest.digest == made.manifest.digest


def test_files_are_shared_out_whole_and_rows_where_there_are_too_few():
    files = list(range(7))
    for parts, processes in ((1, 1), (3, 2), (2, 5), (9, 1), (9, 3), (5, 4)):
        taken = []
        for part in range(parts):
            for rank in range(processes):
                own, rows = share_out(files, (part, parts), (rank, processes))
                places = [(group, index) for group in range(3) for index in range(50) if rows.holds(group, index)]
                taken += [(file, *place) for file in own for place in places]
        assert sorted(taken) == [(file, group, index) for file in files for group in range(3) for index in range(50)]


def test_training_checking_and_the_cache_need_no_media(home, reference, tmp_path, capsys):
    made: Home = home(as_parquet, files=2)
    made.precompute(data={"holdout": 1})
    for file in (made.folder / "data").iterdir():
        file.unlink()  # the dataset itself is out of reach
    config = made.config(data={"holdout": 1}, train={"steps": 1, "seed": 7})
    spec = read_spec(config.model.pretrained)
    report = check_dataset(config, spec, progress=False)
    assert len(report.clips) == 4 and "4 clips from 4 videos" in str(report)
    digests = {item.media_digest for item in made.manifest.items}
    assert set(identities(config, report.clips, progress=False).values()) == digests
    assert cache_admin.verify(made.cache).ok and cache_admin.gc(made.cache, grace_s=0).entries == 0
    assert export_cache(made.cache, tmp_path / "out.tar").ok
    assert ensure_cache(config, spec, progress=False).digest == made.manifest.digest
    assert train(config).step == 1
    with pytest.raises(DataError, match=r"no frame of it is on this disk[\s\S]*without stream_room"):
        doctor(config, DoctorOptions(), progress=False)
    assert not any(made.precompute(data={"holdout": 1}).encoded.values()), "nothing of it is wanted"
    with pytest.raises(DataError, match="2 files could not be read to their end"):
        made.precompute(data={"buckets": ["9x48x48"]})


def test_a_stream_and_files_answer_each_other(home, reference):
    """Addresses are equal: what one way encoded is found the other way."""
    made: Home = home(as_parquet)
    made.precompute()
    require = {"cache": {"mode": "require"}}
    assert ensure_cache(made.config(**require), spec(made), progress=False).complete
    (file,) = (made.folder / "data").iterdir()
    os.utime(file, (1, 1))
    with pytest.raises(CacheError, match=r"streams\[0\]"):  # it may be another dataset now
        ensure_cache(made.config(**require), spec(made), progress=False)
    assert not any(made.precompute().encoded.values())
    assert ensure_cache(made.config(**require), spec(made), progress=False).complete
    made.room = ""
    report = made.precompute()
    assert not any(report.encoded.values()) and report.reused["latents"] == 4 and len(made.media) == 5


@pytest.mark.parametrize(
    ("variant", "images"), [("1.5-5b-i2v", False), ("5b", True)], ids=["first frames", "still images"]
)
def test_images_come_as_a_stream_too(home, clips, tiny_model, variant, images):
    """A first frame of its own for image-to-video; and a still image in a row without a video."""

    def layout(folder: Path, rows: list[Clip]) -> dict[str, Any]:
        import pyarrow
        from pyarrow import parquet

        table = []
        for number, (video, caption) in enumerate(rows):
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), (60 * number, 0, 90)).save(picture, "png")
            is_still = images and number % 2
            table.append({"video": None if is_still else video, "caption": caption, "image": picture.getvalue()})
        parquet.write_table(pyarrow.Table.from_pylist(table), folder / "a.parquet", row_group_size=2)
        return {"kind": "packed", "path": str(folder), "images": images}

    made: Home = home(layout)
    made.model = tiny_model(variant)
    made.precompute()
    there: Home = Home(made.folder.with_name("there"), made.model, made.source, room="")
    there.folder.mkdir()
    there.precompute()
    assert made.entries() == there.entries() and seen(made.manifest) == seen(there.manifest)
    assert len(made.cache.keys("latents")) == 4 and made.media == []
    assert len(check_dataset(made.config(), spec(made), progress=False).clips) == 4


# ------------------------------------------------------------------------------------------------------------- going on


def answers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every row that is asked for from now on, as it was answered."""
    given: list[dict[str, Any]] = []
    ask = streaming.StreamReader._ask

    def asked(*arguments: Any) -> dict[str, Any]:
        given.append(ask(*arguments))
        return given[-1]

    monkeypatch.setattr(streaming.StreamReader, "_ask", asked)
    return given


def test_what_is_encoded_is_not_read_again_and_what_is_cut_otherwise_is(home, monkeypatch, capsys):
    made: Home = home(as_parquet)
    made.precompute()
    given = answers(monkeypatch)
    assert not any(made.precompute().encoded.values()) and given == []
    other = made.precompute(data={"buckets": ["9x48x48"]})
    assert other.encoded == {"latents": 4, "prompts": 0, "images": 0} and sum("row" in one for one in given) == 4
    given.clear()
    key = other.manifest.items[2].latents_key
    packed = made.cache.shards.entries()["latents"][key]
    content = bytearray(packed.shard.read_bytes())
    content[packed.offset + packed.size - 1] ^= 1
    packed.shard.write_bytes(content)
    assert cache_admin.verify(made.cache, delete=True).damaged
    again = made.precompute(data={"buckets": ["9x48x48"]})
    assert again.encoded["latents"] == 1 == sum("row" in one for one in given), "the one that went, alone"


class Killed(BaseException):
    """What no handler of errors takes for one."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Stop before the given call of a function."""
    work, calls = getattr(owner, name), []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return work(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)


@pytest.mark.parametrize(
    ("layout", "owner", "name", "call"),
    [(as_parquet, Cache, "write_latents", 3), (as_tars, streaming, "append", 2)],
)
def test_stopped_at_any_moment_the_next_call_goes_on(home, reference, layout, owner, name, call, monkeypatch):
    made: Home = home(layout)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_at(patch, owner, name, call)
        made.precompute()
    before = len(made.cache.keys("latents"))
    assert before == 2 and cache_admin.gc(made.cache, grace_s=0).entries <= 1, "of a row that was not recorded yet"
    given = answers(monkeypatch)
    report = made.precompute()
    assert made.entries() == reference.entries() and report.encoded["latents"] == 2
    assert sum("row" in one for one in given) == 2 + (name == "append"), "what is recorded is not read again"
    assert made.media == [] and sorted(seen(made.manifest)) == sorted(seen(reference.manifest))


def test_killed_by_the_system_it_leaves_nothing_that_stays(home, reference, launcher):
    made: Home = home(as_parquet)
    path = made.folder / "run.yaml"
    path.write_text(yaml.safe_dump(made.config().model_dump(mode="json")))
    (killed,) = launcher.run("launcher_cases:killed_while_recording", str(path), ranks=1)
    assert killed.code == -signal.SIGKILL, killed.log
    assert made.media, "the clip in hand"
    report = made.precompute()
    assert report.encoded["latents"] == 2 and made.entries() == reference.entries() and made.media == []


def test_a_damaged_line_of_a_record_is_read_again(home, monkeypatch):
    made: Home = home(as_parquet)
    made.precompute()
    (record,) = (made.folder / "cache/streams").glob("*/*.jsonl")
    content = record.read_bytes()
    record.write_bytes(content.replace(b'"at": [0, 1]', b'"at": [0, 7]'))
    given = answers(monkeypatch)
    assert not any(made.precompute().encoded.values())
    assert sum("row" in one for one in given) == 1 and made.manifest.complete


# ------------------------------------------------------------------------------------------------------------- bad rows


def test_bad_rows_are_named_at_the_end_and_can_be_left_out(home, clips, monkeypatch):
    good = clips[0]
    cut = clips[1][0][: len(clips[1][0]) // 2]
    rows: list[Any] = [good, (b"no video", "one"), (None, "two"), clips[1], (clips[2][0], ""), (b"x" * 6000, "large")]
    rows += [(cut, "cut off"), clips[3]]
    made: Home = home(as_parquet, rows)
    with pytest.raises(DataError) as caught:
        made.precompute()
    message = str(caught.value)
    for part in ("row 3\n", "the row holds no video", "the caption is empty", "row 5", "6,000 bytes or more", "row 6"):
        assert part in message, part
    assert len(made.cache.keys("latents")) == 3, "the others are encoded"
    given = answers(monkeypatch)
    with pytest.raises(DataError):
        made.precompute()
    assert given == [], "nor is what is known to be bad"
    report = made.precompute(data={"unreadable_clips": "skip"})
    assert len(report.manifest.items) == 3 and report.skipped == {"unreadable": 2, "with unusable text": 3}
    assert given == [] and len(check_dataset(made.config(data={"unreadable_clips": "skip"}), spec(made)).clips) == 3
    made.room = "0.02MB"
    with pytest.raises(DataError):
        made.precompute()
    assert [answer["row"][1] for answer in given] == ["large"], "there is room for it now"


def spec(made: Home) -> Any:
    return read_spec(str(made.model))


@pytest.mark.parametrize("layout", [as_parquet, as_tars])
def test_a_file_that_is_cut_off_costs_its_end_alone(home, layout, clips):
    made: Home = home(layout, files=2)
    first = min((made.folder / "data").iterdir())
    content = first.read_bytes()
    # A tar loses its last member; of Parquet the pages of the second video turn to garbage, for its end is its index.
    video = clips[2][0]
    place = content.index(video[:500])
    first.write_bytes(content[: place + 100] if layout is as_tars else b"PAR1" + content[4:-8] + b"\xff" * 8)
    with pytest.raises(DataError, match="the file cannot be read"):
        made.precompute()
    report = made.precompute(data={"unreadable_clips": "skip"})
    assert len(report.manifest.items) == (3 if layout is as_tars else 2)
    assert report.skipped["with unusable text"] == 1


def test_a_clip_that_cannot_be_decoded_is_left_out_as_a_file_is(home, clips, monkeypatch):
    made: Home = home(as_parquet)
    from finetune.datasets import decode_pool

    real = decode_pool.perform

    def broken(job: Any) -> Any:
        if isinstance(job, decode_pool.DecodeJob) and job.path.stat().st_size == len(clips[1][0]):
            raise DataError("no frame 3", where=str(job.path), fix="re-encode it")
        return real(job)

    monkeypatch.setattr(decode_pool, "perform", broken)
    skipping: dict[str, Any] = {"data": {"unreadable_clips": "skip"}}
    with pytest.raises(DataError, match=r"no frame 3[\s\S]*row 2"):
        made.precompute()
    report = made.precompute(**skipping)
    assert len(report.manifest.items) == 3 and report.skipped == {"unreadable": 1}
    assert any(note.startswith("left out: ") and "no frame 3" in note for note in report.manifest.notes)
    assert ensure_cache(made.config(**skipping), spec(made), progress=False).complete


@pytest.mark.parametrize(
    ("source", "message"),
    [({"path": "gone"}, "no packed dataset"), ({"caption_column": "words"}, "a column is missing")],
)
def test_what_is_no_stream_is_said(home, source, message):
    made: Home = home(as_parquet)
    given = made.source
    made.source = {**given, **({"path": str(made.folder / "gone")} if "path" in source else source)}
    with pytest.raises(DataError, match=message):
        made.precompute()
    with pytest.raises(FinetuneError, match="no amount of memory"):
        Home(made.folder, made.model, given, "much").config()
    with pytest.raises(DataError, match=r"nothing of it has been read yet[\s\S]*finetune precompute"):
        check_dataset(Home(made.folder, made.model, {**given, "video_column": "film"}).config(), spec(made))


# -------------------------------------------------------------------------------------------------------------- the hub


class Hub(ThreadingHTTPServer):
    """As much of the hub as a dataset is listed and read with."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.root = root
        self.read: list[str] = []
        """Files of data that bytes were asked of."""
        self.lost: set[str] = set()


class HubAnswer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    commit = "a" * 40

    def log_message(self, *_: Any) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        repo, _, rest = path.partition("/datasets/someone/clips")[2].lstrip("/").partition("/")
        if repo in ("", "revision") and path.startswith("/api/"):
            info = {"id": "someone/clips", "sha": self.commit, "private": False, "tags": [], "siblings": []}
            return self._send(json.dumps(info).encode())
        name = rest.partition("/")[2]
        if repo == "tree":
            files = self.server.root.glob("data/*") if name else []
            listed = [{"type": "file", "path": f"data/{file.name}", "size": file.stat().st_size} for file in files]
            folder = {"type": "directory", "path": "data"}
            return self._send(json.dumps([{**one, "oid": "b" * 40} for one in listed or [folder]]).encode())
        file = self.server.root / name
        if repo != "resolve" or not file.is_file() or file.name in self.server.lost:
            return self._send(b"", 404)
        if self.command == "GET":
            self.server.read.append(file.name)
        self._send(file.read_bytes())

    def _send(self, content: bytes, status: int = 200) -> None:
        headers = {"ETag": '"e"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        headers |= {"X-Error-Code": "EntryNotFound"} if status == 404 else {}
        if (asked := self.headers.get("Range")) and status == 200:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            content, status = content[int(first) : end + 1], 206
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub(tmp_path / "hub")
    Thread(target=server.serve_forever, daemon=True).start()
    variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    for name, value in {**variables, "HF_HOME": str(tmp_path / "hf")}.items():
        monkeypatch.setenv(name, value)  # of the worker, which alone asks
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.usefixtures("own_reader")
def test_a_dataset_on_the_hub_is_never_there_as_a_whole(home, reference, hub, tmp_path, monkeypatch):
    made: Home = home(as_parquet, files=2)
    (hub.root).mkdir()
    (made.folder / "data").rename(hub.root / "data")
    made.source = {"kind": "hub", "path": "someone/clips"}
    # A folder of that name where the command runs is something else.
    (tmp_path / "someone/clips").mkdir(parents=True)
    (tmp_path / "someone/clips/a.txt").write_text("no dataset")
    monkeypatch.chdir(tmp_path)
    hub.lost.add("train-00001-of-00002.parquet")
    with pytest.raises(DataError, match=r"it cannot be read|broke off"):
        made.precompute()
    assert len(made.cache.keys("latents")) == 2, "of the file that could be reached"
    hub.lost.clear()
    hub.read.clear()
    made.precompute()
    assert set(hub.read) == {"train-00001-of-00002.parquet"} and made.entries() == reference.entries()
    hub.read.clear()
    assert not any(made.precompute().encoded.values()) and hub.read == []
    hub.shutdown()
    assert ensure_cache(made.config(), spec(made), progress=False).complete, "training asks nobody"
    assert not list((tmp_path / "hf").rglob("*.parquet")) and made.media == []
    listed = [item.where for item in made.manifest.items]
    assert listed[0].startswith("hf://datasets/someone/clips@aaaa") and listed[0].endswith(", row 1")


def test_processes_of_a_launch_share_a_stream_and_its_room(home, reference, launcher):
    made: Home = home(as_parquet, files=2)
    made.room = "0.02MB"
    path = made.folder / "run.yaml"
    path.write_text(yaml.safe_dump(made.config().model_dump(mode="json")))
    ends = launcher.run("launcher_cases:command", "precompute", "--config", str(path))
    assert [end.code for end in ends] == [0, 0], "\n".join(end.log[-3000:] for end in ends)
    assert made.entries() == reference.entries() and sorted(seen(made.manifest)) == sorted(seen(reference.manifest))
    records = [record.name.split(".", 1)[1] for record in (made.folder / "cache/streams").glob("*/*.jsonl")]
    assert sorted(records) == ["0-2.jsonl", "1-2.jsonl"] and made.media == []
    assert not made.cache.files("latents"), "and all is packed"
