"""``finetune lr-find``: which learning rate a run should begin with, by a short run in which it grows.

The loss of a training step says little: it depends more on the timestep that was drawn than on what was learnt. So what
is looked at is the held-out loss, measured every few steps at fixed clips, timesteps and noise. It falls where the
learning rate moves the model, and rises where it breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from finetune.checkpoint.folders import HISTORY, read_history
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError, NonFiniteError, TrainingError
from finetune.core.files import from_here
from finetune.datasets.schedule import lr_at
from finetune.planner.report import table
from finetune.trainers.loop import train

_FLAT = 0.002
"""Least share of its first value by which the loss has to fall for a learning rate to be suggested."""


@dataclass(frozen=True)
class LrReport:
    """Held-out loss over a growing learning rate."""

    points: Sequence[tuple[float, float]]
    """(learning rate, held-out loss after the steps up to it), ascending; the first is before any step, at rate 0."""
    run_dir: Path
    broke_at: float | None = None
    """The learning rate at which a loss or gradient was not finite any more; None where none was."""

    @property
    def lowest(self) -> tuple[float, float]:
        """The point with the lowest loss."""
        return min(self.points, key=lambda point: point[1])

    @property
    def suggested(self) -> float | None:
        """The rate at which the loss falls fastest, before its lowest point; None if it never falls."""
        lowest, start = self.lowest, self.points[0][1]
        if start - lowest[1] < _FLAT * start:
            return None
        falling = [point for point in self.points[1:] if point[0] <= lowest[0]]
        if len(falling) < 2:
            return falling[0][0]
        slopes = {
            math.sqrt(rate * further): (loss - then) / math.log(further / rate)
            for (rate, loss), (further, then) in pairwise(falling)
        }
        return max(slopes, key=lambda rate: slopes[rate])

    @property
    def verdict(self) -> str:
        """What it says, and what to write."""
        (rate, loss), highest, start = self.lowest, self.points[-1][0], self.points[0][1]
        if self.suggested is None:
            return (
                f"no learning rate up to {highest:.1e} moved the held-out loss: try --highest {10 * highest:.0e}, or"
                " more --steps"
            )
        text = f"falls from {start:.4f} to {loss:.4f} at {rate:.1e}"
        if rate == highest and self.broke_at is None:
            text += f", and still falls at the end: try --highest {10 * highest:.0e} as well"
        elif self.broke_at is not None:
            text += f", and breaks at {self.broke_at:.1e}"
        else:
            text += ", and rises from there"
        return f"the held-out loss {text}; begin with optimizer.lr: {self.suggested:.1e}"

    def __str__(self) -> str:
        low, high = (pick(loss for _, loss in self.points) for pick in (min, max))
        rows = [
            [
                "before" if not rate else f"{rate:.2e}",
                f"{loss:.4f}",
                "#" * round(30 * (loss - low) / ((high - low) or 1)),
            ]
            for rate, loss in self.points
        ]
        return "\n".join([*table(["learning rate", "held-out loss", ""], rows), "", self.verdict])


def lr_find(config: RunConfig, *, lowest: float, highest: float, steps: int, every: int) -> LrReport:
    """Train with a growing learning rate in a folder of its own; errors stand at ``finetune.lr_find``."""
    if not 0 < lowest < highest:
        raise ConfigError(
            f"the learning rate is to grow from {lowest:g} to {highest:g}",
            where="--lowest, --highest",
            fix="give a lower and a higher number, such as 1e-6 and 1e-2",
        )
    if not config.data.holdout and all(source.split != "holdout" for source in config.data.sources):
        raise ConfigError(
            "no clip is held out, and the loss of training steps is too noisy to see a learning rate in",
            where=config.where("data.holdout"),
            fix="set data.holdout: 0.1, say",
        )
    folder = config.output_dir / "lr-find"
    values = config.to_dict()
    values["optimizer"]["lr"] = highest
    values["lr_schedule"] = {"kind": "exponential", "first": lowest / highest}
    values["train"] |= {"steps": steps, "epochs": None, "ema_decay": None}
    values["validation"] |= {"every": every, "at_start": True, "samples": [], "sample_every": None}
    values["checkpoint"] |= {"every": None, "keep_last": 1, "keep_best": False, "resume": "none"}
    values["tracking"] |= {"kind": "none"}
    values["output_dir"] = str(folder)
    if folder.exists():
        raise ConfigError(
            "an earlier search stands there", where=from_here(folder), fix=f"read it, then remove it: rm -r {folder}"
        )
    grown = RunConfig.from_dict(values, base=config.base)
    broke_at = None
    try:
        train(grown)
    except NonFiniteError:
        measured = read_history(folder / HISTORY)
        if len(measured) < 2:
            raise
        broke_at = lr_at(measured[-1].step + 1, highest, grown.lr_schedule, steps)
    history = read_history(folder / HISTORY)
    if len(history) < 2:
        raise TrainingError(
            "the search was stopped before it had measured twice",
            where=from_here(folder),
            fix=f"remove the folder, and search again: rm -r {folder}",
        )
    points = [
        (lr_at(row.step - 1, highest, grown.lr_schedule, steps) if row.step else 0.0, row.heldout) for row in history
    ]
    return LrReport(points, folder, broke_at)
