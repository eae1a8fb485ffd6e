"""What goes beside exported weights: a model card for people, a record for programs, and the run's sampled videos."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from base64 import b64encode
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch

from finetune.checkpoint.folders import sample_name, samples_path
from finetune.cogvideox.config import MergedAdapter
from finetune.cogvideox.load import pipeline_class
from finetune.cogvideox.model_files import KNOWN_MODELS, is_hub_id, known_model
from finetune.cogvideox.riflex import angle, intrinsic_component
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.conversion.source import ExportSource
from finetune.conversion.verify import Verification
from finetune.core.files import COMPLETE, CONTROL_FILE, LORA_FILE, from_here
from finetune.core.text import shown
from finetune.inference.adapters import base_adapters, base_numbers
from finetune.methods.lora import LoraMethod, Merged, is_lora

LayoutName = Literal["diffusers", "comfyui", "kohya", "peft"]
"""The layouts that adapters are written in."""

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""How peft names an adapter's file, and its settings beside it."""

_CAPTION_LENGTH = 240

_WEIGHTS_NAMES = {"raw": "the weights", "ema": "the averaged weights"}


@dataclass(frozen=True)
class ExportedModel:
    """What an export holds, as its card and its record describe it."""

    source: ExportSource
    spec: ModelSpec
    merged: Merged | None
    """What became of an adapter that was merged into its base."""
    name: str
    """Of the export's folder, from where the command was typed."""
    layout: str = "diffusers"
    """As ``--to`` names it."""
    full_pipeline: bool = False
    """Whether the base's other components stand in it."""

    @property
    def is_adapter(self) -> bool:
        """Whether its weights are loaded onto a base."""
        return self.source.trains_adapter and self.merged is None

    @property
    def has_projection(self) -> bool:
        """Whether a projection goes with the adapter, in a file of its own."""
        return self.is_adapter and not all(map(is_lora, self.source.tensors))

    @property
    def title(self) -> str:
        """The run's name."""
        return self.source.config.output_dir.name

    @property
    def adapter_file(self) -> str:
        """How the file of an adapter is called; where programs list files by name, after the run."""
        return {"diffusers": LORA_FILE, "peft": PEFT_FILE}.get(self.layout, f"{self.title}.safetensors")

    @property
    def is_as_measured(self) -> bool:
        """Whether the run measured and sampled with the very weights that are exported."""
        return self.source.weights == self.source.measured and (self.merged is None or self.merged.strength == 1)

    @property
    def base_on_hub(self) -> bool:
        """Whether everybody finds the base where the run had it."""
        return is_hub_id(self.source.trained_on)

    @property
    def base(self) -> str:
        """The base model where it is now, unless everybody finds it where it was."""
        return self.source.trained_on if self.base_on_hub else from_here(Path(self.source.config.model.pretrained))

    @property
    def public_base(self) -> str:
        """A hub id as it is; of a path only the last part, because the rest is about somebody's machine."""
        return self.source.trained_on if self.base_on_hub else Path(self.source.trained_on).name

    @property
    def example_caption(self) -> str:
        """A prompt to begin with."""
        if self.source.data is not None and self.source.data.captions:
            return " ".join(shown(self.source.data.captions[0]).split())
        return self.source.config.data.trigger or "a video"

    @property
    def takes_last_frame(self) -> bool:
        """Whether it was trained to be given other frames than the first."""
        return self.spec.image_to_video and self.source.config.data.condition_frames.stored is not None

    @property
    def base_adapters(self) -> tuple[MergedAdapter, ...]:
        """What has to be merged into the base, or loaded beside an adapter, for it to act as it was trained."""
        return self.source.config.model.adapters if self.is_adapter else ()

    @property
    def command(self) -> str:
        """The command that samples with it; empty for a layout of other programs, and for a DoRA on top of adapters."""
        method = self.source.config.method
        on_top = bool(self.base_adapters) and isinstance(method, LoraMethod) and method.use_dora
        if self.is_adapter and (self.layout != "diffusers" or on_top):
            return ""
        words = ["finetune", "generate", "--model", self.base, "--adapter" if self.is_adapter else "--transformer"]
        words += [self.name, *(["--revision", self.source.revision] if self.source.revision is not None else [])]
        for adapter in self.base_adapters:
            words += ["--adapter", f"{from_here(adapter.path)}:{adapter.strength:g}"]
        words += ["--image", "first_frame.png"] if self.spec.image_to_video else []
        words += ["--last-image", "last_frame.png"] if self.takes_last_frame else []
        words += ["--control", "control.mp4"] if self.spec.control else []
        return shlex.join([*words, "--prompt", self.example_caption])


