"""Checkpoints: saving, finding, verifying, pruning, and whether a changed configuration may continue from one."""

from __future__ import annotations

from finetune.trainers.checkpoint.compare import Difference, compare_configs, require_same_run
from finetune.trainers.checkpoint.store import (
    CheckpointConfig,
    LoadedCheckpoint,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)

__all__ = [
    "CheckpointConfig",
    "Difference",
    "LoadedCheckpoint",
    "checkpoint_path",
    "compare_configs",
    "find_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "prune",
    "require_same_run",
    "save_checkpoint",
]
