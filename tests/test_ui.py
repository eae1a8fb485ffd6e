"""``finetune ui``: who is let in, what is read and written, what outlives it, and the page in a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
import yaml

from finetune.cli.main import app as command_line
from finetune.config.document import Document
from finetune.config.messages import field_paths
from finetune.config.schema import RunConfig, load_config
from finetune.core.errors import ConfigError, DataError, FinetuneError

for library in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(library, reason="the extra `ui` is not installed")

# ruff: noqa: E402
from finetune.web.access import AccessPolicy, Roots
from finetune.web.commands import COMMANDS
from finetune.web.form import form_of
from finetune.web.jobs import Jobs
from finetune.web.server import application
from finetune.web.workspace import EXCLUDED, Workspace
from finetune.web.yaml_edit import put

HOSTILE = "</textarea></script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)> red"

YAML = """\
# a run, by hand
model: {pretrained: tiny}
data:
  sources:
    - path: clips   # mine
  buckets: [9x64x64]
  trigger: "zqx"    # quoted

train:
  steps: 4          # few
optimizer:
  lr: 1e-3
output_dir: runs/run
# the end
"""

EMPTY = f"{YAML}memory:\n"


# ------------------------------------------------------------------------------------------------------------ one value


@pytest.mark.parametrize(
    ("path", "value", "before", "after"),
    [
        ("train.steps", "1200", "  steps: 4          # few", "  steps: 1200       # few"),
        ("optimizer.lr", "2e-4", "  lr: 1e-3", "  lr: 2e-4"),
        ("data.trigger", "a # b", '  trigger: "zqx"    # quoted', "  trigger: a        # quoted"),
        ("data.trigger", '"a # b"', '  trigger: "zqx"    # quoted', "  trigger: 'a # b'  # quoted"),
        ("data.sources.0.path", "other", "    - path: clips   # mine", "    - path: other   # mine"),
        ("model.dtype", "bf16", "model: {pretrained: tiny}", "model: {pretrained: tiny, dtype: bf16}"),
        ("memory.block", "lean", "memory:\n", "memory: {block: lean}\n"),
        ("train.seed", "7", "  steps: 4          # few\n", "  steps: 4          # few\n  seed: 7\n"),
        (
            "data.sources.1",
            "{path: b}",
            "    - path: clips   # mine\n",
            "    - path: clips   # mine\n    - {path: b}\n",
        ),
        ("cache.dir", "c", "memory:\n", "memory:\ncache:\n  dir: c\n"),
        ("data.trigger", "", '  trigger: "zqx"    # quoted\n', ""),
        ("optimizer.lr", "", "optimizer:\n  lr: 1e-3\n", ""),
        ("cache.mode", "", "", ""),
    ],
)
def test_one_value_is_changed_and_every_other_byte_stays(path, value, before, after):
    assert put(EMPTY, path, value, name="run.yaml") == EMPTY.replace(before, after, 1 if before else 0)


@pytest.mark.parametrize(
    ("text", "path", "value", "words"),
    [
        ("a: &x {b: 1}\nc: *x\n", "c.b", "2", "in a way that the form cannot edit"),
        ("a: 1\n", "a", "[1", "not valid YAML"),
        ("a: 1\n", "a.b", "2", "has no field 'b'"),
        ("a: [1]\n", "a.7", "2", "is no index"),
        ("a: {\n", "a", "2", "not valid YAML"),
    ],
)
def test_what_cannot_be_edited_is_refused_and_not_damaged(text, path, value, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        put(text, path, value, name="run.yaml")


def test_the_form_has_every_option_with_its_help_and_its_default():
    def fields_of(*overrides: str) -> dict[str, Any]:
        document = Document(yaml.safe_load(YAML))
        for override in overrides:
            document.override(override)
        return {field.path: field for section in form_of(document) for field in section.fields}

    fields = fields_of()
    kinds = [f"{path}={kind}" for path, field in fields.items() if path.endswith(".kind") for kind in field.choices]
    anywhere = set(fields).union(*map(fields_of, kinds))
    every = {path for path in field_paths(RunConfig) if not path.startswith(("data.sources", "validation.samples"))}
    leaves = {path for path in every if not any(other.startswith(f"{path}.") for other in every)}
    assert leaves <= anywhere and len(leaves) > 70
    assert {"data.sources.0.path", "data.sources.0.repeats", "optimizer.kind"} <= set(fields)
    assert fields["train.steps"].value == "4" and fields["train.seed"].value is None
    assert fields["train.seed"].default == "42" and fields["data.trigger"].value == "zqx"
    assert "paged_adamw8bit" in fields["optimizer.kind"].choices
    assert not [path for path, field in fields.items() if not field.help and not path.endswith("kind")]


LEFT_OUT = {
    "init": {"source", "force"},
    "caption": {
        "revision",
        "key_variable",
        "send",
        "timeout",
        "print_instruction",
        "frames",
        "side",
        "batch",
        "review",
    },
    "generate": {"revision", "prompts", "source", "parallel"},
    "inspect": {"json"},
}
"""Options that no form has: what names other files, is done by the page otherwise, or is for a terminal."""


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.verb)
def test_the_forms_of_commands_offer_what_the_commands_take(command):
    parser = typer.main.get_command(command_line).commands[command.verb]
    known = {name: parameter for parameter in parser.params for name in (*parameter.opts, parameter.name)}
    for option in command.options:
        assert option.name in known, option
        assert option.needed or not option.name.startswith("-") or not known[option.name].required, option
        choices = getattr(known[option.name].type_descriptor, "choices", None)
        if option.kind == "choice":
            assert set(option.choices) == set(choices), option
        else:
            assert choices is None and getattr(known[option.name], "is_flag", False) == (option.kind == "flag"), option
    left_out = {parameter.name for parameter in parser.params} - {known[option.name].name for option in command.options}
    assert left_out - {"help"} == LEFT_OUT.get(command.verb, set())


def test_text_of_a_form_never_becomes_an_option_and_no_path_leads_out(tmp_path):
    roots = Roots(tmp_path)
    words = COMMANDS["generate"].words({"prompt": "--output=/etc\na  kite", "adapter": "runs/run:0.5"}, roots)
    assert words == ["generate", "--adapter=runs/run:0.5", "--prompt=--output=/etc", "--prompt=a  kite"]
    assert COMMANDS["inspect"].words({"source": "-x"}, roots) == ["inspect", "--", "-x"]
    home = COMMANDS["inspect"].words({"source": "a/../~/x"}, roots)  # "~/x" alone would be somebody's home
    assert home == ["inspect", "--", str(tmp_path.resolve() / "~/x")]
    with pytest.raises(ConfigError) as fault:
        COMMANDS["generate"].words({"output": "/etc", "seed": "x", "compare": "../x", "adapter": "../a:1"}, roots)
    assert "4 fields" in str(fault.value)
    with pytest.raises(ConfigError, match="needed"):
        COMMANDS["export"].words({}, roots)


# ---------------------------------------------------------------------------------------------------- folders and files


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    folder = tmp_path / "work"
    clips = folder / "clips"
    clips.mkdir(parents=True)
    (folder / "run.yaml").write_text(YAML)
    for name in ("a", "b"):
        (clips / f"{name}.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
        (clips / f"{name}.txt").write_text(f"clip {name}\n")
    (tmp_path / "secret.mp4").write_bytes(b"hidden")
    (tmp_path / "secret.yaml").write_text("key: secret\n")
    (folder / "link").symlink_to(tmp_path)
    (folder / "link.yaml").symlink_to(tmp_path / "secret.yaml")
    return Workspace(Roots(folder), 1000)


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.mp4", "/etc/passwd", "clips/../../secret.mp4", "link/secret.mp4", "link", "~root/x", "", "a\0b"),
        *("clips/a.mp4/../../../secret.mp4", "x\ny", "/proc/self/root/etc/passwd", "//etc/passwd", "a" * 5000),
    ],
)
def test_no_path_leads_out_of_the_folders(workspace, path):
    with pytest.raises(ConfigError):
        workspace.roots.inside(path, "a field")
    with pytest.raises(ConfigError):
        workspace.media(path)
    with pytest.raises(FinetuneError):
        workspace.upload(path, "x.mp4", (workspace.roots.workspace / "clips" / "a.mp4").open("rb"))


def test_a_folder_that_is_named_may_be_used(workspace, tmp_path):
    assert Roots(workspace.roots.workspace, [tmp_path]).inside("link/secret.mp4", "").name == "secret.mp4"
    assert workspace.roots.inside("clips/a.mp4", "") == workspace.roots.workspace / "clips" / "a.mp4"


def test_a_configuration_that_leads_out_is_no_run(workspace, tmp_path):
    changes = [("output_dir", "/tmp/x"), ("cache.dir", "../c"), ("data.sources.0.path", str(tmp_path))]
    for field, value in [*changes, ("data.sources.0.allow_outside", "true")]:
        workspace.write("run.yaml", put(YAML, field, value, name=""), workspace.config("run.yaml").digest)
        with pytest.raises(ConfigError, match="outside of the folders") as fault:
            workspace.usable("run.yaml")
        assert "run.yaml:" in str(fault.value)
    for name in ("link.yaml", "../secret.yaml", "clips/a.txt"):
        with pytest.raises(ConfigError):
            workspace.write(name, "x: 1\n", "")
    assert (tmp_path / "secret.yaml").read_text() == "key: secret\n"


def test_two_tabs_do_not_undo_each_other(workspace):
    text, digest = YAML, workspace.config("run.yaml").digest
    workspace.put("run.yaml", "train.steps", "8", "4")
    workspace.put("run.yaml", "optimizer.lr", "5e-4", "0.001")  # another field, from a page that is older
    with pytest.raises(ConfigError, match="changed elsewhere"):
        workspace.put("run.yaml", "train.steps", "9", "4")
    with pytest.raises(ConfigError, match="changed elsewhere"):
        workspace.write("run.yaml", text, digest)
    config = load_config(workspace.roots.workspace / "run.yaml")
    assert (config.train.steps, config.optimizer.lr) == (8, 5e-4)
    with pytest.raises(ConfigError, match="no field"):
        workspace.put("run.yaml", "train.stepz", "8", "")
    workspace.caption("clips", "a.mp4", "new", "clip a")
    with pytest.raises(ConfigError, match="changed elsewhere"):
        workspace.caption("clips", "a.mp4", "other", "clip a")
    assert (workspace.roots.workspace / "clips" / "a.txt").read_text() == "new\n"


@pytest.mark.parametrize("table", [False, True])
def test_a_clip_is_taken_out_and_comes_back(workspace, table):
    folder = workspace.roots.workspace / "clips"
    if table:
        rows = [{"file_name": f"{name}.mp4", "caption": f"clip {name}", "mood": name} for name in "ab"]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name in "ab":
            (folder / f"{name}.txt").unlink()
    workspace.exclude("clips", "b.mp4")
    assert [row.file_name for row in workspace.rows("clips").rows] == ["a.mp4"]
    assert workspace.excluded("clips") == ["b.mp4"]
    with pytest.raises(DataError, match="only clip"):
        workspace.exclude("clips", "a.mp4")
    with pytest.raises(DataError, match="no such clip"):
        workspace.take_back("clips", "../run.yaml")
    workspace.take_back("clips", "b.mp4")
    back = workspace.rows("clips").rows
    assert [(row.file_name, row.texts) for row in back] == [("a.mp4", ["clip a"]), ("b.mp4", ["clip b"])]
    assert workspace.excluded("clips") == [] and (folder / "b.mp4").exists() and (folder / EXCLUDED).is_dir()
    assert not table or back[1].values["mood"] == "b"


# ------------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def jobs(tmp_path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path / "jobs", tmp_path, [sys.executable, "-c"])
    yield jobs
    for job in jobs.all():
        job.stop()


def wait(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


HOLD = "import pathlib, time\nprint('here', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(0.02)"


def test_jobs_in_line_run_one_after_the_other_and_others_at_once(jobs, tmp_path):
    first, second = jobs.start([HOLD]), jobs.start(["print('second')"])
    waiting = jobs.start(["print('never')"])
    assert jobs.run(["import sys; print('beside'); sys.exit(3)"]).state == "warned"
    wait(lambda: first.state == "running")
    assert (second.state, waiting.state) == ("waiting", "waiting")
    waiting.stop()
    (tmp_path / "go").touch()
    wait(lambda: second.state == "done")
    assert (first.state, first.log, second.log, waiting.state) == ("done", "here\n", "second\n", "stopped")
    assert [job.name for job in jobs.all()] == ["000004", "000003", "000002", "000001"]
    with pytest.raises(ConfigError, match="no such job"):
        jobs.get("../../000001")
    jobs.prune(1)
    assert [job.name for job in jobs.all()] == ["000004"]


def test_a_command_outlives_its_server_and_is_stopped_by_the_next(jobs, tmp_path):
    saves = "import signal, sys, time\nsignal.signal(15, lambda *_: (print('saved'), sys.exit(75)))\n"
    server = f"""
