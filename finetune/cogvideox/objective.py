"""The training objective as pure functions: what is drawn, how latents are diffused, and what the loss is.

CogVideoX predicts velocity. Its original trainers turn that prediction into an estimate of x0 and weight the squared
error by 1 / (1 - alpha_bar); algebraically this *is* the mean squared error on velocity, which is what stands here,
without the division that breaks in bfloat16 (Salimans & Ho 2022, appendix D, has the identity;
``tests/test_diffusion.py`` checks it).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from finetune.cogvideox.config import (
    AnyFrames,
    BandedTimesteps,
    ConditionFrames,
    DropoutConfig,
    FirstFrame,
    LogitNormalTimesteps,
    LossWeighting,
    MinSnrWeighting,
    TimestepSampling,
    UniformTimesteps,
)
from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.spec import ModelSpec
from finetune.core.rng import generator
from finetune.core.types import Batch, Noised

UNIFORM = UniformTimesteps()


@dataclass(frozen=True)
class NoiseSample:
    """Every random choice about one sample in one optimizer step."""

    timestep: int
    noise: Tensor
    """Standard normal, float32 [C, F, H, W], F after front padding."""
    posterior_noise: Tensor
    """Standard normal, float32 [C, F, H, W], F before front padding."""
    drop_caption: bool
    drop_image: bool
    drop_control: bool
    image_draw: int
    """Which of the K cached noise-augmented encodings of each given frame to use."""
    given_frames: tuple[int, ...]
    """Latent frames that the model is given as images, rising, counted before front padding."""


def sample_noise(
    seed: int,
    step: int,
    slot: int,
    *,
    latent_shape: tuple[int, int, int, int],
    padded_frames: int,
    image_draws: int,
    dropout: DropoutConfig,
    num_train_timesteps: int,
    timesteps: TimestepSampling = UNIFORM,
    purpose: str = "train",
) -> NoiseSample:
    """Make every random choice for one sample: a pure function of ``(seed, purpose, step, slot)``.

    Each choice has its own stream, so that adding one later does not move the others.

    Args:
        seed: the run's seed.
        step: optimizer step, counted from 0.
        slot: the sample's global index inside that step.
        latent_shape: (C, F, H, W) of the cached posterior.
        padded_frames: F after front padding (equal to F for models without a temporal patch).
        image_draws: how many image latents the cache holds for this sample; 0 for text-to-video.
        dropout: the probabilities, and which frames are given.
        num_train_timesteps: timesteps are from {0, ..., this - 1}.
        timesteps: how often each of them.
        purpose: separates the streams of training from those of validation.
    """
    channels, frames, height, width = latent_shape

    def source(what: str) -> torch.Generator:
        return generator(seed, purpose, what, step, slot)

    return NoiseSample(
        timestep=sample_timestep(seed, step, slot, num_train_timesteps, timesteps, purpose=purpose),
        noise=torch.randn(channels, padded_frames, height, width, generator=source("noise")),
        posterior_noise=torch.randn(channels, frames, height, width, generator=source("posterior")),
        drop_caption=_bernoulli(dropout.caption_dropout, source("caption")),
        drop_image=image_draws > 0 and _bernoulli(dropout.image_dropout, source("image")),
        drop_control=_bernoulli(dropout.control_dropout, source("control")),
        image_draw=int(torch.randint(image_draws, (), generator=source("image_draw"))) if image_draws else 0,
        given_frames=given_frames(dropout.condition_frames, frames, source("frames")),
    )


def given_frames(choice: ConditionFrames, frames: int, generator: torch.Generator) -> tuple[int, ...]:
    """Which of ``frames`` latent frames a sample is given as images, rising; drawn only where there is a choice."""
    if isinstance(choice, AnyFrames):
        return _any_frames(choice, frames, generator)
    return (0,) if isinstance(choice, FirstFrame) else tuple(sorted({0, frames - 1}))


def _any_frames(choice: AnyFrames, frames: int, generator: torch.Generator) -> tuple[int, ...]:
    shares = torch.tensor(choice.shares, dtype=torch.float64)
    kind = int(torch.multinomial(shares, 1, generator=generator))
    if kind < 3:
        return ((0,), tuple(sorted({0, frames - 1})), (frames - 1,))[kind]
    number = int(torch.randint(1, min(choice.most, frames) + 1, (), generator=generator))
    return tuple(sorted(torch.randperm(frames, generator=generator)[:number].tolist()))


def sample_timestep(
    seed: int,
    step: int,
    slot: int,
    num_train_timesteps: int,
    timesteps: TimestepSampling = UNIFORM,
    *,
    purpose: str = "train",
) -> int:
    """The timestep of ``sample_noise``, alone; arguments as there."""
    source = generator(seed, purpose, "timestep", step, slot)
    if isinstance(timesteps, LogitNormalTimesteps):
        return _logit_normal(timesteps, num_train_timesteps, source)
    if isinstance(timesteps, BandedTimesteps):
        return _from_bands(timesteps, source)
    return int(torch.randint(num_train_timesteps, (), generator=source))


def _logit_normal(sampling: LogitNormalTimesteps, count: int, generator: torch.Generator) -> int:
    place = torch.sigmoid(sampling.mean + sampling.std * torch.randn((), dtype=torch.float64, generator=generator))
    return min(int(place * count), count - 1)


def _from_bands(sampling: BandedTimesteps, generator: torch.Generator) -> int:
    shares = torch.tensor([band.share for band in sampling.bands], dtype=torch.float64)
    ranges = [(band.first, band.last + 1) for band in sampling.bands]
    return int(torch.randint(*ranges[int(torch.multinomial(shares, 1, generator=generator))], (), generator=generator))


def _bernoulli(probability: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < probability)


def alpha_bar(spec: ModelSpec) -> Tensor:
    """Cumulative signal power of every timestep, [num_train_timesteps], float64, falling.

    Betas are equally spaced in their square roots; the product of 1 - beta is shifted in signal-to-noise ratio by
    ``snr_shift_scale`` and, where the checkpoint says so, stretched so that the last timestep holds no signal at all
    (Lin et al. 2024, algorithm 1). Equal to ``alphas_cumprod`` of diffusers' CogVideoX schedulers.
    """
    start, end = spec.beta_start**0.5, spec.beta_end**0.5
    betas = torch.linspace(start, end, spec.num_train_timesteps, dtype=torch.float64) ** 2
    product = torch.cumprod(1 - betas, dim=0)
    shift = spec.snr_shift_scale
    shifted = product / (shift + (1 - shift) * product)
    if not spec.rescale_betas_zero_snr:
        return shifted
    root = shifted.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Diffuse clean latents to the noise level ``alpha_bar`` (DDPM, Ho et al. 2020, eq. 4).

    Args:
        x0: clean latents in model space, [B, C, F, H, W], float32 (float64 in tests).
        eps: standard-normal noise, same shape and dtype as ``x0``.
        alpha_bar: cumulative signal power per sample, [B], float32 or wider, in [0, 1].

    Raises:
        TypeError: if an input is narrower than float32.
    """
    a = _per_sample(alpha_bar, x0, eps)
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


