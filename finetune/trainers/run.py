"""That a run trains on what its plan says: no clip left out, none counted twice, whoever trained on it.

Every step comes back from all processes with one timestep per sample. Which timestep a sample has follows from its slot
alone, so the timesteps of a step are its fingerprint: two processes that train on the same clips, or a batch that gets
lost, change it. The count over a run is in its state, so an epoch's account is complete also where a run was resumed in
the middle of it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.cogvideox.objective import sample_timestep
from finetune.cogvideox.spec import ModelSpec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import TrainingError
from finetune.core.files import from_here
from finetune.core.tensor_files import weights_digest
from finetune.core.types import RunState
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import Manifest
from finetune.datasets.dataloader import BatchMaker, Loader
from finetune.datasets.schedule import StepPlan
from finetune.memory.config import Traits
from finetune.memory.runner import rewriting_weights
from finetune.optim.ema import Ema
from finetune.parallel.strategy import ParallelStrategy, require_agreement
from finetune.planner.plan import BackgroundPrediction
from finetune.trainers.tracking import Console, GatheredStep, StepRecord, Tracker, loss_by_timestep_bucket


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
        due = [sample_timestep(self.plan.seed, step, slot, self.num_train_timesteps) for slot in slots]
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


# -------- One assembled run: the objects of a training, and the few things that loop and validation ask of them
# together.

FP16_LOSS_SCALE = 1024.0
"""Constant factor on the loss under fp16 compute, taken off the gradients again. Activation gradients of a mean over a
million latents are about 1e-6, where fp16 has no digits left; the scale is constant because a resumed run could not
know the history of an adaptive one. An overflow stops the run (``require_finite``)."""


@dataclass
class Run:
    """The objects of one training run; see ``assemble`` for how they come to be."""

    config: RunConfig
    spec: ModelSpec
    manifest: Manifest
    cache: Cache
    accelerator: Any
    ranks: ProcessGroup
    """This process among those of the launch."""
    strategy: ParallelStrategy
    """What runs forward and backward passes on this process among the others."""
    module: nn.Module
    """The diffusers transformer itself."""
    dtype: torch.dtype
    """Of the frozen weights and of compute."""
    parameters: dict[str, nn.Parameter]
    """What trains, by name, as the module holds it."""
    ema: Ema | None
    alpha_bar: Tensor
    plan: StepPlan
    loader: Loader
    training: BatchMaker
    heldout: BatchMaker
    total_steps: int
    state: RunState
    resumed_from: Path | None
    tracker: Tracker
    console: Console
    prediction: BackgroundPrediction | None = None
    """Of its peak memory, which may still be under way; None where none is made."""
    first_step: int = field(init=False)
    weights: str = field(init=False)
    """Digest of the weights that were saved last."""

    def __post_init__(self) -> None:
        self.first_step = self.state.step
        self.weights = self.state.weights

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        return self.ranks.device

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What updates the weights."""
        return self.strategy.optimizer

    @property
    def traits(self) -> Traits:
        """What decides which memory states the run may be in."""
        return memory_traits(self.config, self.spec, processes=self.ranks.world, sharded=self.strategy.sharded)

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward."""
        return FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    def ema_step(self) -> None:
        """Take the weights of a finished step into the average, if one is kept."""
        if self.ema is not None:
            self.ema.step()

    def check_ranks(self, step: int, grad_norm: float) -> None:
        """With ``train.check_ranks``, raise unless all processes are about to make the same update."""
        if self.config.train.check_ranks:
            spec = {"samples of the step": self.plan.step(step), "gradient norm": grad_norm}
            require_agreement(step, self.strategy.replicas(), spec, self.ranks)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Compute with the averaged weights inside, if an average is kept."""
        applied = nullcontext() if self.ema is None else self.ema.applied(partial(rewriting_weights, self.module))
        with applied:
            yield

    def save(self, state: RunState) -> Path:
        """Save a checkpoint; all processes call this, and all fail if one of them cannot write.

        Raises:
            CheckpointError: if there is no room for it, or it cannot be written; earlier checkpoints are intact.
            TrainingError: if the weights are not finite: saved, they would take the place of a state that is.
        """
        if not self.is_finite():
            raise TrainingError(
                f"after step {state.step} the weights are not finite, and are not saved",
                where=str(self.config.output_dir),
                fix="lower optimizer.lr or lengthen lr_schedule.warmup_steps, and run the same command again: it"
                " continues from the last checkpoint, which is intact",
            )
        trainable = self.strategy.weights()
        self.weights = weights_digest(trainable)
        state = replace(state, weights=self.weights)
        content = CheckpointContent(
            state=state,
            trainable=trainable,
            optimizer=self.strategy.optimizer_state(),
            ema=None if self.ema is None else self.strategy.shares(self.ema.state()),
            config=self.config.to_dict(),
        )
        config = self.config
        path = save_checkpoint(config.output_dir, content, config.checkpoint, self.ranks, sharded=self.strategy.sharded)
        self.console.note(f"step {state.step}: saved {from_here(path)}")
        return path

    def is_finite(self) -> bool:
        """Whether all that trains is, and its average; all processes call this."""

        def mine() -> bool:
            tensors = [*self.strategy.parameters.values(), *({} if self.ema is None else self.ema.state()).values()]
            return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors)

        return all(self.ranks.run_on_all(mine))

    def account(self, state: RunState, gathered: GatheredStep) -> None:
        """Check that the step just done trained on what the plan says, and log the epochs that ended in it.

        Raises:
            TrainingError: if it did not.
        """
        audit = Audit(self.plan, self.spec.num_train_timesteps)
        for epoch in audit.step(state.step - 1, gathered.timesteps, state.samples_seen):
            self.tracker.log(state.step, {"train/epoch": epoch.epoch, "train/samples_in_epoch": epoch.samples})
        if state.step == self.total_steps:
            epochs = self.plan.epoch_of(state.step * self.plan.micro_batches)
            self.console.note(f"{state.samples_seen} samples, {epochs} whole epochs; no clip left out, none too often")

    def log_step(self, record: StepRecord) -> None:
        """Write one optimizer step to the tracker and to the console."""
        if record.step % self.config.tracking.every == 0 or record.step in (1, self.total_steps):
            by_bucket = loss_by_timestep_bucket(record.losses, record.timesteps, self.spec.num_train_timesteps)
            self.tracker.log(
                record.step,
                {
                    "train/loss": record.loss,
                    **{f"train/loss/{bucket}": loss for bucket, loss in by_bucket.items()},
                    "train/grad_norm": record.grad_norm,
                    "train/lr": record.lr,
                    "train/samples_seen": record.samples_seen,
                    "perf/s_per_step": record.s_per_step,
                    "perf/data_wait_s": record.data_wait_s,
                    "perf/peak_gib": record.peak_gib,
                },
            )
        self.console.step(record)

    def peak_gib(self) -> float:
        """Most memory this process has held: allocated on its GPU since the cache was full, or resident where there is
        none.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        try:
            import resource
        except ImportError:  # Windows does not count it
            return math.nan
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
