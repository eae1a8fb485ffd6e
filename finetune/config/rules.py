"""What no section can see alone: which memory techniques a run may use, rules across fields, the model's version.

Checked against the model's own JSON, before a weight is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from finetune.checkpoint.folders import list_checkpoints
from finetune.cogvideox.config import BandedTimesteps
from finetune.cogvideox.model_files import canonical_name, is_commit, pin_revision
from finetune.cogvideox.riflex import makes_possible, riflex_fault
from finetune.cogvideox.spec import ModelSpec
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, raise_all
from finetune.core.text import holds_word
from finetune.memory.config import Traits
from finetune.methods.adapter import pinned
from finetune.methods.lokr import LokrMethod
from finetune.methods.lora import LoraMethod
from finetune.optim.optimizers import CustomOptimizer
from finetune.parallel.config import context_faults


def memory_traits(config: RunConfig, spec: ModelSpec, *, processes: int = 1, sharded: bool = False) -> Traits:
    """The traits of a run.

    Args:
        config: of the run.
        spec: of its model.
        processes: of the launch.
        sharded: whether FSDP2 or ZeRO spreads the model over them.
    """
    method = config.method
    lora = method if isinstance(method, LoraMethod) else None
    return Traits(
        full=method.kind == "full",
        adapts_adaln=method.kind != "full" and any(map(method.matches, _modulation(spec))),
        dora=lora is not None and lora.use_dora,
        lokr=method.kind == "lokr",
        divided_masks=lora is not None and lora.dropout > 0 and config.parallel.context > 1,
        processes=processes,
        sharded=sharded,
        accumulation=config.train.accumulation,
        batch_size=config.train.batch_size,
    )


def memory_errors(config: RunConfig, traits: Traits) -> list[ConfigError]:
    """What of the memory section cannot be used in a run of such traits, each with the place where it is written."""
    return [
        ConfigError(fault.what, where=config.where(f"memory.{fault.option}"), fix=fault.fix)
        for fault in config.memory.faults(traits)
    ]


def _modulation(spec: ModelSpec) -> list[str]:
    """Names of the linear layers between the timestep and the blocks' scales, shifts and gates."""
    embeddings = [f"{name}.linear_{part}" for name in ("time_embedding", "ofs_embedding") for part in (1, 2)]
    blocks = [f"transformer_blocks.{index}.norm{part}.linear" for index in range(spec.num_layers) for part in (1, 2)]
    return embeddings + blocks


# -------------------------------------------------------------------------------------------------- rules across fields


class Findings(NamedTuple):
    """What a check found: errors make the run impossible, warnings (whole sentences with their place) are advice."""

    errors: tuple[ConfigError, ...]
    warnings: tuple[str, ...]


def check_against(config: RunConfig, spec: ModelSpec) -> Findings:
    """Check a configuration against the spec of its model; nothing is raised and no file but images is looked at."""
    return Findings(
        tuple(
            ConfigError(what, where=config.where(at), fix=fix)
            for wrong, at, what, fix in _errors(config, spec)
            if wrong
        ),
        tuple(f"{advice} [{config.where(at)}]" for unwise, at, advice in _warnings(config, spec) if unwise),
    )


def require_valid(config: RunConfig, spec: ModelSpec) -> tuple[str, ...]:
    """Raise every error of ``check_against`` as one; return its warnings.

    Raises:
        ConfigError: naming each fault with its line.
    """
    findings = check_against(config, spec)
    raise_all(ConfigError, findings.errors, what="{n} faults in the configuration for this model", limit=1000)
    return findings.warnings


def require_start(config: RunConfig) -> None:
    """Refuse adapters to begin with, or on, that are not there or are of another kind, before clips are encoded.

    Raises:
        ConfigError: for the first of them.
    """
    if config.model.adapters:
        from finetune.methods.merged_base import require_readable  # which imports torch

        require_readable(config.model)
    method, resume = config.method, config.checkpoint.resume
    is_new = resume == "none" or (resume == "latest" and not list_checkpoints(config.output_dir))
    if is_new and isinstance(method, LoraMethod) and method.init_from is not None:
        method.read_start(method.init_from)


