"""The wire between a pool and its workers, workers that misbehave, and the limits that every worker is under."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import HANG_S

from finetune.core.errors import DataError
from finetune.core.types import Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets import decode_limits, decode_pool
from finetune.datasets.decode_pool import DecodeJob, DecodePool

ROOT = Path(__file__).parents[1]
HEADER = VideoProbe(2, 8.0, 64, 64, array("d", [0.0, 0.125]), 1, "pyav", ("on-black-1",))
PLAN = ClipPlan((0, 1), (64, 64), (0, 0), Bucket(2, 64, 64))
PIXELS = 3 * 2 * 64 * 64

# --- the wire ---------------------------------------------------------------------------------------------------------

REQUESTS = [
    decode_pool.ProbeRequest(Path("/a/b\n \udcff é.mp4")),
    decode_pool.ClipRequest(Path("/a.mp4"), VideoProbe(2, 8.1, 64, 48, (), 6, "decord"), PLAN, Path("/\udcfe.png")),
    decode_pool.ClipRequest(
        Path("/a.mp4"), VideoProbe(2, 1 / 3, 64, 48, (), 4, "pyav", ("bwdif-tff-1", "pq-bt2020-1")), PLAN
    ),
    decode_pool.ImageRequest(Path("/a.png"), Bucket(1, 32, 48)),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_requests_arrive_as_they_were(request_):
    pipe = io.BytesIO()
    decode_pool.write_request(pipe, request_, 7)
    pipe.seek(0)
    assert decode_pool.read_request(pipe) == (request_, 7)


def answered(request: decode_pool.Request, answer: decode_pool.DecodeAnswer, number: int = 3) -> io.BytesIO:
    pipe = io.BytesIO()
    decode_pool.write_answer(pipe, answer, number)
    pipe.seek(0)
    return pipe


def test_answers_arrive_as_they_were():
    probe, clip, image = REQUESTS[0], REQUESTS[1], REQUESTS[3]
    assert decode_pool.read_answer(answered(probe, HEADER), probe, 3) == HEADER
    pixels = np.arange(PIXELS, dtype=np.uint32).astype(np.uint8).reshape(3, 2, 64, 64)
    still = pixels[:, 0] + 1
    ours = decode_pool.read_answer(answered(clip, decode_pool.Pixels(pixels, still)), clip, 3)
    assert np.array_equal(ours.clip, pixels) and np.array_equal(ours.image, still) and ours.clip.flags.writeable
    ours = decode_pool.read_answer(answered(image, decode_pool.Pixels(None, pixels[:, 0, :32, :48])), image, 3)
    assert ours.clip is None and np.array_equal(ours.image, pixels[:, 0, :32, :48])
    theirs = DataError("frame 3 \x1b[2J is damaged", where=str(clip.image), fix="é")
    ours = decode_pool.read_answer(answered(clip, theirs), clip, 3)
    assert (ours.what, ours.where, ours.fix) == (theirs.what, theirs.where, theirs.fix)
    elsewhere = DataError("no", where="/etc/passwd")
    assert decode_pool.read_answer(answered(clip, elsewhere), clip, 3).where == str(clip.path)
    with pytest.raises(decode_pool.BugError, match="ZeroDivisionError"):
        decode_pool.read_answer(answered(clip, decode_pool.BugError("ZeroDivisionError")), clip, 3)
    with pytest.raises(decode_pool.GarbageError, match="another request"):
        decode_pool.read_answer(answered(probe, HEADER, number=2), probe, 3)


def said(message: object, body: bytes = b"", length: int | None = None) -> bytes:
    header = json.dumps(message).encode()
    return struct.pack("<4sIQ", b"ftm1", len(header), len(body) if length is None else length) + header + body


def probed(*header: object, times: tuple[float, ...] = (0.0, 0.125), more: bytes = b"") -> bytes:
    return said({"number": 1, "kind": "probe", "header": header}, struct.pack(f"<{len(times)}d", *times) + more)


def erred(*words: object) -> bytes:
    return said({"number": 1, "kind": "unusable", "error": words})


GOOD = (2, 8.0, 64, 64, 1, "pyav", ["on-black-1"])
PROBE, CLIP = REQUESTS[0], REQUESTS[2]
NONSENSE: dict[str, tuple[decode_pool.Request, bytes]] = {
    "noise": (PROBE, bytes(range(256))),
    "pickle": (PROBE, pickle.dumps(("done", None), protocol=5)),
    "long header": (PROBE, struct.pack("<4sIQ", b"ftm1", 2**32 - 1, 0)),
    "deep": (PROBE, struct.pack("<4sIQ", b"ftm1", 60000, 0) + b"[" * 60000),
    "long number": (PROBE, struct.pack("<4sIQ", b"ftm1", 60000, 0) + b"9" * 60000),
    "no object": (PROBE, said([1, 2])),
    "no kind": (PROBE, said({"number": 1})),
    "kind of kind": (PROBE, said({"number": 1, "kind": {"a": 1}})),
    "pixels for a header": (PROBE, said({"number": 1, "kind": "pixels"})),
    "no times": (PROBE, probed(*GOOD, times=())),
    "odd times": (PROBE, probed(*GOOD, more=b"x")),
    "three times": (PROBE, probed(*GOOD, times=(0, 1, 2))),
    "nan": (PROBE, probed(*GOOD, times=(0, float("nan")))),
    "backwards": (PROBE, probed(*GOOD, times=(0, -1))),
    "endless": (PROBE, probed(*GOOD, times=(0, float("inf")))),
    "later": (PROBE, probed(*GOOD, times=(1, 2))),
    "too many": (PROBE, said({"number": 1, "kind": "probe", "header": GOOD}, b"", 8 * (decode_limits.MAX_FRAMES + 1))),
    "huge": (PROBE, probed(2, 8.0, 65535, 65535, 1, "pyav", [])),
    "flat": (PROBE, probed(2, 8.0, 0, 64, 1, "pyav", [])),
    "text for a number": (PROBE, probed("2", 8.0, 64, 64, 1, "pyav", [])),
    "true for a number": (PROBE, probed(2, True, 64, 64, 1, "pyav", [])),
    "no rate": (PROBE, probed(2, float("nan"), 64, 64, 1, "pyav", [])),
    "turned": (PROBE, probed(2, 8.0, 64, 64, 9, "pyav", [])),
    "another decoder": (PROBE, probed(2, 8.0, 64, 64, 1, "os.system", [])),
    "another correction": (PROBE, probed(2, 8.0, 64, 64, 1, "pyav", ["bwdif-up-1"])),
    "corrections of another kind": (PROBE, probed(2, 8.0, 64, 64, 1, "pyav", [{"a": 1}])),
    "short header": (PROBE, probed(2, 8.0)),
    "no header": (PROBE, said({"number": 1, "kind": "probe"}, bytes(16))),
    "header for pixels": (CLIP, probed(*GOOD)),
    "a byte too many": (CLIP, said({"number": 1, "kind": "pixels"}, b"", PIXELS + 1)),
    "a byte too few": (CLIP, said({"number": 1, "kind": "pixels"}, b"", PIXELS - 1)),
    "2**62 bytes": (CLIP, said({"number": 1, "kind": "pixels"}, b"", 2**62)),
    "wordless": (CLIP, erred("", "", "")),
    "numbers for words": (CLIP, erred(1, 2, 3)),
    "two words": (CLIP, erred("a", "b")),
    "error with a body": (CLIP, said({"number": 1, "kind": "unusable", "error": ["a", "b", "c"]}, b"x")),
    "bug of nothing": (CLIP, said({"number": 1, "kind": "bug"})),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_is_no_answer_is_not_believed(name):
    request, content = NONSENSE[name]
    with pytest.raises(decode_pool.GarbageError):
        decode_pool.read_answer(io.BytesIO(content), request, 1)


def test_the_canary_of_nonsense():
    assert decode_pool.read_answer(io.BytesIO(probed(*GOOD)), PROBE, 1) == HEADER
    assert isinstance(
        decode_pool.read_answer(io.BytesIO(said({"number": 1, "kind": "pixels"}, bytes(PIXELS))), CLIP, 1),
        decode_pool.Pixels,
    )
    assert decode_pool.read_answer(io.BytesIO(erred("a", "b", "c")), CLIP, 1).what == "a"


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_make_an_answer_that_is_none(data):
    """Sound answers, damaged: what comes out is an answer of the promised shape, or one of three errors."""
    request = data.draw(st.sampled_from(REQUESTS))
    pixels = np.zeros((3, 2, 64, 64), np.uint8)
    answers = [HEADER, decode_pool.Pixels(pixels, pixels[:, 0]), DataError("what", where="/a.mp4", fix="fix")]
    content = bytearray(answered(request, data.draw(st.sampled_from(answers))).getvalue())
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, min(len(content), 200) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    try:
        found = decode_pool.read_answer(io.BytesIO(bytes(content)), request, 3)
    except (decode_pool.GarbageError, decode_pool.BugError, EOFError):
        return
    if isinstance(found, VideoProbe):
        assert isinstance(request, decode_pool.ProbeRequest) and len(found.frame_times_s) == found.frames
    elif isinstance(found, decode_pool.Pixels):
        assert sum(part.nbytes for part in (found.clip, found.image) if part is not None) == decode_pool.answer_bytes(
            request
        )
    else:
        assert isinstance(found, DataError)


def test_a_clip_of_51_mb_is_copied_once():
    """Through a pipe into the array that the caller gets: at most a few bytes are allocated beside it."""
    import tracemalloc

    plan = ClipPlan(tuple(range(49)), (480, 720), (0, 0), Bucket(49, 480, 720))
    request = decode_pool.ClipRequest(Path("/a.mp4"), HEADER, plan)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 49, 480, 720), dtype=np.uint8)
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as output, os.fdopen(reader, "rb") as source:
        sender = threading.Thread(target=decode_pool.write_answer, args=(output, decode_pool.Pixels(pixels, None), 1))
        sender.start()
        tracemalloc.start()
        ours = decode_pool.read_answer(source, request, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        sender.join()
    assert np.array_equal(ours.clip, pixels)
    assert pixels.nbytes <= peak < pixels.nbytes + 2**20


def test_no_pickle_is_read():
    modules = [*(ROOT / "finetune" / "datasets").rglob("*.py")]
    assert len(modules) > 15

    def loads(text: str) -> bool:
        words = {name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for name in node.names}
        froms = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        return bool({"pickle", "marshal", "shelve", "multiprocessing"} & ({word.name for word in words} | froms))

    assert [str(path) for path in modules if loads(path.read_text(encoding="utf-8"))] == []
    assert loads("import pickle") and loads("from pickle import load")  # canary


def test_only_a_pool_meets_files_of_strangers():
    """Outside of the room of decoding, nothing decodes in the main process: no ``probe``, ``decode``..."""
    allowed = {"DecodePool", "DecodeJob", "load_fitted_image", "fit_image", "PIXEL_RULE"}

    def taken(text: str) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "finetune.datasets.decode_pool":
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module in (
                "finetune.datasets.decode",
                "finetune.datasets.video_streams",
            ):
                found.add(str(node.module))
        return found

    room = ROOT / "finetune" / "datasets"
    inside = [room / name for name in ("decode_pool.py", "decode_worker.py", "decode.py", "video_streams.py")]
    outside = [path for path in (ROOT / "finetune").rglob("*.py") if path not in inside]
    used = {path.name: taken(path.read_text(encoding="utf-8")) for path in outside}
    assert {name: names - allowed for name, names in used.items() if names - allowed} == {}
    assert "DecodePool" in used["encode.py"] and "DecodePool" in used["check.py"]
    assert taken("from finetune.datasets.decode_pool import probe") - allowed  # canary


# --- workers that misbehave -------------------------------------------------------------------------------------------

EVIL = """
import json, os, struct, sys, time
from finetune.datasets import decode_limits as limits, decode_pool as wire

