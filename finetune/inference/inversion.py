"""DDIM inversion: the noise that a video comes from, and edits that look at that video while they are sampled.

Everything is written in angles. With ``cos phi = sqrt(alpha_bar)``, a noisy latent is
``x = cos(phi) x0 + sin(phi) eps``, and the velocity that CogVideoX predicts is its derivative,
``v = cos(phi) eps - sin(phi) x0``. A deterministic DDIM step from ``t`` to ``s`` is then a rotation,
``x_s = cos(d) x_t - sin(d) v`` with ``d = phi_t - phi_s``: the usual formula with x0 and eps put in. Nothing in it is
divided by ``sqrt(alpha_bar)``, which is 0 at t = 999: CogVideoX's schedule ends in pure noise (zero terminal SNR),
where inversions that estimate x0 from eps divide by zero. And the angles follow from the model's own ``alpha_bar``,
with the ``snr_shift_scale`` that diffusers' ``DDIMInverseScheduler`` does not know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.objective import alpha_bar
from finetune.cogvideox.spec import ModelSpec

Velocity = Callable[[Tensor, int], Tensor]
"""(latents [1, C, F, H, W] float32, timestep) -> their velocity, float32 of the same shape."""


@dataclass(frozen=True)
class Angles:
    """The noise levels that sampling passes through, from the noisiest down, and then none at all."""

    timesteps: tuple[int, ...]
    """Descending, evenly spaced to the last (``trailing``): 999, 979, ... 19. The stock schedulers add a step up in
    floats, which for one number of steps in nine gives a neighbour here and there, and for some one more, -1."""
    phi: tuple[float, ...]
    """arccos(sqrt(alpha_bar)) of each timestep, and 0, of the clean video."""

    def steps_down(self) -> Iterator[tuple[int, float]]:
        """(timestep that the model is called at, angle to turn by), in the order of sampling."""
        for at, timestep in enumerate(self.timesteps):
            yield timestep, self.phi[at] - self.phi[at + 1]


def angles(spec: ModelSpec, num_inference_steps: int) -> Angles:
    """The noise levels of a DDIM sampling with so many steps.

    Raises:
        ValueError: for less than two steps: one step from pure noise turns by 90 degrees and forgets where it began.
    """
    if not 2 <= num_inference_steps <= spec.num_train_timesteps:
        raise ValueError(f"{num_inference_steps} steps; 2 to {spec.num_train_timesteps} are possible")
    total = spec.num_train_timesteps
    timesteps = tuple(round(total - at * total / num_inference_steps) - 1 for at in range(num_inference_steps))
    levels = alpha_bar(spec).clamp(0, 1)
    return Angles(timesteps, (*(math.acos(math.sqrt(float(levels[t]))) for t in timesteps), 0.0))


def step_down(latents: Tensor, velocity: Tensor, turn: float) -> Tensor:
    """One DDIM step towards the clean video, turning by an angle."""
    return math.cos(turn) * latents - math.sin(turn) * velocity


def step_up(latents: Tensor, velocity: Tensor, turn: float) -> Tensor:
    """One step towards noise, given the velocity *here*: that of diffusers' ``DDIMInverseScheduler``."""
    return math.cos(turn) * latents + math.sin(turn) * velocity


def step_up_from(latents: Tensor, velocity: Tensor, turn: float) -> Tensor:
    """One step towards noise, given the velocity *there*: ``step_down`` undoes it exactly."""
    return (latents + math.sin(turn) * velocity) / math.cos(turn)


@torch.no_grad()
def invert(
    predict: Velocity, latents: Tensor, levels: Angles, *, corrections: int = 3, progress: Callable[[], object] = int
) -> list[Tensor]:
    """Follow a video up to noise.

    A step of sampling uses the velocity at the noisier end, which on the way up is not known yet. As everybody does, it
    is first taken at the cleaner end. Each correction then takes it at the noisier end that the last estimate gave, so
    that sampling down again undoes the step; it costs one more call of the model.

    Args:
        predict: the model.
        latents: of the video, in model space, padded in front where the model wants it; [1, C, F, H, W] float32.
        levels: of the sampling that is to be inverted.
        corrections: of each step; 0 for DDIM inversion as in the literature.
        progress: called after each step.

    Returns:
        The latents at every timestep of ``levels``, in the order of sampling, on the CPU: the first is the noise.
    """
    trajectory: list[Tensor] = []
    for timestep, turn in reversed(list(levels.steps_down())):
        noisier = step_up(latents, predict(latents, timestep), turn)
        for _ in range(corrections):
            noisier = step_up_from(latents, predict(noisier, timestep), turn)
        latents = noisier
        trajectory.append(latents.cpu())
        progress()
    return trajectory[::-1]


# ----------------------------------------------------------------------------------------------------- shared attention


