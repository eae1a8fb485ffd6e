"""What goes beside exported weights: a model card for people, a record for programs, and the run's sampled videos."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune.checkpoint.validation_history import round_folder, sample_name
from finetune.cogvideox.spec import ModelSpec
from finetune.config.document import Dumper
from finetune.convert.merge import Merged
from finetune.convert.source import Source
from finetune.core.files import LORA_FILE, from_here
from finetune.core.text import shown
from finetune.inference.inputs import base_numbers
from finetune.methods.lora import LoraMethod

_CAPTION_LENGTH = 240

_NAMES = {"raw": "the weights", "ema": "the averaged weights"}

_STOCK_TEXT_LENGTH = 226
"""``max_sequence_length`` of the stock pipelines unless told otherwise: right for the first generation only."""


def training_record(
    found: Source, spec: ModelSpec, merged: Merged | None, *, max_abs_diff: float, tolerance: float
) -> str:
    """What programs may want to know of an export, as JSON: ``generate`` takes size and rate from it.

    Paths of the machine it was trained on are left out. ``merged`` is what became of an adapter that was merged.
    """
    config = found.config
    return _json(
        {
            "format": 1,
            "kind": config.method.kind,
            "merged": None if merged is None else dataclasses.asdict(merged),
            "base_model": _public_name(found.trained_on),
            "revision": found.revision,
            "base_digest": found.state.base or None,
            "image_to_video": spec.image_to_video,
            "base_facts": base_numbers(spec),
            "step": found.state.step,
            "weights": found.weights,
            "buckets": [str(bucket) for bucket in config.data.buckets],
            "fps": config.data.fps or spec.native_fps,
            "trigger": config.data.trigger,
            "method": config.method.model_dump(mode="json", exclude={"init_from"}),
            "optimizer": config.optimizer.model_dump(mode="json"),
            "lr_schedule": config.lr_schedule.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json"),
            "verified": {"max_abs_diff": max_abs_diff, "tolerance": tolerance},
            "versions": versions(),
        }
    )


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("cogvideox-finetune", "diffusers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return found


def as_measured(found: Source, merged: Merged | None) -> bool:
    """Whether the run measured and sampled with the very weights that are exported."""
    return found.weights == found.measured and (merged is None or merged.strength == 1)


def copy_samples(found: Source, merged: Merged | None, folder: Path) -> list[str]:
    """Copy the videos that the run sampled with the exported weights to ``folder/samples``; returns their names.

    Those of another step, or of the average where the weights themselves are exported, would show another model.
    """
    if found.run_dir is None or not as_measured(found, merged):
        return []
    rounds = round_folder(found.run_dir, found.state.step)
    # Only what a run writes: other names could act as Markdown in the card, a link could publish any file.
    names = [sample_name(number, sample) for number, sample in enumerate(found.config.validation.samples)]
    names = [name for name in names if (rounds / name).is_file() and not (rounds / name).is_symlink()]
    for name in names:
        (folder / "samples").mkdir(exist_ok=True)
        shutil.copyfile(rounds / name, folder / "samples" / name)
    return names


def model_card(
    found: Source, spec: ModelSpec, merged: Merged | None, *, name: str, samples: list[str], full_pipeline: bool
) -> str:
    """README.md: front matter for the hub, then what was trained, on what, how well, and how to load it."""
    config = found.config
    kind = "LoRA" if found.lora else "Full fine-tuning"
    base = _public_name(found.trained_on)
    adapter = found.lora and merged is None
    sections = [
        _front_matter(found, spec, adapter=adapter),
        f"# {_text(config.output_dir.name)}\n\n{kind} of {_code(base)}"
        f" ({'image' if spec.image_to_video else 'text'} to video), {found.state.step} optimizer steps"
        f"{', exponential moving average of the weights' if found.weights == 'ema' else ''}."
        + ("" if merged is None else f" In this folder {merged}: it needs no adapter file, and no adapter loader."),
        "## Use\n\n"
        + _fenced("python", usage(found, spec, name=name, adapter=adapter, full_pipeline=full_pipeline))
        + "\n\nor, with the package that trained it:\n\n"
        + _fenced("bash", command(found, spec, name, adapter=adapter)),
        "## Training data\n\n" + _data(found),
        "## Settings\n\n" + _settings(found, spec),
        "## Held-out loss\n\n" + _heldout(found, merged),
    ]
    if samples:
        sections.append("## Samples\n\n" + _samples(found, merged, samples))
    sections.append(
        "## Verification\n\nThese files were loaded again through the stock diffusers pipeline and compared with the"
        " trained model before they were published; the numbers stand in `finetune.json`."
    )
    return "\n\n".join(sections) + "\n"


def _front_matter(found: Source, spec: ModelSpec, *, adapter: bool) -> str:
    task = "image-to-video" if spec.image_to_video else "text-to-video"
    values: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": task,
        # A derivative falls under its base's licence, which this package cannot know.
        "license": "other",
        "license_name": "that-of-the-base-model",
        "tags": ["cogvideox", "diffusers", task, *_method_tags(found, adapter=adapter)],
    }
    if _is_hub_id(found.trained_on):  # a path would be a broken link on the hub
        values["base_model"] = found.trained_on
        values["base_model_relation"] = "adapter" if adapter else "finetune"
    if found.config.data.trigger:
        values["instance_prompt"] = found.config.data.trigger
    # Our dumper, because the hub reads YAML 1.2: a trigger word such as 1e-4 has to be in quotes there.
    return f"---\n{yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)}---"


def _method_tags(found: Source, *, adapter: bool) -> list[str]:
    # "lora" promises a file that LoRA loaders read.
    return ["lora"] if adapter else ["lora-merged"] if found.lora else ["full-fine-tuning"]


def usage(found: Source, spec: ModelSpec, *, name: str, adapter: bool, full_pipeline: bool) -> str:
    """Python that loads the export and samples a video; it runs as it stands where the export was made.

    A base model that is a folder is named where it is from there, or it would not run.
    """
    config = found.config
    pipeline = "CogVideoXImageToVideoPipeline" if spec.image_to_video else "CogVideoXPipeline"
    dtype = str(config.model.torch_dtype())
    base = repr(_base(found))
    if found.revision is not None:  # the branch may have moved by the time this is read
        base += f", revision={found.revision!r}"
    bucket = config.data.buckets[0]
    caption = _example_caption(found)
    classes = [pipeline] if adapter or full_pipeline else [pipeline, "CogVideoXTransformer3DModel"]
    lines = [
        "import torch",
        f"from diffusers import {', '.join(classes)}",
        f"from diffusers.utils import export_to_video{', load_image' if spec.image_to_video else ''}",
        "",
    ]
    if adapter:
        lines += [
            f"pipeline = {pipeline}.from_pretrained({base}, torch_dtype={dtype})",
            f'pipeline.load_lora_weights({name!r}, weight_name="{LORA_FILE}", adapter_name="tuned")',
            'pipeline.set_adapters("tuned", 1.0)  # the strength; the file brings its own alpha, so 1.0 is as trained',
        ]
    elif full_pipeline:
        lines.append(f"pipeline = {pipeline}.from_pretrained({name!r}, torch_dtype={dtype})")
    else:
        loaded = f'CogVideoXTransformer3DModel.from_pretrained({name!r}, subfolder="transformer", torch_dtype={dtype})'
        lines += [
            f"transformer = {loaded}",
            f"pipeline = {pipeline}.from_pretrained({base}, transformer=transformer, torch_dtype={dtype})",
        ]
    lines += [
        "if torch.cuda.is_available():",
        "    pipeline.enable_model_cpu_offload()",
        "    pipeline.vae.enable_tiling()",
        "video = pipeline(",
        f"    prompt={caption!r},",
        *(['    image=load_image("first_frame.png"),'] if spec.image_to_video else []),
        f"    num_frames={bucket.frames},",
        f"    height={bucket.height},",
        f"    width={bucket.width},",
        f"    num_inference_steps={config.validation.num_inference_steps},",
        f"    guidance_scale={config.validation.guidance_scale:g},",
        *(
            [f"    max_sequence_length={spec.max_text_seq_length},"]
            if spec.max_text_seq_length != _STOCK_TEXT_LENGTH
            else []
        ),
        "    generator=torch.Generator().manual_seed(0),",
        ").frames[0]",
        f'export_to_video(video, "video.mp4", fps={round(config.data.fps or spec.native_fps)})',
    ]
    return "\n".join(lines) + "\n"


def _base(found: Source) -> str:
    """The base model where it is now, unless everybody finds it where it was."""
    return found.trained_on if _is_hub_id(found.trained_on) else from_here(Path(found.config.model.pretrained))


def command(found: Source, spec: ModelSpec, name: str, *, adapter: bool) -> str:
    """The command that samples with the export ``name``."""
    words = ["finetune", "generate", "--model", _base(found), "--adapter" if adapter else "--transformer", name]
    words += ["--revision", found.revision] if found.revision is not None else []
    words += ["--image", "first_frame.png"] if spec.image_to_video else []
    return shlex.join([*words, "--prompt", _example_caption(found)])


def _example_caption(found: Source) -> str:
    if found.data is not None and found.data.captions:
        return " ".join(shown(found.data.captions[0]).split())
    return found.config.data.trigger or "a video"


def _data(found: Source) -> str:
    buckets = ", ".join(str(bucket) for bucket in found.config.data.buckets)
    data = found.data
    if data is None:
        return f"Clips of {buckets} (frames x height x width). The cache of the run was not at hand for a count."
    shapes = ", ".join(f"{count} of {bucket}" for bucket, count in data.by_bucket.items())
    heldout = f", and {data.heldout} held out to measure on" if data.heldout else ""
    lines = [f"{data.clips} clips (frames x height x width: {shapes}){heldout}. Captions such as:", ""]
    return "\n".join([*lines, *(f"- {_code(caption)}" for caption in data.captions)])


def _settings(found: Source, spec: ModelSpec) -> str:
    config = found.config
    rows = [
        ("steps", str(found.state.step)),
        ("samples seen", str(found.state.samples_seen)),
        ("micro-batch x accumulation", f"{config.train.batch_size} x {config.train.accumulation}"),
        ("optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.lr_schedule.kind}"),
        ("frame rate", f"{config.data.fps or spec.native_fps:g} per second"),
        ("caption dropout", f"{config.data.caption_dropout:g}"),
        ("weights held in", str(config.model.torch_dtype()).removeprefix("torch.")),
        ("seed", str(config.train.seed)),
        *([("commit of the base model", found.revision)] if found.revision is not None else []),
        ("versions", ", ".join(f"{package} {number}" for package, number in versions().items())),
    ]
    if isinstance(config.method, LoraMethod):
        method = config.method
        variants = "".join(f", {name}" for name, on in (("rsLoRA", method.use_rslora), ("DoRA", method.use_dora)) if on)
        targets = (method.targets,) if isinstance(method.targets, str) else method.targets
        rows.insert(
            0, ("LoRA", f"rank {method.rank}, alpha {method.alpha:g}{variants}, on {_text(', '.join(targets))}")
        )
    if config.data.trigger:
        rows.insert(0, ("trigger word", _text(config.data.trigger)))
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])


def _heldout(found: Source, merged: Merged | None) -> str:
    before, after = found.heldout
    if before is None and after is None:
        return "Not measured."
    shown = ["not measured" if loss is None else f"{loss:.4f}" for loss in (before, after)]
    return (
        f"Before training {shown[0]}, at step {found.state.step} {shown[1]}: mean squared error on velocity, on clips"
        " that were not trained on, at fixed timesteps and noise."
        + (
            ""
            if as_measured(found, merged)
            else f" Measured with {_NAMES[found.measured]} at strength 1, not with this export's."
        )
    )


def _samples(found: Source, merged: Merged | None, names: list[str]) -> str:
    prompts = {sample_name(number, sample): sample for number, sample in enumerate(found.config.validation.samples)}
    which = f"{_NAMES[found.weights]} {'of this export' if merged is None else 'that were then merged'}"
    lines = [f"- [{name}](samples/{name}): {_code(prompts[name].prompt)}" for name in names]
    return "\n".join([f"Sampled at step {found.state.step}, with {which}.", "", *lines])


def _is_hub_id(pretrained: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", pretrained) is not None and not Path(pretrained).exists()


def _public_name(pretrained: str) -> str:
    """A hub id as it is; of a path only the last part, because the rest is about somebody's machine."""
    return pretrained if _is_hub_id(pretrained) else Path(pretrained).name


def _code(text: str) -> str:
    """A caption as inline code, so that nothing in it can act as Markdown or HTML."""
    text = " ".join(shown(text).split())
    text = text[:_CAPTION_LENGTH] + ("..." if len(text) > _CAPTION_LENGTH else "")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _text(text: str) -> str:
    """A name or a word as text: every mark that Markdown might act on is written so that it cannot.

    For table cells too, where code will not do: a bar would end the cell inside it, and an escape would show.
    """
    marks = re.sub(r"([!-,./:-@\[-`{}~])", r"\\\1", " ".join(shown(text).split()))
    return marks.replace("|", "&#124;")


def _fenced(language: str, code: str) -> str:
    """A block of code that nothing in it can end."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"
