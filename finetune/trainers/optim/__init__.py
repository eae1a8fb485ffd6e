"""Optimizers, fp32 master weights, and optimizer state without pickle."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.trainers.optim.masters import MasterWeights
from finetune.trainers.optim.sections import (
    AdamW,
    AdamW8bit,
    CustomOptimizer,
    OptimizerConfig,
    PagedAdamW8bit,
    TorchaoAdamW8bit,
)
from finetune.trainers.optim.state import (
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
    owner_of,
    precise_weights,
    require_same_optimizer,
)

__all__ = [
    "AdamW",
    "AdamW8bit",
    "CustomOptimizer",
    "MasterWeights",
    "OptimizerConfig",
    "OptimizerState",
    "PagedAdamW8bit",
    "TorchaoAdamW8bit",
    "load_optimizer_state",
    "optimizer_state",
    "owner_of",
    "precise_weights",
    "require_same_optimizer",
    "set_lr",
]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group; torchao keeps it in a tensor that its compiled step reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
