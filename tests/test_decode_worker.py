"""What a pool and its workers say to each other, workers that misbehave, and the limits that every worker is under."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from waiting import HANG_S, until

from finetune.core.errors import DataError
from finetune.core.text import shown
from finetune.core.types import Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets import containers, decode_pool, pictures, worker
from finetune.datasets.decode_pool import DecodeJob, DecodePool, FileJob

ROOT = Path(__file__).parents[1]
PROBE = VideoProbe(2, 8.0, 64, 64, array("d", [0.0, 0.125]), 1, ("on-black-1",))
PLAN = ClipPlan((0, 1), (64, 64), (0, 0), Bucket(2, 64, 64))
PIXEL_BYTES = 3 * 2 * 64 * 64

# --- messages ---------------------------------------------------------------------------------------------------------

JOBS = [
    FileJob(Path("/a/b\n \udcff é.mp4")),
    DecodeJob(Path("/a.mp4"), VideoProbe(2, 8.1, 64, 48, (), 6), PLAN, Path("/\udcfe.png")),
    DecodeJob(
        Path("/a.mp4"), VideoProbe(2, 1 / 3, 64, 48, (), 4, ("bwdif-tff-1", "pq-bt2020-1")), PLAN, None, "decord"
    ),
    FileJob(Path("/a.png"), Bucket(1, 32, 48)),
]
CLIP = np.arange(PIXEL_BYTES, dtype=np.uint32).astype(np.uint8).reshape(3, 2, 64, 64)
ANSWERS = [PROBE, [CLIP, CLIP[:, 0] + 1], [CLIP], [CLIP[:, 0, :32, :48]]]


def sent(fields: object) -> dict:
    return json.loads(json.dumps(fields, default=os.fspath))


@pytest.mark.parametrize(("job", "theirs"), zip(JOBS, ANSWERS, strict=True))
def test_jobs_and_answers_arrive_as_they_were(monkeypatch, job, theirs):
    arrived = []
    monkeypatch.setattr(decode_pool, "perform", lambda job: arrived.append(job) or theirs)
    fields, body = decode_pool.handle(sent(decode_pool.fields_of(job)))
    assert arrived == [job]
    ours = decode_pool.answer_of(job, sent(fields), bytearray(b"".join(bytes(part) for part in body)))
    if isinstance(theirs, VideoProbe):
        assert ours == theirs
    else:
        assert len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs)) and ours[0].flags.writeable


PROBE_FIELDS = sent(asdict(replace(PROBE, frame_times_s=())))
TIMES = bytes(PROBE.frame_times_s)
MALFORMED = {
    "no times": (JOBS[0], PROBE_FIELDS, b""),
    "three times": (JOBS[0], PROBE_FIELDS, bytes(array("d", [0, 1, 2]))),
    "backwards": (JOBS[0], PROBE_FIELDS, bytes(array("d", [0, -1]))),
    "nan": (JOBS[0], PROBE_FIELDS, bytes(array("d", [0, float("nan")]))),
    "huge": (JOBS[0], PROBE_FIELDS | {"height": 65535, "width": 65535}, TIMES),
    "text for a number": (JOBS[0], PROBE_FIELDS | {"height": "64"}, TIMES),
    "half a pixel": (JOBS[0], PROBE_FIELDS | {"height": 64.5}, TIMES),
    "endlessly fast": (JOBS[0], PROBE_FIELDS | {"fps": float("inf")}, TIMES),
    "turned": (JOBS[0], PROBE_FIELDS | {"orientation": 9}, TIMES),
    "another field": (JOBS[0], PROBE_FIELDS | {"decoder": "os.system"}, TIMES),
    "another correction": (JOBS[0], PROBE_FIELDS | {"corrections": ["bwdif-up-1"]}, TIMES),
    "pixels for a header": (JOBS[0], {}, bytes(PIXEL_BYTES)),
    "a byte too few": (JOBS[2], {}, bytes(PIXEL_BYTES - 1)),
    "no image": (JOBS[1], {}, bytes(PIXEL_BYTES)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_answer_is_not_believed(name):
    job, fields, body = MALFORMED[name]
    with pytest.raises(DataError, match="nonsense") as caught:
        decode_pool.answer_of(job, fields, bytearray(body))
    assert caught.value.where == shown(str(job.path))


def test_the_canary_of_malformed_answers():
    assert decode_pool.answer_of(JOBS[0], PROBE_FIELDS, bytearray(TIMES)) == PROBE
    assert decode_pool.answer_of(JOBS[2], {}, bytearray(PIXEL_BYTES))[0].shape == (3, 2, 64, 64)


def test_only_a_pool_meets_files_of_strangers():
    """Nothing above decodes in the main process: no ``probe_file``, ``read_clip``..."""
    below = {"containers", "decode", "decord_reader", "pictures", "worker"}

    def taken(text: str) -> set[str]:
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        modules = {f"{node.module}.{name.name}" for node in imports for name in node.names if name.name != "Frame"}
        return {name for name in below if any(f"{it}.".startswith(f"finetune.datasets.{name}.") for it in modules)}

    room = ROOT / "finetune" / "datasets"
    # These ask workers of their own, or run in them.
    others = [f"footage/{name}.py" for name in ("pool", "measure", "cutting")] + ["diagnosis/frames.py"]
    # These read a file that the user names on the command line: an image, the record in a video's header.
    others += ["captioning/prompts.py", "inference/record.py"]
    inside = [
        *(ROOT / "finetune" / name for name in others),
        *(room / f"{name}.py" for name in (*below, "decode_pool", "tables", "packed", "streams")),
    ]
    used = {path: taken(path.read_text(encoding="utf-8")) for path in (ROOT / "finetune").rglob("*.py")}
    assert all(used.pop(path) or path.stem == "worker" for path in inside)
    assert len(used) > 50 and {path for path, names in used.items() if names} == set()


# --- workers that misbehave -------------------------------------------------------------------------------------------

MISBEHAVING = """
import json, os, sys, time
from finetune.datasets import worker