limits.limit_process()
pipe = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
wire.send(pipe, {"kind": "ready"})

def say(message, body=b"", length=None):
    header = json.dumps(message).encode()
    pipe.write(struct.pack("<4sIQ", b"ftm1", len(header), len(body) if length is None else length) + header + body)
    pipe.flush()

def raw(content):
    pipe.write(content)
    pipe.flush()

def chatter(stream, megabytes):
    try:
        for _ in range(megabytes):
            os.write(stream, b"x" * 2**20)
    except OSError:
        return "full"

while True:
    request, number = wire.read_request(sys.stdin.buffer)
    name = request.path.stem
    pixels = bytes(wire.answer_bytes(request))
    good = lambda: say({"number": number, "kind": "pixels"}, pixels)
    exec(open(os.environ["EVIL_DEEDS"]).read())
    deeds[name]()
"""
DEEDS = """
deeds = {
    "good": good,
    "hang": lambda: time.sleep(10**6),
    "exit": lambda: os._exit(0),
    "fail": lambda: os._exit(3),
    "abort": lambda: os.abort(),
    "close": lambda: (pipe.close(), time.sleep(10**6)),
    "half a head": lambda: (raw(b"ftm1\\0"), os._exit(0)),
    "half an answer": lambda: (say({"number": number, "kind": "pixels"}, pixels[:1000], len(pixels)), os._exit(0)),
    "half, then hang": lambda: (say({"number": number, "kind": "pixels"}, pixels[:1000], len(pixels)), time.sleep(9e9)),
    "trickle": lambda: [(raw(b"f"), time.sleep(0.01)) for _ in iter(int, 1)],
    "text": lambda: raw(b"[h264 @ 0x55] error while decoding MB 3 4\\n" * 99),
    "too large": lambda: say({"number": number, "kind": "pixels"}, b"", 2**62),
    "two answers": lambda: (good(), good()),
    "chatter": lambda: (chatter(1, 20), chatter(2, 20), good()),
}
"""
SAID = {
    "hang": "took longer than 2 s",
    "half, then hang": "took longer than 2 s",
    "trickle": "answered with nonsense",
    "exit": "ended without an answer",
    "fail": "crashed (exit code 3)",
    "abort": "crashed (SIGABRT)",
    "close": "stopped answering",
    "half a head": "ended without an answer",
    "half an answer": "ended without an answer",
}


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A pool whose worker answers as a file's name says."""
    (tmp_path / "evil_worker.py").write_text(EVIL)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decode_pool, "WORKER_MODULE", "evil_worker")

    def start(deeds: str) -> DecodePool:
        (tmp_path / "deeds.py").write_text(deeds)
        monkeypatch.setenv("EVIL_DEEDS", str(tmp_path / "deeds.py"))
        return DecodePool(workers=1)

    # Others get what they need, on a busy machine too.
    limit_s = decode_pool.Child._limit_s
    monkeypatch.setattr(
        decode_pool.Child, "_limit_s", lambda self, asked: 2.0 if "hang" in asked.path.stem else limit_s(self, asked)
    )
    return start


