"""Checkpoints: whole or absent, verified when read, removed only after a newer one stands.

``<run>/checkpoints/step-00000500/`` holds ``trainable.safetensors``, ``optimizer.safetensors`` and ``optimizer.json``,
``ema.safetensors`` where an average is kept, ``config.json``, ``state.json``, and the ``COMPLETE`` marker, written
last, with a checksum of every other file and of itself (``seals``). Processes that share a model out write a folder of
shares in place of each safetensors file. There is no pickle in it, and no random state: randomness follows from the
step.
"""

from __future__ import annotations

from finetune.trainers.checkpoint.compare import Difference, compare_configs, require_same_run
from finetune.trainers.checkpoint.folders import FOLDER, checkpoint_path, list_checkpoints, prune, step_folders, sweep
from finetune.trainers.checkpoint.form import TRAINABLE, CheckpointConfig
from finetune.trainers.checkpoint.load import LoadedCheckpoint, choose_checkpoint, load_checkpoint
from finetune.trainers.checkpoint.save import save_checkpoint
from finetune.trainers.checkpoint.saver import Saver

__all__ = [
    "FOLDER",
    "TRAINABLE",
    "CheckpointConfig",
    "Difference",
    "LoadedCheckpoint",
    "Saver",
    "checkpoint_path",
    "choose_checkpoint",
    "compare_configs",
    "list_checkpoints",
    "load_checkpoint",
    "prune",
    "require_same_run",
    "save_checkpoint",
    "step_folders",
    "sweep",
]
