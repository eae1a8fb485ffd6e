"""What becomes of a run whose checkpoint cannot be written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finetune.errors import CheckpointError
from finetune.types import RunState

_TRIES = 10
"""Attempts, after the first, before the next checkpoint is due."""


class Saver:
    """Saves checkpoints, and gives a disk that fails until the next one is due.

    A checkpoint between two others that cannot be written is a warning, and is tried again ten times before the next
    one is due; if that one fails as well, or the last one of a run or that of a stop does, the error is raised. So a
    passing fault costs nothing, and a lasting one stops training with at most two intervals of work unsaved, where
    stopping at once would always lose one.

    Args:
        save: writes the checkpoint of a state. With several processes all call it, and it fails on all of them or on
            none.
        every: steps between two checkpoints; None where they are saved for another reason only.
        say: prints a line for a person.
        begun: the state that the run begins or continues with.
    """

    def __init__(
        self, save: Callable[[RunState], Path], every: int | None, say: Callable[[str], object], begun: RunState
    ) -> None:
        self._save = save
        self._gap = max(1, (every or 100) // _TRIES)
        self._say = say
        self._kept = begun
        """The last state that is on the disk."""
        self._failed_at: int | None = None

    def after_step(self, state: RunState, *, due: bool, must: bool) -> tuple[RunState, Path | None]:
        """Save after a step, if it is time to.

        Args:
            state: after the step.
            due: whether a checkpoint is wanted now.
            must: whether there will be no other chance.

        Returns:
            The state to go on with, and the checkpoint, None where none was written. A best measurement whose
            checkpoint was not written is no longer the best in that state: the one on the disk has to be kept.

        Raises:
            CheckpointError: if it cannot be written, and must be, or the one before could not either.
        """
        retries = self._failed_at is not None and (state.step - self._failed_at) % self._gap == 0
        if not (due or must or retries):
            return state, None
        try:
            path = self._save(state)
        except CheckpointError as error:
            if must or (due and self._failed_at is not None):
                raise
            self._say(f"warning: step {state.step}: {error}\n  training goes on; tried again in {self._gap} steps")
            self._failed_at = state.step if self._failed_at is None else self._failed_at
            if state.best_step == state.step:
                kept = self._kept
                state = replace(state, best_heldout_loss=kept.best_heldout_loss, best_step=kept.best_step)
            return state, None
        self._kept, self._failed_at = state, None
        return state, path
