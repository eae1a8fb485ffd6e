"""A whole model in every process: one process, or several under DDP, as accelerate launches them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class Replicated:
    """The ``Engine`` of one process and of DDP.

    Args:
        accelerator: the launch; it wraps the model for DDP where there are several processes.
        module: the transformer, on its device.
        parameters: what trains.
        optimizer: over ``parameters``.
    """

    def __init__(
        self,
        accelerator: Any,
        module: nn.Module,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        # The optimizer is not handed to accelerate: it would move a state that is paged, or kept on the CPU on purpose.
        self.model: nn.Module = accelerator.prepare(module)
        self._parameters = list(parameters)
        self._optimizer = optimizer

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
            torch._foreach_div_([p.grad for p in self._parameters if p.grad is not None], scale)
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, limit))

    def step(self) -> None:
        """See ``Engine``."""
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """See ``Engine``."""
        self._optimizer.zero_grad()