def _errors(config: RunConfig, spec: ModelSpec) -> Iterator[tuple[bool, str, str, str]]:
    """(whether it is so, path, what, fix) of all that makes the run impossible."""
    validation, image_to_video = config.validation, spec.image_to_video
    if (unfit := riflex_fault(spec)) is not None:
        yield True, "model.riflex", *unfit
    buckets = {f"data.buckets.{index}": bucket for index, bucket in enumerate(config.data.buckets)}
    buckets |= {f"data.image_buckets.{index}": bucket for index, bucket in enumerate(config.data.image_buckets or ())}
    if validation.bucket is not None:
        buckets["validation.bucket"] = validation.bucket
    for index, source in enumerate(config.data.sources):
        what = "an image-to-video model learns nothing from a still image, which is the very frame that it is given"
        fix = "leave images: true out, or choose a text-to-video model"
        yield source.images and image_to_video, f"data.sources.{index}.images", what, fix
        what = "a dataset that is read as a stream names no control videos, and this model follows one"
        fix = "leave stream_room out and name the videos in a table, or leave model.control out"
        path = f"data.sources.{index}.stream_room"
        yield spec.control and getattr(source, "stream_room", None) is not None, path, what, fix
    for path, bucket in buckets.items():
        fix = f"set model.riflex: {bucket.frames} for longer videos" if makes_possible(spec, bucket) else ""
        for fault in spec.check_bucket(bucket):
            yield True, path, fault, fix
    for index, sample in enumerate(validation.samples):
        path, images = f"validation.samples.{index}", sample.images
        field = next((name for name in ("image", "last_image", "keyframes") if getattr(sample, name)), "image")
        what = "an image-to-video model samples from an image, and this prompt has none"
        yield image_to_video and not images, path, what, "add `image: PATH` beside the prompt"
        fix = "remove the image, or choose an image-to-video model"
        yield bool(images) and not image_to_video, f"{path}.{field}", f"a {spec.task} model takes no image", fix
        what = "the model samples along a control video, and this prompt has none"
        yield spec.control and sample.control is None, path, what, "add `control: PATH` beside the prompt"
        what, fix = f"the model is {spec.task} and takes no control video", "remove it, or set model.control: true"
        yield sample.control is not None and not spec.control, f"{path}.control", what, fix
        if sample.control is not None and spec.control and config.cache.mode != "require":
            yield not sample.control.is_file(), f"{path}.control", f"there is no video {sample.control}", ""
        if image_to_video:
            for fault in sample.image_faults((validation.bucket or config.data.buckets[0]).frames, spec.vae_temporal):
                yield True, f"{path}.keyframes", fault, ""
        for image in images if image_to_video and config.cache.mode != "require" else ():
            field = {sample.image: "image", sample.last_image: "last_image"}.get(image, "keyframes")
            yield not image.is_file(), f"{path}.{field}", f"there is no image {image}", ""
    frames = config.data.condition_frames.kind
    what = f"a text-to-video model is given no frames, and {frames} is wanted"
    fix = "leave data.condition_frames out, or choose an image-to-video model"
    yield frames != "first" and not image_to_video, "data.condition_frames", what, fix
    most = spec.num_train_timesteps
    what = f"{validation.timesteps} timesteps are wanted; the model has {most}"
    yield validation.timesteps > most, "validation.timesteps", what, ""
    if isinstance(sampling := config.objective.timesteps, BandedTimesteps):
        for index, band in enumerate(sampling.bands):
            what = f"the band ends at timestep {band.last}; the model's timesteps are 0 to {most - 1}"
            yield band.last >= most, f"objective.timesteps.bands.{index}.last", what, f"set last: {most - 1}"
    nothing_left = all(source.split == "holdout" for source in config.data.sources)
    what = "every source is held out, so there is nothing to train on"
    yield nothing_left, "data.sources", what, "leave `split: holdout` out of at least one source"
    for index, source in enumerate(config.data.sources):
        path = f"data.sources.{index}.prior_preservation"
        what = "full fine-tuning changes the base model itself, and so has nothing left to ask what that would predict"
        fix = "train a LoRA, or leave prior_preservation out: its clips are then trained on like all others"
        yield source.prior_preservation and config.method.kind == "full", path, what, fix
    trained = [source for source in config.data.sources if source.split == "train"]
    what = "every source is for prior preservation, so the model can only stay what it is"
    idle = bool(trained) and all(source.prior_preservation for source in trained)
    yield idle, "data.sources", what, "add a source of the clips that are to be learnt"
    what = "full fine-tuning in fp16 would lose small gradients: fp16 has no digits below 6e-8"
    fix = "set model.dtype: bf16, or train a LoRA, whose gradients are float32"
    yield config.model.dtype == "fp16" and config.method.kind == "full", "model.dtype", what, fix
    context = config.parallel.context
    if context > 1:
        sampled = [validation.bucket] if validation.bucket is not None else []
        for what, most in context_faults(spec, dict.fromkeys([*config.data.trained_buckets, *sampled]), context):
            yield True, "parallel.context", what, f"set parallel.context to at most {most}"
    what = "math forms attention in many operations, and selective checkpointing keeps what one of them gives"
    wrong = config.model.attention == "math" and config.memory.checkpointing == "selective"
    yield wrong, "model.attention", what, "set model.attention: auto, or memory.checkpointing: full"
    for unusable in config.memory.faults(memory_traits(config, spec)):
        yield True, f"memory.{unusable.option}", unusable.what, unusable.fix
    if config.method.kind != "full":
        try:
            config.method.select(spec.linear_layers)
        except ConfigError as unmatched:
            yield True, unmatched.where, unmatched.what, unmatched.fix
    lokr = isinstance(config.method, LokrMethod)
    beside = {
        "model.control": (
            spec.control,
            "the projection of a control video trains beside a LoRA, and not beside a LoKr",
        ),
        "model.adapters": (
            bool(config.model.adapters),
            "a LoKr would act only on a base with these LoRAs merged into it, beside which diffusers does not load it",
        ),
        "parallel.context": (context > 1, "processes that divide a clip's tokens train a LoRA, and not a LoKr"),
    }
    for path, (wrong, what) in beside.items():
        yield lokr and wrong, path, what, "leave it out, or set method.kind: lora"
    release = tuple(map(int, version("diffusers").split(".")[:2]))
    what = f"diffusers {version('diffusers')} is installed, and loads no LoKr: nobody could use what is trained"
    fix = "update diffusers to 0.42 or later, or set method.kind: lora"
    yield lokr and release < (0, 42), "method.kind", what, fix
    optimizer = config.optimizer
    couples = isinstance(optimizer, CustomOptimizer) and not optimizer.in_torch
    what = f"{optimizer.title} may look at all parameters together, and memory.gradient_release updates them one by one"
    fix = "set memory.gradient_release: none, or an optimizer of torch.optim"
    yield couples and config.memory.gradient_release != "none", "optimizer.name", what, fix
    if isinstance(optimizer, CustomOptimizer) and not optimizer.takes_vectors:
        if config.method.kind == "full":
            others = "full fine-tuning trains biases and norms as well"
        elif isinstance(config.method, LoraMethod) and config.method.use_dora:
            others = "a DoRA trains magnitudes as well"
        else:
            others = "with model.control a projection trains as well, bias and all" if config.model.control else ""
        what = f"{optimizer.title} updates matrices alone, and {others}"
        yield bool(others), "optimizer.name", what, "set optimizer.kind: adamw8bit, or name another optimizer"
    for folder in _other_folders(config):
        yield True, "output_dir", f"the run's folder is {folder}", "name a folder of its own, such as runs/NAME"
    output = config.output_dir
    yield output.exists() and not output.is_dir(), "output_dir", f"{output} is a file, not a folder", ""


