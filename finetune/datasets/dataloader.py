"""From the cache to micro-batches: the entries a step asks for, with every random choice already made.

All work here is on the CPU and a pure function of ``(seed, step, slot)``; a background thread does it ahead of the
model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finetune.cogvideox.config import DropoutConfig
from finetune.cogvideox.encode import condition_latents, model_latents
from finetune.cogvideox.objective import NoiseSample, sample_noise
from finetune.cogvideox.spec import ModelSpec
from finetune.core.types import Batch, CacheEntry
from finetune.datasets.cache import Cache
from finetune.datasets.cache_entries import ManifestItem
from finetune.datasets.schedule import MicroBatch, StepPlan


@dataclass(frozen=True)
class BatchMaker:
    """Turns clips of the cache into training input.

    Args:
        spec: the model's spec (scaling, front padding, number of timesteps).
        cache: where the entries are read.
        items: the clips that indices in ``MicroBatch.items`` refer to.
        empty_prompt: embedding that stands for "no caption", [L, D].
        dropout: how often conditions are withheld.
        seed: the run's seed.
    """

    spec: ModelSpec
    cache: Cache
    items: Sequence[ManifestItem]
    empty_prompt: Tensor
    dropout: DropoutConfig
    seed: int

    def training(self, step: int, micro: MicroBatch) -> Batch:
        """One micro-batch of optimizer step ``step``."""
        rows = [
            self._row(self.items[index], "train", step, slot, self.dropout)
            for index, slot in zip(micro.items, micro.slots, strict=True)
        ]
        return _collate(rows, micro.slots, [self.items[index].clip for index in micro.items])

    def fixed(self, index: int, timesteps: Sequence[int]) -> Batch:
        """One clip at given timesteps, with noise that is the same at every call; nothing is dropped.

        Args:
            index: the clip.
            timesteps: one sample of the batch each.
        """
        never = DropoutConfig(caption_dropout=0, image_dropout=0)
        item = self.items[index]
        # The address is the clip's content, so a clip keeps its noise when others are added or taken away.
        clip = int(item.latents_key[:12], 16)
        rows = [self._row(item, "validation", clip, timestep, never, timestep=timestep) for timestep in timesteps]
        return _collate(rows, tuple(range(len(rows))), [item.clip] * len(rows))

    def _row(
        self,
        item: ManifestItem,
        purpose: str,
        step: int,
        slot: int,
        dropout: DropoutConfig,
        timestep: int | None = None,
    ) -> _Row:
        entry = self.cache.read(item)
        frames = entry.latents_mean.shape[1]
        choice = sample_noise(
            self.seed,
            step,
            slot,
            latent_shape=tuple(entry.latents_mean.shape),  # type: ignore[arg-type]  # always four numbers
            padded_frames=frames + self.spec.front_padding(frames),
            image_draws=0 if entry.image_latents is None else entry.image_latents.shape[0],
            dropout=dropout,
            num_train_timesteps=self.spec.num_train_timesteps,
            purpose=purpose,
        )
        return self._prepare(entry, choice if timestep is None else replace(choice, timestep=timestep))

    def _prepare(self, entry: CacheEntry, choice: NoiseSample) -> _Row:
        mean, std = entry.latents_mean.float()[None], entry.latents_std.float()[None]
        image = None
        if entry.image_latents is not None:
            chosen = entry.image_latents[choice.image_draw].float()[None]
            image = torch.zeros_like(chosen) if choice.drop_image else chosen
            image = condition_latents(self.spec, image)[0]
        return _Row(
            latents=model_latents(self.spec, mean, std, choice.posterior_noise[None])[0],
            noise=choice.noise,
            timestep=choice.timestep,
            prompt_embeds=self.empty_prompt if choice.drop_caption else entry.prompt_embeds,
            image_latents=image,
        )


@dataclass(frozen=True)
class _Row:
    latents: Tensor
    noise: Tensor
    timestep: int
    prompt_embeds: Tensor
    image_latents: Tensor | None


def _collate(rows: Sequence[_Row], slots: tuple[int, ...], clips: Sequence[str]) -> Batch:
    images = [row.image_latents for row in rows if row.image_latents is not None]
    return Batch(
        latents=torch.stack([row.latents for row in rows]),
        noise=torch.stack([row.noise for row in rows]),
        timesteps=torch.tensor([row.timestep for row in rows], dtype=torch.int64),
        prompt_embeds=torch.stack([row.prompt_embeds for row in rows]),
        image_latents=torch.stack(images) if images else None,
        slots=slots,
        clips=tuple(clips),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on ``device``; copies from pinned memory do not wait."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return replace(
        batch,
        latents=move(batch.latents),
        noise=move(batch.noise),
        timesteps=move(batch.timesteps),
        prompt_embeds=move(batch.prompt_embeds),
        image_latents=None if batch.image_latents is None else move(batch.image_latents),
    )


def _pinned(batch: Batch) -> Batch:
    return replace(
        batch,
        latents=batch.latents.pin_memory(),
        noise=batch.noise.pin_memory(),
        timesteps=batch.timesteps.pin_memory(),
        prompt_embeds=batch.prompt_embeds.pin_memory(),
        image_latents=None if batch.image_latents is None else batch.image_latents.pin_memory(),
    )


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
            begun = time.perf_counter()
            batch = future.result()
            self.waited_s += time.perf_counter() - begun
            yield to_device(batch, self._device)

    def fault(self, step: int) -> Exception | None:
        """Why this process's batches of ``step`` cannot be made, without raising it; waits until that is known.

        None if they can be made, and beyond the last step. ``step`` itself would raise the same error.
        """
        if step >= self._total_steps:
            return None
        self._submit(step)
        begun = time.perf_counter()
        errors = [future.exception() for future in self._ahead[step]]
        self.waited_s += time.perf_counter() - begun
        return next((error for error in errors if isinstance(error, Exception)), None)

    def _submit(self, step: int) -> None:
        if step not in self._ahead:
            micros = self._plan.for_rank(step, self._rank, self._processes)
            self._ahead[step] = [self._pool.submit(self._one, step, micro) for micro in micros]

    def _one(self, step: int, micro: MicroBatch) -> Batch:
        batch = self._make(step, micro)
        return _pinned(batch) if self._device.type == "cuda" else batch

    def close(self) -> None:
        """Stop the thread; what was made ahead is thrown away."""
        self._pool.shutdown(wait=True, cancel_futures=True)
