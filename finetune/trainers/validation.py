"""Held-out loss at fixed clips, timesteps and noise, measured without touching a bit of the training state.

Nothing here draws a random number: the loop hands in ready batches, so two evaluations of the same weights give the
same number, and a difference between two numbers is a difference between weights.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from finetune.checkpoint.folders import HISTORY, Measurement, read_history
from finetune.core.distributed import ProcessGroup
from finetune.core.files import atomic_write_text
from finetune.core.rng import seed_for, training_state_untouched
from finetune.core.types import Batch, RunState
from finetune.datasets.dataloader import BatchMaker, to_device
from finetune.datasets.schedule import is_due
from finetune.trainers.fault_report import ReportedSample, refuse_measurement
from finetune.trainers.run import Run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.tracking import loss_by_timestep_bucket

Pair = tuple[float, int]
"""Loss and timestep of one sample."""


@dataclass(frozen=True)
class HeldoutLoss:
    """One evaluation: the mean over every (clip, timestep) pair, and by timestep band."""

    mean: float
    by_band: dict[str, float]
    losses: tuple[float, ...]
    """Of every (clip, timestep) pair, in the order of the processes and of their batches."""

    @property
    def is_finite(self) -> bool:
        """Whether every loss is."""
        return all(math.isfinite(loss) for loss in self.losses)


def fixed_timesteps(count: int, num_train_timesteps: int) -> tuple[int, ...]:
    """``count`` timesteps at the midpoints of equal parts of the schedule, ascending: 4 of 1000 are 125, 375, 625, 875.

    Midpoints, so that the mean over them estimates the mean over all timesteps, which is what training minimises.

    Raises:
        ValueError: if more are wanted than there are.
    """
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(f"{count} of {num_train_timesteps} timesteps")
    return tuple((2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count))


def evaluate(
    loss_of: Callable[[Batch], Tensor],
    batches: Iterable[Batch],
    num_train_timesteps: int,
    *,
    gather: Callable[[list[Pair]], list[Pair]] | None = None,
) -> HeldoutLoss:
    """Mean loss over ready batches, summed exactly, so that neither their order nor their size matters.

    Args:
        loss_of: per-sample losses [B] of a batch; call ``evaluate`` inside ``training_state_untouched``.
        batches: fixed clips at fixed timesteps with fixed noise; an iterable, so that they need not be in memory at
            once. With several processes, this one's share, which may be empty.
        num_train_timesteps: length of the schedule, for the bands.
        gather: joins the (loss, timestep) lists of all processes; None for one process.

    Raises:
        ValueError: if no process has anything to measure, or a loss is not [B].
    """
    pairs: list[Pair] = []
    for batch in batches:
        losses = loss_of(batch)
        if losses.shape != batch.timesteps.shape:
            raise ValueError(f"loss_of gave {tuple(losses.shape)} for {len(batch.timesteps)} samples")
        pairs += zip(losses.detach().to("cpu", torch.float64).tolist(), batch.timesteps.tolist(), strict=True)
    if gather is not None:
        pairs = gather(pairs)
    if not pairs:
        raise ValueError("there is no batch to measure")
    every_loss = [loss for loss, _ in pairs]
    return HeldoutLoss(
        mean=math.fsum(every_loss) / len(every_loss),
        by_band=loss_by_timestep_bucket(every_loss, [timestep for _, timestep in pairs], num_train_timesteps),
        losses=tuple(every_loss),
    )


# -------- Measuring while training: the held-out loss, and its gap to the training clips.
#
# Everything it reads is fixed (clips, timesteps, noise) and everything it touches is put back, so a run
# with validation is bit for bit the run without.


@dataclass(frozen=True)
class _Job:
    """One clip at a few of the fixed timesteps: what one forward pass measures."""

    maker: BatchMaker
    index: int
    timesteps: Sequence[int]

    def batch(self) -> Batch:
        return self.maker.fixed(self.index, self.timesteps)


class _CutShortError(Exception):
    """A stop was asked for in the middle of a measurement."""


class Validator:
    """Measures a run on its held-out clips.

    Whoever asks a run to stop has seconds to give: once ``stop`` is requested, a measurement ends with the forward pass
    it is in, on every process.

    Args:
        run: the assembled run.
        losses: per-sample loss of a batch on the device, as training computes it.
        stop: the request.
    """

    def __init__(self, run: Run, losses: Callable[[Batch], Tensor], stop: StopRequest) -> None:
        self._run = run
        self._stop = stop
        self._losses = losses
        config = run.config.validation
        self._heldout = _subset(run.heldout, config.clips)
        self._trainsubset = _subset(run.training, config.clips)
        self._timesteps = fixed_timesteps(config.timesteps, run.spec.num_train_timesteps)
        self._history = _read_history(run.config.output_dir / HISTORY, before=run.state.step)
        self.cut_short = False
        """Whether a measurement was ended by ``stop``; the same on every process."""

    @property
    def before(self) -> float | None:
        """Held-out loss at step 0; None where it was not measured."""
        return self._history[0].heldout if self._history and self._history[0].step == 0 else None

    @property
    def history(self) -> Sequence[Measurement]:
        """What was measured so far, oldest first."""
        return self._history

    @property
    def latest(self) -> float | None:
        """Held-out loss at the last measurement; None before the first."""
        return self._history[-1].heldout if self._history else None

    def owes(self, step: int) -> bool:
        """Whether the measurement that falls on ``step`` is missing, because a stop was asked for before it."""
        run = self._run
        due = step > 0 and is_due(step, run.config.validation.every, last=run.total_steps) and bool(self._heldout)
        return run.ranks.run_on_main(lambda: due and all(row.step != step for row in self._history))

    def judge(self, state: RunState) -> tuple[RunState, bool]:
        """Measure after a step; returns the state with the best loss so far, and whether this is it."""
        loss = self.measure(state.step)
        if loss is None or not self._run.config.checkpoint.keep_best:
            return state, False
        if state.best_heldout_loss is not None and loss >= state.best_heldout_loss:
            return state, False
        return replace(state, best_heldout_loss=loss, best_step=state.step), True

    def measure(self, step: int) -> float | None:
        """Held-out loss and the training subset's, logged; None where no clip is held out, or if it was cut short.

        Raises:
            TrainingError: if a loss is not finite; nothing is logged then, and the measurement stays owed.
            Exception: on every process, if one of them could not measure.
        """
        if not self._heldout:
            return None
        try:
            with self._run.averaged_weights(), training_state_untouched(self._run.strategy.model):
                heldout = self._evaluate(self._heldout)
                trainsubset = self._evaluate(self._trainsubset)
                if not (heldout.is_finite and trainsubset.is_finite):
                    # Here, where the weights are those that were measured.
                    measured = self._samples(self._heldout, heldout) + self._samples(self._trainsubset, trainsubset)
                    refuse_measurement(self._run, measured, step=step)
        except _CutShortError:
            self.cut_short = True
            self._run.console.note(f"step {step}: the measurement was cut short; the next start makes up for it")
            return None
        gap = heldout.mean - trainsubset.mean
        self._run.tracker.log(
            step,
            {
                "heldout/loss": heldout.mean,
                **{f"heldout/loss/{band}": loss for band, loss in heldout.by_band.items()},
                "trainsubset/loss": trainsubset.mean,
                "heldout/gap": gap,
            },
        )
        self._run.console.note(
            f"step {step}: held-out loss {heldout.mean:.4f},"
            f" same on training clips {trainsubset.mean:.4f} (gap {gap:+.4f})"
        )
        self._remember(Measurement(step, heldout.mean, trainsubset.mean, heldout.by_band))
        return heldout.mean

    def _evaluate(self, makers: Sequence[tuple[BatchMaker, int]]) -> HeldoutLoss:
        """Evaluate clips at the fixed timesteps, shared out over the processes and put together again."""
        run, jobs = self._run, self._jobs(makers)
        mine = jobs[run.ranks.rank :: run.ranks.world]
        exchanged = False

        def exchange(pairs: list[Pair]) -> list[Pair]:
            nonlocal exchanged
            exchanged = True
            # Beyond its own jobs a process has only kept the others company (``_in_step``).
            whole = run.ranks.gather(pairs[: sum(len(job.timesteps) for job in mine)])
            if len(whole) < sum(len(job.timesteps) for job in jobs):
                raise _CutShortError
            return whole

        batches = self._in_step(jobs, mine) if run.strategy.collective_forward else self._freely(mine)
        try:
            return evaluate(self._losses, batches, run.spec.num_train_timesteps, gather=exchange)
        except Exception as error:
            if not exchanged:  # the others wait there
                _raise_everywhere(run.ranks, error)
            raise

    def _jobs(self, makers: Sequence[tuple[BatchMaker, int]]) -> list[_Job]:
        size = self._run.config.train.batch_size
        return [
            _Job(maker, index, self._timesteps[first : first + size])
            for maker, index in makers
            for first in range(0, len(self._timesteps), size)
        ]

    def _samples(self, makers: Sequence[tuple[BatchMaker, int]], found: HeldoutLoss) -> list[ReportedSample]:
        """What was measured, with what came of it."""
        jobs, world = self._jobs(makers), self._run.ranks.world
        places = [
            (rank, number, slot, job.maker.items[job.index], timestep)
            for rank in range(world)
            for number, job in enumerate(jobs[rank::world])
            for slot, timestep in enumerate(job.timesteps)
        ]
        return [
            ReportedSample(rank=rank, micro_batch=number, slot=slot, item=item, timestep=timestep, loss=loss)
            for (rank, number, slot, item, timestep), loss in zip(places, found.losses, strict=True)
        ]

    def _freely(self, mine: Sequence[_Job]) -> Iterator[Batch]:
        """Batches of one process, which may make more or fewer forward passes than the others."""
        for job in mine:
            if self._stop.requested:
                return
            yield to_device(job.batch(), self._run.device)

    def _in_step(self, jobs: Sequence[_Job], mine: Sequence[_Job]) -> Iterator[Batch]:
        """Batches where processes communicate in every forward pass: as many for each, made or given up by all."""
        ranks = self._run.ranks
        for number in range(math.ceil(len(jobs) / ranks.world)):
            job = mine[number] if number < len(mine) else jobs[0]
            made: list[Batch] = []
            if any(ranks.run_on_all(partial(self._make, job, made))):
                return
            yield to_device(made[0], self._run.device)

    def _make(self, job: _Job, made: list[Batch]) -> bool:
        made.append(job.batch())
        return self._stop.requested

    def _remember(self, measured: Measurement) -> None:
        self._history.append(measured)
        if self._run.ranks.is_main:
            lines = "".join(json.dumps(asdict(row)) + "\n" for row in self._history)
            try:
                atomic_write_text(self._run.config.output_dir / HISTORY, lines)
            except OSError as error:  # the next measurement writes this line as well
                self._run.console.note(f"warning: {HISTORY} could not be written: {error}")


def _raise_everywhere(ranks: ProcessGroup, error: Exception) -> None:
    def fail() -> None:
        raise error

    ranks.run_on_all(fail)


def _subset(maker: BatchMaker, count: int) -> list[tuple[BatchMaker, int]]:
    """At most ``count`` clips, the same ones for the same dataset, chosen by their content."""
    order = sorted(range(len(maker.items)), key=lambda index: seed_for(0, "subset", maker.items[index].latents_key))
    return [(maker, index) for index in order[:count]]


def _read_history(path: Path, *, before: int) -> list[Measurement]:
    """Measurements up to the step a run resumes at; those of a run that begins anew are dropped."""
    return [row for row in read_history(path) if row.step <= before] if before else []
