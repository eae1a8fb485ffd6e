#!/usr/bin/env python3
"""Draw ``docs/report.png`` and ``docs/before_and_after.png`` from a quickstart's folder. Needs chromium.

make quickstart && python scripts/draw_report.py quickstart
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune

ROWS = 0.497
"""Of the picture: the prompts with the new shape, which come first."""


def main(folder: Path) -> None:
    """Write the report again with its clips, and take both pictures."""
    from playwright.sync_api import sync_playwright

    page = finetune.report(folder / "run", folder / "report.html")
    page.write_text(page.read_text(encoding="utf-8").replace(f"{folder.absolute()}/", ""), encoding="utf-8")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1180, "height": 1120})
        tab.goto(page.absolute().as_uri())
        tab.wait_for_timeout(500)
        shot = tab.screenshot()
        heading = tab.locator("h2", has_text="Samples").bounding_box()
        third = tab.locator("figure", has_text="learning rate").bounding_box()
        assert heading is not None and third is not None
        tab.set_viewport_size({"width": 1180, "height": 292})
        tab.locator("h2", has_text="Samples").scroll_into_view_if_needed()
        tab.evaluate("top => scrollTo(0, top)", heading["y"] - 12)
        tab.wait_for_timeout(300)
        samples = tab.screenshot()
        browser.close()
    top, below = (Image.open(io.BytesIO(content)).convert("RGB") for content in (shot, samples))
    top = top.crop((0, 0, 1180, round(third["y"])))
    whole = Image.new("RGB", (1180, top.height + below.height))
    whole.paste(top, (0, 0))
    whole.paste(below, (0, top.height))
    whole.quantize(128).save(ROOT / "docs" / "report.png", optimize=True)
    picture = Image.open(folder / "before_and_after.png").convert("RGB")
    cut = picture.crop((0, 0, picture.width, round(ROWS * picture.height)))
    cut.quantize(128).save(ROOT / "docs" / "before_and_after.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
