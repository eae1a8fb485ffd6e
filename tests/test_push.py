"""``push``: what goes to the hub and what never does, against a server of this process that keeps what it is sent."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_export import LORA, make_run

from finetune import export, push
from finetune.cli.main import main
from finetune.core.errors import ExportError, FinetuneError
from finetune.core.files import LORA_FILE
from finetune.inference.videos import write_mp4

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.private: bool | None = None
        self.tokens: set[str] = set()
        self.requests: list[str] = []
        self.refusal: int | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def _answer(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _handle(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {self.path}")
        hub.tokens.add(self.headers.get("Authorization", ""))
        if hub.refusal is not None:
            return self._answer({"error": f"no way for {self.headers['Authorization']}"}, hub.refusal)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if hub.private is None:
                hub.private = asked.get("private", asked.get("visibility") == "private")
            return self._answer({"url": f"{hub.address}/me/{asked['name']}", "name": f"me/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".mp4")) else "regular" for name in names}
            return self._answer(
                {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]}
            )
        if self.path.endswith("/objects/batch"):
            place = f"{hub.address}/blobs/"
            objects = [
                {**each, "actions": {"upload": {"href": place + each["oid"]}}} for each in json.loads(body)["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if self.path.startswith("/blobs/"):
            hub.blobs[self.path.removeprefix("/blobs/")] = body
            return self._answer({})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.blobs[value["oid"]]
            return self._answer({"commitUrl": f"{hub.address}/me/kites/commit/1", "commitOid": "1" * 40})
        return self._answer({"id": "me/kites", "private": hub.private, "sha": "1" * 40, "siblings": []})

    do_GET = do_POST = do_PUT = _handle  # noqa: N815 - the library's names


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def sampled(tiny_model, tmp_path_factory) -> Path:
    """Where a run stands that sampled a video, with its export."""
    folder = tmp_path_factory.mktemp("sampled")
    samples = {"samples": [{"prompt": "a red kite", "seed": 4}]}
    run = make_run(folder / "runs", tiny_model("5b"), LORA, validation=samples)
    video = run / "samples" / "step-00000003" / "00-seed4.mp4"
    video.parent.mkdir(parents=True)
    write_mp4(video, np.zeros((9, 64, 64, 3), dtype=np.uint8), fps=8)
    with contextlib.chdir(folder):
        export("runs/run")
    return folder


@pytest.fixture
def exported(sampled, tmp_path, monkeypatch) -> Path:
    """The export, from where its command was typed."""
    shutil.copytree(sampled, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path("runs/run/export")


def test_a_dry_run_lists_files_and_asks_nobody(hub, exported, capsys):
    assert main(["push", str(exported), "--repo", "me/kites"]) == 0
    printed = capsys.readouterr().out
    names = ["README.md", "finetune.json", LORA_FILE, "samples/00-seed4.mp4"]
    assert [line.split()[0] for line in printed.splitlines()[:4]] == names
    assert "nothing was sent: with --yes, 4 files" in printed and "private repository me/kites" in printed
    assert not hub.requests


def test_an_upload_holds_weights_card_and_videos(hub, exported, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    assert main(["push", str(exported), "--repo", "me/kites", "--yes"]) == 0
    printed = capsys.readouterr()
    assert f"{hub.address}/me/kites/commit/1" in printed.out and hub.private is True
    assert hub.files.keys() == {"README.md", "finetune.json", LORA_FILE, "samples/00-seed4.mp4"}
    for name in hub.files.keys() - {"README.md"}:
        assert hub.files[name] == (exported / name).read_bytes()
    assert before == {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    card = hub.files["README.md"].decode()
    assert "load_lora_weights('me/kites', weight_name=" in card and "runs/run/export" not in card
    assert "hf download me/kites --local-dir kites\nfinetune generate" in card and "--adapter kites --prompt" in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["widget"] == [{"text": "a red kite", "output": {"url": "samples/00-seed4.mp4"}}]
    assert hub.tokens == {f"Bearer {TOKEN}", ""} or hub.tokens == {f"Bearer {TOKEN}"}  # blobs go without
    assert TOKEN not in printed.out + printed.err + caplog.text


@pytest.mark.parametrize(("status", "fix"), [(401, "hf auth login"), (403, "may write"), (400, "try again")])
def test_no_token_is_in_an_error(hub, exported, capsys, caplog, status, fix):
    """Although this server repeats it in its answer."""
    caplog.set_level(logging.DEBUG)
    hub.refusal = status
    assert main(["push", str(exported), "--repo", "me/kites", "--yes"]) == 2
    printed = capsys.readouterr()
    assert "the hub refused" in printed.err and fix in printed.err and hub.requests
    assert TOKEN not in printed.out + printed.err + caplog.text
    assert f"Bearer {TOKEN}" in hub.tokens  # a canary: it was sent


def test_a_public_repository_is_meant(hub, exported):
    hub.private = False
    with pytest.raises(ExportError, match="exists and is public"):
        push(exported, "me/kites", dry_run=False)
    assert not hub.files
    assert "public repository" in str(push(exported, "me/kites", public=True, dry_run=False)) and hub.files


def test_an_upload_where_no_network_may_be_used(exported, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ExportError, match="HF_HUB_OFFLINE is set"):
        push(exported, "me/kites", dry_run=False)


def test_what_never_goes(hub, exported, tmp_path):
    run = exported.parent
    for folder, message in ((run, "a run or a checkpoint"), (tmp_path, "no export"), (tmp_path / "none", "no export")):
        with pytest.raises(FinetuneError, match=message):
            push(folder, "me/kites", dry_run=False)
    with pytest.raises(FinetuneError, match="a run or a checkpoint"):
        push(next((run / "checkpoints").iterdir()), "me/kites", dry_run=False)
    with pytest.raises(FinetuneError, match="names no repository"):
        push(exported, "me/my kites", dry_run=False)
    for name in ("optimizer.safetensors", "weights.pt", ".env", "cache/a.bin", "trainable.safetensors"):
        (exported / name).parent.mkdir(exist_ok=True)
        (exported / name).write_bytes(b"")
        with pytest.raises(FinetuneError, match=f"not for others: {name}"):
            push(exported, "me/kites", dry_run=False)
        (exported / name).unlink()
    (exported / "link.png").symlink_to("/etc/passwd")
    with pytest.raises(FinetuneError, match=r"link.png \(a link\)"):
        push(exported, "me/kites", dry_run=False)
    (exported / "link.png").unlink()
    content = bytearray((exported / LORA_FILE).read_bytes())
    content[-1] ^= 1
    (exported / LORA_FILE).write_bytes(content)
    with pytest.raises(FinetuneError, match="not as it was written"):
        push(exported, "me/kites", dry_run=False)
    content[-1] ^= 1
    (exported / LORA_FILE).write_bytes(content)
    (exported / "README.md").write_text("my own words", encoding="utf-8")
    (exported / "cover.png").write_bytes(b"png")
    push(exported, "me/kites", dry_run=False)
    assert hub.files["README.md"] == b"my own words" and hub.files["cover.png"] == b"png"
