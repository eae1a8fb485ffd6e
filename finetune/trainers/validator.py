"""Measuring and sampling while training: held-out loss, its gap to the training clips, and videos.

Everything it reads is fixed (clips, timesteps, noise, prompts, seeds) and everything it touches is put back, so a run
with validation is bit for bit the run without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from finetune.caching.encode import release_memory
from finetune.cogvideox import load_scheduler, load_vae
from finetune.datasets.loader import BatchMaker, to_device
from finetune.files import atomic_write_text
from finetune.sampling import SampleRequest, sample_videos
from finetune.streams import address
from finetune.trainers.run import Run
from finetune.trainers.stopping import StopRequest
from finetune.trainers.validation import (
    HISTORY,
    HeldoutLoss,
    SamplePrompt,
    evaluate,
    fixed_timesteps,
    training_state_untouched,
)
from finetune.types import Batch, RunState
from finetune.videos import Frames, write_mp4


@dataclass(frozen=True)
class Measurement:
    """One line of ``HISTORY``: the held-out loss after ``step`` optimizer steps, and the same on training clips."""

    step: int
    heldout: float
    trainsubset: float
    by_band: dict[str, float]
    """Held-out loss by timestep band."""


class Validator:
    """Measures a run on its held-out clips and samples its prompts.

    Args:
        run: the assembled run.
        losses: per-sample loss of a batch on the device, as training computes it.
        stop: once it is requested, no further video is begun.
    """

    def __init__(self, run: Run, losses: Callable[[Batch], Tensor], stop: StopRequest) -> None:
        self._run = run
        self._stop = stop
        self._losses = losses
        config = run.config.validation
        self._heldout = _subset(run.heldout, config.clips)
        self._trainsubset = _subset(run.training, config.clips)
        self._timesteps = fixed_timesteps(config.timesteps, run.facts.num_train_timesteps)
        self._history = _read_history(run.config.output_dir / HISTORY, before=run.state.step)

    @property
    def before(self) -> float | None:
        """Held-out loss at step 0; None where it was not measured."""
        return self._history[0].heldout if self._history and self._history[0].step == 0 else None

    @property
    def latest(self) -> float | None:
        """Held-out loss at the last measurement; None before the first."""
        return self._history[-1].heldout if self._history else None

    def judge(self, state: RunState) -> tuple[RunState, bool]:
        """Measure after a step; returns the state with the best loss so far, and whether this is it."""
        loss = self.measure(state.step)
        if loss is None or not self._run.config.checkpoint.keep_best:
            return state, False
        if state.best_heldout_loss is not None and loss >= state.best_heldout_loss:
            return state, False
        return replace(state, best_heldout_loss=loss, best_step=state.step), True

    def measure(self, step: int) -> float | None:
        """Held-out loss and the training subset's, logged; None where no clip is held out."""
        if not self._heldout:
            return None
        with self._run.averaged_weights(), training_state_untouched(self._run.engine.model):
            heldout = self._evaluate(self._heldout)
            trainsubset = self._evaluate(self._trainsubset)
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
        run, size = self._run, self._run.config.train.batch_size
        jobs = [
            (maker, index, self._timesteps[first : first + size])
            for maker, index in makers
            for first in range(0, len(self._timesteps), size)
        ]
        mine = jobs[run.accelerator.process_index :: run.accelerator.num_processes]
        batches = (to_device(maker.fixed(index, steps), run.device) for maker, index, steps in mine)
        return evaluate(self._losses, batches, run.facts.num_train_timesteps, gather=run.gather_pairs)

    def _remember(self, measured: Measurement) -> None:
        self._history.append(measured)
        if self._run.accelerator.is_main_process:
            lines = "".join(json.dumps(asdict(row)) + "\n" for row in self._history)
            atomic_write_text(self._run.config.output_dir / HISTORY, lines)

    def sample(self, step: int) -> None:
        """Sample every configured prompt with the weights of this step, to files and to the tracker."""
        run, config = self._run, self._run.config.validation
        if not config.samples:
            return
        mine = list(enumerate(config.samples))[run.accelerator.process_index :: run.accelerator.num_processes]
        folder = run.config.output_dir / "samples" / f"step-{step:08d}"
        fps = run.config.data.fps or run.facts.native_fps
        videos: list[tuple[int, Frames]] = []
        if mine:
            vae = load_vae(run.config.model, device=run.device, dtype=run.dtype)
            with run.averaged_weights(), training_state_untouched(run.module):
                for number, sample in mine:
                    if self._stop.requested:
                        break
                    (frames,) = sample_videos(
                        run.facts,
                        transformer=run.module,
                        vae=vae,
                        scheduler=load_scheduler(run.config.model),
                        requests=[self._request(sample)],
                        num_inference_steps=config.num_inference_steps,
                        guidance_scale=config.guidance_scale,
                        dynamic_cfg=config.dynamic_cfg,
                    )
                    write_mp4(folder / f"{number:02d}-seed{sample.seed}.mp4", frames, fps)
                    videos.append((number, frames))
            del vae
            release_memory()
        shown = sorted(run.gather_objects(videos), key=lambda pair: pair[0])
        for number, frames in shown:
            run.tracker.log_video(f"samples/{number:02d} {config.samples[number].prompt[:60]}", frames, step, fps)
        run.console.note(f"step {step}: sampled {len(shown)} videos to {folder}")

    def _request(self, sample: SamplePrompt) -> SampleRequest:
        run = self._run
        empty = run.cache.read_prompt(run.manifest.empty_prompt_key)
        return SampleRequest(
            prompt_embeds=run.cache.read_prompt(run.manifest.prompts[sample.prompt]),
            negative_embeds=empty if run.config.data.unconditional_text == "empty" else torch.zeros_like(empty),
            image=None if sample.image is None else run.cache.read_image(run.manifest.images[str(sample.image)]),
            seed=sample.seed,
            bucket=run.config.validation.bucket or run.config.data.buckets[0],
        )


def _subset(maker: BatchMaker, count: int) -> list[tuple[BatchMaker, int]]:
    """At most ``count`` clips, the same ones for the same dataset, chosen by their content."""
    order = sorted(range(len(maker.items)), key=lambda index: address(0, "subset", maker.items[index].latents_key))
    return [(maker, index) for index in order[:count]]


def _read_history(path: Path, *, before: int) -> list[Measurement]:
    """Measurements up to the step a run resumes at; those of a run that begins anew are dropped."""
    if before == 0 or not path.is_file():
        return []
    rows = [Measurement(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [row for row in rows if row.step <= before]