worker.limit_process()
pipe = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)

def say(content):
    pipe.write(content if isinstance(content, bytes) else json.dumps(content).encode() + b"\\n")
    pipe.flush()

def chatter(stream):
    try:
        for _ in range(20):
            os.write(stream, b"x" * 2**20)
    except OSError:
        pass

say({"fields": {}, "length": 0})
for line in sys.stdin.buffer:
    request = json.loads(line)
    length = request["most_bytes"]
    def good():
        say({"fields": {}, "length": length}), say(bytes(length))
    {
        "good": good,
        "hang": lambda: time.sleep(10**6),
        "exit": lambda: os._exit(0),
        "fail": lambda: os._exit(3),
        "abort": lambda: os.abort(),
        "close": lambda: (pipe.close(), time.sleep(10**6)),
        "half a line": lambda: (say(b'{"fields": '), os._exit(0)),
        "half an answer": lambda: (say({"fields": {}, "length": length}), say(bytes(1000)), os._exit(0)),
        "half, then hang": lambda: (say({"fields": {}, "length": length}), say(bytes(1000)), time.sleep(9e9)),
        "text": lambda: say(b"[h264 @ 0x55] error while decoding MB 3 4\\n"),
        "a line without end": lambda: [say(b"x" * 2**16) for _ in range(100)],
        "deep": lambda: say(b"[" * 60000 + b"\\n"),
        "too large": lambda: say({"fields": {}, "length": length + 1}),
        "less than nothing": lambda: say({"fields": {}, "length": -1}),
        "no fields": lambda: say({"length": 0}),
        "a wordless error": lambda: say({"error": 7}),
        "chatter": lambda: (chatter(1), chatter(2), good()),
    }[os.path.splitext(os.path.basename(request["fields"]["path"]))[0]]()