def names_of(deeds: str) -> list[str]:
    (assignment,) = ast.parse(deeds).body
    assert isinstance(assignment, ast.Assign) and isinstance(assignment.value, ast.Dict)
    return [ast.literal_eval(key) for key in assignment.value.keys if key is not None]


def test_a_worker_that_misbehaves_costs_its_file_only(evil):
    names = names_of(DEEDS)
    assert len(names) == 14
    with evil(DEEDS) as pool:
        jobs = [DecodeJob(0, Path(f"/{each}.mp4"), HEADER, PLAN) for name in names for each in (name, "good", "good")]
        results = [result for _, result in pool.decode_many(jobs)]
    for name, result, next_, last in zip(names, results[::3], results[1::3], results[2::3], strict=True):
        assert isinstance(last, Clip), f"after {name!r}: {last}"
        if name == "two answers":  # the second one is not taken for the next file's
            assert isinstance(result, Clip) and "another request" in next_.what
            continue
        assert isinstance(next_, Clip), f"after {name!r}: {next_}"
        if name in ("good", "chatter"):
            assert isinstance(result, Clip), name
        else:
            assert isinstance(result, DataError) and result.where == f"/{name}.mp4", name
            assert SAID.get(name, "answered with nonsense") in result.what, (name, result.what)


