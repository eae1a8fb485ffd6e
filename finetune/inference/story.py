"""From an idea to a video: a prompt is written, its first frame painted, and the frame animated, one model at a time.

Each stage leaves a file, and ``story.json`` says what it was made from. A stage whose file stands, and would be made
from the same, is not done again: what was interrupted goes on, and who changes the prompt or the frame by hand has the
stages after it done anew.
"""

from __future__ import annotations

import gc
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.caching.encode import release_memory
from finetune.core.checksums import digest_file
from finetune.core.errors import ConfigError, ModelError, first_line, is_out_of_memory
from finetune.core.files import atomic_write_bytes, atomic_write_text, require_writable
from finetune.core.types import Bucket

RECORD = "story.json"


@dataclass(frozen=True)
class Painter:
    """A text-to-image pipeline of diffusers, and how it is used."""

    name: str
    """A folder or a hub id."""
    bucket: Bucket
    """Of the video whose first frame it paints."""
    seed: int
    num_inference_steps: int | None
    """None for the pipeline's own default."""
    device: torch.device

    @property
    def inputs(self) -> dict[str, Any]:
        """What decides the picture, besides the prompt."""
        size = f"{self.bucket.height}x{self.bucket.width}"
        return {"painter": self.name, "size": size, "seed": self.seed, "steps": self.num_inference_steps}


@dataclass(frozen=True)
class Animation:
    """How the frame becomes a video."""

    animate: Callable[[str, Path], Path]
    """(prompt, first frame) -> the video's file."""
    inputs: Mapping[str, Any]
    """What decides the video, besides the two; JSON types."""


@dataclass(frozen=True)
class Script:
    """How the idea becomes a prompt."""

    write: Callable[[str], str]
    """idea -> prompt"""
    inputs: Mapping[str, Any]
    """As in ``Animation``."""


@dataclass(frozen=True)
class StoryReport:
    """What there is now; ``str()`` of it is what the command prints."""

    prompt: str
    files: tuple[Path, Path, Path]
    """Prompt, first frame, video."""
    made: tuple[str, ...]
    """Which of the stages were done now: prompt, frame, video."""

    def __str__(self) -> str:
        stages = dict(zip(("prompt", "frame", "video"), self.files, strict=True))
        lines = [f"{'wrote' if name in self.made else 'kept'} {path}" for name, path in stages.items()]
        return "\n".join([self.prompt, *lines])


def tell(idea: str, out: Path, script: Script, painter: Painter, animation: Animation) -> StoryReport:
    """Make a video of an idea in ``out``: ``prompt.txt``, ``frame.png`` and the video.

    Args:
        idea: in a few words.
        out: the story's folder, new or of an earlier call.
        script: writes the prompt.
        painter: paints the first frame.
        animation: makes the video; nothing of the other two is in memory then.

    Raises:
        ConfigError: if the folder cannot be written to, or its record is none of a story.
        ModelError: if the painter cannot be loaded, or is no text-to-image pipeline.
        FinetuneError: what ``script`` and ``animation`` raise.
    """
    require_writable(out, kind=ConfigError, what="the story", where=f"--output {out}")
    stages = _Stages(out)

    def write() -> Path:
        path = out / "prompt.txt"
        atomic_write_text(path, script.write(idea) + "\n")
        return path

    text_file = stages.run("prompt", {"idea": idea, **script.inputs}, write)
    release_memory()
    prompt = text_file.read_text(encoding="utf-8").strip()
    frame = stages.run("frame", {"prompt": prompt, **painter.inputs}, lambda: paint(prompt, painter, out / "frame.png"))
    release_memory()
    inputs = {"prompt": prompt, "frame": digest_file(frame), **animation.inputs}
    video = stages.run("video", inputs, lambda: animation.animate(prompt, frame))
    return StoryReport(prompt, (text_file, frame, video), tuple(stages.made))


class _Stages:
    """The stages of one story, and its record."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._record: dict[str, dict[str, Any]] = {}
        self.made: list[str] = []
        if (path := folder / RECORD).is_file():
            try:
                self._record = {
                    str(name): {"file": str(stage["file"]), "inputs": dict(stage["inputs"])}
                    for name, stage in json.loads(path.read_text(encoding="utf-8")).items()
                }
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                fix = "take another folder, or delete the file to begin anew"
                raise ConfigError(f"this is no story's record: {error!r:.100}", where=str(path), fix=fix) from None

    def run(self, name: str, inputs: Mapping[str, Any], make: Callable[[], Path]) -> Path:
        """The file of a stage, made where there is none from the same inputs."""
        before = self._record.get(name)
        if before is not None and before["inputs"] == inputs:
            # Its name alone: a record that somebody wrote reaches nothing outside the folder.
            path = self._folder / Path(before["file"]).name
            if path.is_file():
                return path
        path = make()
        self._record[name] = {"file": path.name, "inputs": dict(inputs)}
        atomic_write_text(self._folder / RECORD, json.dumps(self._record, indent=1, ensure_ascii=False) + "\n")
        self.made.append(name)
        return path


def paint(prompt: str, painter: Painter, path: Path) -> Path:
    """Paint a picture with any text-to-image pipeline of diffusers; it is gone from memory afterwards.

    Raises:
        ModelError: if it cannot be loaded, or is no such pipeline.
    """
    from diffusers import DiffusionPipeline

    cuda = painter.device.type == "cuda"
    try:
        pipeline: Any = DiffusionPipeline.from_pretrained(
            painter.name, torch_dtype=torch.bfloat16 if cuda else torch.float32, use_safetensors=True
        )
        if cuda:  # one of its models at a time: the largest painters are larger than CogVideoX
            pipeline.enable_model_cpu_offload(device=painter.device)
        steps = {} if painter.num_inference_steps is None else {"num_inference_steps": painter.num_inference_steps}
        picture = pipeline(
            prompt=prompt,
            height=painter.bucket.height,
            width=painter.bucket.width,
            generator=torch.Generator("cpu").manual_seed(painter.seed),
            **steps,
        ).images[0]
        content = io.BytesIO()
        picture.convert("RGB").save(content, "PNG")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the first frame cannot be painted: {first_line(error)}",
            where=painter.name,
            fix="name the folder or hub id of a text-to-image pipeline of diffusers, with weights in safetensors",
        ) from error
    finally:
        pipeline = None
        gc.collect()
    atomic_write_bytes(path, content.getvalue())
    return path
