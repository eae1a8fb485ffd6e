#!/usr/bin/env python3
"""Draw ``docs/ui-data.png``, ``ui-plan.png`` and ``ui-run.png`` from a quickstart's folder. Needs chromium.

make quickstart && python scripts/draw_terminal.py quickstart && python scripts/draw_ui.py quickstart

The second command leaves another run, which the third shows beside the quickstart's.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

VIEWS = {
    "data": ("data?folder=clips&config=run.yaml", "article video", 860),
    "plan": ("plan?config=cogvideox-5b-lora.yaml&card=24GB&device=4090", "#outlook .bar", 900),
    "run": ("run?config=run.yaml&run=run&beside=runs/terminal", "#differing", 1000),
}
"""Of each picture: the address, what has to be there, and its height."""


def main(folder: Path, into: Path, width: int = 1180, scheme: str = "light") -> None:
    """Take the pictures, of a page so many pixels wide, ``light`` or ``dark``."""
    from playwright.sync_api import sync_playwright

    recipe = (ROOT / "configs" / "cogvideox-5b-lora.yaml").read_text(encoding="utf-8")
    (folder / "cogvideox-5b-lora.yaml").write_text(recipe.replace("../", ""), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "finetune", "ui", "--port", "0"]
    server = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment)
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.set_default_timeout(600_000)
            for name, (part, needed, height) in VIEWS.items():
                tab.set_viewport_size({"width": width, "height": height})
                tab.goto(address + part)
                tab.wait_for_selector(needed, state="attached")
                tab.evaluate("document.querySelector('h1 bdi').textContent = 'my-project'")
                tab.wait_for_timeout(1500)
                picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
                picture.quantize(128).save(into / f"ui-{name}.png", optimize=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), ROOT / "docs")