import os, signal, sys
from pathlib import Path


from finetune.web.jobs import Jobs
job = Jobs(Path({str(jobs.folder)!r}), Path({str(tmp_path)!r}), [sys.executable, "-c"]).start([{saves + HOLD!r}])
while job.log != "here\\n": pass
os.killpg(0, signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", server], start_new_session=True)
    assert killed.returncode == -signal.SIGKILL
    (job,) = jobs.all()
    assert job.state == "running"
    job.stop()
    wait(lambda: not job.is_alive)
    assert (job.state, job.log) == ("stopped", "here\nsaved\n")


def test_a_killed_command_is_known_from_one_that_runs(jobs):
    job = jobs.start([HOLD])
    wait(lambda: job.log)
    known = json.loads((job.folder / "process.json").read_text())
    os.kill(known["pid"], signal.SIGKILL)
    wait(lambda: not job.is_alive)
    assert job.state == "failed"
    (job.folder / "ended.json").unlink()  # as if its job's process had been killed beside it
    assert job.state == "lost"
    (job.folder / "process.json").write_text(json.dumps({**known, "pid": os.getpid()}))  # its number is another's now
    job.stop()
    assert job.state == "lost"


# ---------------------------------------------------------------------------------------------------------- who may ask


@pytest.fixture
def client(workspace):
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx2")
    return testclient.TestClient(
        application(workspace, AccessPolicy("127.0.0.1", most_upload_bytes=2000)), base_url="http://localhost:7860"
    )


ORIGIN = {"origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}


@pytest.mark.parametrize(
    ("method", "headers", "code"),
    [
        ("GET", {}, 200),
        ("GET", {"host": "127.0.0.1:9"}, 200),
        ("GET", {"host": "[::1]:7860"}, 200),
        ("GET", {"host": "evil.example:7860"}, 403),
        ("GET", {"host": "localhost.evil.example"}, 403),
        ("GET", {"host": "10.0.0.1"}, 403),
        ("GET", {"host": "["}, 403),
        ("GET", {"host": ""}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, 403),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}, 200),
        ("POST", ORIGIN, 200),
        ("POST", {}, 403),
        ("POST", {"origin": "null"}, 403),
        ("POST", {"origin": "http://evil.example"}, 403),
        ("POST", {"origin": "http://localhost:9"}, 403),
        ("POST", {**ORIGIN, "sec-fetch-site": "cross-site"}, 403),
        ("POST", {**ORIGIN, "content-length": "99999999"}, 413),
        ("PUT", ORIGIN, 405),
        ("TRACE", {}, 403),
    ],
)
def test_requests_of_others_are_refused(client, workspace, method, headers, code):
    url = "/plan/field?config=run.yaml" if method == "POST" else "/run"
    data = {"field": "train.steps", "value": "5", "before": "4"} if method == "POST" else None
    response = client.request(method, url, headers=headers, data=data)
    assert response.status_code == code
    written = load_config(workspace.roots.workspace / "run.yaml").train.steps
    assert written == (5 if (method, code) == ("POST", 200) else 4)
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_beyond_this_machine_a_token_is_asked_for(workspace):
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx2")
    app = application(workspace, AccessPolicy("0.0.0.0", "a-token", 1000))
    stranger = testclient.TestClient(app, base_url="http://192.0.2.7:7860")
    assert stranger.get("/run").status_code == 401
    assert stranger.get("/assets/ui.js").status_code == 401
    assert stranger.get("/?token=a-tokem").status_code == 403
    assert stranger.get("/run", headers={"cookie": "finetune-token=x"}).status_code == 401
    assert stranger.get("/run", headers={"host": "rebound.example"}).status_code == 403
    entered = stranger.get("/run?token=a-token&config=run.yaml", follow_redirects=False)
    assert entered.headers["location"] == "/run?config=run.yaml"
    cookie = entered.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert stranger.get("/run").status_code == 200


