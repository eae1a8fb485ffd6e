"""``train(config)``: assemble a run, then the loop.

Accelerate does what it is best at: devices, gradient synchronisation, accumulation, launch, trackers. The order of
samples, the learning rate and every random number are pure functions of the step (``schedule``, ``streams``), so there
is no state to restore but tensors and one integer.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from finetune.cogvideox import denoise
from finetune.config import RunConfig
from finetune.diffusion import noise_batch, v_mse
from finetune.errors import TrainingError
from finetune.schedule import is_due, lr_at
from finetune.streams import address
from finetune.trainers.assemble import assemble
from finetune.trainers.meter import Meter, require_finite
from finetune.trainers.optim import set_lr
from finetune.trainers.run import Run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.validator import Validator
from finetune.types import Batch


@dataclass(frozen=True)
class TrainReport:
    """What a call of ``train`` did."""

    run_dir: Path
    step: int
    """Optimizer steps the run has completed."""
    total_steps: int
    checkpoint: Path | None
    """The checkpoint that holds the last step."""
    heldout_before: float | None
    """Held-out loss before the first step; None where it was not measured."""
    heldout_after: float | None
    """Held-out loss at the last measurement."""
    stopped_by: str
    """The signal that ended the run early, or empty."""
    s_per_step: float | None
    """Median seconds per optimizer step of this call, the first one (warm-up) left out; None before the second."""
    peak_gib: float
    """Most memory this process has held: allocated on its GPU, or resident where there is none."""

    def __str__(self) -> str:
        done = f"{self.step} of {self.total_steps} steps in {self.run_dir}"
        if self.stopped_by:
            return f"{self.stopped_by}: stopped after {done}; saved {self.checkpoint}. The same command continues."
        lines = [f"trained {done}"]
        if self.heldout_before is not None and self.heldout_after is not None:
            lines.append(f"held-out loss {self.heldout_before:.4f} before, {self.heldout_after:.4f} after")
        return "\n".join(lines)


def train(config: RunConfig) -> TrainReport:
    """Train as ``config`` says: fill the cache if need be, continue or begin the run, and save what was learnt.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError, ModelError: before any training, with what to mend.
        TrainingError: a loss or gradient was not finite, gradient checkpointing did not recompute, or the GPU's memory
            does not hold a step.
    """
    with ExitStack() as cleanup:
        run = assemble(config, cleanup)
        # Not before: what assembling does survives a kill, and has no step to finish.
        with StopRequest() as stop:
            try:
                return _loop(run, stop)
            except torch.OutOfMemoryError as error:
                raise TrainingError(
                    f"out of GPU memory: {str(error).splitlines()[0]}",
                    where=f"buckets {', '.join(map(str, config.data.buckets))}, train.batch_size"
                    f" {config.train.batch_size}, memory.checkpointing {config.memory.checkpointing}, method"
                    f" {config.method.kind}",
                    fix="in this order: memory.checkpointing: full, train.batch_size: 1 (and more accumulation), a"
                    " smaller bucket, optimizer.kind: adamw8bit, a smaller method.rank; the last checkpoint is intact",
                ) from error


def batch_losses(run: Run, batch: Batch, model: nn.Module | None = None) -> Tensor:
    """Velocity loss per sample of one micro-batch, float32 [B].

    Args:
        run: the assembled run.
        batch: on the run's device.
        model: what to call; the wrapper that synchronises gradients if None. Validation calls the module itself: its
            processes do not make equally many calls, and a wrapper may communicate in each.
    """
    noised = noise_batch(batch, run.alpha_bar)
    prediction = denoise(
        run.engine.model if model is None else model,
        run.facts,
        noised.noisy_latents,
        batch.prompt_embeds,
        batch.timesteps,
        batch.image_latents,
    )
    return v_mse(prediction, noised.velocity)


def _loop(run: Run, stop: StopRequest) -> TrainReport:
    config, accelerator = run.config, run.accelerator
    validator = Validator(run, lambda batch: batch_losses(run, batch, run.module), stop)
    meter = Meter(config.train.accumulation * config.train.batch_size, accelerator.gather)
    state = run.state
    saved = run.resumed_from
    durations_s: list[float] = []

    if state.step == 0 and config.validation.at_start:
        run.console.note("measuring the base model")
        if config.validation.every is not None:
            validator.measure(0)
        if config.validation.sample_every is not None:
            validator.sample(0)

    for step in range(state.step, run.total_steps):
        begun, waited = time.perf_counter(), run.loader.waited_s
        lr = lr_at(step, config.optimizer.lr, config.lr_schedule, run.total_steps)
        set_lr(run.optimizer, lr)
        samples = sum(len(micro.items) for micro in run.plan.step(step))
        with run.recompute_guard(step == run.first_step):
            for number, batch in enumerate(run.loader.step(step), start=1):
                # LoRA dropout draws from the global generator: give that an address too.
                torch.manual_seed(address(config.train.seed, "model", step, batch.slots[0]))
                with run.engine.micro_batch(last=number == config.train.accumulation):
                    losses = batch_losses(run, batch)
                    # The engine averages over processes; with this weight the gradient is the mean over the step's
                    # samples, also where a bucket's last micro-batch is smaller.
                    run.engine.backward(losses.sum() * (accelerator.num_processes / samples * run.loss_scale))
                    meter.add(losses, batch.timesteps, batch.clips)
        grad_norm = run.engine.clip(config.train.max_grad_norm or math.inf, scale=run.loss_scale)
        record = meter.exchange(stop.requested)
        require_finite(record, grad_norm, meter, step, run.gather_words)
        run.engine.step()
        meter.reset()
        run.ema_step()
        state = replace(state, step=step + 1, samples_seen=state.samples_seen + len(record.losses))
        durations_s.append(time.perf_counter() - begun)
        run.log_step(state, record, grad_norm, lr, durations_s[-1], run.loader.waited_s - waited)

        finished = state.step == run.total_steps
        best = False
        # Who asks for a stop has seconds to give, not minutes: save, and no more.
        if not record.stop and is_due(state.step, config.validation.every, last=run.total_steps):
            state, best = validator.judge(state)
        if is_due(state.step, config.checkpoint.every) or best or finished or record.stop:
            saved = run.save(state)
        # After saving: sampling takes minutes, and may fail for want of memory or disk.
        if not record.stop and is_due(state.step, config.validation.sample_every, last=run.total_steps):
            validator.sample(state.step)
        if record.stop:
            break

    return TrainReport(
        run_dir=config.output_dir,
        step=state.step,
        total_steps=run.total_steps,
        checkpoint=saved,
        heldout_before=validator.before,
        heldout_after=validator.latest,
        stopped_by=(stop.by or "a stop request") if state.step < run.total_steps else "",
        s_per_step=statistics.median(durations_s[1:]) if len(durations_s) > 1 else None,
        peak_gib=run.peak_gib(),
    )
