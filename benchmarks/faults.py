"""Which fault of a trainer makes which picture: a LoRA of the demo world, trained with one known fault at a time.

    python benchmarks/faults.py [--faults NAME ...] [--lrs 3e-3 3e-2 3e-4] [--seeds 0] \
        [--output benchmarks/results/faults.json] [--picture docs/faults.png]

CogVideo's issue 750 reports that LoRAs of 5B, rank 128 and alpha 64, give over-saturated videos at every learning rate
above 1e-6, the more so the longer they train. Here such a LoRA learns the ring lesson of the demo world, whose noise
schedule is 5B's, in 150 steps of 8 clips, as the package trains (``none``) or with a fault of older trainers. A file
that loses its alpha needs no training: it acts at 1 / (alpha / rank) = 2 times its strength; one whose alpha is counted
twice at half of it. Measured are the held-out loss, on latents at the right scale and always in float32, and the
samples' chroma and contrast against those of clips with the same captions. About 5 minutes of a core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "prototypes")]

from record import Record
from tiny_world import (
    GUIDANCE_SCALE,
    World,
    decoded,
    encoded,
    held_out_losses,
    noise,
    open_world,
    sampled,
    shares,
    train,
)

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import load_scheduler
from finetune.cogvideox.objective import add_noise, v_mse, velocity
from finetune.core.rng import generator
from finetune.inference.inversion import angles
from finetune.inference.videos import Frames, side_by_side
from finetune.methods.lora import LoraMethod, set_strength
from finetune.testing.demo import NEW_SHAPE, Scene, held_out, lesson

METHOD = LoraMethod(rank=128, alpha=64, targets="attention")
STRENGTHS = (0.5, 1.0, 1.5, METHOD.rank / METHOD.alpha)
"""Beside 0, the base; the last is an adapter whose file has lost its alpha."""

SAMPLING_STEPS = 16
BANDS = ("t000-249", "t250-499", "t500-749", "t750-999")

UNSEEN = tuple(replace(scene, seed=100) for scene in lesson(1))
"""Of the kinds of the lesson; none of its clips."""

ASKED = (*held_out(), *(scene for scene in lesson(1) if scene.shape != NEW_SHAPE))
"""What is sampled: rings in combinations that are never trained, and old shapes."""


@dataclass(frozen=True)
class Fault:
    """A way of training; as the package does it where nothing is given."""

    bf16_noising: bool = False
    """Noise levels, noisy latents, predicted velocity and x0 in bfloat16, by the stock scheduler's own methods."""
    bf16_weights: bool = False
    """The adapter's weights and Adam's averages in bfloat16, with no float32 copies."""
    scale: float = 1.0
    """By which latents are too large."""
    caption_dropout: float = 0.1


FAULTS = {
    "none": Fault(),
    "bf16 noising": Fault(bf16_noising=True),
    "bf16 weights": Fault(bf16_weights=True),
    "no dropout": Fault(caption_dropout=0.0),
    "2B's scale": Fault(scale=1.15258426 / 0.7),  # 5B's latents multiplied by 2B's scaling factor
}


@dataclass(frozen=True)
class Lesson:
    """What all runs share."""

    world: World
    scheduler: Any
    """The stock one."""
    latents: Tensor
    """Of the clips to learn from, [N, C, F, H, W]."""
    captions: Sequence[str]
    unseen: Tensor
    """Of ``UNSEEN``, [24, C, F, H, W]."""


def x0_loss(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, latents: Tensor, eps: Tensor, timesteps: Tensor
) -> Tensor:
    """The older trainers' loss: x0's squared error over 1 - alpha_bar, in whatever precision the latents have.

    In float32 it is ``v_mse``. In bfloat16 the scheduler rounds alpha_bar before it takes it from 1, which makes the
    lowest noise levels 0 or far off, while the weight has them right.

    Args:
        predict: noisy latents and timesteps -> velocity, both of the latents' dtype.
        scheduler: diffusers', with ``add_noise`` and ``get_velocity``.
        latents: clean, [B, C, F, H, W].
        eps: standard normal, same shape.
        timesteps: [B]
    """
    noisy = scheduler.add_noise(latents, eps.to(latents.dtype), timesteps)
    x0 = scheduler.get_velocity(predict(noisy, timesteps), noisy, timesteps)
    weights = 1 / (1 - scheduler.alphas_cumprod[timesteps])
    return (weights.view(-1, 1, 1, 1, 1) * (x0 - latents) ** 2).mean()


