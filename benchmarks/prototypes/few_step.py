"""Videos in 4 or 8 steps: adapters that learn to jump, against the base model with the best of the stock samplers.

    python benchmarks/prototypes/few_step.py [--models base consistency phased trajectory] [--seeds 1 2 3] \
        [--output benchmarks/results/prototype_few_step.json]

The teacher is the base model, guided, in 48 DDIM steps. A student takes its guidance in, so that a step of it is one
pass of the model where a step of the base is two. With ``cos phi = sqrt(alpha_bar)`` and velocity v, a jump from noise
level phi to psi is ``cos(phi - psi) x - sin(phi - psi) v`` (``inference.inversion.step_down``). To psi = 0 that is
a consistency model's boundary scaling: c_skip = cos phi, c_out = -sin phi, the identity at phi = 0. The students:

- ``consistency`` (Song et al. 2023; with guidance, Luo et al. 2023): from anywhere to the clean clip, to land where the
  student itself lands after one of the teacher's steps. Its target has no gradient, and there is no averaged copy.
- ``phased`` (Wang et al. 2024): the same, but only to the end of the current one of 4 (or 8) stretches of the schedule.
- ``trajectory``: a jump over a whole stretch, learnt from where the teacher went on a set of noises made beforehand.

Distances are between clean latents and the teacher's from the same noise. About 12 minutes of a core.
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
from diffusers import CogVideoXDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "prototypes")]

from record import Record
from tiny_world import (
    BATCH,
    GUIDANCE_SCALE,
    KNOWN,
    World,
    decoded,
    encoded,
    guided,
    noise,
    open_world,
    sampled,
    scenes,
    shares,
    train,
)

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import load_scheduler
from finetune.cogvideox.objective import add_noise
from finetune.core.rng import generator
from finetune.inference.inversion import Angles, angles
from finetune.testing.demo import KNOWN_SHAPES

MODELS = ("base", "consistency", "phased", "trajectory")
SAMPLERS = ("ddim", "dpm++", "unipc", "sde-dpm++")
TEACHER_STEPS = 48
"""A multiple of every number of steps that is measured: their noise levels are among the teacher's."""
RANK = 32


def jump(latents: Tensor, velocity: Tensor, turn: Tensor) -> Tensor:
    """``step_down`` by an angle of its own for each sample, [B]."""
    turn = turn.to(latents.dtype).view(-1, 1, 1, 1, 1)
    return torch.cos(turn) * latents - torch.sin(turn) * velocity