def test_what_a_worker_writes_to_its_streams_is_bounded(evil):
    with evil(DEEDS) as pool:
        (((_, result)),) = pool.decode_many([DecodeJob(0, Path("/chatter.mp4"), HEADER, PLAN)])
        assert isinstance(result, Clip)
        size = os.fstat(pool._workers[0]._complaints.fileno()).st_size
        assert 0 < size <= decode_limits.WORKER_LOG


def test_the_canary_of_pickle(tmp_path):
    """What a worker that a file has taken over could have sent: reading it would have run it."""

    class Command:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    answer = pickle.dumps(("done", Command()))
    with pytest.raises(decode_pool.GarbageError):
        decode_pool.read_answer(io.BytesIO(answer), REQUESTS[0], 1)
    assert not (tmp_path / "owned").exists()
    pickle.loads(answer)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "said", "limit_s"),
    [("import time; time.sleep(10**6)", "took longer", 1.0), ("print(1)", "ended", HANG_S)],
)
def test_a_worker_that_never_gets_ready(tmp_path, monkeypatch, content, said, limit_s):
    (tmp_path / "lazy_worker.py").write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(decode_pool, "WORKER_MODULE", "lazy_worker")
    monkeypatch.setattr(decode_pool, "START_TIMEOUT_S", limit_s)
    with DecodePool(workers=1) as pool, pytest.raises(RuntimeError, match=said):
        list(pool.probe_many([Path("/a.mp4")]))


