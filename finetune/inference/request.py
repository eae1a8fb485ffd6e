"""What ``generate`` is asked for: prompts, adapters, sizes, and what can be wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from finetune.cogvideox.riflex import makes_possible, riflex_fault
from finetune.cogvideox.spec import ModelSpec
from finetune.core.errors import ConfigError, DataError, FinetuneError, raise_all
from finetune.core.files import LORA_FILE, atomic_write_text
from finetune.core.text import text_fault
from finetune.core.types import Bucket, Offload, Quantization, SamplePrompt
from finetune.datasets.geometry import BucketField
from finetune.inference.modes import FromControl, FromVideo, Mode, image_mode, read_clip, require_clip
from finetune.inference.postprocess import Interpolation

_MOST_VIDEOS, _MOST_PARTS = 10_000, 1000
"""Of a prompt, and of a video: of more the bare list would not fit into memory."""

_MOST_FPS = 1000
"""That players and ffmpeg know what to do with; said before anything is sampled."""


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


class VideoPrompt(SamplePrompt):
    """One video to generate: what for, with which noise, and what is its own rather than the request's."""

    video: Path | None = None
    """What video-to-video starts from."""
    strength: float | None = Field(None, gt=0, le=1)
    """Of video-to-video; None for the request's."""
    bucket: BucketField | None = None
    """Frames x height x width; None for the request's."""
    adapters: tuple[AdapterArgument, ...] | None = None
    """None for the request's; empty for the base model."""


