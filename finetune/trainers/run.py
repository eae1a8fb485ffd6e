"""One run, put together: what it trains on, what trains, and where it tells of itself."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.cogvideox.denoise import ofs_of
from finetune.cogvideox.objective import sample_timestep, velocity_losses
from finetune.cogvideox.spec import ModelSpec
from finetune.config.rules import memory_traits
from finetune.config.schema import RunConfig
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import NonFiniteError, TrainingError
from finetune.core.files import from_here
from finetune.core.tensor_files import weights_digest
from finetune.core.types import Batch, RunState
from finetune.datasets.cache import Cache
from finetune.datasets.dataloader import BatchMaker, Loader
from finetune.datasets.manifests import Manifest, ManifestItem
from finetune.datasets.schedule import StepPlan
from finetune.memory import adaln_offload
from finetune.memory.config import Traits
from finetune.memory.runner import rewriting_weights
from finetune.methods.prior import asks_base, base_prediction
from finetune.optim.ema import Ema
from finetune.parallel.strategy import ParallelStrategy, require_agreement
from finetune.planner.plan import BackgroundPrediction
from finetune.trainers.console import Console
from finetune.trainers.tracking import GatheredStep, StepRecord, Tracker

FP16_LOSS_SCALE = 1024.0
"""Constant factor on the loss under fp16 compute, taken off the gradients again. Activation gradients of a mean over a
million latents are about 1e-6, where fp16 has no digits left; the scale is constant because a resumed run could not
know the history of an adaptive one. An overflow stops the run (``require_finite``)."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on and is measured on."""

    cache: Cache
    manifest: Manifest
    training: BatchMaker
    val: BatchMaker
    plan: StepPlan
    loader: Loader
    total_steps: int


