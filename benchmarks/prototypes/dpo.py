"""Diffusion-DPO (Wallace et al. 2023) for a model of velocity, against plain training on the preferred clips alone.

    python benchmarks/prototypes/dpo.py [--seeds 1 2 3] [--output benchmarks/results/prototype_dpo.json]

A pair is two clips of one caption, of which one is preferred: here two of the base model's own samples, the one with
the lighter background preferred. No caption says anything of it, and the base draws every shade.

Both ways of training see the same pairs and cost the same, counted in passes: a pair is two clips forward and backward
(three passes each) and two without gradients, a clip alone is three passes. About 6 minutes of a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "prototypes")]

from record import Record
from tiny_world import (
    GUIDANCE_SCALE,
    KNOWN,
    World,
    decoded,
    encoded,
    held_out_loss,
    noise,
    open_world,
    sampled,
    shares,
    train,
)

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.objective import add_noise, v_mse, velocity
from finetune.core.rng import generator
from finetune.inference.inversion import angles
from finetune.methods.prior import without_adapter
from finetune.testing import demo
from finetune.testing.demo import Frames

SAMPLING_STEPS = 15
RANK = 16
CAPTION_DROPOUT = 0.1
LIGHT = 60.0
"""Mean of a background, 0 to 255, from which it counts as light: the middle of what the world's scenes have."""


@dataclass(frozen=True)
class Pairs:
    """Two clips per caption."""

    captions: list[str]
    preferred: Tensor
    """[N, C, F, H, W], in model space."""
    rejected: Tensor
    """As ``preferred``."""


@dataclass(frozen=True)
class Settings:
    """One way of training."""

    kind: str
    """``dpo``, or ``sft`` for plain training on the preferred clips."""
    lr: float
    strength: float = 0.0
    """Beta times the number of timesteps, of DPO: how much a difference of errors counts."""


def dpo_loss(errors: Tensor, base_errors: Tensor, strength: float) -> Tensor:
    """-log sigmoid(-strength ((e_w - b_w) - (e_l - b_l))), Wallace et al. 2023, eq. 14, of velocity errors.

    Args:
        errors: ``v_mse`` of the model being trained, [2, B]: of preferred clips, then of rejected ones.
        base_errors: the same of the base model, at the same timesteps and noise.
        strength: beta times the number of timesteps.

    Returns:
        The mean, log 2 where the model is the base.
    """
    preferred, rejected = errors - base_errors
    return -functional.logsigmoid(-strength * (preferred - rejected)).mean()


def brightness(clip: Frames) -> float:
    """Mean of the two outermost pixels, which no shape of the world reaches."""
    inner = np.zeros(clip.shape[1:3], dtype=bool)
    inner[2:-2, 2:-2] = True
    return float(clip[:, ~inner].mean())


def draw(transformer: Any, world: World, captions: Sequence[str], seed: int, purpose: str) -> Tensor:
    """Samples as clean latents, [N, C, F, H, W]."""
    *_, clean = sampled(
        transformer,
        world,
        captions,
        noise(world, len(captions), seed, purpose),
        angles(world.spec, SAMPLING_STEPS),
        GUIDANCE_SCALE,
    )
    return clean


