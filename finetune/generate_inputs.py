"""What ``finetune generate`` is asked for, and everything that can be wrong with it before a weight is loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.errors import ConfigError, FinetuneError, ModelError, raise_all
from finetune.facts import Facts, read_json
from finetune.text import text_fault
from finetune.trainers.validation import SamplePrompt
from finetune.types import Bucket

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Name of an adapter's file in its folder: diffusers' own."""
TRAINING_RECORD = "finetune.json"
"""Beside an export's weights: what it was trained on and with, for programs (the model card is for people)."""
MAX_FPS = 1000.0
"""The most that is taken from a record; who wants more says so."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA and how strongly it acts."""

    path: Path
    """A safetensors file, an export's folder, a checkpoint, or a run's folder (its newest checkpoint then)."""
    strength: float = 1.0
    """1 as trained, 0 not at all (the adapter is then not loaded)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def file(self) -> Path:
        """The safetensors file itself."""
        return self.path / ADAPTER_FILE if self.path.is_dir() else self.path


@dataclass(frozen=True)
class GenerateRequest:
    """One call of ``generate``."""

    base: str | None
    """Model folder in diffusers format, or hub id; None: what the first adapter or ``transformer`` was trained on."""
    prompts: tuple[SamplePrompt, ...]
    out: Path
    """Folder for the videos."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    transformer: Path | None = None
    """A fully fine-tuned transformer in place of the base's: an export's folder, or its ``transformer`` sub-folder."""
    adapters: tuple[Adapter, ...] = ()
    bucket: Bucket | None = None
    """Frames x height x width; None: what the first adapter or ``transformer`` was trained at, else the native size."""
    fps: float | None = None
    """Of the files written; None: what the first adapter or ``transformer`` was trained at, else the native rate."""
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    offload: bool = False
    """Keep on the GPU only the component that runs: slower, for cards on which the transformer just fits."""
    device: str | None = None
    """None: the GPU if there is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.transformer is not None:
            object.__setattr__(self, "transformer", Path(self.transformer))


def parse_adapter(text: str) -> Adapter:
    """Read ``PATH`` or ``PATH:STRENGTH``, as in ``my_lora:0.8``.

    Raises:
        ConfigError: if what follows the last colon is no number.
    """
    if Path(text).exists() or ":" not in text:
        return Adapter(Path(text))
    path, _, strength = text.rpartition(":")
    try:
        return Adapter(Path(path), float(strength))
    except ValueError:
        raise ConfigError(
            f"the adapter's strength {strength!r} is not a number",
            where=f"--adapter {text}",
            fix="write PATH or PATH:STRENGTH, as in my_lora:0.8",
        ) from None


def prompts_with_seeds(prompts: list[str], images: list[Path], *, seed: int = 0) -> tuple[SamplePrompt, ...]:
    """Prompts as given one by one, the first with ``seed``, the next with ``seed + 1`` and so on.

    Args:
        prompts: the texts.
        images: none, one for all prompts, or one for each.
        seed: of the first.

    Raises:
        ConfigError: if there are images, but neither one nor as many as prompts.
    """
    if len(images) not in (0, 1, len(prompts)):
        raise ConfigError(
            f"{len(images)} images for {len(prompts)} prompts", where="--image", fix="give one for all, or one for each"
        )
    chosen: list[Path | None] = [*images] if len(images) == len(prompts) else [*images[:1], None][:1] * len(prompts)
    return tuple(
        SamplePrompt(prompt=prompt, image=image, seed=seed + index)
        for index, (prompt, image) in enumerate(zip(prompts, chosen, strict=True))
    )


def read_prompts(path: Path, *, seed: int = 0) -> tuple[SamplePrompt, ...]:
    """Read prompts from a file.

    Args:
        path: text with one prompt per line, or ``.jsonl`` with an object per line: ``prompt``, and where wanted
            ``image`` (relative to the file) and ``seed``. Empty lines are left out.
        seed: of the first prompt; each following one that states none gets the next number.

    Raises:
        ConfigError: if the file cannot be read or is empty; every bad line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the prompts cannot be read: {error}", where=str(path)) from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError("there is no prompt in the file", where=str(path), fix="write one prompt per line")
    if path.suffix != ".jsonl":
        return prompts_with_seeds([line for _, line in numbered], [], seed=seed)
    prompts, errors = [], []
    for index, (number, line) in enumerate(numbered):
        try:
            prompts.append(_from_row(json.loads(line), path.parent, seed + index))
        except RecursionError:
            errors.append(ConfigError("not usable JSON: nested too deeply", where=f"{path}:{number}"))
        except (ValueError, ValidationError) as error:
            reason = _reason(error)
            errors.append(ConfigError(reason, where=f"{path}:{number}"))
    raise_all(ConfigError, errors, what="{n} prompts cannot be used")
    return tuple(prompts)


