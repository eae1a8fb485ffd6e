"""From the cache to micro-batches: the entries a step asks for, with every random choice already made.

All work here is on the CPU and a pure function of ``(seed, step, slot)``; a background thread does it ahead of the
model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from finetune.cogvideox.config import DropoutConfig, ObjectiveConfig
from finetune.cogvideox.encode import condition_latents, control_latents, lay_out, model_latents
from finetune.cogvideox.objective import NoiseSample, alpha_bar, loss_mask, sample_noise, timestep_weights
from finetune.cogvideox.spec import ModelSpec
from finetune.core.rng import generator
from finetune.core.types import Batch, CacheEntry
from finetune.datasets.cache import Cache
from finetune.datasets.manifests import ManifestItem
from finetune.datasets.schedule import MicroBatch, StepPlan


def unconditional_prompt(cache: Cache, key: str, dropout: DropoutConfig) -> Tensor:
    """The embedding that stands for "no caption", [L, D].

    Args:
        cache: where it is read.
        key: of the empty caption's entry.
        dropout: says whether that entry is meant, or zeros in its place.

    Raises:
        CacheError: if the entry cannot be read.
    """
    empty = cache.read_prompt(key)
    return torch.zeros_like(empty) if dropout.unconditional_text == "zeros" else empty


@dataclass(frozen=True)
class BatchMaker:
    """Turns clips of the cache into training input.

    Args:
        spec: the model's spec (scaling, front padding, number of timesteps).
        cache: where the entries are read.
        items: the clips that indices in ``MicroBatch.items`` refer to.
        empty_prompt: embedding that stands for "no caption", [L, D].
        dropout: which conditions a sample has, and how often they are withheld.
        seed: the run's seed.
        objective: which timesteps are trained, and what their losses count.
    """

    spec: ModelSpec
    cache: Cache
    items: Sequence[ManifestItem]
    empty_prompt: Tensor
    dropout: DropoutConfig
    seed: int
    objective: ObjectiveConfig

    @cached_property
    def any_prior(self) -> bool:
        """Whether any of the clips is for prior preservation."""
        return any(item.prior for item in self.items)

    @cached_property
    def _timestep_weights(self) -> Tensor | None:
        return timestep_weights(self.objective.weighting, alpha_bar(self.spec))

    def training(self, step: int, micro: MicroBatch) -> Batch:
        """One micro-batch of optimizer step ``step``."""
        rows = [
            self._sample(self._drawn(self.items[index], step, slot), "train", step, slot)
            for index, slot in zip(micro.items, micro.slots, strict=True)
        ]
        batch = _collate(rows, micro.slots)
        if not self.any_prior:
            return batch
        return replace(batch, prior=tuple(self.items[index].prior for index in micro.items))

    def _drawn(self, item: ManifestItem, step: int, slot: int) -> ManifestItem:
        """The clip with one of its captions, mirrored or not: each with a purpose of its own, so that no other choice
        moves.
        """

        def one_of(count: int, purpose: str) -> int:
            return int(torch.randint(count, (), generator=generator(self.seed, purpose, step, slot)))

        if item.variants:
            item = item.with_caption(one_of(len(item.prompt_keys), "caption"))
        if item.flipped_key and one_of(2, "flip"):
            item = replace(item, latents_key=item.flipped_key)
        return item

    def fixed(self, index: int, timesteps: Sequence[int]) -> Batch:
        """One clip with its first caption at given timesteps, and noise that is the same at every call; nothing is
        dropped or mirrored.

        Args:
            index: the clip.
            timesteps: one sample of the batch each.
        """
        never = {"caption_dropout": 0.0, "image_dropout": 0.0, "control_dropout": 0.0}
        keeping = replace(self, dropout=self.dropout.model_copy(update=never), objective=ObjectiveConfig())
        item = replace(self.items[index], caption_dropout=None)
        # The address is the clip's content, so a clip keeps its noise when others are added or taken away.
        clip = int(item.content_key[:12], 16)
        rows = [
            replace(keeping._sample(item, "validation", clip, timestep), timesteps=torch.tensor([timestep]))
            for timestep in timesteps
        ]
        return _collate(rows, tuple(range(len(rows))))

    def _sample(self, item: ManifestItem, purpose: str, step: int, slot: int) -> Batch:
        """A batch of one sample, whose random choices are those of ``(purpose, step, slot)``."""
        entry = self.cache.read(item)
        frames = entry.latents_mean.shape[1]
        dropout = self.dropout
        if item.caption_dropout is not None:
            dropout = dropout.model_copy(update={"caption_dropout": item.caption_dropout})
        choice = sample_noise(
            self.seed,
            step,
            slot,
            latent_shape=tuple(entry.latents_mean.shape),  # type: ignore[arg-type]  # always four numbers
            padded_frames=frames + self.spec.front_padding(frames),
            image_draws=0 if entry.image_latents is None else entry.image_latents.shape[0],
            dropout=dropout,
            num_train_timesteps=self.spec.num_train_timesteps,
            timesteps=self.objective.timesteps,
            purpose=purpose,
        )
        mean, std = entry.latents_mean.float()[None], entry.latents_std.float()[None]
        return Batch(
            latents=model_latents(self.spec, mean, std, choice.posterior_noise[None]),
            noise=choice.noise[None],
            timesteps=torch.tensor([choice.timestep]),
            prompt_embeds=(self.empty_prompt if choice.drop_caption else entry.prompt_embeds)[None],
            image_latents=self._condition(entry, choice),
            slots=(slot,),
            clips=(item.clip,),
            weights=self._weight(item.weight, choice.timestep),
            mask=self._mask(entry),
        )

    def _mask(self, entry: CacheEntry) -> Tensor | None:
        """Weights by place, [1, 1, F, H, W]; None for a clip that is learnt whole."""
        if self.objective.masked is None or entry.mask is None:
            return None
        return loss_mask(self.spec, entry.mask, self.objective.masked.outside)[None]

    def _condition(self, entry: CacheEntry, choice: NoiseSample) -> Tensor | None:
        """What the model is given beside the noise, scaled: the first frame, [1, C, 1, H, W]; the whole clip's
        condition, [1, C, F, H, W], where other frames may be given or of a control video; None for text-to-video.
        """
        if self.spec.control and entry.control_latents is not None:
            control = entry.control_latents.float()[None]
            return control_latents(self.spec, torch.zeros_like(control) if choice.drop_control else control)
        if entry.image_latents is None:
            return None
        images = entry.image_latents[choice.image_draw].float()[None]
        if self.dropout.condition_frames.stored is not None:
            frames, padded = entry.latents_mean.shape[1], choice.noise.shape[1]
            given = dict.fromkeys(choice.given_frames, images)
            if entry.frame_latents is not None:
                further = entry.frame_latents[choice.image_draw].float()[None]
                # Stored are the last ones, so they are counted from the end.
                given |= {frame: further[:, :, [frame - frames]] for frame in choice.given_frames if frame}
            images = lay_out(given, frames=frames, padded_frames=padded)
        return condition_latents(self.spec, torch.zeros_like(images) if choice.drop_image else images)

    def _weight(self, weight: float, timestep: int) -> Tensor | None:
        """What a sample's loss is multiplied by, [1]; None for 1."""
        if self._timestep_weights is not None:
            weight *= float(self._timestep_weights[timestep])
        return None if weight == 1 else torch.tensor([weight])