def training_record(model: ExportedModel, verification: Verification) -> str:
    """What programs may want to know of an export, as JSON: ``generate`` takes size and rate from it.

    Paths of the machine it was trained on are left out.
    """
    source, config = model.source, model.source.config
    record = {
        "format": 1,
        "kind": config.method.kind,
        "merged": None if model.merged is None else asdict(model.merged),
        "base_model": model.public_base,
        "revision": source.revision,
        "base_digest": source.state.base or None,
        "image_to_video": model.spec.image_to_video,
        **({"control": True} if model.spec.control else {}),
        "base_facts": base_numbers(model.spec),
        "base_adapters": base_adapters(config.model) if model.is_adapter else [],
        "step": source.state.step,
        "weights": source.weights,
        "buckets": [str(bucket) for bucket in config.data.buckets],
        "fps": config.data.fps or model.spec.native_fps,
        "trigger": config.data.trigger,
        "condition_frames": config.data.condition_frames.kind if model.spec.image_to_video else None,
        "riflex": config.model.riflex,
        "method": config.method.model_dump(mode="json", exclude={"init_from"}),
        **{name: getattr(config, name).model_dump(mode="json") for name in ("optimizer", "lr_schedule", "train")},
        "verified": asdict(verification),
        "versions": _versions(),
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("cogvideox-finetune", "diffusers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # run from a source tree that was never installed
            continue
    return versions


def header_metadata(model: ExportedModel, folder: Path, sha256: str) -> dict[str, str]:
    """What sites read in the header of an adapter's file: entries of modelspec, and those of kohya's scripts.

    The same checkpoint gives the same, so that it can be exported again to the byte.

    Args:
        model: what is exported.
        folder: where its sampled videos are.
        sha256: of the tensors' bytes.
    """
    source, spec, config = model.source, model.spec, model.source.config
    method: Any = config.method
    bucket = config.data.buckets[0]
    task = spec.task
    written = datetime.fromtimestamp((source.checkpoint / COMPLETE).stat().st_mtime, UTC)
    variants = (name for name in KNOWN_MODELS if base_numbers(read_spec(str(known_model(name)))) == base_numbers(spec))
    steps = f"{source.state.step} optimizer steps"
    on_top = "".join(f", with {adapter} merged into it before" for adapter in model.base_adapters)
    entries = {
        **lora_metadata(model.title, next(variants, None), method.rank, method.scaling * method.rank, sha256),
        "modelspec.implementation": "https://github.com/Comfy-Org/ComfyUI"
        if model.layout == "comfyui"
        else "diffusers",
        "modelspec.description": f"{source.kind} of {model.public_base} ({task}){on_top}, {steps}",
        "modelspec.date": written.date().isoformat(),
        "modelspec.resolution": f"{bucket.width}x{bucket.height}",
        "modelspec.tags": f"cogvideox, {task}",
        "modelspec.trigger_phrase": config.data.trigger or "",
        "modelspec.usage_hint": "" if spec.riflex is None else f"sample with RIFLEx positions for {spec.riflex} frames",
        "modelspec.thumbnail": _thumbnail(folder),
        "ss_steps": str(source.state.step),
        "ss_seed": str(config.train.seed),
        "ss_learning_rate": f"{config.optimizer.lr:g}",
        "ss_optimizer": config.optimizer.kind,
    }
    if source.is_lokr:  # whoever knows kohya's networks would look for a LoRA's tensors
        entries["modelspec.architecture"] = entries["modelspec.architecture"].replace("/lora", "/lokr")
        del entries["ss_network_module"]
    return {name: value for name, value in entries.items() if value}


def lora_metadata(title: str, variant: str | None, rank: int, alpha: float, sha256: str) -> dict[str, str]:
    """Of any LoRA: the entries that modelspec demands, and those that sites take rank and scale from.

    Args:
        title: for people.
        variant: its base, if that is one of ``KNOWN_MODELS``.
        rank: of most layers.
        alpha: so that alpha / rank is what the update counts.
        sha256: of the tensors' bytes.
    """
    base = f"cogvideox{'' if variant is None else '' if variant.startswith('1.5') else '-'}{variant or ''}"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.hash_sha256": f"0x{sha256}",
        "modelspec.prediction_type": "v",
        "modelspec.timestep_range": "0,999",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": base,
        "ss_output_name": title,
        "sshs_model_hash": sha256,
    }


_STRIP_FRAMES, _STRIP_WIDTH = 4, 256


def _thumbnail(folder: Path) -> str:
    """Some frames of the first sampled video side by side, as modelspec has it; empty where there is no video."""
    video = next(iter(sorted((folder / "samples").glob("*.mp4"))), None)
    if video is None:
        return ""
    import av
    from PIL import Image

    try:
        with av.open(str(video)) as container:
            frames = [frame.to_image() for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError):  # an export must not fail for a picture
        frames = []
    if not frames:
        return ""
    width = _STRIP_WIDTH // _STRIP_FRAMES
    height = max(1, min(_STRIP_WIDTH, round(frames[0].height * width / frames[0].width)))
    strip = Image.new("RGB", (_STRIP_WIDTH, height))
    for place in range(_STRIP_FRAMES):
        frame = frames[place * (len(frames) - 1) // (_STRIP_FRAMES - 1)]
        strip.paste(frame.resize((width, height), Image.Resampling.LANCZOS), (place * width, 0))
    buffer = BytesIO()
    strip.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode('ascii')}"


def copy_samples(model: ExportedModel, folder: Path) -> dict[str, str]:
    """Copy the videos that the run sampled with the exported weights to ``folder/samples``.

    Those of another step, or of the average where the weights themselves are exported, would show another model.

    Returns:
        The prompt of each by its file's name.
    """
    source = model.source
    if source.run_dir is None or not model.is_as_measured:
        return {}
    videos = samples_path(source.run_dir, source.state.step)
    samples = {}
    # Only what a run writes: other names could act as Markdown in the card, a link could publish any file.
    for number, sample in enumerate(source.config.validation.samples):
        video = videos / sample_name(number, sample)
        if video.is_file() and not video.is_symlink():
            (folder / "samples").mkdir(exist_ok=True)
            shutil.copyfile(video, folder / "samples" / video.name)
            samples[video.name] = sample.prompt
    return samples


def model_card(model: ExportedModel, samples: dict[str, str]) -> str:
    """README.md: front matter for the hub, then what was trained, on what, how well, and how to load it.

    Its code runs as it stands where the export was made; ``samples`` is what ``copy_samples`` returned.
    """
    source, spec = model.source, model.spec
    config = source.config
    return _TEMPLATES.get_template("model_card.md").render(
        model=model,
        source=source,
        spec=spec,
        config=config,
        data=source.data,
        step=source.state.step,
        task=spec.task,
        pipeline=pipeline_class(spec).__name__,
        bucket=config.data.buckets[0],
        fps=config.data.fps or spec.native_fps,
        dtype=str(config.model.torch_dtype()),
        samples=samples,
        control_file=CONTROL_FILE,
        versions=_versions(),
        riflex=None if spec.riflex is None else (2 * intrinsic_component(spec), angle(spec, spec.riflex)),
        weights_names=_WEIGHTS_NAMES,
        from_here=from_here,
    )


# Everything from outside passes one of these on its way into the card.


def _code(text: str) -> str:
    """A caption as inline code, so that nothing in it can act as Markdown or HTML."""
    text = " ".join(shown(text).split())
    text = text[:_CAPTION_LENGTH] + ("..." if len(text) > _CAPTION_LENGTH else "")
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _text(text: str) -> str:
    """A name or a word as text: every mark that Markdown might act on is written so that it cannot.

    For table cells too, where code will not do: a bar would end the cell inside it, and an escape would show.
    """
    marks = re.sub(r"([!-,./:-@\[-`{}~])", r"\\\1", " ".join(shown(text).split()))
    return marks.replace("|", "&#124;")


def _fenced(code: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("finetune", "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {
    "code": _code,
    "text": _text,
    "fenced": _fenced,
    "repr": repr,
    "loss": lambda loss: "not measured" if loss is None else f"{loss:.4f}",
    # JSON is YAML, and always quoted: the hub reads YAML 1.2, where a trigger word such as 1e-4 would be a number.
    "yaml_string": lambda text: json.dumps(text, ensure_ascii=False),
}
