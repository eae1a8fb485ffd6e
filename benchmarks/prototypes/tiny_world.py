"""What the prototypes share: the demo world's base model with an adapter, its samples as a batch, and what they show.

A prototype is a way of training that the package does not offer. It is measured on the demo world (``testing.demo``)
before anybody is promised anything; ``docs/methods.md`` says what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.encode import encode_prompts, encode_video
from finetune.cogvideox.load import load_text, load_transformer, load_vae
from finetune.cogvideox.objective import add_noise, alpha_bar, v_mse, velocity
from finetune.cogvideox.spec import ModelSpec, read_spec
from finetune.core.rng import generator
from finetune.inference.inversion import Angles, step_down
from finetune.methods.lora import LoraMethod
from finetune.testing import demo
from finetune.testing.demo import COLOURS, KNOWN_SHAPES, MOTIONS, SHAPES, Frames, Scene

GUIDANCE_SCALE = 3.0
WARMUP_STEPS = 20
BATCH = 32
"""Clips per pass where no gradient is wanted."""

MEASURED_TIMESTEPS = range(62, 1000, 125)
"""Of a held-out loss: two in each quarter of the schedule."""


@dataclass(frozen=True)
class World:
    """The demo world's base model, its transformer apart: every adapter starts from a fresh one (``adapted``)."""

    model: ModelConfig
    spec: ModelSpec
    vae: Any
    embeds: dict[str, Tensor]
    """Caption -> [L, D], for every caption of the world and the empty one."""
    levels: Tensor
    """alpha_bar of every timestep, float32 [num_train_timesteps]."""

    def texts(self, captions: Sequence[str]) -> Tensor:
        """[B, L, D]"""
        return torch.stack([self.embeds[caption] for caption in captions])

    def base(self) -> Any:
        """The transformer as it is shipped."""
        return load_transformer(self.model, dtype=torch.float32)

    def adapted(self, rank: int, seed: int) -> Any:
        """The transformer with a new adapter, which changes nothing yet."""
        transformer = self.base()
        LoraMethod(rank=rank, alpha=rank, targets="attention+ff").apply(transformer, seed=seed)
        return transformer


def open_world(folder: Path) -> World:
    """Install the shipped base model in ``folder`` and load what surrounds its transformer."""
    model = ModelConfig(pretrained=str(demo.install_demo_model(folder)))
    spec = read_spec(model.pretrained)
    captions = ["", *(Scene(*words).caption for words in product(SHAPES, COLOURS, MOTIONS))]
    with torch.no_grad():
        embeds = encode_prompts(*load_text(model, dtype=torch.float32), captions, spec)
    vae = load_vae(model, dtype=torch.float32)
    return World(model, spec, vae, dict(zip(captions, embeds, strict=True)), alpha_bar(spec).float())


def scenes(kinds: Sequence[str], each: int, seed: int) -> list[Scene]:
    """Every colour and motion of some shapes, ``each`` times."""
    return [
        Scene(shape, colour, motion, seed * 1000 + index)
        for index, shape, colour, motion in product(range(each), kinds, COLOURS, MOTIONS)
    ]


KNOWN = tuple(scenes(KNOWN_SHAPES, 1, 99))
"""A scene for each of the 48 captions that the base was trained on; none of its training clips."""


def encoded(world: World, clips: Sequence[Scene]) -> Tensor:
    """Rendered clips in model space, [N, C, F, H, W]: the posterior's means."""
    parts = [torch.from_numpy(np.stack([demo.render(scene) for scene in part])) for part in _parts(clips, BATCH)]
    means = [encode_video(world.vae, part.permute(0, 4, 1, 2, 3))[0] for part in parts]
    return torch.cat(means) * world.spec.scaling_factor