def _other_folders(config: RunConfig) -> Iterator[str]:
    """What the run's folder is, or is inside of, that it must not be: it is written into, pruned and emptied."""
    output = config.output_dir.resolve()
    taken = {Path(os.environ.get("HOME", "/")).resolve(): "the home folder"}
    taken[Path("/").resolve()] = "the root of the file system"
    inside = {config.cache.dir.resolve(): "the cache's folder"}
    if (model := Path(config.model.pretrained)).is_dir():
        inside[model.resolve()] = "the model's folder"
    for source in config.data.sources:
        if source.kind == "folder":  # all that is in it is read, and so would be the run's samples
            inside[source.path.resolve()] = "a folder of clips"
        elif source.kind != "hub":
            folder = source.path.parent if source.path.is_file() else source.path
            taken[folder.resolve()] = "the folder of a dataset"
    for folder, what in {**taken, **inside}.items():
        if output == folder:
            yield what
        elif folder in inside and folder in output.parents:
            yield f"inside {what}"


def _warnings(config: RunConfig, spec: ModelSpec) -> Iterator[tuple[bool, str, str]]:
    """(whether it is so, path, sentence) of all that is possible and unwise."""
    data, method, validation = config.data, config.method, config.validation
    for index, bucket in enumerate(data.buckets):
        for advice in () if spec.check_bucket(bucket) else spec.advise_bucket(bucket):
            yield True, f"data.buckets.{index}", advice
    for index, source in enumerate(data.sources):
        words = data.trigger if source.trigger is None else source.trigger
        advice = 'the trigger word is held to what the base model knows of it; set trigger: "" for this source'
        yield source.prior_preservation and bool(words.strip()), f"data.sources.{index}", advice
    unused = data.image_buckets is not None and not any(source.images for source in data.sources)
    yield unused, "data.image_buckets", "image_buckets has no effect: no source has images: true"
    fps = data.fps or spec.native_fps
    advice = (
        f"clips are cut at {fps:g} frames per second; the model was made for {spec.native_fps}, and learns to "
        f"move {spec.native_fps / fps:.2g} times as fast as the footage"
    )
    yield fps != spec.native_fps and data.span != "uniform", "data.fps", advice
    # Of the published models only the 2B, the one without rotary positions, was trained in fp16.
    advice = "this model was trained in bf16; in fp16 its activations can overflow (use bf16)"
    yield config.model.dtype == "fp16" and spec.use_rotary, "model.dtype", advice
    for section, name, holder in (("data", "image_dropout", data), ("cache", "image_draws", config.cache)):
        changed = getattr(holder, name) != type(holder).model_fields[name].default
        advice = f"{name} has no effect: this is a {spec.task} model"
        yield changed and not spec.image_to_video, f"{section}.{name}", advice
    changed = data.control_dropout != type(data).model_fields["control_dropout"].default
    advice = "control_dropout has no effect: this model follows no control video"
    yield changed and not spec.control, "data.control_dropout", advice
    advice = 'the model learns zeros as "no caption", and diffusers samples with the embedding of the empty caption'
    yield data.unconditional_text == "zeros" and data.caption_dropout > 0, "data.unconditional_text", advice
    if isinstance(method, LoraMethod):
        advice = (
            f"rsLoRA scales by alpha / sqrt(rank), here {method.scaling:.3g} where plain LoRA would have "
            f"{method.alpha / method.rank:.3g}: lower method.alpha or the learning rate"
        )
        yield method.use_rslora and method.scaling > 2, "method.use_rslora", advice
        advice = "DoRA with dropout recomputes the base layer a second time in each step: it is slow"
        yield method.use_dora and method.dropout > 0, "method.use_dora", advice
    steps, warmup = config.train.steps or 0, config.lr_schedule.warmup_steps
    advice = f"the run ends in its warm-up: {steps} steps with a warm-up of {warmup} never reach the learning rate"
    yield 0 < steps <= warmup, "lr_schedule.warmup_steps", advice
    held_out = data.holdout > 0 or any(source.split == "holdout" for source in data.sources)
    advice = (
        "no clip is held out, so no held-out loss is measured and overfitting stays unseen "
        "(set data.holdout, or validation.every: null)"
    )
    yield validation.every is not None and not held_out, "data.holdout", advice
    trigger, prompts = data.trigger.strip(), [sample.prompt for sample in validation.samples]
    without = bool(prompts) and not any(holds_word(prompt, trigger) for prompt in prompts)
    advice = f"no sampled prompt holds the trigger word {trigger!r}, so the videos will not show what is learnt"
    yield without, "validation.samples", advice
    advice = "clips are held out, but validation.every is null: nothing is measured on them"
    yield validation.every is None and held_out, "validation.every", advice