def _from_row(row: Any, folder: Path, seed: int) -> SamplePrompt:
    if not isinstance(row, dict):
        raise ValueError('expected an object such as {"prompt": "a red ring", "seed": 3}')
    prompt = SamplePrompt.model_validate({"seed": seed, **row})
    if prompt.image is None:
        return prompt
    return prompt.model_copy(update={"image": folder / prompt.image.expanduser()})


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
    return str(error)


def native_bucket(facts: Facts) -> Bucket:
    """The size a model was made for, as far as its JSON says; for the second generation 81x768x1360 where it fits.

    Its JSON gives the reach of the position table instead, 300x300 cells, a size that nobody trained at.
    """
    reach = Bucket(facts.sample_frames, facts.sample_height * facts.vae_spatial, facts.sample_width * facts.vae_spatial)
    if facts.patch_size_t is None:
        return reach
    published = Bucket(facts.sample_frames, 768, 1360)
    fits = published.height <= reach.height and published.width <= reach.width
    return published if fits else reach


def training_record(folder: Path) -> dict[str, Any]:
    """What an export says of its training; empty for a file from elsewhere."""
    path = (folder if folder.is_dir() else folder.parent) / TRAINING_RECORD
    try:
        return read_json(path)
    except ModelError:
        return {}


def recorded_fps(record: Mapping[str, Any]) -> float | None:
    """The frame rate of a training record, if it is one."""
    fps = record.get("fps")
    return float(fps) if isinstance(fps, int | float) and 0 < fps <= MAX_FPS else None


def transformer_root(folder: Path) -> Path:
    """The folder whose ``transformer`` sub-folder holds the weights: ``folder`` itself, or its parent.

    Raises:
        ConfigError: if there are no transformer weights in either sense.
    """
    for root in (folder, folder.resolve().parent):
        if (root / "transformer" / "config.json").is_file() and (root == folder or folder.name == "transformer"):
            return root
    raise ConfigError(
        "there is no fine-tuned transformer",
        where=f"--transformer {folder}",
        fix="give the folder of a full fine-tuning's export, which holds transformer/config.json",
    )


def check_request(request: GenerateRequest, facts: Facts, bucket: Bucket, others: Iterable[FinetuneError] = ()) -> None:
    """Raise one ``ConfigError`` for everything that is wrong with a request, and for ``others`` of its faults."""
    faults = [*_faults(request, facts, bucket), *others]
    raise_all(ConfigError, faults, what="{n} things are wrong with the request")


def _faults(request: GenerateRequest, facts: Facts, bucket: Bucket) -> Iterator[FinetuneError]:
    if not request.prompts:
        yield ConfigError("there is no prompt", fix="give --prompt TEXT or --prompts FILE")
    for index, prompt in enumerate(request.prompts):
        yield from _prompt_faults(prompt, facts, where=f"prompt {index + 1} ({prompt.prompt[:40]!r})")
    for problem in facts.check_bucket(bucket):
        yield ConfigError(problem, where=f"size {bucket}")
    if not 1 <= request.num_inference_steps <= facts.num_train_timesteps:
        steps = request.num_inference_steps
        yield ConfigError(f"{steps} denoising steps", where="--steps", fix=f"give 1 to {facts.num_train_timesteps}")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield ConfigError(f"guidance scale {request.guidance_scale}", where="--guidance", fix="give 1 (none) or more")
    if request.fps is not None and not (math.isfinite(request.fps) and request.fps > 0):
        yield ConfigError(f"{request.fps} frames per second", where="--fps", fix="give a positive number")
    if request.out.exists() and not request.out.is_dir():
        yield ConfigError("the output is a file, not a folder", where=str(request.out))


def _prompt_faults(prompt: SamplePrompt, facts: Facts, *, where: str) -> Iterator[FinetuneError]:
    if fault := text_fault(prompt.prompt):
        yield ConfigError(f"the prompt is damaged: {fault}", where=where, fix="write it again as text")
    if facts.image_to_video and prompt.image is None:
        yield ConfigError("the model is image-to-video and needs a first frame", where=where, fix="give --image FILE")
    if prompt.image is not None and not facts.image_to_video:
        yield ConfigError("the model is text-to-video and takes no image", where=where, fix="leave the image out")
    elif prompt.image is not None and not prompt.image.is_file():
        yield ConfigError("there is no such image", where=f"{where}: {prompt.image}")