@torch.no_grad()
def decoded(world: World, latents: Tensor) -> list[Frames]:
    """The clips that latents stand for."""
    videos = [
        world.vae.decode(part / world.spec.scaling_factor).sample for part in torch.split(latents, 4)
    ]  # small ones stay in the cache
    pixels = ((torch.cat(videos).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(pixels.permute(0, 2, 3, 4, 1).numpy())


def noise(world: World, count: int, seed: int, *purpose: str) -> Tensor:
    """Standard normal latents, [N, C, F, H, W]."""
    shape = world.spec.latent_channels, 1 + (demo.FRAMES - 1) // 4, demo.SIZE // 8, demo.SIZE // 8
    return torch.randn(count, *shape, generator=generator(seed, *purpose))


@torch.no_grad()
def guided(transformer: Any, world: World, latents: Tensor, texts: Tensor, timesteps: Tensor, scale: float) -> Tensor:
    """Velocity with guidance, in one pass of twice the batch; 1 for none.

    Args:
        transformer: with or without an adapter.
        world: of the model.
        latents: [B, C, F, H, W]
        texts: [B, L, D]
        timesteps: [B]
        scale: how far to lead away from the empty caption.
    """
    if scale == 1:
        return denoise(transformer, world.spec, latents, texts, timesteps, None)
    both = torch.cat([world.texts([""]).expand_as(texts), texts])
    away, towards = denoise(
        transformer, world.spec, latents.repeat(2, 1, 1, 1, 1), both, timesteps.repeat(2), None
    ).chunk(2)
    return away + scale * (towards - away)


@torch.no_grad()
def sampled(
    transformer: Any, world: World, captions: Sequence[str], start: Tensor, levels: Angles, scale: float
) -> Iterator[Tensor]:
    """Deterministic DDIM: latents [N, C, F, H, W] at each noise level in turn, from ``start`` to the clean ones."""
    texts, latents = world.texts(captions), start
    yield latents
    for timestep, turn in levels.steps_down():
        parts = [
            guided(transformer, world, part, text, torch.full((len(part),), timestep), scale)
            for part, text in zip(torch.split(latents, BATCH), torch.split(texts, BATCH), strict=True)
        ]
        latents = step_down(latents, torch.cat(parts), turn)
        yield latents


def train(transformer: Any, loss_at: Callable[[int], Tensor], *, steps: int, lr: float) -> list[float]:
    """AdamW on what ``loss_at`` a step gives, with warm-up, a cosine to a twentieth, and clipped gradients.

    Returns:
        The losses.
    """
    trainable = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for step in range(steps):
        decay = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        loss = loss_at(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def held_out_loss(transformer: Any, world: World, latents: Tensor, captions: Sequence[str]) -> Tensor:
    """The velocity's squared error per clip, [N], over ``MEASURED_TIMESTEPS``; the same noise in every call."""
    return held_out_losses(transformer, world, latents, captions).mean(0)


@torch.no_grad()
def held_out_losses(transformer: Any, world: World, latents: Tensor, captions: Sequence[str]) -> Tensor:
    """The same at each of ``MEASURED_TIMESTEPS``, [8, N]."""
    texts = world.texts(captions)
    losses = []
    for timestep in MEASURED_TIMESTEPS:
        eps = torch.randn(latents.shape, generator=generator(0, "held-out", timestep))
        timesteps = torch.full((len(latents),), timestep)
        level = world.levels[timesteps]
        prediction = denoise(transformer, world.spec, add_noise(latents, eps, level), texts, timesteps, None)
        losses.append(v_mse(prediction, velocity(latents, eps, level)))
    return torch.stack(losses)


def shares(clips: Sequence[Frames], captions: Sequence[str]) -> dict[str, float]:
    """How many clips show the shape, colour and motion that their caption asks for, and how far they are from it.

    Returns:
        ``right``: the share that shows all three; ``shape``, ``colour``, ``motion``: each alone; ``distance``: mean
        distance from the shape, as ``demo.concept_distance``.
    """
    rows = []
    for clip, caption in zip(clips, captions, strict=True):
        _, colour, shape, _, motion = caption.split()
        seen = demo.classify(clip)
        rows.append((seen.shape == shape, seen.colour == colour, seen.motion == motion, seen.distances[shape]))
    table = np.array(rows, dtype=float)
    names = ("shape", "colour", "motion", "distance")
    values = {"right": float(table[:, :3].all(1).mean()), **dict(zip(names, table.mean(0).tolist(), strict=True))}
    return {name: round(value, 4) for name, value in values.items()}


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
