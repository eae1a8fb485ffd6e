"""What one optimizer step was like, over all processes: losses by sample, gradient norm, and whether to stop.

Leaf: arithmetic on plain tensors, so that the loop keeps to what happens and this keeps to what it amounted to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune.errors import TrainingError

_PADDING = -2.0
_STOP = -1.0


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step's samples, of every process.

    ``losses`` and ``timesteps`` have one number per sample; ``stop`` is whether any process was asked to stop.
    """

    losses: tuple[float, ...]
    timesteps: tuple[int, ...]
    stop: bool

    @property
    def loss(self) -> float:
        """Mean over the samples of the step, each counted once."""
        return math.fsum(self.losses) / len(self.losses)


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
    _clips: list[str] = field(default_factory=list)

    def add(self, losses: Tensor, timesteps: Tensor, clips: Sequence[str]) -> None:
        """Note one micro-batch: per-sample losses [B] and timesteps [B]. Nothing is read from the device yet."""
        self._losses.append(losses.detach().double())
        self._timesteps.append(timesteps.double())
        self._clips += clips

    def exchange(self, stop: bool) -> StepRecord:
        """Share the step with every process. This is where a step waits for the device, once."""
        mine = torch.stack([torch.cat(self._losses), torch.cat(self._timesteps)], dim=1)
        table = mine.new_full((self.rows + 1, 2), _PADDING)
        table[: len(mine)] = mine
        table[-1] = torch.tensor([float(stop), _STOP], dtype=mine.dtype)
        every = self.gather(table).tolist()
        samples = [(loss, int(timestep)) for loss, timestep in every if timestep >= 0]
        return StepRecord(
            losses=tuple(loss for loss, _ in samples),
            timesteps=tuple(timestep for _, timestep in samples),
            stop=any(flag > 0 for flag, kind in every if kind == _STOP),
        )

    def local_faults(self) -> list[str]:
        """This process's samples with a non-finite loss, in words."""
        losses, timesteps = torch.cat(self._losses).tolist(), torch.cat(self._timesteps).tolist()
        return [
            f"{clip} at timestep {int(timestep)}: loss {loss}"
            for clip, timestep, loss in zip(self._clips, timesteps, losses, strict=True)
            if not math.isfinite(loss)
        ]

    @property
    def clips(self) -> tuple[str, ...]:
        """This process's clips of the step, in order."""
        return tuple(self._clips)

    def reset(self) -> None:
        """Forget the step."""
        self._losses.clear()
        self._timesteps.clear()
        self._clips.clear()


def require_finite(
    record: StepRecord,
    grad_norm: float,
    meter: Meter,
    step: int,
    gather_words: Callable[[list[str]], list[str]],
) -> None:
    """Stop before a non-finite loss or gradient reaches the weights.

    Every process sees the same record and the same gradient norm, so all of them raise or none.

    Args:
        record: the step, of all processes.
        grad_norm: global norm before clipping.
        meter: this process's part, for the names.
        step: which optimizer step, from 0.
        gather_words: concatenates lists of strings over processes.

    Raises:
        TrainingError: naming the step and the samples.
    """
    if math.isfinite(grad_norm) and all(math.isfinite(loss) for loss in record.losses):
        return
    faults = gather_words(meter.local_faults())
    if faults:
        samples = "; ".join(faults)
    else:
        samples = "every loss was finite; the gradient was not. Samples: " + ", ".join(gather_words(list(meter.clips)))
    raise TrainingError(
        f"step {step}: non-finite {'loss' if faults else 'gradient'} (gradient norm {grad_norm});"
        " the weights were not updated",
        where=samples,
        fix="lower optimizer.lr, lengthen lr_schedule.warmup_steps, use model.dtype bf16 instead of fp16, or look at"
        " the named clips; the last checkpoint is intact",
    )
