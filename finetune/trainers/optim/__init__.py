"""Optimizers, the precision of narrow weights, and optimizer state without pickle."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.trainers.optim.expected import OptimizerState, owner_of
from finetune.trainers.optim.narrow import NarrowWeights
from finetune.trainers.optim.rounding import Weights
from finetune.trainers.optim.sections import (
    AdamW,
    AdamW8bit,
    CustomOptimizer,
    OptimizerConfig,
    PagedAdamW8bit,
    TorchaoAdamW8bit,
)
from finetune.trainers.optim.state import (
    load_optimizer_state,
    optimizer_state,
    optimizer_tensors,
    precise_weights,
    require_same_state,
)

__all__ = [
    "AdamW",
    "AdamW8bit",
    "CustomOptimizer",
    "NarrowWeights",
    "OptimizerConfig",
    "OptimizerState",
    "PagedAdamW8bit",
    "TorchaoAdamW8bit",
    "Weights",
    "begin",
    "load_optimizer_state",
    "optimizer_state",
    "optimizer_tensors",
    "owner_of",
    "precise_weights",
    "require_same_state",
    "set_lr",
]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; torchao keeps it in a tensor that its compiled step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def begin(optimizer: torch.optim.Optimizer, *, seed: int, step: int) -> None:
    """Say which optimizer step the next updates belong to: random numbers in them are drawn by it.

    Args:
        optimizer: what ``build`` made.
        seed: of the run.
        step: from 0.
    """
    if isinstance(optimizer, NarrowWeights):
        optimizer.begin(seed, step)
