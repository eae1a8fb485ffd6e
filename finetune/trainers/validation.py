"""Watching a run: its held-out loss at fixed clips, timesteps and noise, and videos of fixed prompts.

Everything that is read is fixed and everything that is touched is put back, so two measurements of the same weights
give the same number, and a run that is watched is bit for bit the run that is not.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from finetune.caching.encode import release_memory
from finetune.checkpoint.folders import HISTORY, Measurement, read_history, sample_name, samples_path
from finetune.cogvideox.load import load_scheduler, load_vae
from finetune.core.distributed import ProcessGroup
from finetune.core.errors import FinetuneError, first_line
from finetune.core.files import atomic_write_text, from_here
from finetune.core.rng import seed_for, training_state_untouched
from finetune.core.types import Batch, RunState, SamplePrompt
from finetune.datasets.dataloader import BatchMaker, to_device, unconditional_prompt
from finetune.datasets.schedule import is_due
from finetune.inference.modes import FromControl, Mode, image_mode
from finetune.inference.sample import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import Frames, write_mp4
from finetune.trainers.fault_report import ReportedSample, refuse_measurement
from finetune.trainers.run import Run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.tracking import loss_by_timestep_bucket, mean

_log = logging.getLogger(__name__)


def fixed_timesteps(count: int, num_train_timesteps: int) -> tuple[int, ...]:
    """``count`` timesteps at the midpoints of equal parts of the schedule, ascending: 4 of 1000 are 125, 375, 625, 875.

    Midpoints, so that the mean over them estimates the mean over all timesteps, which is what training minimises.

    Raises:
        ValueError: if more are wanted than there are.
    """
    if not 1 <= count <= num_train_timesteps:
        raise ValueError(f"{count} of {num_train_timesteps} timesteps")
    return tuple((2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count))


@dataclass(frozen=True)
class FixedPass:
    """One clip at a few of the fixed timesteps: what one forward pass measures."""

    maker: BatchMaker
    index: int
    timesteps: Sequence[int]

    def batch(self) -> Batch:
        return self.maker.fixed(self.index, self.timesteps)


def fixed_passes(
    maker: BatchMaker, timesteps: Sequence[int], clips: int, size: int, *, stills: Collection[bool] = ()
) -> list[FixedPass]:
    """At most so many clips, the same ones for the same dataset, chosen by their content; those for prior preservation
    where there are no others.

    Args:
        maker: of the clips.
        timesteps: at which each is measured.
        clips: at most.
        size: timesteps in one pass.
        stills: whether clips of one frame are wanted, or of several, or both, where there are any: the loss of a still
            image is not compared with that of a video.
    """
    learnt = [index for index, item in enumerate(maker.items) if not item.prior] or range(len(maker.items))
    alike = [index for index in learnt if (maker.items[index].bucket.frames == 1) in stills]
    order = sorted(alike or learnt, key=lambda index: seed_for(0, "subset", maker.items[index].content_key))
    return [
        FixedPass(maker, index, timesteps[first : first + size])
        for index in order[:clips]
        for first in range(0, len(timesteps), size)
    ]


@dataclass(frozen=True)
class MeasuredLoss:
    """The losses of every (clip, timestep) pair: passes by number, with a loss for each of their timesteps."""

    passes: Sequence[FixedPass]
    losses: Sequence[Sequence[float]]

    @property
    def flat(self) -> list[float]:
        """Every loss."""
        return [loss for losses in self.losses for loss in losses]

    @property
    def mean(self) -> float:
        """Over all pairs."""
        return mean(self.flat)

    @property
    def is_finite(self) -> bool:
        """Whether every loss is."""
        return all(map(math.isfinite, self.flat))

    def by_bucket(self, num_train_timesteps: int) -> dict[str, float]:
        """Mean loss by timestep bucket."""
        timesteps = [timestep for one in self.passes for timestep in one.timesteps]
        return loss_by_timestep_bucket(self.flat, timesteps, num_train_timesteps)

    def samples(self, ranks: ProcessGroup) -> list[ReportedSample]:
        """What was measured, with what came of it; pass ``n`` was made by the processes of share ``n`` of the clips."""
        return [
            ReportedSample(
                rank=number % ranks.data_world * ranks.context,
                micro_batch=number // ranks.data_world,
                slot=slot,
                item=one.maker.items[one.index],
                timestep=timestep,
                loss=loss,
            )
            for number, (one, losses) in enumerate(zip(self.passes, self.losses, strict=True))
            for slot, (timestep, loss) in enumerate(zip(one.timesteps, losses, strict=True))
        ]


class Validator:
    """Measures a run on its held-out clips, and on as many of those it trains on.

    Whoever asks a run to stop has seconds to give: once ``stop`` is requested, a measurement ends with the forward pass
    it is in, on every process.

    Args:
        run: the run.
        stop: the request.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self._run = run
        self._stop = stop
        spec, step = run.model.spec, run.state.step
        timesteps = fixed_timesteps(run.config.validation.timesteps, spec.num_train_timesteps)
        frames = {item.bucket.frames == 1 for item in run.data.val.items}
        self._val, self._train_subset = (
            fixed_passes(maker, timesteps, run.config.validation.clips, run.config.train.batch_size, stills=frames)
            for maker in (run.data.val, run.data.training)
        )
        # A run that begins anew drops what an earlier one measured.
        history = read_history(run.config.output_dir / HISTORY) if step else []
        self.history = [row for row in history if row.step <= step]
        """What was measured so far, oldest first."""
        self.cut_short = False
        """Whether a measurement was ended by ``stop``; the same on every process."""

    @property
    def before(self) -> float | None:
        """Held-out loss at step 0; None where it was not measured."""
        return self.history[0].heldout if self.history and self.history[0].step == 0 else None

    @property
    def latest(self) -> float | None:
        """Held-out loss at the last measurement; None before the first."""
        return self.history[-1].heldout if self.history else None

    def owes(self, step: int) -> bool:
        """Whether the measurement that falls on ``step`` is missing, because a stop was asked for before it."""
        run = self._run
        due = step > 0 and is_due(step, run.config.validation.every, last=run.data.total_steps) and bool(self._val)
        return run.ranks.run_on_main(lambda: due and all(row.step != step for row in self.history))

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
        run = self._run
        if not self._val:
            return None
        with run.model.averaged_weights(), training_state_untouched(run.model.strategy.model):
            val = self._evaluate(self._val)
            train_subset = self._evaluate(self._train_subset) if val is not None else None
            if val is None or train_subset is None:
                self.cut_short = True
                run.console.note(f"step {step}: the measurement was cut short; the next start makes up for it")
                return None
            if not (val.is_finite and train_subset.is_finite):
                # Here, where the weights are those that were measured.
                refuse_measurement(run, val.samples(run.ranks) + train_subset.samples(run.ranks), step=step)
        by_bucket, gap = val.by_bucket(run.model.spec.num_train_timesteps), val.mean - train_subset.mean
        run.tracker.log(
            step,
            {
                "heldout/loss": val.mean,
                **{f"heldout/loss/{bucket}": loss for bucket, loss in by_bucket.items()},
                "trainsubset/loss": train_subset.mean,
                "heldout/gap": gap,
            },
        )
        run.console.note(
            f"step {step}: held-out loss {val.mean:.4f}, same on training clips {train_subset.mean:.4f}"
            f" (gap {gap:+.4f})"
        )
        run.console.fact("held out", f"{val.mean:.4f} at step {step}, training clips {train_subset.mean:.4f}")
        self._remember(Measurement(step, val.mean, train_subset.mean, by_bucket))
        return val.mean

    def _evaluate(self, passes: Sequence[FixedPass]) -> MeasuredLoss | None:
        """Make passes, shared out over the processes, and put their losses together; None where ``stop`` ended it."""
        ranks, model = self._run.ranks, self._run.model

        def measure_own() -> list[list[float]]:
            return [model.losses(batch, training=False).double().tolist() for batch in self._own_batches(passes)]

        shares = ranks.run_on_all(measure_own)[:: ranks.context]
        if sum(map(len, shares)) < len(passes):
            return None
        losses = [shares[number % len(shares)][number // len(shares)] for number in range(len(passes))]
        return MeasuredLoss(passes, losses)

    def _own_batches(self, passes: Sequence[FixedPass]) -> Iterator[Batch]:
        """The batches of this process, on its device, until ``stop`` is requested.

        Where all processes communicate in each forward pass, they have equally many, made or given up by all: a pass
        that one makes only to keep the others company comes last, and its losses are not looked at.
        """
        ranks, together = self._run.ranks, self._run.model.collective_forward
        end = math.ceil(len(passes) / ranks.data_world) * ranks.data_world if together else len(passes)
        for number in range(ranks.data_rank, end, ranks.data_world):
            batches: list[Batch] = []
            make = partial(self._make, passes[number % len(passes)], batches)
            if any(ranks.run_on_all(make) if together else [make()]):
                return
            yield to_device(batches[0], ranks.device)

    def _make(self, one: FixedPass, batches: list[Batch]) -> bool:
        """Make the batch of a pass; whether this process is to stop."""
        batches.append(one.batch())
        return self._stop.requested

    def _remember(self, measured: Measurement) -> None:
        self.history.append(measured)
        if self._run.ranks.is_main:
            lines = "".join(json.dumps(asdict(row)) + "\n" for row in self.history)
            try:
                atomic_write_text(self._run.config.output_dir / HISTORY, lines)
            except OSError as error:  # the next measurement writes this line as well
                self._run.console.note(f"warning: {HISTORY} could not be written: {error}")


class Sampler:
    """Samples a run's prompts.

    Args:
        run: the run.
        stop: once it is requested, no further video is begun.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self._run = run
        self._stop = stop

    def owes(self, step: int) -> bool:
        """Whether a video that falls on ``step`` is missing, because the run was ended before it was there."""
        run, config = self._run, self._run.config.validation
        due = step > 0 and is_due(step, config.sample_every, last=run.data.total_steps)
        folder = samples_path(run.config.output_dir, step)
        names = [sample_name(number, sample) for number, sample in enumerate(config.samples)]
        return run.ranks.run_on_main(lambda: due and not all((folder / name).is_file() for name in names))

    def sample(self, step: int) -> None:
        """Sample every configured prompt with the weights of this step, to files and to the tracker.

        A video is not worth a run: whatever fails here is printed as a warning, and training goes on.
        """
        run, config = self._run, self._run.config.validation
        if not config.samples:
            return
        folder, fps = samples_path(run.config.output_dir, step), run.config.data.fps or run.model.spec.native_fps
        videos: list[tuple[int, Frames]] = []
        try:
            for video in self._own_videos():
                videos.append(video)
        except Exception as error:
            _log.warning("process %d could not sample; training goes on: %s", run.ranks.rank, first_line(error))
        release_memory()
        try:
            for number, frames in videos:
                write_mp4(folder / sample_name(number, config.samples[number]), frames, fps)
        except (OSError, FinetuneError) as error:
            _log.warning("sampled videos could not be written; training goes on: %s", first_line(error))
        shown = sorted(run.ranks.gather(videos), key=lambda pair: pair[0])
        for number, frames in shown:
            run.tracker.log_video(f"samples/{number:02d} {config.samples[number].prompt[:60]}", frames, step, fps)
        run.console.fact("samples", from_here(folder))
        run.console.note(f"step {step}: sampled {len(shown)} of {len(config.samples)} videos to {from_here(folder)}")

    def _own_videos(self) -> Iterator[tuple[int, Frames]]:
        """This process's videos, with their numbers, as far as it comes."""
        model, config, ranks = self._run.model, self._run.config.validation, self._run.ranks
        count, together = len(config.samples), model.collective_forward
        # From ``count`` on only to keep the others company, where all communicate in each forward pass.
        end = math.ceil(count / ranks.data_world) * ranks.data_world if together else count
        numbers = range(ranks.data_rank, end, ranks.data_world)
        if not numbers:
            return
        vae = load_vae(self._run.config.model, device=ranks.device, dtype=model.dtype)
        settings = SampleSettings(config.num_inference_steps, config.guidance_scale, config.dynamic_cfg)
        with model.averaged_weights(), training_state_untouched(model.module):
            for number in numbers:
                stops = ranks.run_on_all(lambda: self._stop.requested) if together else [self._stop.requested]
                if any(stops):
                    return
                modules = SampleModules(model.spec, model.module, load_scheduler(self._run.config.model), vae)
                (frames,) = sample_videos(modules, [self._request(config.samples[number % count])], settings)
                if number < count and ranks.leads_context:
                    yield number, frames

    def _request(self, sample: SamplePrompt) -> SampleRequest:
        config, cache, manifest = self._run.config, self._run.data.cache, self._run.data.manifest
        bucket = config.validation.bucket or config.data.buckets[0]
        images = {
            frame: cache.read_image(manifest.images[str(path)])
            for frame, path in sample.images_by_frame(bucket.frames).items()
        }
        mode: Mode = image_mode(images)
        if sample.control is not None:
            pixels = cache.read_image(manifest.images[str(sample.control)])
            mode = FromControl(pixels.permute(1, 2, 3, 0).contiguous().numpy())
        return SampleRequest(
            prompt_embeds=cache.read_prompt(manifest.prompts[sample.prompt]),
            negative_embeds=unconditional_prompt(cache, manifest.empty_prompt_key, config.data),
            mode=mode,
            seed=sample.seed,
            bucket=bucket,
        )
