"""The objective against other people's arithmetic: diffusers' schedulers and CogVideo's published loss."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

from finetune.cogvideox.objective import (
    DropoutConfig,
    NoiseSample,
    add_noise,
    noise_batch,
    sample_noise,
    v_mse,
    velocity,
)
from finetune.core.types import Batch

SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}
SNR_SHIFTS = pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0], ids=["5b", "2b"])


def sample_pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(1, 4, 3, 6, 5, generator=generator, dtype=dtype),
        torch.randn(1, 4, 3, 6, 5, generator=generator, dtype=dtype),
    )


@SNR_SHIFTS
@pytest.mark.parametrize("scheduler_class", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_noise_and_velocity_match_diffusers_at_every_timestep(scheduler_class, snr_shift_scale):
    scheduler = scheduler_class(**SCHEDULER, snr_shift_scale=snr_shift_scale)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    x0, eps = sample_pair()
    for t in range(1000):
        timestep = torch.tensor([t])
        level = scheduler.alphas_cumprod[timestep]
        torch.testing.assert_close(add_noise(x0, eps, level), scheduler.add_noise(x0, eps, timestep), rtol=1e-9, atol=0)
        torch.testing.assert_close(
            velocity(x0, eps, level), scheduler.get_velocity(x0, eps, timestep), rtol=1e-9, atol=1e-12
        )


@SNR_SHIFTS
def test_v_mse_equals_cogvideos_snr_weighted_x0_mse_at_every_timestep(snr_shift_scale):
    """CogVideo: mean(1 / (1 - alpha_bar) * (x0_pred - x0)^2) with x0_pred from the predicted velocity."""
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=snr_shift_scale)
    levels = scheduler.alphas_cumprod.double()
    x0, eps = sample_pair()
    prediction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    for t in range(1000):
        a = levels[t : t + 1]
        x_t = add_noise(x0, eps, a)
        x0_prediction = a.sqrt() * x_t - (1 - a).sqrt() * prediction
        theirs = ((x0_prediction - x0) ** 2 / (1 - a)).mean()
        ours = v_mse(prediction, velocity(x0, eps, a)).mean()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


def test_bfloat16_would_lose_the_smallest_timesteps():
    """Why the arithmetic is fp32: the reason the TypeErrors below exist."""
    levels = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=1.0).alphas_cumprod
    assert int(((1 - levels.bfloat16()) == 0).sum()) == 2
    assert int(((1 - levels.float()) == 0).sum()) == 0


@pytest.mark.parametrize("narrow", ["x0", "eps", "alpha_bar"])
def test_narrow_inputs_are_refused(narrow):
    x0, eps = sample_pair(torch.float32)
    arguments = {"x0": x0, "eps": eps, "alpha_bar": torch.tensor([0.5])}
    arguments[narrow] = arguments[narrow].bfloat16()
    with pytest.raises(TypeError, match=narrow):
        add_noise(**arguments)
    with pytest.raises(TypeError, match=narrow):
        velocity(**arguments)


def test_the_loss_refuses_a_prediction_narrower_than_float32():
    x0, eps = sample_pair(torch.float32)
    with pytest.raises(TypeError, match="bfloat16"):
        v_mse(x0.bfloat16(), eps)


def test_the_loss_is_a_mean_per_sample():
    prediction = torch.stack([torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2) * 3])
    assert v_mse(prediction, torch.zeros_like(prediction)).tolist() == [0.0, 9.0]


def a_batch(timesteps: list[int]) -> Batch:
    x0, eps = sample_pair(torch.float32)
    n = len(timesteps)
    return Batch(
        latents=x0.repeat(n, 1, 1, 1, 1),
        noise=eps.repeat(n, 1, 1, 1, 1),
        timesteps=torch.tensor(timesteps),
        prompt_embeds=torch.zeros(n, 3, 8),
        image_latents=None,
        slots=tuple(range(n)),
        clips=tuple("abc"[:n]),
    )


def test_noise_batch_takes_each_samples_own_level():
    alpha_bar = torch.linspace(1, 0, 1000, dtype=torch.float64).float()
    noised = noise_batch(a_batch([0, 999]), alpha_bar)
    x0, eps = sample_pair(torch.float32)
    torch.testing.assert_close(noised.noisy_latents[0], x0[0], rtol=0, atol=0)
    torch.testing.assert_close(noised.noisy_latents[1], eps[0], rtol=0, atol=0)
    torch.testing.assert_close(noised.velocity[1], -x0[0], rtol=0, atol=0)


def drawn(seed: int = 1, step: int = 2, slot: int = 3, **changes: object) -> NoiseSample:
    arguments: dict[str, object] = {
        "latent_shape": (4, 3, 6, 5),
        "padded_frames": 4,
        "image_draws": 4,
        "dropout": DropoutConfig(),
        "num_train_timesteps": 1000,
    }
    return sample_noise(seed, step, slot, **(arguments | changes))


def test_a_draw_depends_on_its_address_alone():
    torch.manual_seed(0)
    first = drawn()
    torch.rand(100)
    again = drawn()
    assert torch.equal(first.noise, again.noise) and first.timestep == again.timestep
    for other in (drawn(seed=9), drawn(step=9), drawn(slot=9), drawn(purpose="validation")):
        assert not torch.equal(first.noise, other.noise)
    assert first.noise.shape == (4, 4, 6, 5) and first.posterior_noise.shape == (4, 3, 6, 5)


def test_dropout_does_not_move_the_other_draws():
    with_dropout, without = drawn(), drawn(dropout=DropoutConfig(caption_dropout=0, image_dropout=0))
    assert torch.equal(with_dropout.noise, without.noise) and with_dropout.timestep == without.timestep


def test_rates_and_timesteps_follow_their_distributions():
    n = 3000
    draws = [
        sample_noise(
            5, step, 0, latent_shape=(1, 1, 1, 1), padded_frames=1, image_draws=4,
            dropout=DropoutConfig(caption_dropout=0.1, image_dropout=0.05), num_train_timesteps=1000,
        )
        for step in range(n)
    ]  # fmt: skip
    # Five standard deviations of a binomial: one false alarm in two million, and the stream is fixed anyway.
    for rate, hits in ((0.1, sum(d.drop_caption for d in draws)), (0.05, sum(d.drop_image for d in draws))):
        assert abs(hits - rate * n) < 5 * math.sqrt(n * rate * (1 - rate))
    counts = torch.bincount(torch.tensor([d.timestep // 100 for d in draws]), minlength=10).double()
    chi_square = float(((counts - n / 10) ** 2 / (n / 10)).sum())
    assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4
    assert {d.image_draw for d in draws} == {0, 1, 2, 3}


def test_text_to_video_never_drops_an_image():
    assert not drawn(image_draws=0, dropout=DropoutConfig(image_dropout=1.0)).drop_image