def _collate(samples: Sequence[Batch], slots: tuple[int, ...]) -> Batch:
    images = [sample.image_latents for sample in samples if sample.image_latents is not None]
    weighted = any(sample.weights is not None for sample in samples)
    weights = [torch.ones(1) if sample.weights is None else sample.weights for sample in samples]
    masked = any(sample.mask is not None for sample in samples)
    masks = [torch.ones_like(sample.latents[:, :1]) if sample.mask is None else sample.mask for sample in samples]
    return Batch(
        latents=torch.cat([sample.latents for sample in samples]),
        noise=torch.cat([sample.noise for sample in samples]),
        timesteps=torch.cat([sample.timesteps for sample in samples]),
        prompt_embeds=torch.cat([sample.prompt_embeds for sample in samples]),
        image_latents=torch.cat(images) if images else None,
        slots=slots,
        clips=tuple(clip for sample in samples for clip in sample.clips),
        weights=torch.cat(weights) if weighted else None,
        mask=torch.cat(masks) if masked else None,
        timesteps_on_host=tuple(int(timestep) for sample in samples for timestep in sample.timesteps),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""
    return _change_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def _change_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    tensors: dict[str, Any] = {name: change(v) for name, v in vars(batch).items() if isinstance(v, Tensor)}
    return replace(batch, **tensors)


class Loader:
    """The micro-batches of each step for one process, made one step ahead in a background thread.

    Args:
        plan: the order of the run.
        make: makes one micro-batch, such as ``BatchMaker.training``.
        rank: this process.
        processes: how many there are.
        total_steps: nothing is made ahead beyond this step.
        device: where batches go; on CUDA they are pinned first so that the copy overlaps.
    """

    def __init__(
        self,
        plan: StepPlan,
        make: Callable[[int, MicroBatch], Batch],
        *,
        rank: int,
        processes: int,
        total_steps: int,
        device: torch.device,
    ) -> None:
        self._plan = plan
        self._make = make
        self._rank = rank
        self._processes = processes
        self._total_steps = total_steps
        self._device = device
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: dict[int, list[Future[Batch]]] = {}
        self.prepare: Callable[[Batch], object] | None = None
        """Called in the thread with each batch that is made: for what of a step the host can compute ahead."""
        self.waited_s = 0.0
        """Seconds that ``step`` has waited for batches so far: time in which the model had nothing to do."""

    def step(self, step: int) -> Iterator[Batch]:
        """This process's micro-batches of one optimizer step, on the device.

        Raises:
            CacheError: an entry cannot be read.
        """
        self._submit(step)
        if step + 1 < self._total_steps:
            self._submit(step + 1)
        for future in self._ahead.pop(step):
            started = time.perf_counter()
            batch = future.result()
            self.waited_s += time.perf_counter() - started
            yield to_device(batch, self._device)

    def fault(self, step: int) -> Exception | None:
        """Why this process's batches of ``step`` cannot be made, without raising it; waits until that is known.

        None if they can be made, and beyond the last step. ``step`` itself would raise the same error.
        """
        if step >= self._total_steps:
            return None
        self._submit(step)
        started = time.perf_counter()
        errors = [future.exception() for future in self._ahead[step]]
        self.waited_s += time.perf_counter() - started
        return next((error for error in errors if isinstance(error, Exception)), None)

    def _submit(self, step: int) -> None:
        if step not in self._ahead:
            micros = self._plan.for_rank(step, self._rank, self._processes)
            self._ahead[step] = [self._pool.submit(self._one, step, micro) for micro in micros]

    def _one(self, step: int, micro: MicroBatch) -> Batch:
        batch = self._make(step, micro)
        if self.prepare is not None:
            self.prepare(batch)
        return _change_tensors(batch, Tensor.pin_memory) if self._device.type == "cuda" else batch

    def close(self) -> None:
        """Stop the thread; what was made ahead is thrown away."""
        self._pool.shutdown(wait=True, cancel_futures=True)
