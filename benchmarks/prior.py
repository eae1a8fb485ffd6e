"""What a LoRA forgets, and what prior preservation keeps: the ring lesson of the demo world in several ways.

    python benchmarks/prior.py [--folder FOLDER] [--steps N] [--only NAME ...]

A LoRA learns the ring from 48 clips. Beside them are a dozen clips of old shapes, good ones or poor ones (without
colour and of little contrast), or the ring's own clips under captions of old shapes, or nothing. Does it make rings
then, does it still make the old shapes in the colour that was asked for, and what is the loss on good clips of old
shapes that it has not seen? Prints the table of docs/methods.md, and draws docs/prior.png if all are run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from finetune.config.schema import RunConfig
from finetune.inference.generate import generate
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.inference.videos import Frames, side_by_side, write_mp4
from finetune.testing.demo import (
    COLOURS,
    FPS,
    KNOWN_SHAPES,
    MOTIONS,
    NEW_SHAPE,
    Scene,
    classify,
    concept_distance,
    held_out,
    install_demo_model,
    lesson,
    render,
    write_clips,
)
from finetune.testing.quickstart import CONFIG, GUIDANCE, NUM_INFERENCE_STEPS
from finetune.trainers.loop import train

PICTURE = Path(__file__).parents[1] / "docs" / "prior.png"

OLD_KINDS = tuple(
    Scene(shape, colour, tuple(MOTIONS)[(row + column) % len(MOTIONS)])
    for (row, shape), (column, colour) in product(enumerate(KNOWN_SHAPES), enumerate(COLOURS))
)
"""Each old shape in each colour."""

PRIOR = {"prior_preservation": True, "repeats": 4}

WAYS: dict[str, list[dict[str, Any]]] = {
    "rings alone": [],
    "a dozen good clips": [{"path": "good", "repeats": 4}],
    "a dozen good clips, prior": [{"path": "good", **PRIOR}],
    "a dozen poor clips": [{"path": "poor", "repeats": 4}],
    "a dozen poor clips, prior": [{"path": "poor", **PRIOR}],
    "rings, renamed, prior": [{"path": "renamed", **PRIOR, "repeats": 1}],
}
"""Name -> sources beside the ring clips; each is seen as often as these."""


SHOWN = ("the base model", "rings alone", "a dozen good clips, prior", "rings, renamed, prior")
"""In the picture."""


@dataclass(frozen=True)
class Outcome:
    """What a way led to."""

    name: str
    loss: float
    """On unseen clips of old shapes."""
    videos: Sequence[Frames]
    """Of ``held_out()``, then of ``OLD_KINDS``."""

    def row(self) -> str:
        """Of the table."""
        rings, old = self.videos[: len(held_out())], self.videos[len(held_out()) :]
        seen = [classify(video) for video in old]
        shapes = sum(one.shape == scene.shape for one, scene in zip(seen, OLD_KINDS, strict=True))
        both = sum(
            (one.shape, one.colour) == (scene.shape, scene.colour) for one, scene in zip(seen, OLD_KINDS, strict=True)
        )
        made = sum(classify(video).shape == NEW_SHAPE for video in rings)
        cells = [
            f"{made} of {len(rings)} ({concept_distance(rings):.2f})",
            f"{shapes} of {len(old)}",
            f"{both} of {len(old)}",
            f"{self.loss:.4f}",
        ]
        return f"| {self.name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; a second call goes on there")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--only", nargs="*", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        install_demo_model(folder / "model")
        write_dataset(folder)
        outcomes = list(run(folder, options.only, options.steps))
    print("| | rings (distance) | old shapes | and their colours | loss on old shapes |\n|---|---|---|---|---|")
    print("\n".join(outcome.row() for outcome in outcomes))
    if len(outcomes) == len(WAYS) + 1:
        scenes = [*held_out(), *OLD_KINDS]
        columns = [outcome for outcome in outcomes if outcome.name in SHOWN]
        rows = [
            (scenes[index].caption, [outcome.videos[index] for outcome in columns])
            for index in (0, len(held_out()) + 2, len(held_out()) + 5)
        ]
        print(side_by_side(rows, [outcome.name for outcome in columns], PICTURE, columns=2))


def write_dataset(folder: Path) -> None:
    """The ring's clips, the same under other captions, poor clips of old shapes, and unseen good ones."""
    rings = [scene for scene in lesson() if scene.shape == NEW_SHAPE]
    table = write_clips(folder / "rings", rings)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    (folder / "renamed").mkdir(exist_ok=True)
    for index, row in enumerate(rows):
        name = row["file_name"]
        (folder / "renamed" / name).write_bytes((folder / "rings" / name).read_bytes())
        old = replace(rings[index], shape=KNOWN_SHAPES[index % len(KNOWN_SHAPES)])
        row["prompt"] = old.caption
    (folder / "renamed" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_clips(folder / "unseen", [replace(scene, seed=seed) for seed in (100, 101) for scene in OLD_KINDS])
    write_clips(folder / "good", OLD_KINDS)
    (folder / "poor").mkdir(exist_ok=True)
    poor = []
    for index, scene in enumerate(OLD_KINDS):
        grey = render(scene).mean(-1, keepdims=True).repeat(3, -1)
        write_mp4(folder / "poor" / f"{index:02d}.mp4", (60 + 0.4 * grey).astype(np.uint8), FPS)
        poor.append({"file_name": f"{index:02d}.mp4", "prompt": scene.caption})
    (folder / "poor" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in poor))


def run(folder: Path, names: Iterable[str], steps: int) -> Iterable[Outcome]:
    """The base model, then each way."""
    base: float | None = None
    for name in names:
        report = train(configuration(folder, name, [{"path": "rings"}, *WAYS[name]], steps))
        assert report.heldout_before is not None and report.heldout_after is not None and report.checkpoint is not None
        if base is None:
            base = report.heldout_before
            yield Outcome("the base model", base, sampled(folder, "base", None))
        videos = sampled(folder, name, report.checkpoint)
        yield Outcome(name, report.heldout_after, videos)


def configuration(folder: Path, name: str, sources: Sequence[dict[str, Any]], steps: int, **changes: Any) -> RunConfig:
    """The quickstart's, with other sources; unseen clips of old shapes are held out."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8")) | changes
    values["data"]["sources"] = [*sources, {"path": "unseen", "split": "holdout"}]
    values["train"]["steps"] = steps
    values["validation"] = {"every": steps, "clips": 24}
    values["checkpoint"] = {"every": None}
    values["output_dir"] = name.replace(" ", "-")
    return RunConfig.from_dict(values, base=folder)


def sampled(folder: Path, name: str, checkpoint: Path | None) -> list[Frames]:
    """Videos of ``held_out()``, then of ``OLD_KINDS``, with the adapter of a checkpoint or without one."""
    request = GenerateRequest(
        base=str(folder / "model"),
        prompts=tuple(
            VideoPrompt(prompt=scene.caption, seed=seed) for seed, scene in enumerate([*held_out(), *OLD_KINDS])
        ),
        out=folder / "samples" / name.replace(" ", "-"),
        adapters=() if checkpoint is None else (AdapterArgument(checkpoint),),
        fps=FPS,
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE,
    )
    return list(generate(request).frames)


if __name__ == "__main__":
    main()