def ends(levels: Angles, stretches: int) -> Tensor:
    """Per noise level, the angle at which its stretch of the schedule ends, float64 [steps]."""
    phi = torch.tensor(levels.phi, dtype=torch.float64)
    length = len(levels.timesteps) // stretches
    return phi[(torch.arange(len(levels.timesteps)) // length + 1) * length]


@dataclass(frozen=True)
class Lesson:
    """What both kinds of students need for a step."""

    world: World
    captions: list[str]
    """N, of the clips or noises."""
    batch: int
    """Clips per step."""
    seed: int


def consistency_loss(
    transformer: Any, teacher: Any, lesson: Lesson, clips: Tensor, *, stretches: int
) -> Callable[[int], Tensor]:
    """What ``train`` minimises: the student's jump from a level against its jump from the teacher's next one.

    Args:
        transformer: the student.
        teacher: the base.
        lesson: the rest.
        clips: in model space, [N, C, F, H, W].
        stretches: into how many the schedule is cut; 1 for a jump to the clean clip from anywhere.
    """
    world, batch = lesson.world, lesson.batch
    levels = angles(world.spec, TEACHER_STEPS)
    phi, end = torch.tensor(levels.phi, dtype=torch.float64), ends(levels, stretches)
    timesteps = torch.tensor([*levels.timesteps, 0])

    def loss_at(step: int) -> Tensor:
        source = generator(lesson.seed, "train", step)
        chosen = torch.randint(len(clips), (batch,), generator=source)
        at = torch.randint(TEACHER_STEPS, (batch,), generator=source)
        eps = torch.randn(batch, *clips.shape[1:], generator=source)
        texts = world.texts([lesson.captions[index] for index in chosen])
        noisy = add_noise(clips[chosen], eps, world.levels[timesteps[at]])
        with torch.no_grad():
            velocity = guided(teacher, world, noisy, texts, timesteps[at], GUIDANCE_SCALE)
            next_latents = jump(noisy, velocity, phi[at] - phi[at + 1])
            # Where the next level is the end itself the turn is 0, and the target is where the teacher went.
            velocity = denoise(transformer, world.spec, next_latents, texts, timesteps[at + 1], None)
            target = jump(next_latents, velocity, phi[at + 1] - end[at])
        velocity = denoise(transformer, world.spec, noisy, texts, timesteps[at], None)
        return (jump(noisy, velocity, phi[at] - end[at]) - target).square().mean()

    return loss_at


def trajectory_loss(transformer: Any, lesson: Lesson, stops: Tensor) -> Callable[[int], Tensor]:
    """What ``train`` minimises: a jump from one stop to the next against where the teacher was.

    Args:
        transformer: the student.
        lesson: the rest.
        stops: the teacher's latents at the ends of the stretches, noise first, [stretches + 1, N, C, F, H, W].
    """
    world, batch = lesson.world, lesson.batch
    levels = angles(world.spec, len(stops) - 1)
    phi, timesteps = torch.tensor(levels.phi, dtype=torch.float64), torch.tensor(levels.timesteps)

    def loss_at(step: int) -> Tensor:
        source = generator(lesson.seed, "train", step)
        chosen = torch.randint(stops.shape[1], (batch,), generator=source)
        at = torch.randint(len(timesteps), (batch,), generator=source)
        texts, latents = world.texts([lesson.captions[index] for index in chosen]), stops[at, chosen]
        velocity = denoise(transformer, world.spec, latents, texts, timesteps[at], None)
        return (jump(latents, velocity, phi[at] - phi[at + 1]) - stops[at + 1, chosen]).square().mean()

    return loss_at


@torch.no_grad()
def stock_sample(
    name: str, transformer: Any, world: World, captions: Sequence[str], start: Tensor, steps: int
) -> Tensor:
    """Clean latents of the guided base by one of diffusers' samplers."""
    stock = load_scheduler(world.model).config
    kind: Any = {
        "sde-dpm++": CogVideoXDPMScheduler,
        "dpm++": DPMSolverMultistepScheduler,
        "unipc": UniPCMultistepScheduler,
    }
    scheduler = kind[name].from_config(stock)
    scheduler.set_timesteps(steps)
    texts, latents, old, source = world.texts(captions), start, None, generator(0, "sampler")
    for at, timestep in enumerate(scheduler.timesteps.tolist()):
        velocity = torch.cat(
            [
                guided(transformer, world, part, text, torch.full((len(part),), timestep), GUIDANCE_SCALE)
                for part, text in zip(torch.split(latents, BATCH), torch.split(texts, BATCH), strict=True)
            ]
        )
        if name == "sde-dpm++":
            before = scheduler.timesteps[at - 1] if at else None
            latents, old = scheduler.step(velocity, old, timestep, before, latents, generator=source, return_dict=False)
        else:
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


@torch.no_grad()
def renoised_sample(transformer: Any, world: World, captions: Sequence[str], start: Tensor, levels: Angles) -> Tensor:
    """Clean latents by a consistency model's own sampler: to the clean clip, and back up with new noise."""
    texts, latents, source = world.texts(captions), start, generator(0, "renoise")
    for at, (timestep, phi) in enumerate(zip(levels.timesteps, levels.phi, strict=False)):
        timesteps = torch.full((len(latents),), timestep)
        if at:
            eps = torch.randn(latents.shape, generator=source)
            latents = add_noise(latents, eps, world.levels[timesteps])
        velocity = denoise(transformer, world.spec, latents, texts, timesteps, None)
        latents = jump(latents, velocity, torch.full((len(latents),), phi))
    return latents


class Exam:
    """What clean latents are compared with: the teacher's from the same noise, and what their captions ask for."""

    def __init__(self, world: World, teacher: Any, each: int, seed: int) -> None:
        self.world, self.captions = world, [scene.caption for scene in KNOWN] * each
        self.start = noise(world, len(self.captions), seed, "measure")
        levels = angles(world.spec, TEACHER_STEPS)
        *_, self.teacher = sampled(teacher, world, self.captions, self.start, levels, GUIDANCE_SCALE)

    def mark(self, latents: Tensor) -> dict[str, float]:
        """``mse`` to the teacher, and ``shares``."""
        mse = (latents - self.teacher).square().mean().item()
        return {"mse": round(mse, 4), **shares(decoded(self.world, latents), self.captions)}

    def ddim(self, transformer: Any, steps: int, scale: float) -> Tensor:
        """Clean latents of a student (scale 1) or the base."""
        *_, clean = sampled(transformer, self.world, self.captions, self.start, angles(self.world.spec, steps), scale)
        return clean


def base_rows(exam: Exam, teacher: Any, steps: Sequence[int]) -> dict[str, dict[str, float]]:
    """The base by every sampler; two passes to a step."""
    rows = {"teacher": exam.mark(exam.teacher)}
    for count in steps:
        for sampler in SAMPLERS:
            if sampler == "ddim":
                latents = exam.ddim(teacher, count, GUIDANCE_SCALE)
            else:
                latents = stock_sample(sampler, teacher, exam.world, exam.captions, exam.start, count)
            rows[f"base {sampler} {count} steps"] = exam.mark(latents)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8], help="numbers of steps to sample in")
    parser.add_argument(
        "--passes", type=int, default=36_000, help="of one clip, backward as two: what a student may cost"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pool", type=int, default=144, help="clips, or noises for the teacher's trajectories")
    parser.add_argument("--measured", type=int, default=1, help="samples per caption in a measurement")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    options = parser.parse_args(arguments)
    record = Record(options.output, "cpu", key="name")
    with tempfile.TemporaryDirectory() as folder:
        world = open_world(Path(folder) / "model")
        for seed in options.seeds:
            study(world, options, record, seed)


def study(world: World, options: argparse.Namespace, record: Record, seed: int) -> None:
    """One seed: the base, and every student."""

    def report(name: str, row: dict[str, Any]) -> None:
        record.add({"name": f"{name} seed {seed}"} | row)
        print(name, seed, row, flush=True)

    teacher = world.base()
    exam = Exam(world, teacher, options.measured, seed)
    if "base" in options.models:
        for name, row in base_rows(exam, teacher, options.steps).items():
            report(name, row)
    each = max(1, options.pool // len(KNOWN))
    clips = scenes(KNOWN_SHAPES, each, seed)[: options.pool]
    latents, captions = encoded(world, clips), [scene.caption for scene in clips]
    lesson = Lesson(world, captions, options.batch, seed)
    stops: Tensor | None = None
    for student in (model for model in options.models if model != "base"):
        for count in (0,) if student == "consistency" else options.steps:
            started, budget = time.process_time(), options.passes
            transformer = world.adapted(RANK, seed)
            if student == "trajectory":
                if stops is None:
                    start = noise(world, len(captions), seed, "pool")
                    levels = angles(world.spec, TEACHER_STEPS)
                    stops = torch.stack([*sampled(teacher, world, captions, start, levels, GUIDANCE_SCALE)])
                budget -= len(captions) * TEACHER_STEPS * 2
                loss_at = trajectory_loss(transformer, lesson, stops[:: TEACHER_STEPS // count])
                cost = 3
            else:  # forward and backward, the teacher's guided step, and the target
                loss_at = consistency_loss(transformer, teacher, lesson, latents, stretches=count or 1)
                cost = 6
            steps = max(1, budget // (cost * options.batch))
            losses = train(transformer, loss_at, steps=steps, lr=options.lr)
            about = {
                "train_steps": steps,
                "cpu_s": round(time.process_time() - started),
                "last_loss": round(float(np.mean(losses[-50:])), 5),
            }
            for measured in options.steps if count == 0 else (count,):
                report(f"{student} ddim {measured} steps", about | exam.mark(exam.ddim(transformer, measured, 1.0)))
                if count == 0:
                    levels = angles(world.spec, measured)
                    renoised = renoised_sample(transformer, world, exam.captions, exam.start, levels)
                    report(f"{student} renoised {measured} steps", about | exam.mark(renoised))


if __name__ == "__main__":
    main()
