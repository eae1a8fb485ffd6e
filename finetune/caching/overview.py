"""What follows from a configuration, its model's JSON and its clips' headers: numbers with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune.caching.plan import held_out
from finetune.caching.report import PlannedClip
from finetune.config import RunConfig
from finetune.facts import Facts
from finetune.schedule import Item, StepPlan
from finetune.types import Bucket

MOST_EPOCHS = 100
"""How often a clip may be seen before a run is told of it: docs/training.md has 50 to 100 for ten clips."""


def run_advice(config: RunConfig, plan: StepPlan, steps: int, *, held: int) -> list[str]:
    """What a person should know of a run's length and of what it is measured on, before the first step.

    Args:
        config: the run's configuration.
        plan: over its training clips.
        steps: in all.
        held: number of different videos that are kept out of training.
    """
    advice = []
    asked = config.data.holdout
    if not held and (asked or any(source.split == "holdout" for source in config.data.sources)):
        why = (
            f"data.holdout is {asked:g}, and no video can be spared"
            if asked
            else "none of the held-out sources is left"
        )
        advice.append(f"no clip is held out, so no held-out loss is measured and overfitting stays unseen: {why}")
    elif 1 <= held < asked:
        advice.append(f"data.holdout asks for {asked:g} videos, and {held} can be kept out: training needs one")
    epochs = steps / plan.steps_per_epoch
    times = epochs * max(item.repeats for item in plan.items)
    if times > MOST_EPOCHS:
        advice.append(
            f"{len(plan.items)} clips for {steps} steps are {epochs:.5g} epochs: what is seen {times:.5g} times is"
            f" learnt by heart. Lower train.steps to {max(1, round(steps * MOST_EPOCHS / times))} or less, or add clips"
            " (docs/training.md says how many suit what)"
        )
    return advice


def overview(
    config: RunConfig, facts: Facts, clips: Sequence[PlannedClip], identities: Mapping[Path, str]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Derived numbers as (label, value), for one process; and advice on them.

    Args:
        config: the run's configuration.
        facts: of its model.
        clips: all clips of the dataset, from ``check_dataset``.
        identities: of their videos, from ``plan.identities``.
    """
    split = held_out(clips, identities, config.data.holdout)
    training = [clip for clip, is_held in zip(clips, split, strict=True) if not is_held]
    train = config.train
    plan = StepPlan(
        items=tuple(Item(clip.plan.bucket, clip.sample.repeats) for clip in training),
        seed=train.seed,
        batch_size=train.batch_size,
        micro_batches=train.accumulation,
    )
    steps = train.steps or plan.steps_for_epochs(train.epochs or 1)
    held = {identities[clip.sample.video] for clip, is_held in zip(clips, split, strict=True) if is_held}
    kind = "image-to-video" if facts.image_to_video else "text-to-video"
    numbers = [
        ("model", f"{config.model.pretrained}, {kind}, {facts.num_layers} blocks, dtype {config.model.dtype}"),
        *(("bucket", _size(facts, bucket)) for bucket in sorted({clip.plan.bucket for clip in clips}, key=str)),
        ("clips", f"{len(training)} to train on, {sum(split)} held out"),
        ("effective batch", f"{train.batch_size} x {train.accumulation} accumulation, times the number of processes"),
        ("epoch", f"{plan.samples_per_epoch} clips with repeats, {plan.steps_per_epoch:.2f} steps on one process"),
        ("steps", f"{steps}, {steps / plan.steps_per_epoch:.2f} epochs on one process"),
        ("method", config.method.kind),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("output", str(config.output_dir)),
    ]
    return numbers, run_advice(config, plan, steps, held=len(held))


def _size(facts: Facts, bucket: Bucket) -> str:
    channels, frames, height, width = facts.latent_shape(bucket)
    padding = facts.front_padding(frames)
    padded = f" + {padding} in front" if padding else ""
    shape = f"{channels} channels x {frames}{padded} frames x {height} x {width}"
    return f"{bucket}: latents of {shape}, {facts.tokens(bucket):,} tokens with text"
