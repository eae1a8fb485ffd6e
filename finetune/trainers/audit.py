"""That a run trains on what its plan says: no clip left out, none counted twice, whoever trained on it.

Every step comes back from all processes with one timestep per sample. Which timestep a sample has follows from its slot
alone, so the timesteps of a step are its fingerprint: two processes that train on the same clips, or a batch that gets
lost, change it. The count over a run is in its state, so an epoch's account is complete also where a run was resumed in
the middle of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.diffusion import drawn_timestep
from finetune.errors import TrainingError
from finetune.schedule import StepPlan


@dataclass(frozen=True)
class EpochAccount:
    """One epoch whose last clip has been trained on."""

    epoch: int
    """Counted from 1."""
    samples: int
    """Clips trained on in it, repeats counted; as many as the plan holds."""


@dataclass(frozen=True)
class Audit:
    """Compares what was trained on with the plan.

    Args:
        plan: of the run.
        num_train_timesteps: of the model.
    """

    plan: StepPlan
    num_train_timesteps: int

    def step(self, step: int, timesteps: Sequence[int], samples_seen: int) -> list[EpochAccount]:
        """Check one step.

        Args:
            step: which, from 0.
            timesteps: of all its samples, of every process, in any order.
            samples_seen: by the whole run, this step included.

        Returns:
            The epochs that ended in it.

        Raises:
            TrainingError: if the samples were not those of the plan, or an epoch's count does not come out.
        """
        slots = [slot for micro in self.plan.step(step) for slot in micro.slots]
        due = [drawn_timestep(self.plan.seed, step, slot, self.num_train_timesteps) for slot in slots]
        if sorted(due) != sorted(timesteps):
            raise _not_as_planned(
                f"step {step}: {len(timesteps)} samples were trained on, and they are not the {len(due)} of the plan"
            )
        first = step * self.plan.micro_batches
        begun, going_on = self.plan.epoch_of(first), self.plan.epoch_of(first + self.plan.micro_batches)
        accounts = [self._account(epoch, step, samples_seen) for epoch in range(begun, going_on)]
        return [account for account in accounts if account.samples]  # fractional repeats alone leave epochs empty

    def _account(self, epoch: int, step: int, samples_seen: int) -> EpochAccount:
        plan = self.plan
        in_epoch = plan.start_of(epoch + 1) - step * plan.micro_batches
        later = sum(len(micro.items) for micro in plan.step(step)[in_epoch:])
        counted, expected = samples_seen - later, plan.samples_before(epoch + 1)
        if counted != expected:
            raise _not_as_planned(
                f"after epoch {epoch + 1} the run has trained on {counted} samples, and the plan has {expected}"
            )
        return EpochAccount(epoch + 1, expected - plan.samples_before(epoch))


def _not_as_planned(what: str) -> TrainingError:
    return TrainingError(
        what,
        where="the order of samples",
        fix="this is a bug, not your configuration: please report it; the last checkpoint is from before this step",
    )
