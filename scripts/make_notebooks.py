#!/usr/bin/env python3
"""Write ``notebooks/*.ipynb``: trainings for cards that Colab lends, and the demos that came with CogVideoX.

    python scripts/make_notebooks.py            # write them
    python scripts/make_notebooks.py --check    # say what is not up to date

Their text is Markdown, ``notebooks/*.md.jinja``; a block of Python in it is a cell. Where ``FINETUNE_TINY`` is set, one
cell of a notebook takes a tiny model in place of a published one, and tests/test_notebooks.py runs all of them.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parent.parent

FENCE = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)

NOTEBOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "train-2b-t4": (
        "train",
        {
            "title": "A LoRA of CogVideoX-2B on a T4",
            "note": " A T4 (16 GB) computes in float16 and not in bfloat16, and the 2B model was trained in it.",
            "model": "2b",
            "card": "16GB",
            "options": "model.dtype=fp16 train.steps=500",
        },
    ),
    "train-5b-l4": (
        "train",
        {
            "title": "A LoRA of CogVideoX-5B on an L4",
            "note": " An L4 has 24 GB.",
            "model": "5b",
            "card": "24GB",
            "options": "train.steps=500",
        },
    ),
    "train-5b-i2v-l4": (
        "train",
        {
            "title": "A LoRA of CogVideoX-5B-I2V on an L4",
            "note": " Videos begin with a picture; in training it is each clip's own first frame. An L4 has 24 GB.",
            "model": "5b-i2v",
            "card": "24GB",
            "options": "train.steps=500",
            "image": True,
        },
    ),
    "sample-text": (
        "sample",
        {
            "title": "A video from a text",
            "note": "",
            "model": "5b",
            "prompt": "a lighthouse on a cliff in a storm, waves break far below",
            "options": "",
        },
    ),
    "sample-text-int8": (
        "sample",
        {
            "title": "A video from a text, with weights in 8 bits",
            "note": " Transformer and T5 are held in int8, which changes videos a little.",
            "model": "5b",
            "prompt": "a lighthouse on a cliff in a storm, waves break far below",
            "options": " --quantize int8 --quantize-text int8 --dtype bf16",
        },
    ),
    "sample-image": (
        "sample",
        {
            "title": "A video from a picture",
            "note": "",
            "model": "5b-i2v",
            "prompt": "it sails away",
            "options": " --image first.png",
            "image": True,
        },
    ),
    "sample-video": (
        "sample",
        {
            "title": "A video from a video",
            "note": " `--strength` is how much is made anew: at 1 little of the video is left, at 0.3 details change.",
            "model": "5b",
            "prompt": "the same in winter",
            "options": " --video from.mp4 --strength 0.8",
            "video": True,
        },
    ),
}
"""Name -> its template, and what fills it."""


def notebook(page: str) -> str:
    """The file of a notebook, format 4.5, from a page of Markdown."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(FENCE.split(page)):  # text and code by turns
        source = re.sub(r"\n{3,}", "\n\n", part).strip("\n")
        if source:
            kind = (
                {"cell_type": "code", "execution_count": None, "outputs": []}
                if number % 2
                else {"cell_type": "markdown"}
            )
            cells.append(kind | {"id": f"cell-{number}", "metadata": {}, "source": source.splitlines(keepends=True)})
    metadata = {
        "accelerator": "GPU",
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def generate() -> dict[str, str]:
    """Every notebook's file, by its name."""
    loader = jinja2.FileSystemLoader(ROOT / "notebooks")
    pages = jinja2.Environment(loader=loader, trim_blocks=True, keep_trailing_newline=True)
    return {
        f"{name}.ipynb": notebook(pages.get_template(f"{template}.md.jinja").render(values))
        for name, (template, values) in NOTEBOOKS.items()
    }


def main() -> int:
    stale = []
    for name, text in generate().items():
        path = ROOT / "notebooks" / name
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    print("\n".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