def make_pairs(world: World, seed: int, pool: int) -> Pairs:
    """Of ``pool`` samples, as many of each caption: the lighter half, each beside one of the darker half."""
    base = world.base()
    each = max(2, pool // len(KNOWN))
    captions = [scene.caption for scene in KNOWN for _ in range(each)]
    latents = draw(base, world, captions, seed, "pool")
    first_frames = decoded(world, latents[:, :, :1])  # a background does not move, and a single frame is cheap
    shades = torch.tensor([brightness(clip) for clip in first_frames]).view(-1, each)
    order = shades.argsort(1, descending=True) + each * torch.arange(len(shades))[:, None]
    half = each // 2
    better, worse = order[:, :half].flatten(), order[:, each - half :].flatten()
    return Pairs([captions[index] for index in better], latents[better], latents[worse])


def pair_loss(
    transformer: Any, world: World, pairs: Pairs, settings: Settings, *, batch: int, seed: int
) -> Callable[[int], Tensor]:
    """What ``train`` minimises. ``batch`` counts clips, so half as many pairs."""
    dpo = settings.kind == "dpo"

    def loss_at(step: int) -> Tensor:
        source = generator(seed, "train", step)
        count = batch // 2 if dpo else batch
        chosen = torch.randint(len(pairs.captions), (count,), generator=source)
        timesteps = torch.randint(len(world.levels), (count,), generator=source)
        eps = torch.randn(count, *pairs.preferred.shape[1:], generator=source)
        dropped = torch.rand(count, generator=source) < CAPTION_DROPOUT
        texts = world.texts(
            ["" if drop else pairs.captions[index] for index, drop in zip(chosen, dropped, strict=True)]
        )
        x0 = pairs.preferred[chosen]
        if dpo:  # the same timesteps and noise on both sides
            x0 = torch.cat([x0, pairs.rejected[chosen]])
            timesteps, eps, texts = (torch.cat([tensor, tensor]) for tensor in (timesteps, eps, texts))
        level = world.levels[timesteps]
        noisy, target = add_noise(x0, eps, level), velocity(x0, eps, level)
        errors = v_mse(denoise(transformer, world.spec, noisy, texts, timesteps, None), target)
        if not dpo:
            return errors.mean()
        with torch.no_grad(), without_adapter(transformer):
            base_errors = v_mse(denoise(transformer, world.spec, noisy, texts, timesteps, None), target)
        return dpo_loss(errors.view(2, -1), base_errors.view(2, -1), settings.strength)

    return loss_at


def measure(transformer: Any, world: World, seed: int, each: int) -> dict[str, Any]:
    """What samples of a model show, and its held-out losses, on scenes and noise that no training has seen."""
    known = [scene.caption for scene in KNOWN] * each
    clips = decoded(world, draw(transformer, world, known, seed, "measure"))
    shades = np.array([brightness(clip) for clip in clips])
    light = torch.tensor([brightness(demo.render(scene)) >= LIGHT for scene in KNOWN])
    losses = held_out_loss(transformer, world, encoded(world, KNOWN), [scene.caption for scene in KNOWN])
    return {
        "light": round(float((shades >= LIGHT).mean()), 4),
        "brightness": round(float(shades.mean()), 1),
        "known": shares(clips, known),
        "heldout_light": round(losses[light].mean().item(), 5),
        "heldout_dark": round(losses[~light].mean().item(), 5),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--steps", type=int, default=150, help="of DPO; plain training gets a third more, which cost the same"
    )
    parser.add_argument("--batch", type=int, default=16, help="clips per step")
    parser.add_argument("--pool", type=int, default=192, help="samples of the base that pairs are made of")
    parser.add_argument("--measured", type=int, default=1, help="samples per caption in a measurement")
    parser.add_argument("--strength", type=float, nargs="+", default=[1000.0, 2000.0], help="beta times T, of DPO")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="learning rates of DPO")
    parser.add_argument("--sft-lr", type=float, nargs="*", default=[5e-4], help="learning rates of plain training")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    ways = [Settings("dpo", lr, strength) for lr in options.lr for strength in options.strength]
    ways += [Settings("sft", lr) for lr in options.sft_lr]
    record = Record(options.output, "cpu", key="name")
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(Path(folder) / "model")
        for seed in options.seeds:
            pairs = make_pairs(world, seed, options.pool)
            report(record, f"base seed {seed}", measure(world.base(), world, seed, options.measured))
            for way in ways:
                started = time.process_time()
                transformer = world.adapted(RANK, seed)
                steps = options.steps if way.kind == "dpo" else options.steps * 4 // 3
                loss_at = pair_loss(transformer, world, pairs, way, batch=options.batch, seed=seed)
                losses = train(transformer, loss_at, steps=steps, lr=way.lr)
                row = {
                    "lr": way.lr,
                    "strength": way.strength,
                    "steps": steps,
                    "cpu_s": round(time.process_time() - started),
                    "last_loss": round(float(np.mean(losses[-50:])), 4),
                }
                name = f"{way.kind} lr {way.lr:g} strength {way.strength:g} seed {seed}"
                report(record, name, row | measure(transformer, world, seed, options.measured))


def report(record: Record, name: str, row: dict[str, Any]) -> None:
    """Keep a row, and print it."""
    record.add({"name": name} | row)
    print(name, row, flush=True)


if __name__ == "__main__":
    main()
