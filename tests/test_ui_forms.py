"""Every form of ``finetune ui``: it makes what it says, and whatever stands in a field gets a message."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoint import said
from test_push import hub as hub
from tiny_upscaler import save_upscaler

for library in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(library, reason="the extra `ui` is not installed")

# ruff: noqa: E402
from finetune.cli.main import main
from finetune.core.files import atomic_write_text
from finetune.inference.videos import write_mp4
from finetune.web.access import MOST_FORM_BYTES, AccessPolicy, Roots
from finetune.web.actions import ACTIONS
from finetune.web.commands import COMMANDS, Kind
from finetune.web.form import form_of
from finetune.web.jobs import ENDED, JOB, LOG, Job, Jobs
from finetune.web.server import application
from finetune.web.workspace import Workspace

ORIGIN = {"origin": "http://localhost:7860", "sec-fetch-site": "same-origin"}

TAB = {"init": "plan", "caption": "data", "generate": "play", "report": "run"}
"""Where a command's form stands, if not under Ship."""


class JobsHere(Jobs):
    """Runs each command in this process, before ``start`` returns: what a job's process does is tested elsewhere."""

    def start(self, words: Sequence[str], *, label: str = "", in_line: bool = True) -> Job:
        folder = self.folder / f"{len(self.all()) + 1:06d}"
        folder.mkdir(parents=True)
        place = contextlib.chdir(self.folder.parent.parent)
        with place, (folder / LOG).open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = main(words)
        atomic_write_text(folder / JOB, json.dumps({"words": [*words], "label": label, "in_line": in_line}))
        atomic_write_text(folder / ENDED, json.dumps({"code": code}))
        return self.get(folder.name)


class Browser:
    """A browser on the page, as far as forms go."""

    def __init__(self, folder: Path) -> None:
        from starlette.testclient import TestClient

        self.folder = folder
        self.workspace = Workspace(Roots(folder), 1 << 20)
        self.workspace.jobs = JobsHere(self.workspace.jobs.folder, folder)
        app = application(self.workspace, AccessPolicy("127.0.0.1", most_upload_bytes=1 << 20))
        self.client = TestClient(app, base_url="http://localhost:7860")

    def send(self, verb: str, form: dict[str, str]) -> Any:
        """The page that follows a command's form."""
        url = f"/{TAB.get(verb, 'ship')}/{'init' if verb == 'init' else 'command'}"
        return self.client.post(url, headers=ORIGIN, data={"verb": verb, **form})


@pytest.fixture(scope="module")
def project(tiny_model, demo_clips, calm_run, tmp_path_factory) -> Path:
    """A folder with a model, clips, a run and its export, and what videos can be made from."""
    folder = tmp_path_factory.mktemp("project") / "work"
    shutil.copytree(demo_clips, folder / "clips")
    shutil.copytree(tiny_model(), folder / "tiny")
    shutil.copytree(calm_run().run_dir, folder / "runs" / "run")
    with contextlib.chdir(folder):
        assert main(["export", "runs/run"]) == 0
    write_mp4(folder / "in.mp4", np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8), 8)
    save_upscaler(folder / "large.safetensors")
    (folder.parent / "secret.mp4").write_bytes(b"hidden")
    (folder / "link").symlink_to(folder.parent)
    return folder


@pytest.fixture
def page(project, tmp_path) -> Browser:
    pytest.importorskip("starlette.testclient", reason="needs httpx2")
    shutil.copytree(project, tmp_path / "work", symlinks=True)
    (tmp_path / "work" / "link").unlink()
    (tmp_path / "work" / "link").symlink_to(tmp_path)
    return Browser(tmp_path / "work")


SAMPLE = {"adapter": "runs/run/export:0.5", "prompt": "a red kite", "steps": "2", "bucket": "9x64x64", "guidance": "1"}

