"""``train(config)``: assemble a run, then the loop.

Accelerate does what it is best at: devices, gradient synchronisation, accumulation, launch, trackers. The order of
samples, the learning rate and every random number are pure functions of the step (``schedule``, ``streams``), so there
is no state to restore but tensors and one integer. It also means that a step can be done again: for want of memory
(``ladder``), or to find out what went wrong in it (``fault_report``).
"""

from __future__ import annotations

import math
import shlex
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.checkpoint.folders import Measurement, best_of, checkpoint_path, verdict
from finetune.checkpoint.save import CheckpointManager
from finetune.cogvideox.objective import velocity_losses
from finetune.config.loading import as_config
from finetune.config.schema import RunConfig
from finetune.core.distributed import peers
from finetune.core.errors import first_line, is_out_of_memory
from finetune.core.files import from_here
from finetune.core.rng import seed_for
from finetune.core.types import Batch, RunState
from finetune.datasets.schedule import is_due, lr_at
from finetune.optim.optimizers import begin, set_lr
from finetune.trainers.fault_report import require_finite
from finetune.trainers.oom_retry import OomRetry, out_of_memory
from finetune.trainers.run import Run
from finetune.trainers.sampling import Sampler
from finetune.trainers.setup import fault_ahead, require_batches, setup_run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.tracking import StepMetrics, StepRecord
from finetune.trainers.validation import Validator


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
    weights: str = ""
    """Digest of the weights in ``checkpoint``: equal for two runs that trained the same, bit for bit."""
    best_step: int | None = None
    """The step with the lowest held-out loss; None where no step was measured."""
    best_heldout: float | None = None
    """Held-out loss at ``best_step``."""
    verdict: str = ""
    """What the measurements say of the last step."""
    export_command: str = ""
    """Exports the last step, or the best one where the last is worse and the best was kept."""

    def __str__(self) -> str:
        done = f"{self.step} of {self.total_steps} steps in {from_here(self.run_dir)}"
        if self.stopped_by:
            saved = "nothing to save yet" if self.checkpoint is None else f"saved {from_here(self.checkpoint)}"
            return f"{self.stopped_by}: stopped after {done}; {saved}. The same command continues."
        lines = [f"trained {done}"]
        if self.heldout_before is not None and self.heldout_after is not None:
            lines.append(f"held-out loss {self.heldout_before:.4f} before, {self.heldout_after:.4f} after")
        lines += [self.verdict] if self.verdict else []
        return "\n".join(lines)


def train(
    config: RunConfig | Mapping[str, Any] | str | Path, on_step: Callable[[StepRecord], None] | None = None
) -> TrainReport:
    """Train as ``config`` says: fill the cache if need be, continue or begin the run, and save what was learnt.

    Args:
        config: a configuration, the values of one, or its file.
        on_step: called on the main process after each optimizer step; what it raises ends the run as it is.

    Raises:
        ConfigError, DataError, CacheError, CheckpointError, ModelError: before any training, with what to mend.
        CacheError: in training, if an entry turned out to be damaged; the steps before it are saved.
        TrainingError: a loss or gradient was not finite, gradient checkpointing did not recompute, or the GPU's memory
            does not hold a step.
        LaunchError: another process of the launch failed or is gone.
    """
    config = as_config(config)
    # The last to leave: a launcher repeats its signals while the tracker is being closed.
    with StopRequest() as stop, peers(), ExitStack() as cleanup:
        run = setup_run(config, cleanup)
        cleanup.callback(run.strategy.drop_gradients)  # a notebook keeps the traceback, and what it refers to
        # Not before: what assembling does survives a kill, and has no step to finish.
        stop.begin()
        ladder = OomRetry(run)
        try:
            report = _loop(run, ladder, stop, on_step)
            _compare_prediction(run, report)
            return report
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            where = "outside of a step's passes, where nothing can be done again"
            raise out_of_memory(run, ladder.state, first_line(error), where, in_step=False) from error


def _compare_prediction(run: Run, report: TrainReport) -> None:
    """Log the predicted peak beside the measured one; a short run waits for it, one that is to stop does not."""
    wait_s = 0.0 if report.stopped_by else 60.0
    prediction = None if run.prediction is None else run.prediction.result(wait_s)
    if prediction is not None and (compared := prediction.compared(run.peak_gib())):
        run.console.note(compared)
        run.tracker.log(report.step, {"perf/predicted_peak_gib": (prediction.nbytes or 0) / 2**30})


def batch_losses(run: Run, batch: Batch, model: nn.Module | None = None) -> Tensor:
    """Velocity loss per sample of one micro-batch, float32 [B].

    Args:
        run: the assembled run.
        batch: on the run's device.
        model: what to call; the wrapper that synchronises gradients if None. Validation calls the module itself: its
            processes do not make equally many calls, and a wrapper may communicate in each.
    """
    return velocity_losses(run.strategy.model if model is None else model, run.spec, run.alpha_bar, batch)


def _passes(run: Run, ladder: OomRetry, meter: StepMetrics, step: int) -> None:
    """The forward and backward passes of one step: its gradient, a mean over its samples, is left in the strategy."""
    samples = sum(len(micro.items) for micro in run.plan.step(step))
    for number, batch in enumerate(run.loader.step(step), start=1):
        for part in ladder.state.split(batch):
            # LoRA dropout draws from the global generator: give that an address too.
            torch.manual_seed(seed_for(run.config.train.seed, "model", step, part.slots[0]))
            last = number == run.config.train.accumulation and part.slots[-1] == batch.slots[-1]
            with run.strategy.micro_batch(last=last):
                losses = batch_losses(run, part)
                # The strategy averages over processes; with this weight the gradient is the mean over the step's
                # samples, also where a bucket's last micro-batch is smaller.
                run.strategy.backward(losses.sum() * (run.ranks.world / samples * run.loss_scale))
                meter.add(losses, part.timesteps)


