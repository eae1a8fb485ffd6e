"""What a masked loss keeps out: rings that all have a white mark in one corner.

    python benchmarks/masks.py [--folder FOLDER] [--steps N]

A LoRA learns the ring from clips of which each has the mark, without masks and with masks that are black over it. Does
it make rings then, and does it make the mark? What is the loss on rings that do not have it? Prints the table of
docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from prior import configuration, sampled

from finetune.inference.videos import Frames, write_mp4
from finetune.testing.demo import (
    FPS,
    NEW_SHAPE,
    SIZE,
    classify,
    concept_distance,
    held_out,
    install_demo_model,
    lesson,
    render,
    write_clips,
)
from finetune.trainers.loop import train

MARK = slice(2, 14), slice(50, 62)
"""Rows and columns of the mark, in pixels."""

HIDDEN = slice(0, 16), slice(48, 64)
"""Where the masks are black: the cells of the latents that show it."""

OUTSIDE: dict[str, float | None] = {
    "no masks": None,
    "outside: 0.5": 0.5,
    "outside: 0.1": 0.1,
    "outside: 0": 0.0,
    "outside: 0, the rest kept": 0.0,
}

KEPT = {"path": "rest", "prior_preservation": True}
"""The same clips with masks that are white over the mark."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a second call goes on there")
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        install_demo_model(folder / "model")
        write_dataset(folder)
        rows = []
        for name, outside in OUTSIDE.items():
            objective = {"masked": None if outside is None else {"outside": outside}}
            sources = [{"path": "marked"}, *([KEPT] if name.endswith("kept") else [])]
            config = configuration(folder, name, sources, options.steps, objective=objective)
            report = train(config)
            if not rows:
                rows.append(row("the base model", report.heldout_before, sampled(folder, "base", None)))
            rows.append(row(name, report.heldout_after, sampled(folder, name, report.checkpoint)))
    print("| | rings (distance) | corner over the rest | loss on rings without the mark |\n|---|---|---|---|")
    print("\n".join(rows))


def write_dataset(folder: Path) -> None:
    """The ring's clips with the mark and with masks, and clips that are held out."""
    scenes = [scene for scene in lesson() if scene.shape == NEW_SHAPE]
    mask = np.full((SIZE, SIZE, 3), 255, np.uint8)
    mask[HIDDEN] = 0
    for name, image in (("marked", mask), ("rest", 255 - mask)):
        (folder / name).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / name / "mask.png")
        rows = []
        for index, scene in enumerate(scenes):
            frames = render(scene)
            frames[:, *MARK] = 235
            write_mp4(folder / name / f"{index:02d}.mp4", frames, FPS)
            rows.append({"file_name": f"{index:02d}.mp4", "mask": "mask.png", "prompt": scene.caption})
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_clips(folder / "unseen", held_out())


def row(name: str, loss: float | None, videos: list[Frames]) -> str:
    """Of the table: of the videos that ask for a ring."""
    rings = videos[: len(held_out())]
    made = sum(classify(video).shape == NEW_SHAPE for video in rings)
    corner = np.mean([video[:, *MARK].mean() - np.median(video) for video in rings])
    return f"| {name} | {made} of {len(rings)} ({concept_distance(rings):.2f}) | {corner:+.0f} of 255 | {loss:.4f} |"


if __name__ == "__main__":
    main()