FORMS: list[tuple[str, dict[str, str], str, tuple[str, ...]]] = [
    ("init", {"model": "tiny", "data": "clips", "output": "new.yaml"}, "wrote new.yaml", ("new.yaml",)),
    ("caption", {"folder": "raw", "model": "some", "for": "tiny"}, "4 captions", ()),
    ("generate", SAMPLE, "wrote videos/", ("videos/000-a-red-kite-seed0.mp4",)),
    (
        "generate",
        {**SAMPLE, "video": "in.mp4", "strength": "0.5", "interpolate": "minterpolate", "upscale": "large.safetensors"}
        | {"gif": "1", "output": "more"},
        "wrote more/",
        ("more/000-a-red-kite-seed0.mp4", "more/000-a-red-kite-seed0.gif"),
    ),
    (
        "generate",
        {**SAMPLE, "model": "tiny", "adapter": "", "enhance": "some", "output": "long"},
        "a-long-prompt",
        ("long/000-a-long-prompt-seed0.mp4",),
    ),
    ("export", {"source": "runs/run", "to": "comfyui"}, "runs/run/comfyui", ("runs/run/comfyui",)),
    ("inspect", {"source": "runs/run/export", "norms": "1"}, "diffusers: yes", ()),
    ("convert", {"source": "runs/run/export", "out": "sat", "to": "sat", "model": "tiny"}, "converted", ("sat",)),
    (
        "merge",
        {"sources": "runs/run/export:0.5\nruns/run:0.25", "out": "both.safetensors", "rank": "2"},
        "8 layers of rank 2",
        ("both.safetensors",),
    ),
    ("push", {"folder": "runs/run/export", "repo": "me/kites"}, "nothing was sent", ()),
    ("push", {"folder": "runs/run/export", "repo": "me/kites", "yes": "1"}, "me/kites/commit/1", ()),
    ("report", {"runs": "runs/run"}, "report.html", ("runs/run/report.html",)),
]


@pytest.mark.parametrize(("verb", "form", "words", "files"), FORMS)
def test_a_form_ends_in_what_it_makes(page, serve, hub, verb, form, words, files):
    if verb == "caption":
        shutil.copytree(page.folder / "clips", page.folder / "raw", ignore=lambda *_: ["metadata.jsonl"])
    if {"enhance", "folder"} & form.keys() and verb != "push":
        form = {**form, "endpoint": serve(lambda request: said("a long prompt")).url}
    response = page.send(verb, form)
    assert response.status_code == 200 and words in response.text, page.workspace.jobs.all()[0].log
    (job,) = page.workspace.jobs.all()
    assert job.state == "done" and "Traceback" not in job.log
    assert verb == "init" or "state done" in response.text
    for file in files:
        assert (page.folder / file).exists()
        if file.endswith((".mp4", ".gif")):
            address = f"/file?path={file.replace('/', '%2F')}"
            assert address in response.text and page.client.get(address).status_code == 200
    assert bool(hub.files) == ("yes" in form)


def test_every_command_was_tried():
    assert {verb for verb, *_ in FORMS} == set(COMMANDS)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_what_the_hub_refuses_is_said(page, hub, status):
    hub.refusal = status
    response = page.send("push", {"folder": "runs/run/export", "repo": "me/kites", "yes": "1"})
    assert "state failed" in response.text and "the hub refused" in response.text
    assert "Traceback" not in response.text and "hf_" not in response.text


# ---------------------------------------------------------------------------------------------------------- bad values

OUTSIDE = ("../secret.mp4", "/etc/passwd", "link/secret.mp4", "link", "clips/../../secret.mp4", "~root/x", "/proc/self")

DAMAGED = ("a\0b", "\x1b[31mred", "x" * 30_000)

REFUSED: dict[Kind, tuple[str, ...]] = {
    "text": DAMAGED,
    "lines": DAMAGED,
    "number": ("many", "1,5", *DAMAGED),
    "choice": ("nothing", *DAMAGED),
    "flag": (),
    "path": (*OUTSIDE, "clips\nruns", "x" * 1001, *DAMAGED),
    "paths": (*OUTSIDE, "x" * 1001, *DAMAGED),
    "adapters": (*OUTSIDE, *(f"{path}:1" for path in OUTSIDE), *DAMAGED),
    "model": ("../secret.mp4", "/etc", "link", "~", *DAMAGED),
    "strengths": (*OUTSIDE, *DAMAGED),
}
"""By kind, what the page itself refuses."""

