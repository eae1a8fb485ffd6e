"""One assembled run: the objects of a training, and the few things that loop and validation ask of them together."""

from __future__ import annotations

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.bands import loss_by_band
from finetune.config import RunConfig
from finetune.datasets.cache import Cache
from finetune.datasets.loader import BatchMaker, Loader
from finetune.datasets.manifest import Manifest
from finetune.facts import Facts
from finetune.memory import assert_recompute
from finetune.schedule import StepPlan
from finetune.trainers.checkpoint import save_checkpoint
from finetune.trainers.ema import Ema
from finetune.trainers.engine import Engine
from finetune.trainers.meter import StepRecord
from finetune.trainers.optim import optimizer_state
from finetune.trainers.tracking import Console, Tracker
from finetune.trainers.validation import Pair
from finetune.types import RunState

FP16_LOSS_SCALE = 1024.0
"""Constant factor on the loss under fp16 compute, taken off the gradients again. Activation gradients of a mean over a
million latents are about 1e-6, where fp16 has no digits left; the scale is constant because a resumed run could not
know the history of an adaptive one. An overflow stops the run (``require_finite``)."""


@dataclass
class Run:
    """The objects of one training run; see ``assemble`` for how they come to be."""

    config: RunConfig
    facts: Facts
    manifest: Manifest
    cache: Cache
    accelerator: Any
    engine: Engine
    """What runs forward and backward passes on this process among the others."""
    module: nn.Module
    """The diffusers transformer itself."""
    dtype: torch.dtype
    """Of the frozen weights and of compute."""
    parameters: dict[str, nn.Parameter]
    """What trains, by name."""
    optimizer: Any
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
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.first_step = self.state.step

    @property
    def device(self) -> torch.device:
        """Where this process trains."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before backward."""
        return FP16_LOSS_SCALE if self.dtype == torch.float16 else 1.0

    def recompute_guard(self, first: bool) -> AbstractContextManager[object]:
        """Around the first step: raises unless gradient checkpointing does recompute."""
        return assert_recompute(self.module, self.config.memory) if first else nullcontext()

    def ema_step(self) -> None:
        """Take the weights of a finished step into the average, if one is kept."""
        if self.ema is not None:
            self.ema.step()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Compute with the averaged weights inside, if an average is kept."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save(self, state: RunState) -> Path:
        """Save a checkpoint from the main process; every process returns its path."""
        path = save_checkpoint(
            self.config.output_dir,
            state,
            trainable=self.config.method.state(self.module),
            optimizer=optimizer_state(self.optimizer, self.parameters),
            ema=None if self.ema is None else self.ema.state(),
            config=self.config.to_dict(),
            policy=self.config.checkpoint,
        )
        self.console.note(f"step {state.step}: saved {path}")
        self.accelerator.wait_for_everyone()
        return path

    def log_step(
        self, state: RunState, record: StepRecord, grad_norm: float, lr: float, took_s: float, waited_s: float
    ) -> None:
        """Record one optimizer step: means over all processes and micro-batches."""
        peak_gib = self.peak_gib()
        if state.step % self.config.tracking.every == 0 or state.step in (1, self.total_steps):
            bands = loss_by_band(record.losses, record.timesteps, self.facts.num_train_timesteps)
            self.tracker.log(
                state.step,
                {
                    "train/loss": record.loss,
                    **{f"train/loss/{band}": loss for band, loss in bands.items()},
                    "train/grad_norm": grad_norm,
                    "train/lr": lr,
                    "train/samples_seen": state.samples_seen,
                    "perf/s_per_step": took_s,
                    "perf/data_wait_s": waited_s,
                    "perf/peak_gib": peak_gib,
                },
            )
        self.console.step(state.step, loss=record.loss, lr=lr, s_per_step=took_s, peak_gib=peak_gib)

    def peak_gib(self) -> float:
        """Most memory this process has held so far: allocated on its GPU, or resident where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    # ---------------------------------------------------------------------------------------- between processes

    def gather_objects(self, mine: list[Any]) -> list[Any]:
        """Every process's objects, in order of rank."""
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(mine)
        return gathered

    def gather_words(self, mine: list[str]) -> list[str]:
        """``gather_objects`` for strings."""
        return [str(word) for word in self.gather_objects(mine)]

    def gather_pairs(self, mine: list[Pair]) -> list[Pair]:
        """``gather_objects`` for (loss, timestep) pairs."""
        return [(float(loss), int(timestep)) for loss, timestep in self.gather_objects(mine)]
