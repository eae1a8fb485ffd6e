#!/usr/bin/env python3
"""Draw ``docs/ledger.png`` and ``docs/captions.png``: pages that the verbs write on the way from footage to a cache.

The footage is made by FFmpeg here, and the captions stand below, for no model is loaded. Needs chromium.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from draw_doctor import ROOT, SPIRE, VALLEY, film, photograph

import finetune
from finetune.testing.tiny import build_tiny

SOURCES = {
    "VID_0410.mp4": ("color=black:r=30:s=540x360", "8", "null"),  # filmed in a pocket
    "VID_0411.mp4": (f"mandelbrot=r=30:{VALLEY}", "6.2", "gblur=sigma=14,hue=h=140"),
    "VID_0412.mp4": (f"mandelbrot=r=30:{VALLEY}", "12", "null"),
    "VID_0413.mp4": (f"mandelbrot=r=30:{SPIRE}", "9", "hue=h=90"),
}
"""Name -> what FFmpeg shows, seconds, filters."""

CAPTIONS = (
    "The camera moves slowly towards a jagged point between two smooth, deep green hills. Along their edges grow grey"
    " crystals, and between them lies a lake with bands of orange, sky blue and brown, which fills more and more of the"
    " picture. The light is even and the colours are saturated. One continuous shot.",
    "In an upright picture, a thin grey spire of crystals stands before a bright green sky. The camera pushes in on it"
    " without a cut, until violet and pink rings at its foot slide out of the picture. Dark green spheres hang on its"
    " right side. The colours are saturated.",
)


def main() -> None:
    """Make the footage, prepare it, and take the two pictures."""
    with tempfile.TemporaryDirectory() as folder:
        raw, clips, model = Path(folder) / "phone", Path(folder) / "clips", Path(folder) / "model"
        raw.mkdir()
        for name, (source, seconds, filters) in SOURCES.items():
            film(raw / name, source, "-t", seconds, "-vf", filters)
        shutil.copy(raw / "VID_0413.mp4", raw / "VID_0413 (1).mp4")
        print(finetune.prepare(raw, clips, report=True))
        photograph(clips / "ledger.html", ROOT / "docs" / "ledger.png", start=".tools", height=1000)
        table = clips / "metadata.jsonl"
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
        for row, caption in zip(rows, CAPTIONS, strict=True):
            row["caption"] = caption
        table.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        page = Path(folder) / "captions.html"
        build_tiny(model, "5b", captions=CAPTIONS)  # with a tokenizer that knows these words
        numbers = model / "transformer" / "config.json"
        numbers.write_text(json.dumps(json.loads(numbers.read_text()) | {"max_text_seq_length": 226}))
        print(finetune.caption(clips, target=str(model), review=page))
        page.write_text(page.read_text(encoding="utf-8").replace(str(clips), "clips"), encoding="utf-8")
        photograph(page, ROOT / "docs" / "captions.png", height=900)


if __name__ == "__main__":
    main()