"""
OUTCOMES = {
    "hang": "took longer than 5 s",
    "half, then hang": "took longer than 5 s",
    "exit": "ended without an answer",
    "fail": "crashed (exit code 3)",
    "abort": "crashed (SIGABRT)",
    "close": "stopped answering",
    "half a line": "ended without an answer",
    "half an answer": "ended without an answer",
    **dict.fromkeys(["text", "a line without end", "deep", "too large"], "answered with nonsense"),
    **dict.fromkeys(["less than nothing", "no fields", "a wordless error"], "answered with nonsense"),
    "good": None,
    "chatter": None,
}


def test_a_worker_that_misbehaves_costs_its_file_only(monkeypatch):
    monkeypatch.setattr(decode_pool, "WORKER", MISBEHAVING)
    jobs = [DecodeJob(Path(f"/{each}.mp4"), PROBE, PLAN) for name in OUTCOMES for each in (name, "good")]
    with DecodePool(workers=1, timeout_s=5) as pool:
        results = [result for _, result in pool.decode_many(jobs)]
    for (name, outcome), result, after in zip(OUTCOMES.items(), results[::2], results[1::2], strict=True):
        assert isinstance(after, Clip), f"after {name!r}: {after}"
        if outcome is None:
            assert isinstance(result, Clip), name
        else:
            assert isinstance(result, DataError) and result.where == f"/{name}.mp4", name
            assert outcome in result.what, (name, result.what)


@pytest.mark.parametrize(
    ("program", "outcome", "limit_s"),
    [("import time; time.sleep(10**6)", "took longer", 1.0), ("print(1)", "ended|nonsense", HANG_S)],
)
def test_a_worker_that_never_gets_ready(monkeypatch, program, outcome, limit_s):
    monkeypatch.setattr(decode_pool, "WORKER", program)
    monkeypatch.setattr(worker, "START_TIMEOUT_S", limit_s)
    with DecodePool(workers=1) as pool, pytest.raises(RuntimeError, match=outcome):
        list(pool.probe_many([Path("/a.mp4")]))


PARENT = """
print("once", flush=True)
from pathlib import Path
from finetune.datasets.decode_pool import DecodePool
pool = DecodePool(workers=1)
print(next(pool.probe_many([Path("/no such file.mp4")]))[1].what)
print(*pool.pids, flush=True)
input()
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", ["a script without a main guard", "-c"])
def test_a_worker_runs_no_script_again_and_ends_with_its_parent(tmp_path, how):
    (tmp_path / "script.py").write_text(PARENT)
    words = ["-c", PARENT] if how == "-c" else [str(tmp_path / "script.py")]
    with subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        lines = [parent.stdout.readline() for _ in range(3)]
        parent.send_signal(signal.SIGKILL)
    assert lines[:2] == ["once\n", "there is no such file\n"]
    until(lambda: not Path(f"/proc/{int(lines[2])}").exists(), "the worker ends")


# --- limits -----------------------------------------------------------------------------------------------------------

GREEDY = """
import resource, sys
import numpy as np
from pathlib import Path
from finetune.datasets import containers, decode, decode_pool, pictures, worker

held = []
def greedy(path):
    held.append(np.empty(worker.MEMORY_BYTES, np.uint8))
    print(worker.MEMORY_BYTES, "bytes are held", file=sys.stderr)
decode.probe_file = greedy
pictures.read_fitted_image = lambda path, bucket: np.empty(2**30, np.uint8)[:3]
if "free" in sys.argv:
    worker.limit_process = lambda *limits: None
    worker._limit_memory = lambda more: None
worker.serve(decode_pool.handle)
print([resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)])
print(Path("/proc/self/oom_score_adj").read_text().strip())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are complete on Linux only")
def test_a_worker_is_under_limits():
    greedy, small = (
        {"fields": sent(decode_pool.fields_of(job)), "most_bytes": most_bytes}
        for job, most_bytes in ((FileJob(Path("/a.mp4")), 0), (replace(JOBS[3], bucket=Bucket(1, 1, 1)), 2**30))
    )

    def run(*words: str) -> str:
        requests = "".join(json.dumps(request) + "\n" for request in (greedy, small))
        command = [sys.executable, "-c", GREEDY, *words]
        done = subprocess.run(command, input=requests, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr

    ours = run()
    assert "more memory than a worker is given (4 GiB)" in ours and "/a.mp4" in ours and '"length": 3' in ours
    assert str([0, worker.LOG_BYTES, worker.OPEN_FILES]) in ours and "\n1000\n" in ours
    assert "bytes are held" not in ours and "bytes are held" in run("free")  # canary


def test_the_limits_leave_room_for_what_people_have():
    assert 7680 * 4320 <= pictures.MAX_PIXELS < 65535**2
    assert 9 * 3600 * 60 < containers.MAX_FRAMES < 10**9
    # Ten reference frames of 8K at 10 bits and 4:4:4, a picture in RGB, and the libraries.
    assert worker.MEMORY_BYTES > 10 * 7680 * 4320 * 2 * 3 + 3 * 7680 * 4320 + 2**28
    plan = ClipPlan(tuple(range(10**6, 10**6 + 4096)), (1, 1), (0, 0), Bucket(1, 1, 1))
    job = DecodeJob(Path("/" + "\udcff" * 4000), PROBE, plan)
    line = json.dumps({"fields": decode_pool.fields_of(job)}, default=os.fspath)
    assert len(line) < worker.LINE_BYTES
