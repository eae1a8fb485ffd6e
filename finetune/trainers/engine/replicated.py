"""A whole model in every process: one process, or several under DDP, as accelerate launches them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune.trainers.checkpoint import LoadedCheckpoint
from finetune.trainers.method import load_strictly
from finetune.trainers.optim import (
    OptimizerConfig,
    OptimizerState,
    load_optimizer_state,
    optimizer_state,
    precise_weights,
)


class Replicated:
    """The ``Engine`` of one process and of DDP.

    Args:
        accelerator: the launch; it wraps the model for DDP where there are several processes.
        module: the transformer, on its device.
        parameters: what trains, by name.
    """

    lockstep = False
    sharded = False
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Any, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.name = "one process" if accelerator.num_processes == 1 else "DDP, a whole model in each process"
        self.model: nn.Module = accelerator.prepare(module)
        self.parameters = dict(parameters)

    def start(self, optimizer: OptimizerConfig, saved: LoadedCheckpoint | None) -> None:
        """See ``Engine``."""
        if saved is not None:
            load_strictly(self.parameters, saved.trainable)
        # Built after the weights are final: master copies are taken from them. It is not handed to accelerate, which
        # would move a state that is paged, or kept on the CPU on purpose.
        self.optimizer = optimizer.build(self.parameters.items())
        if saved is not None:
            load_optimizer_state(self.optimizer, saved.optimizer, self.parameters)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """See ``Engine``."""
        no_sync = getattr(self.model, "no_sync", None)
        context: AbstractContextManager[object] = nullcontext() if last or no_sync is None else no_sync()
        return context

    def backward(self, loss: Tensor) -> None:
        """See ``Engine``."""
        loss.backward()  # type: ignore[no-untyped-call]

    def clip(self, limit: float, *, scale: float = 1.0) -> float:
        """See ``Engine``."""
        if scale != 1.0:
            torch._foreach_div_([p.grad for p in self.parameters.values() if p.grad is not None], scale)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def step(self) -> None:
        """See ``Engine``."""
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """See ``Engine``."""
        self.optimizer.zero_grad()

    def replicas(self) -> Mapping[str, Tensor]:
        """See ``Engine``."""
        named: dict[str, Tensor] = {f"weight of {name}": p.detach() for name, p in self.parameters.items()}
        return named | {f"gradient of {name}": p.grad for name, p in self.parameters.items() if p.grad is not None}

    def precise(self) -> Mapping[str, Tensor]:
        """See ``Engine``."""
        return precise_weights(self.optimizer, self.parameters)

    def weights(self) -> Mapping[str, Tensor]:
        """See ``Engine``."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def optimizer_state(self) -> OptimizerState:
        """See ``Engine``."""
        return optimizer_state(self.optimizer, self.parameters)

    def shares(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See ``Engine``."""
        return tensors

    def read(self, saved: LoadedCheckpoint, part: str) -> Mapping[str, Tensor] | None:
        """See ``Engine``."""
        tensors: Mapping[str, Tensor] | None = getattr(saved, part)
        return tensors