def loss_with(fault: Fault, lesson: Lesson, transformer: Any, *, batch: int, seed: int) -> Callable[[int], Tensor]:
    """What ``train`` minimises."""
    world = lesson.world

    def loss_at(step: int) -> Tensor:
        source = generator(seed, "train", step)
        chosen = torch.randint(len(lesson.latents), (batch,), generator=source)
        timesteps = torch.randint(len(world.levels), (batch,), generator=source)
        eps = torch.randn(batch, *lesson.latents.shape[1:], generator=source)
        dropped = torch.rand(batch, generator=source) < fault.caption_dropout
        texts = world.texts(["" if drop else lesson.captions[at] for at, drop in zip(chosen, dropped, strict=True)])
        latents = lesson.latents[chosen] * fault.scale

        def predict(noisy: Tensor, timesteps: Tensor) -> Tensor:
            return denoise(transformer, world.spec, noisy.float(), texts, timesteps, None).to(noisy.dtype)

        if fault.bf16_noising:
            return x0_loss(predict, lesson.scheduler, latents.bfloat16(), eps, timesteps)
        level = world.levels[timesteps]
        return v_mse(predict(add_noise(latents, eps, level), timesteps), velocity(latents, eps, level)).mean()

    return loss_at


def trained(fault: Fault, lesson: Lesson, lr: float, options: argparse.Namespace, seed: int) -> tuple[Any, float]:
    """The transformer with its adapter, in float32, and the mean of the last 50 losses."""
    transformer = lesson.world.base()
    METHOD.apply(transformer, seed=seed)
    adapter = list(METHOD.trainable(transformer).values())
    if fault.bf16_weights:
        for parameter in adapter:
            parameter.data = parameter.data.bfloat16()
    loss_at = loss_with(fault, lesson, transformer, batch=options.batch, seed=seed)
    losses = train(transformer, loss_at, steps=options.steps, lr=lr)
    for parameter in adapter:
        parameter.data = parameter.data.float()
    return transformer, float(np.mean(losses[-50:]))


def colours(clips: Sequence[Frames]) -> dict[str, float]:
    """Saturation of clips.

    Returns:
        ``chroma``: mean over pixels of the largest channel less the smallest; ``contrast``: standard deviation of the
        brightness in a clip, mean over clips; both 0 to 255. ``clipped``: share of channel values at 0 or 255.
    """
    pixels = np.stack(clips).astype(np.float32)
    return {
        "chroma": round(float(np.ptp(pixels, axis=-1).mean()), 2),
        "contrast": round(float(pixels.mean(-1).reshape(len(clips), -1).std(1).mean()), 2),
        "clipped": round(float(((pixels == 0) | (pixels == 255)).mean()), 4),
    }


def losses_of(transformer: Any, lesson: Lesson, scale: float = 1.0) -> dict[str, float]:
    """The held-out loss, and the same by part of the noise schedule; ``scale`` as of a ``Fault``."""
    captions = [scene.caption for scene in UNSEEN]
    rows = held_out_losses(transformer, lesson.world, lesson.unseen * scale, captions).mean(1)
    bands = dict(zip(BANDS, rows.view(len(BANDS), -1).mean(1).tolist(), strict=True))
    return {name: round(loss, 5) for name, loss in ({"loss": rows.mean().item()} | bands).items()}


