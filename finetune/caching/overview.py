"""What follows from a configuration, its model's JSON and its clips' headers: numbers with their units."""

from __future__ import annotations

from collections.abc import Sequence

from finetune.caching.report import PlannedClip
from finetune.config import RunConfig
from finetune.facts import Facts
from finetune.holdout import choose_holdout
from finetune.schedule import Item, StepPlan
from finetune.types import Bucket


def overview(config: RunConfig, facts: Facts, clips: Sequence[PlannedClip]) -> list[tuple[str, str]]:
    """Derived numbers as (label, value), for one process.

    Args:
        config: the run's configuration.
        facts: of its model.
        clips: all clips of the dataset, from ``check_dataset``. Which videos ``data.holdout`` takes depends on their
            bytes, which are not read here; how many it takes does not, so counts of clips may be off by a few where
            videos give several clips.
    """
    candidates = [clip for clip in clips if not clip.holdout]
    drawn = choose_holdout([str(clip.sample.video) for clip in candidates], config.data.holdout)
    training = [clip for clip in candidates if str(clip.sample.video) not in drawn]
    held_out = len(clips) - len(training)
    train = config.train
    plan = StepPlan(
        items=tuple(Item(clip.plan.bucket, clip.sample.repeats) for clip in training),
        seed=train.seed,
        batch_size=train.batch_size,
        micro_batches=train.accumulation,
    )
    steps = train.steps or plan.steps_for_epochs(train.epochs or 1)
    kind = "image-to-video" if facts.image_to_video else "text-to-video"
    return [
        ("model", f"{config.model.pretrained}, {kind}, {facts.num_layers} blocks, dtype {config.model.dtype}"),
        *(("bucket", _size(facts, bucket)) for bucket in sorted({clip.plan.bucket for clip in clips}, key=str)),
        ("clips", f"{len(training)} to train on, {held_out} held out"),
        ("effective batch", f"{train.batch_size} x {train.accumulation} accumulation, times the number of processes"),
        ("epoch", f"{plan.samples_per_epoch} clips with repeats, {plan.steps_per_epoch:.2f} steps on one process"),
        ("steps", f"{steps}, {steps / plan.steps_per_epoch:.2f} epochs on one process"),
        ("method", config.method.kind),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("output", str(config.output_dir)),
    ]


def _size(facts: Facts, bucket: Bucket) -> str:
    channels, frames, height, width = facts.latent_shape(bucket)
    padding = facts.front_padding(frames)
    padded = f" + {padding} in front" if padding else ""
    shape = f"{channels} channels x {frames}{padded} frames x {height} x {width}"
    return f"{bucket}: latents of {shape}, {facts.tokens(bucket):,} tokens with text"
