"""Sampling through the stock diffusers pipeline. (SIGNATURES; being filled in)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from finetune.trainers.validation import SamplePrompt
from finetune.types import Bucket
from finetune.videos import Frames

if TYPE_CHECKING:
    from finetune.facts import Facts


@dataclass(frozen=True)
class SampleRequest:
    """One video to sample from embeddings that are ready: T5 need not be in memory."""

    prompt_embeds: Tensor
    """[L, D]"""
    negative_embeds: Tensor
    """[L, D]: the embedding of the empty caption, or of a negative prompt."""
    seed: int
    bucket: Bucket
    image: Tensor | None = None
    """uint8 RGB [3, H, W] at the bucket's height and width; image-to-video only."""


def sample_videos(
    facts: Facts,
    transformer: Any,
    scheduler: Any,
    vae: Any,
    requests: Sequence[SampleRequest],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    dynamic_cfg: bool = False,
) -> list[Frames]:
    """Sample every request through the stock pipeline; one uint8 [F, H, W, 3] per request."""
    raise NotImplementedError


@dataclass(frozen=True)
class Adapter:
    """A LoRA file or folder and how strongly it acts: 1 as trained, 0 not at all."""

    path: Path
    strength: float = 1.0


@dataclass(frozen=True)
class GenerateRequest:
    """What ``finetune generate`` is asked for."""

    base: str
    """Model folder or hub id."""
    prompts: tuple[SamplePrompt, ...]
    out: Path
    """Folder for the videos."""
    revision: str | None = None
    transformer: Path | None = None
    """A fully fine-tuned transformer's folder, in place of the base's."""
    adapters: tuple[Adapter, ...] = ()
    bucket: Bucket | None = None
    """None: what the first adapter was trained at, else the model's native size."""
    fps: float | None = None
    negative_prompt: str = ""
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    dynamic_cfg: bool = False
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    offload: bool = False
    device: str | None = None


@dataclass(frozen=True)
class GenerateReport:
    """What was written."""

    videos: tuple[Path, ...]
    sheet: Path


def parse_adapter(text: str) -> Adapter:
    """``PATH`` or ``PATH:STRENGTH``."""
    raise NotImplementedError


def read_prompts(path: Path, *, seed: int = 0) -> tuple[SamplePrompt, ...]:
    """Prompts from a text file (one per line) or ``.jsonl`` (``prompt``, ``image``, ``seed``); seeds default to ``seed`` + index."""
    raise NotImplementedError


def generate(request: GenerateRequest) -> GenerateReport:
    """Sample every prompt and write ``<out>/<index>-<slug>.mp4`` and ``sheet.png``."""
    raise NotImplementedError