# --- limits -----------------------------------------------------------------------------------------------------------

GREEDY = """
import resource, sys
from pathlib import Path
from finetune.datasets import decode_limits as limits, decode_pool as tasks, decode_pool as wire
from finetune.core.errors import DataError

if "free" not in sys.argv:
    limits.limit_process()
import numpy as np
from finetune.datasets import decode as frames

held = []
def greedy(path):
    held.append(np.empty(limits.WORKER_MEMORY, np.uint8))
    return "held"
frames.probe_file = greedy
answer = tasks.answer(wire.ProbeRequest(Path("/a.mp4")))
limits.limit_memory(2**31)
small = np.empty(2**30, np.uint8)
print(answer)
print([resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)])
print(Path("/proc/self/oom_score_adj").read_text().strip())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are complete on Linux only")
def test_a_worker_is_under_limits():
    def run(*words: str) -> str:
        return subprocess.run([sys.executable, "-c", GREEDY, *words], capture_output=True, text=True, check=True).stdout

    ours = run()
    assert "more memory than a worker is given (4 GiB)" in ours and "/a.mp4" in ours
    assert str([0, decode_limits.WORKER_LOG, decode_limits.WORKER_FILES]) in ours and ours.endswith("1000\n")
    assert run("free").startswith("held")  # canary


def test_the_limits_leave_room_for_what_people_have():
    assert 7680 * 4320 <= decode_limits.MAX_PIXELS < 65535**2
    assert 9 * 3600 * 60 < decode_limits.MAX_FRAMES < 10**9
    # Ten reference frames of 8K at 10 bits and 4:4:4, a picture in RGB, and the libraries.
    assert decode_limits.WORKER_MEMORY > 10 * 7680 * 4320 * 2 * 3 + 3 * 7680 * 4320 + 2**28
    assert (
        decode_limits.probe_timeout_s(0) == 60
        and decode_limits.probe_timeout_s(10**15) == decode_limits.DECODE_TIMEOUT_S
    )
    plan = ClipPlan(tuple(range(10**6, 10**6 + 4096)), (1, 1), (0, 0), Bucket(1, 1, 1))
    request = decode_pool.ClipRequest(Path("/" + "\udcff" * 4000), HEADER, plan)
    pipe = io.BytesIO()
    decode_pool.write_request(pipe, request, 1)
    assert len(pipe.getvalue()) < decode_limits.MAX_REQUEST
    told = DataError("\udcff" * 10**5, where="\U0001f600" * 10**5, fix="é" * 10**5)
    assert len(answered(request, told).getvalue()) < decode_limits.MAX_MESSAGE
    assert struct.calcsize("<4sIQ") == 16 and json.loads(pipe.getvalue()[16:].decode())["number"] == 1
