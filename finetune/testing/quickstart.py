"""The first hour in minutes: teach a tiny CogVideoX a shape that it has never seen, by the package's own commands.

Nothing here is a shortcut: the clips are H.264 files, the model is a diffusers pipeline folder, and what runs is what
runs on one's own clips. ``main`` only puts the steps in a row and says what came of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune.caching.precompute import precompute
from finetune.config.schema import load_config
from finetune.conversion.export import ExportOptions, ExportReport, export
from finetune.core.errors import ConfigError
from finetune.core.files import atomic_write_text, from_here
from finetune.inference.generate import generate
from finetune.inference.request import AdapterArgument, GenerateRequest, VideoPrompt
from finetune.inference.videos import Frames, side_by_side
from finetune.reports.report import REPORT, write_report
from finetune.testing.demo import (
    KNOWN_SHAPES,
    NEW_SHAPE,
    Scene,
    classify,
    concept_distance,
    held_out,
    install_demo_model,
    lesson,
    write_clips,
)
from finetune.trainers.loop import TrainReport, train
from finetune.trainers.tracking import tensorboard_command

_MARKER = ".quickstart"
"""In a folder that a quickstart has made."""

CONFIG = Path(__file__).parent.parent / "templates" / "quickstart.yaml"

NUM_INFERENCE_STEPS, GUIDANCE = 25, 3.0
"""Of the videos that are compared in the end; as in ``CONFIG``."""

NEW_SCENES = tuple(held_out())
"""Colours and motions of the ring that training never combines."""

OLD_SCENES = (
    Scene("circle", "red", "up"),
    Scene("square", "blue", "left"),
    Scene("triangle", "green", "right"),
    Scene("circle", "yellow", "down"),
)


@dataclass(frozen=True)
class Outcome:
    """What the lesson changed, in numbers that a test can hold on to; pairs are without and with the adapter."""

    train: TrainReport
    export: ExportReport
    distances: tuple[float, float]
    """Mean distance of the videos for ring captions from real rings, 0 (a ring) to 1 (nothing like one)."""
    rings: tuple[int, int]
    """Ring captions whose video shows a ring, of ``len(NEW_SCENES)``."""
    old: tuple[int, int]
    """Captions of old shapes whose video shows that shape, of ``len(OLD_SCENES)``."""
    picture: Path


def main(folder: Path) -> Outcome | TrainReport:
    """Run the whole lesson in ``folder``; a second call finds its cache, and its training finished.

    Returns:
        What changed; the training's report if a signal stopped it, which ends the lesson until the next call.

    Raises:
        ConfigError: if the folder holds what others put there.
        FinetuneError: as the steps do.
    """
    torch.set_num_threads(1)  # more gain nothing on so small a model, and wait for each other where a machine is busy
    made = all((folder / name).is_file() for name in ("model/model_index.json", "heldout/metadata.jsonl"))
    if folder.is_dir() and any(folder.iterdir()) and not (made or (folder / _MARKER).is_file()):
        raise ConfigError(
            "the folder holds files that no quickstart made",
            where=str(folder),
            fix="name a new or empty one with --output",
        )
    atomic_write_text(folder / _MARKER, "Made by `finetune quickstart`, which writes into no folder of others.\n")
    _say(1, "a tiny CogVideoX that knows circles, squares and triangles, and clips of a shape it has never seen")
    install_demo_model(folder / "model")
    write_clips(folder / "clips", lesson())
    write_clips(folder / "heldout", held_out())
    if not (folder / "run.yaml").exists():  # or it may have been edited since
        atomic_write_text(folder / "run.yaml", CONFIG.read_text(encoding="utf-8"))
    config = load_config(folder / "run.yaml")

    _say(2, "precompute: clips through the VAE, captions through T5, once")
    prepared = precompute(config)
    print(prepared)
    if not any(prepared.encoded.values()):
        print("the cache of an earlier run holds everything: nothing was encoded")

    _say(3, "train a LoRA")
    begun = time.perf_counter()
    trained = train(config)
    if trained.stopped_by:
        print(trained)
        return trained
    print(f"{trained}\ntraining took {time.perf_counter() - begun:.0f} s")

    _say(4, "export, reload through the stock diffusers pipeline, compare")
    exported = export(trained.run_dir, None, ExportOptions())
    print(exported)

    _say(5, "sample the same captions with the same seeds, without and with the adapter")
    base = _sample(folder, "base", ())
    adapted = _sample(folder, "adapter", (AdapterArgument(exported.folder),))
    scenes, new = (*NEW_SCENES, *OLD_SCENES), len(NEW_SCENES)
    rows = [(scene.caption, list(pair)) for scene, *pair in zip(scenes, base, adapted, strict=True)]
    outcome = Outcome(
        train=trained,
        export=exported,
        distances=(concept_distance(base[:new]), concept_distance(adapted[:new])),
        rings=(_recognised(base[:new], NEW_SCENES), _recognised(adapted[:new], NEW_SCENES)),
        old=(_recognised(base[new:], OLD_SCENES), _recognised(adapted[new:], OLD_SCENES)),
        picture=side_by_side(rows, ["base model", "with the adapter"], folder / "before_and_after.png"),
    )
    write_report([trained.run_dir], trained.run_dir / REPORT)
    print(_summary(folder, outcome))
    return outcome


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/5] {what}", flush=True)


def _sample(folder: Path, name: str, adapters: tuple[AdapterArgument, ...]) -> Sequence[Frames]:
    scenes = (*NEW_SCENES, *OLD_SCENES)
    report = generate(
        GenerateRequest(
            base=str(folder / "model"),
            prompts=tuple(VideoPrompt(prompt=scene.caption, seed=seed) for seed, scene in enumerate(scenes)),
            out=folder / "samples" / name,
            adapters=adapters,
            fps=8,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE,
        )
    )
    print(f"{name}: {len(report.videos)} videos in {folder / 'samples' / name}")
    return report.frames


def _recognised(videos: Sequence[Frames], scenes: Sequence[Scene]) -> int:
    return sum(classify(video).shape == scene.shape for video, scene in zip(videos, scenes, strict=True))


def _summary(folder: Path, outcome: Outcome) -> str:
    before, after = outcome.train.heldout_before, outcome.train.heldout_after
    loss = "not measured" if before is None or after is None else f"{before:.4f} before, {after:.4f} after"
    new, old, run, rings = len(NEW_SCENES), len(OLD_SCENES), outcome.train.run_dir, outcome.rings
    return f"""
What changed
  held-out loss        {loss}
  a {NEW_SHAPE} when asked     {rings[0]} of {new} before, {rings[1]} of {new} after\
 (distance from real ones {outcome.distances[0]:.2f} -> {outcome.distances[1]:.2f})
  {", ".join(KNOWN_SHAPES)} still right   {outcome.old[0]} of {old} before, {outcome.old[1]} of {old} after

What there is
  {outcome.picture}    look at this first
  {from_here(run / REPORT)}    the run in a browser: curves, samples, clips, and what to do next
  {from_here(outcome.export.folder)}    the adapter, for diffusers' load_lora_weights
  {from_here(run)}    checkpoints, sampled videos, curves: {tensorboard_command(run)}
  {folder / "run.yaml"}    the configuration that made it

Next, on your own clips (a folder of videos with a .txt caption beside each)
  finetune init --model 5b --method lora --card 24GB --data YOUR_CLIPS --output run.yaml
  finetune doctor --config run.yaml"""
