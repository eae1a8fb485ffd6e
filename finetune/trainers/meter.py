"""What one optimizer step was like, over all processes: losses by sample, and what any of them has to tell the others.

Leaf: arithmetic on plain tensors, so that the loop keeps to what happens and this keeps to what it amounted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PADDING = -2.0
_FLAGS = -1.0
_STOP, _FAULT = 1, 2
"""Bits of the row that stands under ``_FLAGS``."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step's samples, of every process: by rank, and in each rank's own order.

    ``losses`` and ``timesteps`` have one number per sample.
    """

    losses: tuple[float, ...]
    timesteps: tuple[int, ...]
    stop: bool
    """Whether any process was asked to stop."""
    fault: bool
    """Whether any process cannot go on after this step."""

    @property
    def loss(self) -> float:
        """Mean over the samples of the step, each counted once."""
        return math.fsum(self.losses) / len(self.losses)

    def is_finite(self, grad_norm: float) -> bool:
        """Whether the step may be taken: every loss, and the norm of the gradient, is a number."""
        return math.isfinite(grad_norm) and all(math.isfinite(loss) for loss in self.losses)


@dataclass
class Meter:
    """Collects one process's part of a step and exchanges it in a single collective.

    Args:
        rows: most samples a process can have in a step (accumulation x batch size); shorter parts are padded, because a
            collective needs equal shapes.
        gather: concatenates a [rows + 1, 2] tensor over processes, such as ``Accelerator.gather``.
    """

    rows: int
    gather: Callable[[Tensor], Tensor]
    _losses: list[Tensor] = field(default_factory=list)
    _timesteps: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, timesteps: Tensor) -> None:
        """Note one pass: per-sample losses [B] and timesteps [B]. Nothing is read from the device yet."""
        self._losses.append(losses.detach().double())
        self._timesteps.append(timesteps.double())

    def exchange(self, *, stop: bool = False, fault: bool = False) -> StepRecord:
        """Share the step with every process. This is where a step waits for the device, once.

        Args:
            stop: this process was asked to stop.
            fault: this process cannot go on after this step.
        """
        mine = torch.stack([torch.cat(self._losses), torch.cat(self._timesteps)], dim=1)
        table = mine.new_full((self.rows + 1, 2), _PADDING)
        table[: len(mine)] = mine
        table[-1] = torch.tensor([_STOP * stop + _FAULT * fault, _FLAGS], dtype=mine.dtype)
        every = self.gather(table).tolist()
        samples = [(loss, int(timestep)) for loss, timestep in every if timestep >= 0]
        flags = [int(value) for value, kind in every if kind == _FLAGS]
        return StepRecord(
            losses=tuple(loss for loss, _ in samples),
            timesteps=tuple(timestep for _, timestep in samples),
            stop=any(flag & _STOP for flag in flags),
            fault=any(flag & _FAULT for flag in flags),
        )

    def reset(self) -> None:
        """Forget the step, or what there is of one that is begun again."""
        self._losses.clear()
        self._timesteps.clear()