class _SharedAttention:
    """Attention in which every sample of a batch attends to the last one's tokens besides its own.

    The last one, the video on its way from noise, attends to itself alone. Its keys are turned by the same rotary
    positions, so that a sample finds in it what stands at the same place; models with sine positions have them in the
    tokens already.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)

        def heads(projected: Tensor) -> Tensor:
            return projected.view(*projected.shape[:2], attn.heads, -1).transpose(1, 2)

        query, key, value = heads(attn.to_q(tokens)), heads(attn.to_k(tokens)), heads(attn.to_v(tokens))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query[:, :, text:] = apply_rotary_emb(query[:, :, text:], image_rotary_emb)
            key[:, :, text:] = apply_rotary_emb(key[:, :, text:], image_rotary_emb)
        samples = len(tokens) - 1

        def with_last(states: Tensor) -> Tensor:
            return torch.cat([states[:-1], states[-1:].expand(samples, -1, -1, -1)], dim=2)

        attended = torch.cat(
            [
                functional.scaled_dot_product_attention(query[:-1], with_last(key), with_last(value)),
                functional.scaled_dot_product_attention(query[-1:], key[-1:], value[-1:]),
            ]
        )
        output = attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))
        return output[:, text:], output[:, :text]


@contextmanager
def attention_to_last(transformer: Any) -> Iterator[None]:
    """Inside, every block of a transformer lets a batch's samples attend to the last one's tokens as well."""
    attentions = [block.attn1 for block in transformer.transformer_blocks]
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.processor = _SharedAttention()
    try:
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor


# -------------------------------------------------------------------------------------------------------------- editing


@dataclass(frozen=True)
class Condition:
    """What a video is sampled for."""

    prompt_embeds: Tensor
    """[L, D]"""
    image_latents: Tensor | None = None
    """Of the first frame, scaled, [1, C, 1, H, W], for image-to-video models."""


@dataclass(frozen=True)
class Editing:
    """An inverted video, and what it is to become."""

    levels: Angles
    trajectory: Sequence[Tensor]
    """Of ``invert``."""
    source: Condition
    """What the video was inverted for."""
    target: Condition
    negative_embeds: Tensor
    """[L, D]: what guidance leads away from."""
    guidance_scale: float = 6.0
    share: float = 1.0
    """The part of the steps, from the first on, in which the edit attends to the inverted video."""


def predictor(transformer: Any, spec: ModelSpec, condition: Condition, device: torch.device) -> Velocity:
    """The velocity that a model predicts for one condition, without guidance."""

    def predict(latents: Tensor, timestep: int) -> Tensor:
        return _predict(transformer, spec, latents.to(device), [condition], timestep)

    return predict


def _predict(
    transformer: Any, spec: ModelSpec, latents: Tensor, conditions: Sequence[Condition], timestep: int
) -> Tensor:
    """Velocities [B, C, F, H, W] of latents [B, ...], each for its condition."""
    device = latents.device
    images = [condition.image_latents for condition in conditions if condition.image_latents is not None]
    return denoise(
        transformer,
        spec,
        latents,
        torch.stack([condition.prompt_embeds for condition in conditions]).to(device),
        torch.full((len(conditions),), timestep, device=device),
        torch.cat(images).to(device) if images else None,
    )


@torch.no_grad()
def edit(
    transformer: Any, spec: ModelSpec, start: Tensor, editing: Editing, *, progress: Callable[[], object] = int
) -> Tensor:
    """Sample from noise while attending to an inverted video, by DDIM.

    Args:
        transformer: the model; its attention is as it was afterwards.
        spec: of the model.
        start: what sampling begins with, [1, C, F, H, W] float32: the inverted noise, or noise afresh.
        editing: the inverted video and what it is to become.
        progress: called after each step.

    Returns:
        Latents in model space, as ``start``.
    """
    latents, target = start, editing.target
    conditions = [target]
    if editing.guidance_scale > 1:
        conditions = [Condition(editing.negative_embeds, target.image_latents), target]
    shared_steps = round(editing.share * len(editing.levels.timesteps))
    for at, (timestep, turn) in enumerate(editing.levels.steps_down()):
        batch = latents.expand(len(conditions), -1, -1, -1, -1)
        if at < shared_steps:
            reference = editing.trajectory[at].to(latents)
            with attention_to_last(transformer):
                everything = torch.cat([batch, reference])
                velocities = _predict(transformer, spec, everything, [*conditions, editing.source], timestep)[:-1]
        else:
            velocities = _predict(transformer, spec, batch, conditions, timestep)
        away, velocity = velocities[:1], velocities[-1:]
        if editing.guidance_scale > 1:
            velocity = away + editing.guidance_scale * (velocity - away)
        latents = step_down(latents, velocity, turn)
        progress()
    return latents
