"""Sampling while training: the configured prompts, with the weights of a step.

Prompts and seeds are fixed and everything that is touched is put back, so a run that samples is bit for bit the run
that does not.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from finetune.caching.encode import release_memory
from finetune.checkpoint.folders import sample_name, samples_path
from finetune.cogvideox.load import load_scheduler, load_vae
from finetune.core.errors import FinetuneError, first_line
from finetune.core.files import from_here
from finetune.core.rng import training_state_untouched
from finetune.core.types import SamplePrompt
from finetune.datasets.schedule import is_due
from finetune.inference.generate import SampleModules, SampleRequest, SampleSettings, sample_videos
from finetune.inference.videos import Frames, write_mp4
from finetune.trainers.run import Run
from finetune.trainers.stopping import StopRequest

_log = logging.getLogger(__name__)


class Sampler:
    """Samples a run's prompts.

    Args:
        run: the assembled run.
        stop: once it is requested, no further video is begun.
    """

    def __init__(self, run: Run, stop: StopRequest) -> None:
        self._run = run
        self._stop = stop

    def owes(self, step: int) -> bool:
        """Whether a video that falls on ``step`` is missing, because the run was ended before it was there."""
        run, config = self._run, self._run.config.validation
        due = step > 0 and is_due(step, config.sample_every, last=run.total_steps)
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
        folder = samples_path(run.config.output_dir, step)
        fps = run.config.data.fps or run.spec.native_fps
        videos: list[tuple[int, Frames]] = []
        try:
            self._sample_mine(videos)
        except Exception as error:
            _log.warning("process %d could not sample; training goes on: %s", run.ranks.rank, first_line(error))
        release_memory()
        self._write(videos, folder, fps)
        shown = sorted(run.ranks.gather(videos), key=lambda pair: pair[0])
        for number, frames in shown:
            run.tracker.log_video(f"samples/{number:02d} {config.samples[number].prompt[:60]}", frames, step, fps)
        run.console.note(f"step {step}: sampled {len(shown)} of {len(config.samples)} videos to {from_here(folder)}")

    def _sample_mine(self, videos: list[tuple[int, Frames]]) -> None:
        """Put this process's videos, with their numbers, into ``videos``, as far as it comes."""
        run, config = self._run, self._run.config.validation
        turns = self._turns(len(config.samples))
        if not turns:
            return
        vae = load_vae(run.config.model, device=run.device, dtype=run.dtype)
        settings = SampleSettings(config.num_inference_steps, config.guidance_scale, config.dynamic_cfg)
        with run.averaged_weights(), training_state_untouched(run.module):
            for number in turns:
                if self._stops():
                    return
                modules = SampleModules(run.spec, run.module, load_scheduler(run.config.model), vae)
                request = self._request(config.samples[number % len(config.samples)])
                (frames,) = sample_videos(modules, [request], settings)
                if number < len(config.samples):
                    videos.append((number, frames))

    def _write(self, videos: list[tuple[int, Frames]], folder: Path, fps: float) -> None:
        try:
            for number, frames in videos:
                sample = self._run.config.validation.samples[number]
                write_mp4(folder / sample_name(number, sample), frames, fps)
        except (OSError, FinetuneError) as error:
            _log.warning("sampled videos could not be written; training goes on: %s", first_line(error))

    def _turns(self, count: int) -> range:
        """Which videos this process samples: from ``count`` on only to keep the others company, in lockstep."""
        world = self._run.ranks.world
        end = math.ceil(count / world) * world if self._run.strategy.collective_forward else count
        return range(self._run.ranks.rank, end, world)

    def _stops(self) -> bool:
        """Whether to begin no further video; where processes sample in lockstep, all of them say the same."""
        if self._run.strategy.collective_forward:
            return any(self._run.ranks.run_on_all(lambda: self._stop.requested))
        return self._stop.requested

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
