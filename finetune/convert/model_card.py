"""What goes beside exported weights: a model card for people, a record for programs, and the run's sampled videos."""

from __future__ import annotations

import json
import platform
import re
import shlex
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jinja2
import torch

from finetune.checkpoint.folders import sample_name, samples_path
from finetune.cogvideox.load import pipeline_class
from finetune.cogvideox.model_files import is_hub_id
from finetune.cogvideox.spec import ModelSpec
from finetune.convert.source import ExportSource
from finetune.convert.verify import Verification
from finetune.core.files import LORA_FILE, from_here
from finetune.core.text import shown
from finetune.inference.adapters import base_numbers
from finetune.methods.lora import Merged

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
    full_pipeline: bool = False
    """Whether the base's other components stand in it."""

    @property
    def is_adapter(self) -> bool:
        """Whether its weights are loaded onto a base."""
        return self.source.is_lora and self.merged is None

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
    def command(self) -> str:
        """The command that samples with it."""
        words = ["finetune", "generate", "--model", self.base, "--adapter" if self.is_adapter else "--transformer"]
        words += [self.name, *(["--revision", self.source.revision] if self.source.revision is not None else [])]
        words += ["--image", "first_frame.png"] if self.spec.image_to_video else []
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
        "base_facts": base_numbers(model.spec),
        "step": source.state.step,
        "weights": source.weights,
        "buckets": [str(bucket) for bucket in config.data.buckets],
        "fps": config.data.fps or model.spec.native_fps,
        "trigger": config.data.trigger,
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
        task="image-to-video" if spec.image_to_video else "text-to-video",
        pipeline=pipeline_class(spec).__name__,
        bucket=config.data.buckets[0],
        fps=config.data.fps or spec.native_fps,
        dtype=str(config.model.torch_dtype()),
        adapter_file=LORA_FILE,
        samples=samples,
        versions=_versions(),
        weights_names=_WEIGHTS_NAMES,
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
