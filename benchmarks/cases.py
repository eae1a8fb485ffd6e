"""Techniques that no shipped configuration has, each added to one: predicted and measured beside the recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig, load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CASES: Mapping[str, tuple[str, Mapping[str, Mapping[str, Any]]]] = {
    "2B LoRA, no checkpointing": ("cogvideox-2b-lora.yaml", {"memory": {"checkpointing": "none"}}),
    "5B LoRA, attention kept": ("cogvideox-5b-lora.yaml", {"memory": {"checkpointing": "selective"}}),
    "5B LoRA, lean, attention kept in 21 blocks": (
        "cogvideox-5b-lora-24gb.yaml",
        {"memory": {"checkpointing": "selective", "keep_attention": 21}},
    ),
    "5B LoRA, lean, 21 blocks streamed": ("cogvideox-5b-lora-24gb.yaml", {"memory": {"streamed_blocks": 21}}),
    "5B LoRA, lean, fp8 per 64 weights": ("cogvideox-5b-lora-24gb.yaml", {"memory": {"base": "fp8_64"}}),
    "5B LoRA, lean, int8": ("cogvideox-5b-lora-24gb.yaml", {"memory": {"base": "int8"}}),
    "5B LoRA, lean, nf4": ("cogvideox-5b-lora-24gb.yaml", {"memory": {"base": "nf4"}}),
    "5B full, clipped per parameter": (
        "cogvideox-5b-full-32gb.yaml",
        {"memory": {"gradient_release": "per_parameter"}},
    ),
    "5B full, Kahan": ("cogvideox-5b-full-32gb.yaml", {"optimizer": {"weights": "kahan"}}),
    "5B full, float32 master": ("cogvideox-5b-full-32gb.yaml", {"optimizer": {"weights": "master"}}),
}
"""What each is called, the file in ``configs/``, and what is changed in which of its sections."""


def cases() -> Iterator[tuple[str, RunConfig]]:
    """Every case, each changed section checked as if it stood in a file."""
    for name, (file, changes) in CASES.items():
        config = load_config(CONFIGS / file)
        sections = {
            section: type(getattr(config, section)).model_validate({**getattr(config, section).model_dump(), **values})
            for section, values in changes.items()
        }
        yield name, config.model_copy(update=sections)