def samples_of(transformer: Any, lesson: Lesson) -> list[Frames]:
    """Of ``ASKED``, always from the same noise."""
    world, captions = lesson.world, [scene.caption for scene in ASKED]
    start, levels = noise(world, len(ASKED), 0, "measure"), angles(world.spec, SAMPLING_STEPS)
    *_, latents = sampled(transformer, world, captions, start, levels, GUIDANCE_SCALE)
    return decoded(world, latents)


def seen_in(clips: Sequence[Frames]) -> dict[str, float]:
    """``colours``, and how many clips show what was asked for."""
    marks = shares(clips, [scene.caption for scene in ASKED])
    return colours(clips) | {name: marks[name] for name in ("right", "distance")}


def measured(lesson: Lesson, options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], list[Frames]]]:
    """Rows, each with its samples, if there are any: the clips themselves, the base, every run at every strength."""
    clips = decoded(lesson.world, encoded(lesson.world, ASKED))
    yield {"name": "clips", **seen_in(clips)}, clips
    base = lesson.world.base()
    clips = samples_of(base, lesson)
    yield {"name": "base", "strength": 0.0, **losses_of(base, lesson), **seen_in(clips)}, clips
    for seed in options.seeds:
        for lr, name in product(options.lrs, options.faults):
            fault, started = FAULTS[name], time.process_time()
            transformer, last_loss = trained(fault, lesson, lr, options, seed)
            about = {"fault": name, "lr": lr, "seed": seed, "steps": options.steps, "batch": options.batch}
            about |= {"last_loss": round(last_loss, 5), "cpu_s": round(time.process_time() - started, 1)}
            if fault.scale != 1:  # what such a trainer's own held-out loss would say
                about["base_loss_at_its_scale"] = losses_of(base, lesson, fault.scale)["loss"]
                about["loss_at_its_scale"] = losses_of(transformer, lesson, fault.scale)["loss"]
            for strength in STRENGTHS:
                set_strength(transformer, strength)
                row = {"name": f"{name} lr {lr:g} strength {strength:g} seed {seed}", "strength": strength} | about
                row |= losses_of(transformer, lesson)
                clips = samples_of(transformer, lesson) if strength == 1 or name == "none" else []
                yield row | (seen_in(clips) if clips else {}), clips


def draw(picture: Path, shown: dict[str, list[Frames]]) -> None:
    """A column per way, and a row per caption: a ring and a square, the middle frame of each."""
    rows = [(ASKED[at].caption, [clips[at][len(clips[at]) // 2 :][:1] for clips in shown.values()]) for at in (0, 11)]
    side_by_side(rows, list(shown), picture, columns=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--lrs", type=float, nargs="+", default=[3e-3, 3e-2, 3e-4], help="the first is drawn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--variations", type=int, default=4, help="clips of each kind to learn from")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--picture", type=Path, help="a PNG of samples of the first seed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = Record(options.output, "cpu", key="name")
    shown: dict[str, list[Frames]] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(Path(folder) / "model")
        clips: list[Scene] = lesson(options.variations)
        shared = Lesson(
            world,
            load_scheduler(world.model),
            encoded(world, clips),
            [scene.caption for scene in clips],
            encoded(world, UNSEEN),
        )
        for row, samples in measured(shared, options):
            record.add(row)
            print(row, flush=True)
            if heading := _heading(row, options):
                shown[heading] = samples
                if options.picture is not None:  # like the rows, complete after each
                    draw(options.picture, shown)


def _heading(row: dict[str, Any], options: argparse.Namespace) -> str | None:
    """Of a row's samples in the picture; None for a row that is not shown."""
    if "fault" not in row:
        return str(row["name"])
    first, highest = options.lrs[0], max(options.lrs)
    if row["seed"] != options.seeds[0] or row["strength"] not in (1, STRENGTHS[-1]):
        return None
    if row["fault"] != "none":
        return str(row["fault"]) if (row["lr"], row["strength"]) == (first, 1) else None
    names = {(first, 1.0): "no fault", (first, STRENGTHS[-1]): "alpha lost", (highest, 1.0): f"lr {highest:g}"}
    return names.get((row["lr"], row["strength"]))


if __name__ == "__main__":
    main()
