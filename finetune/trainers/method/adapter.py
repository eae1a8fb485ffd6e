"""Reading a LoRA adapter from disk, whoever wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.errors import ConfigError

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The adapter file of an export, as diffusers names it."""
CHECKPOINT_FILE = "trainable.safetensors"
"""The trainable tensors of one of our checkpoints (``checkpoint.TRAINABLE``; a test keeps the two equal)."""
METADATA_KEY = "lora_adapter_metadata"
"""Header entry under which diffusers keeps an adapter's settings."""
COMPONENT = "transformer"
"""Prefix of every tensor and setting in diffusers' adapter files."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as found on disk."""

    path: Path
    tensors: Mapping[str, Tensor]
    """By peft's state-dict names, without any prefix."""
    settings: Mapping[str, Any]
    """``rank``, ``alpha``, ``use_rslora`` and ``use_dora``, as ``LoraMethod`` names them."""
    note: str = ""
    """What a reader of an error should know about where the settings come from."""


def read_adapter(source: Path) -> Adapter:
    """Read an adapter and its settings from a safetensors file, an export's folder or one of our checkpoints.

    Settings stand in the file's header (diffusers' layout) or in the checkpoint's ``config.json``. A file with neither
    is read as diffusers reads it: rank from the shapes, alpha equal to the rank.

    Raises:
        ConfigError: if there is no adapter at ``source``, or it varies rank or alpha from layer to layer.
    """
    from safetensors import SafetensorError, safe_open

    where = f"method.init_from: {source}"
    candidates = [source / LORA_FILE, source / CHECKPOINT_FILE] if source.is_dir() else [source]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise ConfigError(
            f"there is no adapter: the folder holds neither {LORA_FILE} nor {CHECKPOINT_FILE}"
            if source.is_dir()
            else "there is no such file or folder",
            where=where,
            fix="name a LoRA safetensors file, an export's folder or a folder <run>/checkpoints/step-...",
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name.removeprefix(f"{COMPONENT}."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"the adapter file cannot be read: {error}", where=where) from None
    ranks = sorted({tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")})
    if not ranks:
        raise ConfigError("the file holds no LoRA tensors", where=where, fix="name a file with *.lora_A.weight tensors")
    recorded = {key.removeprefix(f"{COMPONENT}."): value for key, value in header.items()}
    if len(ranks) > 1 or recorded.get("rank_pattern") or recorded.get("alpha_pattern"):
        raise ConfigError(f"the adapter varies rank or alpha between layers (ranks {ranks})", where=where)
    config = path.with_name("config.json")
    if not recorded and config.is_file():
        method = json.loads(config.read_text(encoding="utf-8")).get("method", {})
        names = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
        recorded = {theirs: method[ours] for theirs, ours in names.items() if ours in method}
    return Adapter(
        path=path,
        tensors=tensors,
        settings={
            "rank": ranks[0],
            "alpha": float(recorded.get("lora_alpha", ranks[0])),
            "use_rslora": bool(recorded.get("use_rslora", False)),
            "use_dora": any(".lora_magnitude_vector" in name for name in tensors),
        },
        note="" if recorded else " (the file does not state its alpha; like diffusers we take alpha = rank)",
    )
