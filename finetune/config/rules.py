"""Cross-field rules: what no section can see alone, checked against the model's own JSON before a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from finetune.config.schema import RunConfig
from finetune.config.traits import memory_errors, memory_traits
from finetune.errors import ConfigError, raise_all
from finetune.facts import Facts
from finetune.text import holds_word
from finetune.trainers.method import LoraMethod


class Findings(NamedTuple):
    """What a check found: errors make the run impossible, warnings (whole sentences with their place) are advice."""

    errors: tuple[ConfigError, ...]
    warnings: tuple[str, ...]


def check_against(config: RunConfig, facts: Facts) -> Findings:
    """Check a configuration against the facts of its model; nothing is raised and no file but images is looked at."""
    errors = [*_bucket_errors(config, facts), *_sample_errors(config, facts), *_run_errors(config, facts)]
    warnings = [
        *_bucket_warnings(config, facts),
        *_model_warnings(config, facts),
        *_method_warnings(config),
        *_run_warnings(config),
    ]
    return Findings(tuple(errors), tuple(f"{said} [{config.where(path)}]" for path, said in warnings))


def require_valid(config: RunConfig, facts: Facts) -> tuple[str, ...]:
    """Raise every error of ``check_against`` as one; return its warnings.

    Raises:
        ConfigError: naming each fault with its line.
    """
    findings = check_against(config, facts)
    raise_all(ConfigError, findings.errors, what="{n} faults in the configuration for this model", limit=1000)
    return findings.warnings


def _bucket_errors(config: RunConfig, facts: Facts) -> Iterator[ConfigError]:
    buckets = {f"data.buckets.{index}": bucket for index, bucket in enumerate(config.data.buckets)}
    if config.validation.bucket is not None:
        buckets["validation.bucket"] = config.validation.bucket
    for path, bucket in buckets.items():
        for fault in facts.check_bucket(bucket):
            yield ConfigError(fault, where=config.where(path))


def _sample_errors(config: RunConfig, facts: Facts) -> Iterator[ConfigError]:
    for index, sample in enumerate(config.validation.samples):
        path = f"validation.samples.{index}"
        if facts.image_to_video and sample.image is None:
            yield ConfigError(
                "an image-to-video model samples from an image, and this prompt has none",
                where=config.where(path),
                fix="add `image: PATH` beside the prompt",
            )
        elif sample.image is not None and not facts.image_to_video:
            yield ConfigError(
                "a text-to-video model takes no image",
                where=config.where(f"{path}.image"),
                fix="remove the image, or choose an image-to-video model",
            )
        elif sample.image is not None and config.cache.mode != "require" and not sample.image.is_file():
            yield ConfigError(f"there is no image {sample.image}", where=config.where(f"{path}.image"))
    if config.validation.timesteps > facts.num_train_timesteps:
        yield ConfigError(
            f"{config.validation.timesteps} timesteps are wanted; the model has {facts.num_train_timesteps}",
            where=config.where("validation.timesteps"),
        )


def _run_errors(config: RunConfig, facts: Facts) -> Iterator[ConfigError]:
    if all(source.split == "holdout" for source in config.data.sources):
        yield ConfigError(
            "every source is held out, so there is nothing to train on",
            where=config.where("data.sources"),
            fix="leave `split: holdout` out of at least one source",
        )
    if config.model.dtype == "fp16" and config.method.kind == "full":
        yield ConfigError(
            "full fine-tuning in fp16 would lose small gradients: fp16 has no digits below 6e-8",
            where=config.where("model.dtype"),
            fix="set model.dtype: bf16, or train a LoRA, whose gradients are float32",
        )
    yield from memory_errors(config, memory_traits(config, facts))
    yield from _output_errors(config)
    if config.output_dir.exists() and not config.output_dir.is_dir():
        yield ConfigError(f"{config.output_dir} is a file, not a folder", where=config.where("output_dir"))


def _output_errors(config: RunConfig) -> Iterator[ConfigError]:
    """A run's folder is written into, pruned and emptied: it must not be one that holds something else."""
    output = config.output_dir.resolve()
    taken = {Path(os.environ.get("HOME", "/")).resolve(): "the home folder"}
    taken[Path("/").resolve()] = "the root of the file system"
    inside = {config.cache.dir.resolve(): "the cache's folder"}
    if (model := Path(config.model.pretrained)).is_dir():
        inside[model.resolve()] = "the model's folder"
    for source in config.data.sources:
        if source.kind == "folder":  # all that is in it is read, and so would be the run's samples
            inside[source.path.resolve()] = "a folder of clips"
        else:
            folder = source.path.parent if source.path.is_file() else source.path
            taken[folder.resolve()] = "the folder of a dataset"
    for folder, what in {**taken, **inside}.items():
        if output == folder or (folder in inside and folder in output.parents):
            yield ConfigError(
                f"the run's folder is {'' if output == folder else 'inside '}{what}",
                where=config.where("output_dir"),
                fix="name a folder of its own, such as runs/NAME",
            )