@pytest.mark.parametrize(
    "url",
    [
        *("/file?path=../secret.mp4", "/file?path=/etc/passwd", "/file?path=link/secret.mp4", "/file?path=run.yaml"),
        *(
            "/file",
            "/file?path=clips",
            "/file?path=%00",
            "/assets/..%2frun.yaml",
            "/assets/ui_run.html",
            "/../run.yaml",
        ),
    ],
)
def test_files_outside_are_not_served(client, url):
    response = client.get(url)
    assert response.status_code == 404 and "hidden" not in response.text and "Traceback" not in response.text


def test_a_video_is_shown_when_it_is_whole(client, workspace):
    videos = workspace.roots.workspace / "videos"
    videos.mkdir()
    for name in ("a.mp4", ".b.7-0.partial.mp4"):
        (videos / name).write_bytes(b"\0\0\0\x18ftypmp42")
    (videos / "gone.mp4").symlink_to("nowhere.mp4")  # like one that goes while the folder is listed
    response = client.get("/play")
    assert response.status_code == 200 and "a.mp4" in response.text
    assert "partial" not in response.text and "gone" not in response.text


def test_videos_are_served_in_parts_and_pages_in_a_sandbox(client, workspace):
    (workspace.roots.workspace / "page.html").write_text("<script>1</script>")
    part = client.get("/file?path=clips/a.mp4", headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    page = client.get("/file?path=page.html")
    assert page.headers["content-security-policy"].startswith("sandbox allow-scripts; default-src 'none'")


@pytest.mark.parametrize(
    ("name", "content", "kept"),
    [
        ("ok.mp4", b"\0\0\0\x18ftypmp42", "ok.mp4"),
        ("../../x y.PNG", b"\x89PNG\r\n\x1a\n", "x-y.png"),
        ("a.mp4", b"\0\0\0\x18ftypmp42", "a-1.mp4"),
        ("x.mp4", b"#!/bin/sh", ""),
        ("x.html", b"<script>", ""),
        ("x.py", b"import os", ""),
        ("x.yaml", b"a: 1", ""),
        ("big.mp4", b"\0\0\0\x18ftyp" + bytes(1500), ""),
        ("huge.mp4", b"\0\0\0\x18ftyp" + bytes(9000), ""),
    ],
)
def test_uploads_are_bounded_in_size_and_kind(client, workspace, name, content, kept):
    before = {path for path in workspace.roots.workspace.rglob("*") if path.is_file()}
    response = client.post(
        "/upload?tab=data", headers=ORIGIN, data={"folder": "clips"}, files={"file": (name, content)}
    )
    new = {path for path in workspace.roots.workspace.rglob("*") if path.is_file()} - before
    assert [path.name for path in new] == ([kept] if kept else [])
    assert all(path.parent.name == "clips" for path in new)
    assert response.status_code == (200 if kept else 413 if len(content) > 2000 else 422)


def test_an_upload_that_does_not_say_its_length_is_bounded_too(client, workspace):
    headers = {**ORIGIN, "content-type": "multipart/form-data; boundary=x"}
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="x.mp4"\r\n\r\n'
    response = client.post(
        "/upload?tab=data", headers=headers, content=iter([head, *[bytes(500)] * 9, b"\r\n--x--\r\n"])
    )
    assert response.status_code == 413 and not (workspace.roots.workspace / "uploads" / "x.mp4").exists()


BAD_FORMS: list[tuple[str, dict[str, str]]] = [
    ("/plan/field?config=run.yaml", {"field": "train.steps", "value": "[", "before": "4"}),
    ("/plan/field?config=run.yaml", {"field": HOSTILE, "value": "1"}),
    ("/plan/field?config=../secret.yaml", {"field": "key", "value": "x", "before": "secret"}),
    ("/plan/field", {}),
    ("/plan/text?config=run.yaml", {"text": "x: \0", "digest": "0"}),
    ("/plan/text?config=run.yaml", {"text": "x" * (1 << 21), "digest": "0"}),
    ("/plan/memory?config=run.yaml", {"value": "{"}),
    ("/plan/init", {"verb": "init", "model": "../../etc", "output": "/etc/x.yaml"}),
    ("/run/start", {"verb": "train", "config": "nothing.yaml"}),
    ("/run/start", {"verb": "rm", "config": "run.yaml"}),
    ("/run/stop", {"stop": "../../1"}),
    ("/data/doctor", {"config": "../secret.yaml"}),
    ("/data/caption?folder=clips", {"clip": "../../secret.mp4", "caption": HOSTILE, "before": ""}),
    ("/data/caption?folder=../", {"clip": "secret.mp4", "caption": "x", "before": ""}),
    ("/data/exclude?folder=clips", {"clip": "nothing"}),
    ("/data/take-back?folder=clips", {"clip": "/etc/passwd"}),
    ("/play/command", {"verb": "generate", "output": "../out", "prompt": HOSTILE, "seed": "x" * 30_000}),
    ("/play/command", {"verb": "caption", "folder": "/etc"}),
    ("/play/command", {"verb": "quickstart"}),
    ("/ship/command", {"verb": "push", "folder": "link", "repo": "a/b"}),
    ("/ship/command", {"verb": "export", "source": "clips", "to": "nothing"}),
]


@pytest.mark.parametrize(("url", "form"), BAD_FORMS)
def test_a_bad_value_gets_a_message_and_starts_nothing(client, workspace, url, form):
    before = (workspace.roots.workspace / "run.yaml").read_text()
    response = client.post(url, headers=ORIGIN, data=form)
    assert response.status_code == 422 and 'role="alert"' in response.text
    assert "Traceback" not in response.text and "<script>alert" not in response.text
    assert (workspace.roots.workspace / "run.yaml").read_text() == before and workspace.jobs.all() == []


def test_addresses_that_make_no_sense_get_a_message(client):
    urls = [
        "/run?run=/etc",
        "/run?job=99",
        "/data?folder=/etc",
        "/data?page=x",
        "/plan?config=/etc/passwd",
        "/play?videos=..",
    ]
    for url in urls:
        response = client.get(url)
        assert response.status_code in (200, 422) and "Traceback" not in response.text, url
    for url in ("/nothing", "/plan/nothing"):
        assert client.get(url).status_code in (404, 405)


def test_text_of_datasets_is_shown_and_does_nothing(client, workspace):
    (workspace.roots.workspace / "clips" / "a.txt").write_text(HOSTILE)
    (workspace.roots.workspace / "<b>.yaml").write_text("x")
    page = client.get("/data?folder=clips").text
    assert "&lt;/textarea&gt;" in page and "<script>alert" not in page and "<b>.yaml" not in page


def test_a_fault_of_ours_shows_no_trace(workspace, monkeypatch, capsys):
    testclient = pytest.importorskip("starlette.testclient", reason="needs httpx2")
    monkeypatch.setattr(Workspace, "configs", lambda self: 1 / 0)
    app = application(workspace, AccessPolicy("127.0.0.1"))
    response = testclient.TestClient(app, base_url="http://localhost", raise_server_exceptions=False).get("/data")
    assert response.status_code == 500 and "ZeroDivision" not in response.text
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("tab", ["data", "plan", "run", "play", "ship"])
def test_every_part_shows_a_command_and_a_run(client, workspace, tab):
    workspace.jobs = Jobs(workspace.jobs.folder, workspace.roots.workspace, [sys.executable, "-c", "print('<b>')"])
    job = workspace.jobs.run(["export"])
    run = workspace.roots.workspace / "runs" / "run"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").write_text(YAML.replace("clips ", str(workspace.roots.workspace)))
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.25}\n')
    page = client.get(f"/{tab}?job={job.name}")
    assert page.status_code == 200 and "link.yaml" not in page.text
    assert tab == "plan" or ('<pre class="log"' in page.text and "&lt;b&gt;" in page.text)
    assert tab != "run" or ("polyline" in page.text and "step 2" in page.text)


