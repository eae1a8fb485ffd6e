#!/usr/bin/env python3
"""Draw ``docs/doctor.png``: the doctor's page, in a browser, of clips that FFmpeg makes here. Needs chromium."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import imageio_ffmpeg
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune

VALLEY = "s=540x360:start_scale=0.6:end_scale=0.1:end_pts=160"

SPIRE = "s=270x480:start_x=-1.25:start_y=0.03:start_scale=0.2:end_scale=0.06:end_pts=160"

CLIPS = {
    "valley": (VALLEY, "null", "a flight down to a coast"),
    "valley_again": (VALLEY, "eq=brightness=0.03", "a flight down to a coast, once more"),
    "tower": (SPIRE, "hue=h=90", "a slow push in on a spire, upright"),
    "cinema": ("s=540x230:start_scale=1.2:end_scale=0.5", "pad=540:360:0:65,hue=h=200", "a wide plain"),
    "soft": ("s=540x360:start_scale=0.9:end_scale=0.3", "gblur=sigma=9,hue=h=140", "a hazy hill"),
}
"""Name -> what FFmpeg's mandelbrot shows, filters, caption."""


def main() -> None:
    """Make the clips, look at them, and take the picture."""
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        clips.mkdir()
        for name, (view, filters, caption) in CLIPS.items():
            film(clips / f"{name}.mp4", f"mandelbrot=r=24:{view}", "-t", "7", "-vf", filters)
            (clips / f"{name}.txt").write_text(caption)
        config = {
            "model": {"pretrained": "5b", "dtype": "bf16"},
            "data": {"sources": [{"path": str(clips)}], "buckets": ["49x480x720"], "holdout": 1},
            "train": {"steps": 300},
            "output_dir": f"{folder}/run",
        }
        page = Path(folder) / "doctor.html"
        report = finetune.doctor(config, page=page, card="24GB", device="4090", predict=True)
        page.write_text(page.read_text(encoding="utf-8").replace(f"{clips}/", "clips/"), encoding="utf-8")
        print(report)
        photograph(page, ROOT / "docs" / "doctor.png", sort="picture")


def film(path: Path, source: str, *arguments: str) -> None:
    """Write a video of what FFmpeg's filter ``source`` shows."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", source, *arguments]
    subprocess.run([*command, "-pix_fmt", "yuv420p", str(path)], check=True)


def photograph(page: Path, target: Path, *, sort: str = "", start: str = "body", height: int = 1240) -> None:
    """Save what a browser shows of a report, in few colours.

    Args:
        page: the report.
        target: the PNG.
        sort: one of the report's columns.
        start: CSS selector of what is at the top.
        height: of the picture, in pixels.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1100, "height": height}, color_scheme="light")
        tab.goto(page.as_uri())
        tab.select_option("#sort", sort)
        tab.eval_on_selector(start, "element => element.scrollIntoView()")
        picture = Image.open(io.BytesIO(tab.screenshot()))
        browser.close()
    picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
