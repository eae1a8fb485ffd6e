"""``train(config)``: put a run together, then take its steps.

Accelerate does what it is best at: devices, gradient synchronisation, accumulation, launch, trackers. The order of
samples, the learning rate and every random number are pure functions of the step (``schedule``, ``rng``), so there
is no state to restore but tensors and one integer. It also means that a step can be done again: for want of memory
(``oom_retry``), or to find out what went wrong in it (``fault_report``).
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

from accelerate.utils import gather

from finetune.checkpoint.folders import Measurement, best_of, checkpoint_path, outcome, verdict
from finetune.checkpoint.save import CheckpointManager
from finetune.cogvideox.objective import weighted
from finetune.config.schema import RunConfig, as_config
from finetune.core.distributed import peers
from finetune.core.errors import FinetuneError, TrainingError, first_line, is_out_of_memory
from finetune.core.files import from_here
from finetune.core.rng import seed_for, seed_global
from finetune.core.types import Batch, RunState
from finetune.datasets.schedule import is_due, lr_at
from finetune.optim.optimizers import begin, set_lr
from finetune.reports.report import REPORT, write_report
from finetune.trainers.fault_report import require_finite
from finetune.trainers.oom_retry import OomRetry, out_of_memory
from finetune.trainers.run import Run
from finetune.trainers.setup import setup_run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.tracking import GatheredStep, StepMetrics, StepRecord
from finetune.trainers.validation import Sampler, Validator


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
    """Exports the last step, or the best one where the last is worse and the best was kept; empty if it diverged."""

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
    # The last to leave: a launcher repeats its signals while the tracker is being closed. ``peers`` twice: closing the
    # process group may fail as well, and what failed before has to be kept while the group is still there.
    with StopRequest() as stop, peers(), ExitStack() as cleanup, peers():
        run = setup_run(config, cleanup)
        cleanup.callback(run.model.strategy.drop_gradients)  # a notebook keeps the traceback, and what it refers to
        # Not before: what setting up does survives a kill, and has no step to finish.
        stop.begin()
        loop = _Loop(run, stop)
        try:
            report = loop.train(on_step)
            _compare_prediction(run, report.step)
            return report
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            where = "outside of a step's passes, where nothing can be done again"
            raise out_of_memory(run, loop.memory.state, first_line(error), where, videos=True) from error


def _compare_prediction(run: Run, step: int) -> None:
    """Log the predicted peak beside the measured one, where it is there by now: no GPU waits for it."""
    prediction = None if run.prediction is None else run.prediction.result()
    if prediction is not None and (compared := prediction.compared(run.model.peak_gib())):
        run.console.note(compared)
        run.tracker.log(step, {"perf/predicted_peak_gib": (prediction.nbytes or 0) / 2**30})


class _Loop:
    """The steps of a run, and what is due between them.

    Args:
        run: put together.
        stop: asks for an early end.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self.run, self.stop, self.state, self.saved = run, stop, run.state, run.resumed_from
        self.memory = OomRetry(run)
        self.validator = Validator(run, stop)
        self.sampler = Sampler(run, stop)
        self.checkpoints = CheckpointManager(run.save, run.config.checkpoint.every, run.console.note, run.state)
        rows = run.config.train.accumulation * run.config.train.batch_size
        self.metrics = StepMetrics(rows, gather, counts=run.ranks.leads_context)
        self.durations_s: list[float] = []
        run.data.loader.prepare = self._prepare

    def _prepare(self, batch: Batch) -> None:
        """In the loader's thread: what the host computes of a step ahead of it."""
        for part in self.memory.state.split(batch):
            self.run.model.prepare(part)

    def train(self, on_step: Callable[[StepRecord], None] | None) -> TrainReport:
        """Train to the end, or until a stop is requested."""
        run, config, total_steps = self.run, self.run.config, self.run.data.total_steps
        self._require_batches(self._fault_ahead(self.state.step))
        self._catch_up()
        if self.validator.cut_short:
            return self._report()
        for step in range(self.state.step, total_steps):
            record, gathered, fault = self._step(step)
            run.log_step(record)
            if run.prediction is not None and (message := run.prediction.news()):
                run.console.note(f"peak memory: {message}")
            if on_step is not None and run.ranks.is_main:
                on_step(record)

            # Who asks for a stop has seconds to give, not minutes: save, and no more.
            best, ending = False, gathered.stop or gathered.fault
            if not ending and is_due(self.state.step, config.validation.every, last=total_steps):
                best = self._validate()
                ending = self.validator.cut_short
            due = is_due(self.state.step, config.checkpoint.every) or best
            last = ending or self.state.step == total_steps
            self.state, path = self.checkpoints.after_step(self.state, due=due, must=last)
            self.saved = path or self.saved
            if gathered.fault:
                self._require_batches(fault)
            if ending:
                break
            # After saving: sampling takes minutes.
            if sampled := is_due(self.state.step, config.validation.sample_every, last=total_steps):
                self.sampler.sample(self.state.step)
            if sampled or is_due(self.state.step, config.validation.every, last=total_steps):
                self._write_page()
        return self._report()

    def _write_page(self) -> None:
        """Show how the run stands as ``report.html``; a page is not worth a run."""
        folder = self.run.config.output_dir
        try:
            if self.run.ranks.is_main:
                write_report([folder], folder / REPORT, read_clips=False)
        except (OSError, FinetuneError) as error:
            self.run.console.note(f"warning: {REPORT} could not be written: {first_line(error)}")

    def _catch_up(self) -> None:
        """Measure and sample the base model of a new run, or what the start before this one still owes."""
        run, config, step = self.run, self.run.config.validation, self.state.step
        if step == 0 and config.at_start:
            if config.every is not None and run.data.val.items:
                run.console.note("measuring the base model")
                self.validator.measure(0)
            if config.sample_every is not None and config.samples and not self.validator.cut_short:
                run.console.note("sampling with the base model")
                self.sampler.sample(0)
        elif self.validator.owes(step):
            self.state, best = self.validator.judge(self.state)
            self.saved = run.save(self.state) if best else self.saved
        if not self.validator.cut_short and self.sampler.owes(step):
            self.sampler.sample(step)

    def _step(self, step: int) -> tuple[StepRecord, GatheredStep, Exception | None]:
        """One optimizer step, and this process's fault with the batches of the next one."""
        run, model, config = self.run, self.run.model, self.run.config
        begun, waited_s = time.perf_counter(), run.data.loader.waited_s
        lr = lr_at(step, config.optimizer.lr, config.lr_schedule, run.data.total_steps)
        set_lr(model.strategy.optimizer, lr)
        begin(model.strategy.optimizer, seed=config.train.seed, step=step)

        passes = partial(self._passes, step)
        self.memory.run_passes(step, passes, forget=self.metrics.reset)
        norm = model.strategy.clip(config.train.max_grad_norm or math.inf, scale=model.loss_scale)
        fault = self._fault_ahead(step + 1)
        gathered = self.metrics.exchange(norm, stop=self.stop.requested, fault=fault is not None)
        grad_norm = gathered.grad_norm
        require_finite(run, gathered, self.memory.state, passes, step=step, grad_norm=grad_norm)
        run.require_planned_samples(step, gathered)
        run.check_ranks(step, grad_norm)
        model.update()
        self.metrics.reset()

        self.state = replace(self.state, step=step + 1, samples_seen=self.state.samples_seen + len(gathered.losses))
        self.durations_s.append(time.perf_counter() - begun)
        record = StepRecord(
            step=self.state.step,
            losses=gathered.losses,
            timesteps=gathered.timesteps,
            grad_norm=grad_norm,
            lr=lr,
            samples_seen=self.state.samples_seen,
            s_per_step=self.durations_s[-1],
            data_wait_s=run.data.loader.waited_s - waited_s,
            peak_gib=model.peak_gib(),
            prior=tuple(item.prior for item in run.items_of(step)) if run.data.training.any_prior else (),
        )
        return record, gathered, fault

    def _passes(self, step: int) -> None:
        """Forward and backward: the step's gradient, as a mean over its samples, is left in the strategy."""
        run, model, train = self.run, self.run.model, self.run.config.train
        samples = sum(len(micro.items) for micro in run.data.plan.step(step))
        for number, batch in enumerate(run.data.loader.step(step), start=1):
            for part in self.memory.state.split(batch):
                # LoRA dropout draws from the global generator: give that an address too.
                seed_global(seed_for(train.seed, "model", step, part.slots[0]), run.ranks.device)
                last = number == train.accumulation and part.slots[-1] == batch.slots[-1]
                with model.strategy.micro_batch(last=last):
                    losses = model.losses(part)
                    # The strategy averages over processes; with this weight the gradient is the mean over the step's
                    # samples, also where a bucket's last micro-batch is smaller, and where processes share a sample:
                    # what each of them has is its tokens' part of the sample's gradient.
                    model.strategy.backward(
                        weighted(losses, part).sum() * (run.ranks.world / samples * model.loss_scale)
                    )
                    self.metrics.add(losses, part.timesteps)

    def _validate(self) -> bool:
        """Measure after a step; whether it is the best one so far."""
        try:
            self.state, best = self.validator.judge(self.state)
        except Exception:  # whatever it is: the steps so far are worth more than to know how good they are
            if self.run.model.is_finite():
                self.run.save(self.state)
            raise
        return best

    def _fault_ahead(self, step: int) -> Exception | None:
        """Why this process has no batches for ``step``; None if it has, or if the run ends before. Waits for them.

        A process without batches must not simply stop: the others would wait for it in the next collective. So each
        looks ahead while the step before is still to be taken, tells the others in that step's exchange, and all of
        them save before they end.
        """
        fault, train = self.run.data.loader.fault(step), self.run.config.train
        if is_out_of_memory(fault):
            return TrainingError(
                f"out of host memory while the batches of step {step} were made",
                where=f"train.batch_size {train.batch_size}, train.accumulation {train.accumulation}",
                fix="free memory on this machine: what else runs on it? Then the same command continues",
            )
        return fault

    def _require_batches(self, fault: Exception | None) -> None:
        """Raise ``fault`` where it happened and a ``FinetuneError`` that quotes it on the other processes."""

        def stop_with_it() -> None:
            if fault is not None:
                raise fault

        self.run.ranks.run_on_all(stop_with_it)

    def _report(self) -> TrainReport:
        run, state = self.run, self.state
        unfinished = state.step < run.data.total_steps or self.validator.owes(state.step)
        # What cannot be sampled is a warning; what a stop has kept from being sampled is owed.
        unfinished |= any(run.ranks.run_on_all(lambda: self.stop.requested)) and self.sampler.owes(state.step)
        return TrainReport(
            run_dir=run.config.output_dir,
            step=state.step,
            total_steps=run.data.total_steps,
            checkpoint=self.saved,
            heldout_before=self.validator.before,
            heldout_after=self.validator.latest,
            stopped_by=(self.stop.by or "a stop request") if unfinished else "",
            s_per_step=statistics.median(self.durations_s[1:]) if len(self.durations_s) > 1 else None,
            peak_gib=run.model.peak_gib(),
            weights=run.weights,
            **_conclusion(run, state, self.validator.history),
        )


def _conclusion(run: Run, state: RunState, history: Sequence[Measurement]) -> dict[str, Any]:
    """Which step to export, and why: fields of ``TrainReport``."""
    folder, best = run.config.output_dir, best_of(history, state)
    command = ["finetune", "export", from_here(folder)]
    if best is None or not history:
        why = "validation.every is null" if run.data.val.items else "no clip is held out (data.holdout)"
        return {
            "verdict": f"nothing measured whether the last step is the best one: {why}; compare the sampled videos",
            "export_command": shlex.join(command),
        }
    (step, loss), text = best, verdict(history, best)
    if outcome(history, best) == "diverged":
        return {"best_step": step, "best_heldout": loss, "verdict": text}
    if loss < history[-1].heldout:
        if state.best_step == step:
            command += ["--checkpoint", "best"]
        elif (standing := checkpoint_path(folder, step)).is_dir():
            command[-1] = from_here(standing)
        else:
            text += f"\nthe checkpoint of step {step} was not kept (checkpoint.keep_best)"
    return {"best_step": step, "best_heldout": loss, "verdict": text, "export_command": shlex.join(command)}