def test_runs_are_shown_beside_each_other(client, workspace):
    for name, lr in (("a", "1e-3"), ("b", "5e-4"), ("<b>", "2e-4")):
        run = workspace.roots.workspace / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(YAML.replace("1e-3", lr))
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "train/loss": {lr}}}\n{{"step": 2, "train/loss": 0.25}}\n')
    alone, both = client.get("/run?run=runs/a").text, client.get("/run?run=runs/a&beside=runs/b&beside=runs/a").text
    assert "differing" not in alone and alone.count("polyline") == 1
    assert both.count("polyline") == 2 and "<bdi>runs/b</bdi> 0.25" in both and 'class="line c1"' in both
    table = re.sub(r"<[^>]+>", " ", both.partition('id="differing"')[2].partition("</section>")[0]).split()
    assert "optimizer.lr 0.001 0.0005" in " ".join(table)
    every = client.get("/run?run=runs/a&beside=runs/b%0Aruns/%3Cb%3E").text
    assert every.count("polyline") == 3 and "<b></bdi>" not in every
    assert "runs/b\nruns/" in every.partition('id="report-runs"')[2]  # the report's form names them as well
    assert "there is no run" in client.get("/run?run=runs/a&beside=clips").text
    assert client.get("/run?run=runs/a&beside=../secret.mp4").status_code == 422


def test_what_a_configuration_takes_is_asked_once_and_shown(client, workspace):
    document = {
        "phases": [{"name": "training", "peak_bytes": 3 << 30, "where": "block 1", "parts": {"weights": 3 << 30}}]
    }
    document |= {"peak_bytes": 3 << 30, "beside_bytes": {"context": 1 << 30}, "overhead_bytes": 1 << 30}
    document |= {"card_bytes": 2 << 30, "fits": False, "s_per_step": 2.0, "memory": {"block": "lean"}}
    program = f"import sys; print('planning'); print({json.dumps(document, indent=1)!r})"
    workspace.plans = Jobs(workspace.plans.folder, workspace.roots.workspace, [sys.executable, "-c", program])

    def look() -> str:
        text = client.get("/plan?config=run.yaml&card=2GB", headers={"x-finetune-again": "1"}).text
        return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text.partition('id="outlook"')[2].partition("</section>")[0]))

    assert "predicting" in client.get("/plan?config=run.yaml&card=2GB").text and workspace.plans.all() == []
    wait(lambda: "This memory section fits" in look())
    shown = look()
    assert "4.00 GiB of 2.0: does not fit" in shown and "2 s a step" in shown and "{block: lean}" in shown
    assert len(workspace.plans.all()) == 2