def _conclusion(run: Run, state: RunState, history: Sequence[Measurement]) -> dict[str, Any]:
    """Which step to export, and why: fields of ``TrainReport``."""
    folder, best = run.config.output_dir, best_of(history, state)
    command = ["finetune", "export", from_here(folder)]
    if best is None or not history:
        why = "validation.every is null" if run.heldout.items else "no clip is held out (data.holdout)"
        return {
            "verdict": f"nothing measured whether the last step is the best one: {why}; compare the sampled videos",
            "export_command": shlex.join(command),
        }
    (step, loss), text = best, verdict(history, best)
    if loss < history[-1].heldout:
        if state.best_step == step:
            command += ["--checkpoint", "best"]
        elif (standing := checkpoint_path(folder, step)).is_dir():
            command[-1] = from_here(standing)
        else:
            text += f"\nthe checkpoint of step {step} was not kept (checkpoint.keep_best)"
    return {"best_step": step, "best_heldout": loss, "verdict": text, "export_command": shlex.join(command)}


def _loop(run: Run, ladder: OomRetry, stop: StopRequest, on_step: Callable[[StepRecord], None] | None) -> TrainReport:
    config = run.config
    # Where processes make unequally many passes, through the module itself: a wrapper may communicate in each.
    direct = None if run.strategy.collective_forward else run.module
    validator = Validator(run, lambda batch: batch_losses(run, batch, direct), stop)
    sampler = Sampler(run, stop)
    saver = CheckpointManager(run.save, config.checkpoint.every, run.console.note, run.state)
    meter = StepMetrics(config.train.accumulation * config.train.batch_size, run.accelerator.gather)
    state = run.state
    saved = run.resumed_from
    durations_s: list[float] = []

    def report() -> TrainReport:
        unfinished = state.step < run.total_steps or validator.owes(state.step)
        # What cannot be sampled is a warning; what a stop has kept from being sampled is owed.
        unfinished |= any(run.ranks.run_on_all(lambda: stop.requested)) and sampler.owes(state.step)
        return TrainReport(
            run_dir=config.output_dir,
            step=state.step,
            total_steps=run.total_steps,
            checkpoint=saved,
            heldout_before=validator.before,
            heldout_after=validator.latest,
            stopped_by=(stop.by or "a stop request") if unfinished else "",
            s_per_step=statistics.median(durations_s[1:]) if len(durations_s) > 1 else None,
            peak_gib=run.peak_gib(),
            weights=run.weights,
            **_conclusion(run, state, validator.history),
        )

    require_batches(run, fault_ahead(run, state.step))
    if state.step == 0 and config.validation.at_start:
        if config.validation.every is not None and run.heldout.items:
            run.console.note("measuring the base model")
            validator.measure(0)
        if config.validation.sample_every is not None and config.validation.samples and not validator.cut_short:
            run.console.note("sampling with the base model")
            sampler.sample(0)
    elif validator.owes(state.step):
        state, best = validator.judge(state)
        saved = run.save(state) if best else saved
    if validator.cut_short:
        return report()
    if sampler.owes(state.step):
        sampler.sample(state.step)

    for step in range(state.step, run.total_steps):
        begun, waited = time.perf_counter(), run.loader.waited_s
        lr = lr_at(step, config.optimizer.lr, config.lr_schedule, run.total_steps)
        set_lr(run.optimizer, lr)
        begin(run.optimizer, seed=config.train.seed, step=step)
        passes = partial(_passes, run, ladder, meter, step)
        ladder.replayed(step, passes, forget=meter.reset)
        grad_norm = run.strategy.clip(config.train.max_grad_norm or math.inf, scale=run.loss_scale)
        fault = fault_ahead(run, step + 1)
        gathered = meter.exchange(stop=stop.requested, fault=fault is not None)
        require_finite(gathered, grad_norm, run, ladder.state, step=step, lr=lr, again=passes)
        run.check_ranks(step, grad_norm)
        run.strategy.step()
        meter.reset()
        run.ema_step()
        state = replace(state, step=step + 1, samples_seen=state.samples_seen + len(gathered.losses))
        durations_s.append(time.perf_counter() - begun)
        run.account(state, gathered)
        record = StepRecord(
            step=state.step,
            losses=gathered.losses,
            timesteps=gathered.timesteps,
            grad_norm=grad_norm,
            lr=lr,
            samples_seen=state.samples_seen,
            s_per_step=durations_s[-1],
            data_wait_s=run.loader.waited_s - waited,
            peak_gib=run.peak_gib(),
        )
        run.log_step(record)
        if run.prediction is not None and (message := run.prediction.news()):
            run.console.note(f"peak memory: {message}")
        if on_step is not None and run.ranks.is_main:
            on_step(record)

        # Who asks for a stop has seconds to give, not minutes: save, and no more.
        best, ending = False, gathered.stop or gathered.fault
        if not ending and is_due(state.step, config.validation.every, last=run.total_steps):
            try:
                state, best = validator.judge(state)
            except Exception:  # whatever it is: the steps so far are worth more than to know how good they are
                if run.is_finite():
                    run.save(state)
                raise
            ending = validator.cut_short
        due = is_due(state.step, config.checkpoint.every) or best
        state, path = saver.after_step(state, due=due, must=ending or state.step == run.total_steps)
        saved = path or saved
        if gathered.fault:
            require_batches(run, fault)
        if ending:
            break
        # After saving: sampling takes minutes.
        if is_due(state.step, config.validation.sample_every, last=run.total_steps):
            sampler.sample(state.step)

    return report()