def _bucket_warnings(config: RunConfig, facts: Facts) -> Iterator[tuple[str, str]]:
    for index, bucket in enumerate(config.data.buckets):
        for advice in () if facts.check_bucket(bucket) else facts.advise_bucket(bucket):
            yield f"data.buckets.{index}", advice
    fps = config.data.fps
    if fps is not None and fps != facts.native_fps and config.data.span != "uniform":
        yield (
            "data.fps",
            f"clips are cut at {fps:g} frames per second; the model was made for {facts.native_fps}, and learns to "
            f"move {facts.native_fps / fps:.2g} times as fast as the footage",
        )


def _model_warnings(config: RunConfig, facts: Facts) -> Iterator[tuple[str, str]]:
    # Of the published models only the 2B, the one without rotary positions, was trained in fp16.
    if config.model.dtype == "fp16" and facts.use_rotary:
        yield "model.dtype", "this model was trained in bf16; in fp16 its activations can overflow (use bf16)"
    if not facts.image_to_video:
        for section, name in ((config.data, "image_dropout"), (config.cache, "image_draws")):
            if getattr(section, name) != type(section).model_fields[name].default:
                where = f"{'data' if section is config.data else 'cache'}.{name}"
                yield where, f"{name} has no effect: this is a text-to-video model"
    if config.data.unconditional_text == "zeros" and config.data.caption_dropout > 0:
        yield (
            "data.unconditional_text",
            'the model learns zeros as "no caption", and diffusers samples with the embedding of the empty caption',
        )


def _method_warnings(config: RunConfig) -> Iterator[tuple[str, str]]:
    method = config.method
    if not isinstance(method, LoraMethod):
        return
    if method.use_rslora and method.scaling > 2:
        yield (
            "method.use_rslora",
            f"rsLoRA scales by alpha / sqrt(rank), here {method.scaling:.3g} where plain LoRA would have "
            f"{method.alpha / method.rank:.3g}: lower method.alpha or the learning rate",
        )
    if method.use_dora and method.dropout > 0:
        yield "method.use_dora", "DoRA with dropout recomputes the base layer a second time in each step: it is slow"


def _run_warnings(config: RunConfig) -> Iterator[tuple[str, str]]:
    steps, warmup = config.train.steps, config.lr_schedule.warmup_steps
    if steps is not None and 0 < steps <= warmup:
        yield (
            "lr_schedule.warmup_steps",
            f"the run ends in its warm-up: {steps} steps with a warm-up of {warmup} never reach the learning rate",
        )
    held_out = config.data.holdout > 0 or any(source.split == "holdout" for source in config.data.sources)
    if config.validation.every is not None and not held_out:
        yield (
            "data.holdout",
            "no clip is held out, so no held-out loss is measured and overfitting stays unseen "
            "(set data.holdout, or validation.every: null)",
        )
    trigger, prompts = config.data.trigger.strip(), [sample.prompt for sample in config.validation.samples]
    if prompts and not any(holds_word(prompt, trigger) for prompt in prompts):
        yield (
            "validation.samples",
            f"no sampled prompt holds the trigger word {trigger!r}, so the videos will not show what is learnt",
        )
    if config.validation.every is None and held_out:
        yield "validation.every", "clips are held out, but validation.every is null: nothing is measured on them"