WRONG: dict[Kind, tuple[str, ...]] = {
    "text": ("banana",),
    "lines": (),
    "number": ("nan", f"-1{'0' * 20}"),
    "choice": (),
    "flag": (),
    "path": ("none/such",),
    "paths": ("none/such",),
    "adapters": ("none/such:nan", "none:such"),
    "model": ("none-such", "none/such:1"),
    "strengths": ("1,nan", "1,,x"),
}
"""By kind, what the command refuses, or makes the best of."""

_BEST = {"--negative-prompt", "--output", "--out", "--rank", "--data", "--repo"}
"""What takes a wrong value of its kind for a right one."""


def whole(verb: str) -> dict[str, str]:
    """A form of a command that has all it needs."""
    return next(form for name, form, *_ in FORMS if name == verb)


@pytest.mark.parametrize("verb", COMMANDS)
def test_the_page_refuses_what_no_command_should_read(page, verb):
    before = set(page.folder.parent.rglob("*"))
    tried = 0
    for option in COMMANDS[verb].options:
        needed = [""] if option.needed or not option.name.startswith("-") else []
        for value in (*REFUSED[option.kind], *needed):
            response = page.send(verb, {**whole(verb), option.key: value})
            assert response.status_code == 422 and 'role="alert"' in response.text, (option.name, value[:40])
            assert option.label in response.text.partition('role="alert"')[2].partition("</pre>")[0]
            tried += 1
    assert tried > len(COMMANDS[verb].options) and page.workspace.jobs.all() == []
    assert set(page.folder.parent.rglob("*")) == before


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_command_says_what_is_wrong_with_a_value(page, verb):
    for option in COMMANDS[verb].options:
        for value in WRONG[option.kind]:
            response = page.send(verb, {**whole(verb), option.key: value})
            assert "Traceback" not in response.text
            if response.status_code == 422:
                assert 'role="alert"' in response.text
                continue
            job = page.workspace.jobs.all()[0]
            code = json.loads((job.folder / ENDED).read_text())["code"]
            assert code == 2 or (code == 0 and option.name in _BEST), (option.name, value, job.log)
            assert code == 0 or "error: " in response.text


def test_a_field_of_the_configuration_never_fails_the_page(page):
    """Whatever is written into any of them: the value is refused, or the faults of the file stand above the form."""
    from test_ui import YAML

    values = (
        "[",
        "{a: 1}",
        "nan",
        "../../etc/passwd",
        "!!python/object:os.system x",
        "*x",
        "-1",
        "\x1b[31m",
        "x" * 9999,
    )
    path = page.folder / "run.yaml"
    path.write_text(YAML)
    fields = [field for section in form_of(page.workspace.config("run.yaml").document) for field in section.fields]
    answers = []
    for number, field in enumerate(fields):
        path.write_text(YAML)
        form = {"field": field.path, "value": values[number % len(values)], "before": field.value or ""}
        options = {"headers": ORIGIN, "data": form, "follow_redirects": number % 5 == 0}
        response = page.client.post("/plan/field?config=run.yaml", **options)
        refused = response.status_code == 422 and 'role="alert"' in response.text and path.read_text() == YAML
        assert refused or (response.status_code in (200, 303) and "# the end" in path.read_text()), form
        assert "Traceback" not in response.text
        answers.append((refused, 'id="faults"' in response.text))
    assert len(answers) > 90 and len(set(answers)) == 3  # refused, taken with faults, taken without


# ------------------------------------------------------------------------------------------------------ other sites


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 403),
        ({"origin": "https://example.org"}, 403),
        ({**ORIGIN, "sec-fetch-site": "cross-site"}, 403),
        ({**ORIGIN, "host": "rebound.example"}, 403),
        ({**ORIGIN, "content-length": str(MOST_FORM_BYTES + 1)}, 413),
    ],
)
def test_no_button_is_pressed_from_elsewhere(page, headers, code):
    before = {path: path.read_bytes() for path in page.folder.rglob("*") if path.is_file()}
    for tab, action in ACTIONS:
        form = {"verb": "inspect", "source": "runs/run", "config": "run.yaml", "clip": "0.mp4", "caption": "mine"}
        response = page.client.post(f"/{tab}/{action}?folder=clips", headers=headers, data=form)
        assert response.status_code == code
    assert len(ACTIONS) > 15 and page.workspace.jobs.all() == []
    assert {path: path.read_bytes() for path in page.folder.rglob("*") if path.is_file()} == before
