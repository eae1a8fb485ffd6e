"""The first hour in minutes: teach a tiny CogVideoX a shape that it has never seen, by the package's own commands.

Nothing here is a shortcut: the clips are H.264 files, the model is a diffusers pipeline folder, and what runs is what
runs on one's own clips. ``main`` only puts the steps in a row and says what came of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.caching.precompute import precompute
from finetune.config.loading import load_config
from finetune.convert.export import ExportReport, export
from finetune.core.files import atomic_write_text, from_here
from finetune.core.types import SamplePrompt
from finetune.inference.generate import GenerateReport, generate
from finetune.inference.request import AdapterArgument, GenerateRequest
from finetune.inference.videos import Frames, side_by_side
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

CONFIG = """\
# What `finetune quickstart` runs. With your model and your clips it is a real run: `finetune init` writes one.
model:
  pretrained: model            # a diffusers folder; on the hub it would be zai-org/CogVideoX-5b

data:
  sources:
    - path: clips              # clips of the new shape, and a few of the old ones so that they are not forgotten
    - path: heldout            # rings in colours and motions that training never combines
      split: holdout
  buckets: [9x64x64]           # frames x height x width
  fps: 8

cache:
  dir: cache

method:
  kind: lora
  rank: 16
  alpha: 16
  targets: attention+ff

optimizer:
  kind: adamw8bit
  lr: 2.0e-3

lr_schedule:
  kind: cosine
  warmup_steps: 20
  final: 0.05

train:
  steps: 600
  batch_size: 8
  seed: 0

memory:
  checkpointing: none          # the model is tiny; on a real one `full` saves most of the memory

validation:
  every: 200                   # held-out loss, and the same on training clips
  clips: 8
  samples:
    - {prompt: a yellow ring moving left, seed: 1}
    - {prompt: a red circle moving up, seed: 2}
  sample_every: 300
  num_inference_steps: 25
  guidance_scale: 3.0

checkpoint:
  every: 300

tracking:
  console_interval_s: 5

output_dir: run
"""

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
    """What the lesson changed, in numbers that a test can hold on to."""

    train: TrainReport
    export: ExportReport
    base_distance: float
    """Mean distance of the base's videos for ring captions from real rings, 0 (a ring) to 1 (nothing like one)."""
    adapter_distance: float
    """The same with the adapter."""
    rings_before: int
    """Ring captions whose video shows a ring, of ``len(NEW_SCENES)``, without the adapter."""
    rings_after: int
    old_before: int
    """Captions of old shapes whose video shows that shape, of ``len(OLD_SCENES)``, without the adapter."""
    old_after: int
    picture: Path


def main(folder: Path) -> Outcome | TrainReport:
    """Run the whole lesson in ``folder``; a second call finds its cache, and its training finished.

    Returns:
        What changed; the training's report if a signal stopped it, which ends the lesson until the next call.

    Raises:
        FinetuneError: as the steps do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _say(1, "a tiny CogVideoX that knows circles, squares and triangles, and clips of a shape it has never seen")
    install_demo_model(folder / "model")
    write_clips(folder / "clips", lesson())
    write_clips(folder / "heldout", held_out())
    atomic_write_text(folder / "run.yaml", CONFIG)
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
    exported = export(trained.run_dir)
    print(exported)

    _say(5, "sample the same captions with the same seeds, without and with the adapter")
    base = _sample(folder, "base", ())
    adapted = _sample(folder, "adapter", (AdapterArgument(exported.folder),))
    scenes = [*NEW_SCENES, *OLD_SCENES]
    rows = [(scene.caption, list(pair)) for scene, *pair in zip(scenes, base.frames, adapted.frames, strict=True)]
    picture = side_by_side(rows, ["base model", "with the adapter"], folder / "before_and_after.png")

    new = len(NEW_SCENES)
    outcome = Outcome(
        train=trained,
        export=exported,
        base_distance=concept_distance(base.frames[:new]),
        adapter_distance=concept_distance(adapted.frames[:new]),
        rings_before=_recognised(base.frames[:new], NEW_SCENES),
        rings_after=_recognised(adapted.frames[:new], NEW_SCENES),
        old_before=_recognised(base.frames[new:], OLD_SCENES),
        old_after=_recognised(adapted.frames[new:], OLD_SCENES),
        picture=picture,
    )
    print(_summary(folder, outcome))
    return outcome


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/5] {what}", flush=True)


def _sample(folder: Path, name: str, adapters: tuple[AdapterArgument, ...]) -> GenerateReport:
    scenes = (*NEW_SCENES, *OLD_SCENES)
    report = generate(
        GenerateRequest(
            base=str(folder / "model"),
            prompts=tuple(SamplePrompt(prompt=scene.caption, seed=seed) for seed, scene in enumerate(scenes)),
            out=folder / "samples" / name,
            adapters=adapters,
            fps=8,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE,
        )
    )
    print(f"{name}: {len(report.videos)} videos in {folder / 'samples' / name}")
    return report


def _recognised(videos: Sequence[Frames], scenes: Sequence[Scene]) -> int:
    return sum(classify(video).shape == scene.shape for video, scene in zip(videos, scenes, strict=True))


def _summary(folder: Path, outcome: Outcome) -> str:
    before, after = outcome.train.heldout_before, outcome.train.heldout_after
    loss = "not measured" if before is None or after is None else f"{before:.4f} before, {after:.4f} after"
    new, old, run = len(NEW_SCENES), len(OLD_SCENES), outcome.train.run_dir
    return f"""
What changed
  held-out loss        {loss}
  a {NEW_SHAPE} when asked     {outcome.rings_before} of {new} before, {outcome.rings_after} of {new} after\
 (distance from real ones {outcome.base_distance:.2f} -> {outcome.adapter_distance:.2f})
  {", ".join(KNOWN_SHAPES)} still right   {outcome.old_before} of {old} before, {outcome.old_after} of {old} after

What there is
  {outcome.picture}    look at this first
  {from_here(outcome.export.folder)}    the adapter, for diffusers' load_lora_weights
  {from_here(run)}    checkpoints, sampled videos, curves: {tensorboard_command(run)}
  {folder / "run.yaml"}    the configuration that made it

Next, on your own clips (a folder of videos with a .txt caption beside each)
  finetune init --model 5b --method lora --card 24GB --data YOUR_CLIPS --output run.yaml
  finetune check --config run.yaml"""
