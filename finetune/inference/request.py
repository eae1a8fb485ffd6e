"""What ``generate`` is asked for: prompts, adapters, sizes, and what can be wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ConfigError, raise_all
from finetune.core.files import LORA_FILE
from finetune.core.text import text_fault
from finetune.core.types import Bucket, SamplePrompt


@dataclass(frozen=True)
class AdapterArgument:
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
        return self.path / LORA_FILE if self.path.is_dir() else self.path


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
    adapters: tuple[AdapterArgument, ...] = ()
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


def parse_adapter(text: str) -> AdapterArgument:
    """Read ``PATH`` or ``PATH:STRENGTH``, as in ``my_lora:0.8``.

    Raises:
        ConfigError: if what follows the last colon is no number.
    """
    if Path(text).exists() or ":" not in text:
        return AdapterArgument(Path(text))
    path, _, strength = text.rpartition(":")
    try:
        return AdapterArgument(Path(path), float(strength))
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
    paired: list[Path | None] = [*images] if len(images) == len(prompts) else [*images, None][:1] * len(prompts)
    return tuple(
        SamplePrompt(prompt=prompt, image=image, seed=seed + index)
        for index, (prompt, image) in enumerate(zip(prompts, paired, strict=True))
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
        except ValidationError as error:
            reasons = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            errors.append(ConfigError("; ".join(reasons), where=f"{path}:{number}"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            errors.append(ConfigError(f"not a prompt: {reason}", where=f"{path}:{number}"))
    raise_all(ConfigError, errors, what="{n} prompts cannot be used")
    return tuple(prompts)


def _from_row(row: Any, folder: Path, seed: int) -> SamplePrompt:
    if not isinstance(row, dict):
        raise ValueError('expected an object such as {"prompt": "a red ring", "seed": 3}')
    prompt = SamplePrompt.model_validate({"seed": seed, **row})
    image = None if prompt.image is None else folder / prompt.image.expanduser()
    return prompt.model_copy(update={"image": image})


def request_faults(request: GenerateRequest, spec: ModelSpec, bucket: Bucket) -> Iterator[ConfigError]:
    """Everything that is wrong with a request for this model at this size, adapters and base left aside."""
    if not request.prompts:
        yield ConfigError("there is no prompt", fix="give --prompt TEXT or --prompts FILE")
    for index, prompt in enumerate(request.prompts):
        yield from _prompt_faults(prompt, spec, where=f"prompt {index + 1} ({prompt.prompt[:40]!r})")
    for problem in spec.check_bucket(bucket):
        yield ConfigError(problem, where=f"size {bucket}")
    if not 1 <= request.num_inference_steps <= spec.num_train_timesteps:
        steps = request.num_inference_steps
        yield ConfigError(f"{steps} denoising steps", where="--steps", fix=f"give 1 to {spec.num_train_timesteps}")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield ConfigError(f"guidance scale {request.guidance_scale}", where="--guidance", fix="give 1 (none) or more")
    if request.fps is not None and not (math.isfinite(request.fps) and request.fps > 0):
        yield ConfigError(f"{request.fps} frames per second", where="--fps", fix="give a positive number")
    if request.out.exists() and not request.out.is_dir():
        yield ConfigError("the output is a file, not a folder", where=str(request.out))


def _prompt_faults(prompt: SamplePrompt, spec: ModelSpec, *, where: str) -> Iterator[ConfigError]:
    if fault := text_fault(prompt.prompt):
        yield ConfigError(f"the prompt is damaged: {fault}", where=where, fix="write it again as text")
    if spec.image_to_video and prompt.image is None:
        yield ConfigError("the model is image-to-video and needs a first frame", where=where, fix="give --image FILE")
    if prompt.image is not None and not spec.image_to_video:
        yield ConfigError("the model is text-to-video and takes no image", where=where, fix="leave the image out")
    elif prompt.image is not None and not prompt.image.is_file():
        yield ConfigError("there is no such image", where=f"{where}: {prompt.image}")