@dataclass(frozen=True)
class TrainedModel:
    """The transformer and what of it trains, on this process among the others."""

    spec: ModelSpec
    module: nn.Module
    """The diffusers transformer itself."""
    dtype: torch.dtype
    """Of the frozen weights and of compute."""
    parameters: dict[str, nn.Parameter]
    """What trains, by name, as the module holds it."""
    alpha_bar: Tensor
    strategy: ParallelStrategy
    """What runs forward and backward passes on this process among the others."""
    ema: Ema | None
    ranks: ProcessGroup

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward."""
        return FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    @property
    def collective_forward(self) -> bool:
        """Whether processes talk to each other in every forward pass, so that all must make equally many."""
        return self.strategy.collective_forward or self.ranks.context > 1

    def losses(self, batch: Batch, *, training: bool = True) -> Tensor:
        """Velocity loss per sample of a micro-batch on the device, float32 [B]; in training, of samples for prior
        preservation that against the base model's prediction.

        Args:
            batch: the micro-batch.
            training: through the wrapper that synchronises gradients. Otherwise through the module itself where that is
                whole: a wrapper may communicate in each call, and processes do not measure equally often.
        """
        unwrapped = self.strategy.model if self.strategy.collective_forward else self.module
        model = self.strategy.model if training else unwrapped
        together = self.collective_forward
        base = base_prediction(unwrapped, self.module, self.spec, self.alpha_bar, batch, collective=together)
        with adaln_offload.announced(self.module, batch.timesteps_on_host, ofs_of(self.spec)):
            return velocity_losses(model, self.spec, self.alpha_bar, batch, base)

    def prepare(self, part: Batch) -> None:
        """Compute ahead what the host adds to a pass of ``losses``; from any thread.

        Args:
            part: what will go through the model at once.
        """
        for _ in range(1 + asks_base(part, collective=self.collective_forward)):
            adaln_offload.prepare(self.module, part.timesteps_on_host, ofs_of(self.spec))

    def update(self) -> None:
        """Take the step: new weights, no gradients, and the average, if one is kept, follows."""
        self.strategy.step()
        if self.ema is not None:
            self.ema.step()

    def is_finite(self) -> bool:
        """Whether all that trains is, and its average; all processes call this."""

        def own_is_finite() -> bool:
            averages = {} if self.ema is None else self.ema.state()
            tensors = [*self.strategy.parameters.values(), *averages.values()]
            return all(bool(torch.isfinite(tensor.detach()).all()) for tensor in tensors)

        return all(self.ranks.run_on_all(own_is_finite))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Compute with the averaged weights inside, if an average is kept."""
        with nullcontext() if self.ema is None else self.ema.applied(partial(rewriting_weights, self.module)):
            yield

    def peak_gib(self) -> float:
        """Most memory this process has held: allocated on its GPU since the cache was full, or resident where there is
        none.
        """
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        try:
            import resource
        except ImportError:  # Windows does not count it
            return math.nan
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@dataclass
class Run:
    """One training run; ``setup_run`` puts it together."""

    config: RunConfig
    data: RunData
    model: TrainedModel
    state: RunState
    """That it begins or continues with."""
    resumed_from: Path | None
    tracker: Tracker
    console: Console
    prediction: BackgroundPrediction | None = None
    """Of its peak memory, which may still be under way; None where none is made."""
    weights: str = ""
    """Digest of the weights that were saved last."""

    @property
    def ranks(self) -> ProcessGroup:
        """This process among those of the launch."""
        return self.model.ranks

    @property
    def traits(self) -> Traits:
        """What decides which memory states the run may be in."""
        model = self.model
        return memory_traits(self.config, model.spec, processes=self.ranks.world, sharded=model.strategy.sharded)

    def check_ranks(self, step: int, grad_norm: float) -> None:
        """With ``train.check_ranks``, raise unless all processes are about to make the same update."""
        if self.config.train.check_ranks:
            agreed = {"samples of the step": self.data.plan.step(step), "gradient norm": grad_norm}
            require_agreement(step, self.model.strategy.replicas(), agreed, self.ranks)

    def items_of(self, step: int) -> tuple[ManifestItem, ...]:
        """The clips of a step, of all processes, in the order of ``GatheredStep``."""
        data, world = self.data, self.ranks.data_world
        micros = (micro for rank in range(world) for micro in data.plan.for_rank(step, rank, world))
        return tuple(data.training.items[index] for micro in micros for index in micro.items)

    def require_planned_samples(self, step: int, gathered: GatheredStep) -> None:
        """Raise unless a step was made of its plan's samples, each of them once, whichever process had it.

        A sample's timestep follows from its slot alone, so the timesteps of a step are its fingerprint: a batch that
        gets lost, or two processes that train on the same clips, change it.

        Raises:
            TrainingError: if it was not.
        """
        plan = self.data.plan
        slots = [slot for micro in plan.step(step) for slot in micro.slots]
        most, sampling = self.model.spec.num_train_timesteps, self.config.objective.timesteps
        planned = [sample_timestep(plan.seed, step, slot, most, sampling) for slot in slots]
        if sorted(planned) != sorted(gathered.timesteps):
            raise TrainingError(
                f"step {step}: {len(gathered.timesteps)} samples were trained on, and they are not the {len(planned)}"
                " of the plan",
                where="the order of samples",
                fix="this is a bug, not your configuration: please report it; the last checkpoint is from before this"
                " step",
            )

    def save(self, state: RunState) -> Path:
        """Save a checkpoint; all processes call this, and all fail if one of them cannot write.

        Raises:
            CheckpointError: if there is no room for it, or it cannot be written; earlier checkpoints are intact.
            TrainingError: if the weights are not finite: saved, they would take the place of a state that is.
        """
        output, model = self.config.output_dir, self.model
        if not model.is_finite():
            raise NonFiniteError(
                f"after step {state.step} the weights are not finite, and are not saved",
                where=str(output),
                fix="lower optimizer.lr or lengthen lr_schedule.warmup_steps, and run the same command again: it"
                " continues from the last checkpoint, which is intact",
            )
        trainable = model.strategy.weights()
        self.weights = weights_digest(trainable)
        state = replace(state, weights=self.weights)
        content = CheckpointContent(
            state=state,
            trainable=trainable,
            optimizer=model.strategy.optimizer_state(),
            ema=None if model.ema is None else model.strategy.shares(model.ema.state()),
            config=self.config.to_dict(),
        )
        policy, sharded = self.config.checkpoint, model.strategy.sharded
        path = save_checkpoint(output, content, policy, self.ranks, sharded=sharded)
        self.console.note(f"step {state.step}: saved {from_here(path)}")
        return path

    def log_step(self, record: StepRecord) -> None:
        """Write one optimizer step, and an epoch that ended in it, to the tracker and to the console."""
        plan, step = self.data.plan, record.step
        if step % self.config.tracking.every == 0 or step in (1, self.data.total_steps):
            self.tracker.log(
                step,
                {
                    **record.shown_losses(self.model.spec.num_train_timesteps),
                    "train/grad_norm": record.grad_norm,
                    "train/lr": record.lr,
                    "train/samples_seen": record.samples_seen,
                    "perf/s_per_step": record.s_per_step,
                    "perf/data_wait_s": record.data_wait_s,
                    "perf/peak_gib": record.peak_gib,
                },
            )
        begun, reached = (plan.epoch_of(number * plan.micro_batches) for number in (step - 1, step))
        for epoch in range(begun, reached):
            # Fractional repeats alone leave epochs empty.
            if samples := plan.samples_before(epoch + 1) - plan.samples_before(epoch):
                self.tracker.log(step, {"train/epoch": epoch + 1, "train/samples_in_epoch": samples})
        self.console.step(record)
        if step == self.data.total_steps:
            self.console.note(
                f"{record.samples_seen} samples, {reached} whole epochs; no clip left out, none too often"
            )
