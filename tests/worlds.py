"""Run configurations for tests: the tiny model, a few clips, everything fast and small."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.config import RunConfig


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, section by section; a section with another ``kind`` replaces."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and value.get("kind") in (None, old.get("kind")):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def run_values(model: Path, clips: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """What a test's YAML would hold: LoRA r4 on four clips of 9x64x64, four steps, nothing measured or sampled."""
    base = {
        "model": {"pretrained": str(model)},
        "data": {"sources": [{"path": str(clips)}], "buckets": ["9x64x64"], "fps": 8},
        "cache": {"dir": str(output.parent / "cache"), "decode_workers": 0, "image_draws": 2},
        "method": {"kind": "lora", "rank": 4, "alpha": 4},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "train": {"steps": 4, "seed": 7},
        "validation": {"every": None, "at_start": False},
        "checkpoint": {"every": None},
        "tracking": {"kind": "none"},
        "output_dir": str(output),
    }
    return merged(base, changes)


def run_config(model: Path, clips: Path, output: Path, **changes: Any) -> RunConfig:
    """``run_values`` as a configuration."""
    return RunConfig.from_dict(run_values(model, clips, output, **changes))