@dataclass(frozen=True)
class GenerateRequest:
    """One call of ``generate``."""

    prompts: tuple[VideoPrompt, ...]
    out: Path
    """Folder for the videos."""
    base: str | None = None
    """Model folder in diffusers format, or hub id; None: what the first adapter or ``transformer`` was trained on."""
    videos: int = 1
    """Of each prompt, with its seed and the next ones."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    base_digest: str | None = None
    """Which weights the transformer has to have; None for any."""
    transformer: Path | None = None
    """A fully fine-tuned transformer in place of the base's: an export's folder, its ``transformer`` sub-folder, or a
    GGUF file."""
    adapters: tuple[AdapterArgument, ...] = ()
    bucket: BucketField | None = None
    """Frames x height x width; None: what the first adapter or ``transformer`` was trained at, else the native size."""
    riflex: int | None = None
    """Frames within which temporal positions do not repeat (``cogvideox.riflex``); 0 for the model's own positions,
    None: as the first adapter or ``transformer`` was trained."""
    fps: float | None = None
    """Of the files written; None: what the first adapter or ``transformer`` was trained at, else the native rate."""
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    """Let the guidance grow with the denoising steps."""
    scheduler: Literal["ddim", "dpm"] | None = None
    """What takes the denoising steps; None: as the base says (of the published models, 2B has DDIM, the others DPM)."""
    strength: float = 0.8
    """Of video-to-video: which part of the denoising steps is made."""
    extend: int = 0
    """By how many further parts each video is continued."""
    compare: tuple[float, ...] | Path | None = None
    """Sample every prompt in columns: with each of these factors of its adapters' strengths, or with each checkpoint of
    a run."""
    gif: bool = False
    """Write each video as an animated GIF as well."""
    upscale: Path | None = None
    """Super-resolution weights that enlarge the files' frames (``postprocess``)."""
    interpolate: Interpolation | None = None
    """How the files get more frames per second (``postprocess``)."""
    preview: Path | None = None
    """Weights of a tiny VAE that shows videos while they are sampled (``preview``)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    budget: int | None = None
    """Bytes of the GPU's memory that may be used; None: what is free of it."""
    offload: Offload | Literal["auto"] = "auto"
    """What waits in host memory; ``auto``: as little as the budget allows."""
    quantize: Quantization | None = None
    """How the transformer is held in fewer bits, which changes the videos."""
    quantize_text: Quantization | None = None
    """The same for T5."""
    compile: bool = False
    """Compile the transformer's blocks."""
    parallel: Literal["prompts", "cfg", "context"] | None = None
    """What several processes divide: the videos, the two passes of guidance, or every pass's tokens; None: the videos
    where there are several, else tokens."""
    device: str | None = None
    """None: the GPU if there is one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        if self.transformer is not None:
            object.__setattr__(self, "transformer", Path(self.transformer))

    @property
    def gguf(self) -> Path | None:
        """``transformer``, if it is a file."""
        return self.transformer if self.transformer is not None and self.transformer.suffix == ".gguf" else None


def parse_adapter(text: str, folder: Path = Path()) -> AdapterArgument:
    """Read ``PATH`` or ``PATH:STRENGTH``, as in ``my_lora:0.8``; a relative path starts at ``folder``.

    Raises:
        ConfigError: if what follows the last colon is no number.
    """
    if (folder / text).exists() or ":" not in text:
        return AdapterArgument(folder / text)
    path, _, strength = text.rpartition(":")
    try:
        return AdapterArgument(folder / path, float(strength))
    except ValueError:
        raise ConfigError(
            f"the adapter's strength {strength!r} is not a number",
            where=f"--adapter {text}",
            fix="write PATH or PATH:STRENGTH, as in my_lora:0.8",
        ) from None


def prompts_with_seeds(
    prompts: Sequence[str],
    images: Sequence[Path] = (),
    *,
    last_images: Sequence[Path] = (),
    videos: Sequence[Path] = (),
    controls: Sequence[Path] = (),
    seeds: range = range(2**62),
) -> tuple[VideoPrompt, ...]:
    """Prompts as given one by one, each with the next of ``seeds``.

    Args:
        prompts: the texts.
        images: first frames: none, one for all prompts, or one for each.
        last_images: last frames, likewise.
        videos: what video-to-video starts from, likewise.
        controls: control videos, likewise.
        seeds: the first is the first prompt's.

    Raises:
        ConfigError: if there are images, but neither one nor as many as prompts; for a seed below 0 or too large.
    """
    if not seeds or seeds.start < 0:
        raise ConfigError(f"seed {seeds.start}", where="--seed", fix="give 0 to 2^62 - 1")
    columns = {"image": images, "last_image": last_images, "video": videos, "control": controls}
    rows: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=False)
    ]
    for name, files in columns.items():
        if len(files) not in (0, 1, len(prompts)):
            raise ConfigError(
                f"{len(files)} {name.replace('_', ' ')}s for {len(prompts)} prompts",
                where=f"--{name.replace('_', '-')}",
                fix="give one for all, or one for each",
            )
        for index, row in enumerate(rows if files else []):
            row[name] = files[index if len(files) > 1 else 0]
    return tuple(VideoPrompt(**row) for row in rows)


def read_prompts(path: Path, *, seeds: range = range(2**62)) -> tuple[VideoPrompt, ...]:
    """Read prompts from a file.

    Args:
        path: text with one prompt per line, or ``.jsonl`` with an object per line: ``prompt``, and where wanted
            ``seed``, ``bucket``, ``image``, ``last_image``, ``keyframes`` (images by the number of their frame),
            ``video``, ``control``, ``strength`` (of video-to-video) and ``adapter`` (``PATH:STRENGTH``, or a list of
            them). Paths are relative to the file; empty lines are left out.
        seeds: of the prompts in turn; one that states its own leaves its place unused.

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
        return prompts_with_seeds([line for _, line in numbered], seeds=seeds)
    prompts, errors = [], []
    for (number, line), seed in zip(numbered, seeds, strict=False):
        try:
            prompts.append(_from_row(json.loads(line), path.parent, seed))
        except ValidationError as error:
            reasons = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
            errors.append(ConfigError("; ".join(reasons), where=f"{path}:{number}"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            errors.append(ConfigError(f"not a prompt: {reason}", where=f"{path}:{number}"))
        except ConfigError as error:
            errors.append(ConfigError(error.what, where=f"{path}:{number}", fix=error.fix))
    raise_all(ConfigError, errors, what="{n} prompts cannot be used")
    return tuple(prompts)


def write_prompts(path: Path, prompts: Sequence[SamplePrompt]) -> None:
    """Write prompts as ``read_prompts`` reads them, ``.jsonl``, files by their absolute paths.

    Raises:
        ConfigError: for another suffix.
        OSError: if it cannot be written.
    """
    if path.suffix != ".jsonl":
        raise ConfigError("prompts with seeds are written as .jsonl", where=f"--output {path}", fix="name it so")
    atomic_write_text(path, "".join(json.dumps(_as_row(prompt), ensure_ascii=False) + "\n" for prompt in prompts))


_FILES = ("image", "last_image", "video", "control")


def _as_row(prompt: SamplePrompt) -> dict[str, Any]:
    row = prompt.model_dump(mode="json", exclude_none=True, exclude={"adapters"})
    for name in _FILES:
        if name in row:
            row[name] = str(Path(row[name]).absolute())
    if "keyframes" in row:
        row["keyframes"] = {frame: str(Path(image).absolute()) for frame, image in row["keyframes"].items()}
    if isinstance(prompt, VideoPrompt) and prompt.adapters is not None:
        row["adapter"] = [f"{adapter.path.absolute()}:{adapter.strength}" for adapter in prompt.adapters]
    return row


def _from_row(row: Any, folder: Path, seed: int) -> VideoPrompt:
    if not isinstance(row, dict):
        raise ValueError('expected an object such as {"prompt": "a red ring", "seed": 3}')
    row = {"seed": seed, **row}
    if "adapters" in row:
        raise ValueError("write adapter, with a text or a list of texts")
    if "adapter" in row:
        texts = [row["adapter"]] if isinstance(row["adapter"], str) else row["adapter"]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("adapter is PATH or PATH:STRENGTH, or a list of them")
        row["adapters"] = tuple(parse_adapter(text, folder) for text in texts)
        del row["adapter"]
    prompt = VideoPrompt.model_validate(row)
    files = {name: getattr(prompt, name) for name in _FILES}
    here: dict[str, Any] = {name: folder / p.expanduser() for name, p in files.items() if p is not None}
    if prompt.keyframes:
        here["keyframes"] = {frame: folder / image.expanduser() for frame, image in prompt.keyframes.items()}
    return prompt.model_copy(update=here)


def mode_of(prompt: VideoPrompt, bucket: Bucket, fps: float, strength: float) -> Mode:
    """What a prompt's video is sampled from.

    Raises:
        DataError: if its video cannot be read.
    """
    if prompt.control is not None:
        return FromControl(read_clip(prompt.control, bucket, fps))
    if prompt.video is not None:
        return FromVideo(read_clip(prompt.video, bucket, fps), prompt.strength or strength)
    return image_mode(prompt.images_by_frame(bucket.frames))


def request_faults(request: GenerateRequest, spec: ModelSpec, bucket: Bucket, fps: float) -> Iterator[FinetuneError]:
    """Everything that is wrong with a request for this model at this size, adapters and base left aside."""
    if not request.prompts:
        yield ConfigError("there is no prompt", fix="give --prompt TEXT or --prompts FILE")
    for index, prompt in enumerate(request.prompts):
        where = f"prompt {index + 1} ({prompt.prompt[:40]!r})"
        yield from _prompt_faults(prompt, spec, prompt.bucket or bucket, where=where)
        yield from _video_faults(request, prompt, prompt.bucket or bucket, fps, where=where)
    if (fault := riflex_fault(spec)) is not None:
        yield ConfigError(fault[0], where=f"--riflex {spec.riflex}", fix=fault[1])
    for size in {bucket, *(prompt.bucket for prompt in request.prompts if prompt.bucket is not None)}:
        fix = f"give --riflex {size.frames} for longer videos" if makes_possible(spec, size) else ""
        for problem in spec.check_bucket(size):
            yield ConfigError(problem, where=f"size {size}", fix=fix)
    if not 1 <= request.num_inference_steps <= spec.num_train_timesteps:
        steps = request.num_inference_steps
        yield ConfigError(f"{steps} denoising steps", where="--steps", fix=f"give 1 to {spec.num_train_timesteps}")
    if not (math.isfinite(request.guidance_scale) and request.guidance_scale >= 1):
        yield ConfigError(f"guidance scale {request.guidance_scale}", where="--guidance", fix="give 1 (none) or more")
    if not 0 < request.strength <= 1:
        yield ConfigError(f"strength {request.strength}", where="--strength", fix="give more than 0, at most 1")
    if not 1 <= request.videos <= _MOST_VIDEOS:
        yield ConfigError(f"{request.videos} videos of each prompt", where="--videos", fix=f"give 1 to {_MOST_VIDEOS}")
    if not 0 <= request.extend <= _MOST_PARTS:
        yield ConfigError(f"{request.extend} parts more", where="--extend", fix=f"give 0 to {_MOST_PARTS}")
    if spec.control and request.extend > 0:
        what = "a video that follows a control video is as long as its bucket"
        yield ConfigError(what, where="--extend", fix="leave it out, or give a longer --bucket")
    if spec.control and request.scheduler == "dpm":
        what = "diffusers' control pipeline steps with DDIM alone"
        yield ConfigError(what, where="--scheduler dpm", fix="leave it out")
    if request.fps is not None and not 0 < request.fps <= _MOST_FPS:
        where, fix = "--fps", f"give more than 0, at most {_MOST_FPS}"
        yield ConfigError(f"{request.fps:g} frames per second", where=where, fix=fix)
    if request.out.exists() and not request.out.is_dir():
        yield ConfigError("the output is a file, not a folder", where=str(request.out))


def _prompt_faults(prompt: VideoPrompt, spec: ModelSpec, bucket: Bucket, *, where: str) -> Iterator[ConfigError]:
    if fault := text_fault(prompt.prompt):
        yield ConfigError(f"the prompt is damaged: {fault}", where=where, fix="write it again as text")
    if spec.control and prompt.control is None:
        yield ConfigError("the model follows a control video and needs one", where=where, fix="give --control VIDEO")
    elif spec.control and prompt.video is not None:
        fix = "leave --video out: give it, or what was made of it, as --control"
        yield ConfigError("the model follows a control video and takes no other", where=where, fix=fix)
    elif prompt.control is not None and not spec.control:
        what = f"the model is {spec.task} and takes no control video"
        yield ConfigError(what, where=where, fix="leave --control out, or name an adapter that follows one")
    elif spec.image_to_video and prompt.video is not None:
        yield ConfigError(
            "the model is image-to-video, and only text-to-video models make video-to-video",
            where=where,
            fix="use a text-to-video model, or give the video's first frame as --image",
        )
    elif spec.image_to_video and not prompt.images:
        what, fix = "the model is image-to-video and needs a first frame", "give --image FILE, or --last-image FILE"
        yield ConfigError(what, where=where, fix=fix)
    if prompt.images and not spec.image_to_video:
        yield ConfigError(f"the model is {spec.task} and takes no image", where=where, fix="leave the image out")
        return
    for fault in prompt.image_faults(bucket.frames, spec.vae_temporal):
        yield ConfigError(fault, where=f"{where}: keyframes")
    yield from (ConfigError("there is no such image", where=f"{where}: {p}") for p in prompt.images if not p.is_file())


def _video_faults(
    request: GenerateRequest, prompt: VideoPrompt, bucket: Bucket, fps: float, *, where: str
) -> Iterator[FinetuneError]:
    strength, steps = prompt.strength or request.strength, request.num_inference_steps
    video = prompt.video or prompt.control
    if video is None:
        return
    if prompt.video is not None and 0 < strength <= 1 and int(strength * steps) < 1:
        yield ConfigError(f"strength {strength} of {steps} steps is none", where=where, fix="give more of either")
    try:
        require_clip(video, bucket, fps)
    except DataError as error:
        yield error
