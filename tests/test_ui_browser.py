"""From clips to an export on the page of ``finetune ui``, in a browser."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

for library in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(library, reason="the extra `ui` is not installed")

HOSTILE = "</textarea></script><script>alert(1)</script><img src=https://example.org/x onerror=alert(2)> red"


class Page:
    """``finetune ui`` in a process, and a browser's page on it that keeps what must not happen."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.folder, self.noise = folder, list[str]()
        words = [sys.executable, "-m", "finetune", "ui", "--port", "0"]
        self.server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None
        self.url = self.server.stdout.readline().strip()
        self.tab = browser.new_page(viewport={"width": 1280, "height": 900})
        self.tab.set_default_timeout(600_000)
        self.tab.on("console", lambda message: self.noise.append(message.text))
        self.tab.on("pageerror", lambda error: self.noise.append(str(error)))
        self.tab.on("dialog", lambda dialog: (self.noise.append(dialog.message), dialog.dismiss()))
        self.tab.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.noise.append(request.url)

    def go(self, part: str) -> Any:
        self.tab.goto(f"{self.url}{part}")
        return self.tab

    def job(self, state: str = "done") -> str:
        """What the command that is shown printed, when it is in a state."""
        self.tab.wait_for_selector(f"#job .state.{state}")
        return str(self.tab.inner_text("#job .log"))

    def restart(self) -> None:
        self.server.kill()
        self.server.wait()
        port = self.url.rstrip("/").rpartition(":")[2]
        words = [sys.executable, "-m", "finetune", "ui", "--port", port]
        self.server = subprocess.Popen(words, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        assert self.server.stdout is not None and self.server.stdout.readline().strip() == self.url


@pytest.fixture
def page(browser, tiny_model, demo_clips, tmp_path) -> Iterator[Page]:
    folder = tmp_path / "work"
    shutil.copytree(demo_clips, folder / "clips")
    shutil.copytree(tiny_model(), folder / "tiny")
    page = Page(browser, folder)
    yield page
    page.tab.close()
    page.server.kill()


SETTINGS = """\
# mine, with comments
model: {pretrained: tiny}
data:
  sources: [{path: clips}]
  buckets: [9x64x64] # as they are
  fps: 8
cache: {dir: cache, decode_workers: 0}
method: {kind: lora, rank: 4, alpha: 4}
optimizer: {kind: adamw, lr: 1e-3} # fast
train:
  steps: 3 # few
validation: {every: null, at_start: false}
tracking: {kind: none}
output_dir: runs/run
"""


def test_from_clips_to_an_export_in_a_browser(page):
    tab = page.go("data?folder=clips")
    caption = tab.locator("textarea[name=caption]").first
    caption.fill(f"a red circle {HOSTILE}")
    tab.locator("article button", has_text="save").first.click()
    tab.wait_for_selector(".note")
    assert HOSTILE in (page.folder / "clips" / "metadata.jsonl").read_text()

    page.go("plan")
    tab.fill("#init-model", "tiny")
    tab.fill("#init-data", "clips")
    tab.click("#form-init button")
    tab.wait_for_selector("#field-train\\.steps")
    assert "wrote run.yaml" in tab.inner_text(".note")
    tab.fill("#text", SETTINGS)
    tab.click("form.text button")
    tab.wait_for_selector(".note:has-text('saved')")
    steps = tab.locator("#field-train\\.steps")
    steps.fill("2")
    steps.press("Enter")
    tab.wait_for_selector(".option.written:has(#field-train\\.steps) input[name=before][value='2']", state="attached")
    assert tab.input_value("#text").rstrip() == SETTINGS.replace("steps: 3 ", "steps: 2 ").rstrip()
    tab.fill("#text", SETTINGS.replace("alpha", "alfa"))
    tab.click("form.text button")
    tab.wait_for_selector("#faults")
    assert "run.yaml:8:" in tab.inner_text("#faults") and "did you mean 'alpha'" in tab.inner_text("#faults")
    tab.fill("#text", SETTINGS.replace("steps: 3", "steps: 2"))
    tab.click("form.text button")
    tab.wait_for_selector("#faults", state="detached")

    page.go("run?config=run.yaml")
    tab.click("button[value=train]")
    tab.wait_for_selector("#job .state.running")
    page.restart()
    tab.reload()
    assert "export runs/run" in page.job()
    tab.wait_for_selector("#record svg.chart")
    assert "step 2 of 2" in tab.inner_text("#record")

    page.go("play?config=run.yaml")
    for field, value in [("prompt", "a red circle moving left"), ("compare", "0,1"), ("steps", "1")]:
        tab.fill(f"#generate-{field}", value)
    tab.click("#form-generate button")
    page.job()
    tab.wait_for_selector("#videos img")
    assert tab.evaluate("document.querySelector('#videos img').naturalWidth") > 64

    page.go("ship?config=run.yaml")
    tab.click("#form-export button")
    page.job()
    assert (page.folder / "runs" / "run" / "export" / "pytorch_lora_weights.safetensors").is_file()
    told = ("status of 422", "ERR_CONNECTION")  # what the browser says of a refused value, and of the server's restart
    assert [line for line in page.noise if not any(words in line for words in told)] == []