# ---------------------------------------------------------------------- the model's version: decided once, and recorded


def pin_model(config: RunConfig, decide: Callable[[Callable[[], Any]], Any] = lambda work: work()) -> RunConfig:
    """The same configuration with ``model.revision`` as a commit, which changes nothing for a model in a folder, and
    with the hash of every file in ``model.adapters``.

    A run that goes on uses the commit that it began with, also where its branch has moved since. If the configuration
    names another commit, it is left as it is, and the comparison with the checkpoint refuses it.

    Args:
        config: the run's.
        decide: runs a function where one process has to decide for all (``ProcessGroup.run_on_main``).

    Raises:
        ModelError: if the model or the revision cannot be found.
        ConfigError: if an adapter's file cannot be read.
    """
    model = config.model
    places = (config.where(f"model.adapters.{index}.path") for index in range(len(model.adapters)))
    adapters = decide(lambda: tuple(map(pinned, model.adapters, places))) if model.adapters else ()
    revision = decide(lambda: _revision_of(config))
    if (revision, adapters) == (model.revision, model.adapters):
        return config
    return config.model_copy(update={"model": model.model_copy(update={"revision": revision, "adapters": adapters})})


def _revision_of(config: RunConfig) -> str | None:
    model = config.model
    if not is_commit(model.revision) and (recorded := recorded_revision(config)) is not None:
        return recorded
    return pin_revision(model.pretrained, model.revision)


def recorded_revision(config: RunConfig) -> str | None:
    """The commit that the run in ``output_dir`` began with; None for a new run, or one of another or a local model.

    What cannot be read is no record here: whoever continues from the checkpoint reads it whole, and says what is wrong.
    """
    resume = config.checkpoint.resume
    if resume == "none":
        return None
    standing = [path for _, path in reversed(list_checkpoints(config.output_dir))]
    for folder in standing if resume == "latest" else [Path(resume)]:
        file = folder / "config.json"
        if not file.is_file():  # a pipe would keep us waiting
            continue
        try:
            recorded = json.loads(file.read_text(encoding="utf-8"))["model"]
            if canonical_name(str(recorded["pretrained"])) == config.model.pretrained and is_commit(
                recorded["revision"]
            ):
                return str(recorded["revision"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None