def velocity(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """The target: sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans & Ho 2022). Arguments as in ``add_noise``."""
    a = _per_sample(alpha_bar, x0, eps)
    return a.sqrt() * eps - (1 - a).sqrt() * x0


def _per_sample(alpha_bar: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    # fp32 is a correctness rule, not a preference: in bfloat16 `1 - alpha_bar` is exactly zero for the two smallest
    # CogVideoX-5B timesteps, so those samples would train on no noise.
    for name, tensor in (("x0", x0), ("eps", eps), ("alpha_bar", alpha_bar)):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} is {tensor.dtype}; the diffusion arithmetic needs float32 or float64")
    return alpha_bar.to(x0.dtype).reshape(-1, *(1,) * (x0.ndim - 1))


def noise_batch(batch: Batch, alpha_bar: Tensor) -> Noised:
    """Diffuse a micro-batch and form its target.

    Args:
        batch: latents and noise on the device where the arithmetic should run.
        alpha_bar: the whole schedule, [num_train_timesteps], on the same device, float32 or wider.
    """
    level = alpha_bar[batch.timesteps]
    return Noised(
        noisy_latents=add_noise(batch.latents, batch.noise, level),
        velocity=velocity(batch.latents, batch.noise, level),
    )


def v_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error on velocity per sample.

    Args:
        prediction: the model's velocity, [B, C, F, H, W], float32 or wider.
        target: ``Noised.velocity``, same shape and dtype.

    Returns:
        [B], the mean over everything but the batch.

    Raises:
        TypeError: if an input is narrower than float32.
    """
    if prediction.dtype not in (torch.float32, torch.float64) or prediction.dtype != target.dtype:
        raise TypeError(f"loss of {prediction.dtype} against {target.dtype}; both must be float32 or wider, and equal")
    return (prediction - target).square().flatten(1).mean(1)


def masked_v_mse(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """``v_mse`` as a mean that counts each place of the picture as much as ``mask`` says; equal weights give ``v_mse``.

    Args:
        prediction: as in ``v_mse``.
        target: as in ``v_mse``.
        mask: weights, [B, 1, F, H, W], of the same dtype, at least 0 and not all of a sample's 0.

    Returns:
        [B]: the sum of weight times squared error over the sum of weights, each for all C channels.
    """
    errors = (prediction - target).square().mean(1, keepdim=True)
    return (mask * errors).flatten(1).sum(1) / mask.flatten(1).sum(1)


def loss_mask(spec: ModelSpec, mask: Tensor, outside: float) -> Tensor:
    """The weights for ``masked_v_mse`` of one clip.

    Args:
        spec: of the model.
        mask: from the cache (``pool_mask``), [1, F', H', W'], 0 to 1.
        outside: of ``MaskedLoss``.

    Returns:
        float32 [1, F'', H', W'], padded in front as the clip's latents are.
    """
    weights = outside + (1 - outside) * mask.float()
    return torch.cat([weights[:, :1].expand(-1, spec.front_padding(weights.shape[1]), -1, -1), weights], dim=1)


def timestep_weights(weighting: LossWeighting, alpha_bar: Tensor) -> Tensor | None:
    """What the loss at every timestep is multiplied by, float64 [num_train_timesteps]; None where that is 1.

    With signal-to-noise ratio s = alpha_bar / (1 - alpha_bar), the velocity's squared error is (s + 1) times that of
    the clean latents it implies, and (s + 1) / s times that of the noise.

    Args:
        weighting: as configured.
        alpha_bar: the noise schedule, float64 [num_train_timesteps].
    """
    if isinstance(weighting, MinSnrWeighting):
        return _min_snr(weighting, alpha_bar)
    return {"velocity": None, "noise": alpha_bar, "clean": 1 - alpha_bar}[weighting.kind]


def _min_snr(weighting: MinSnrWeighting, alpha_bar: Tensor) -> Tensor:
    return torch.minimum(alpha_bar, weighting.gamma * (1 - alpha_bar))  # min(s, gamma) / (s + 1), without a division


def weighted(losses: Tensor, batch: Batch) -> Tensor:
    """What the gradient is taken of: the losses of a batch [B], each times its sample's weight; the same without."""
    return losses if batch.weights is None else losses * batch.weights


def velocity_losses(
    model: nn.Module, spec: ModelSpec, alpha_bar: Tensor, batch: Batch, base: Tensor | None = None
) -> Tensor:
    """The velocity's mean squared error per sample, float32 [B]; weighted by ``batch.mask`` where there is one.

    Args:
        model: the transformer, or what wraps it.
        spec: of the model.
        alpha_bar: the noise schedule, float32 [num_train_timesteps].
        batch: on the device of both.
        base: what the base model predicts for it (``predicted_velocity``), [B, C, F, H, W], which is the target of the
            samples that ``batch.prior`` marks; None: every sample's is the velocity of its clip.
    """
    noised = noise_batch(batch, alpha_bar)
    target = noised.velocity
    if base is not None and batch.prior is not None:  # row by row: the host knows which, and does not ask the device
        target = torch.stack([base[row] if prior else target[row] for row, prior in enumerate(batch.prior)])
    prediction = _predicted(model, spec, noised, batch)
    return v_mse(prediction, target) if batch.mask is None else masked_v_mse(prediction, target, batch.mask)


def predicted_velocity(model: nn.Module, spec: ModelSpec, alpha_bar: Tensor, batch: Batch) -> Tensor:
    """What a model predicts for a micro-batch, float32 [B, C, F, H, W]; arguments as in ``velocity_losses``."""
    return _predicted(model, spec, noise_batch(batch, alpha_bar), batch)


def _predicted(model: nn.Module, spec: ModelSpec, noised: Noised, batch: Batch) -> Tensor:
    return denoise(model, spec, noised.noisy_latents, batch.prompt_embeds, batch.timesteps, batch.image_latents)
