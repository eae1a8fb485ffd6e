"""The objective against other people's arithmetic: CogVideo's published loss; and every random choice of a sample."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from finetune.cogvideox.config import DropoutConfig
from finetune.cogvideox.objective import NoiseSample, add_noise, noise_batch, sample_noise, v_mse, velocity
from finetune.core.types import Batch

SCHEDULER = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


def pair(dtype: torch.dtype = torch.float64, count: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    x0, eps = (torch.randn(count, 4, 3, 6, 5, generator=generator, dtype=dtype) for _ in range(2))
    return x0, eps


@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0], ids=["5b", "2b"])
def test_v_mse_equals_cogvideos_snr_weighted_x0_mse_at_every_timestep(snr_shift_scale):
    """CogVideo: mean(1 / (1 - alpha_bar) * (x0_pred - x0)^2) with x0_pred from the predicted velocity."""
    levels = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=snr_shift_scale).alphas_cumprod.double()
    x0, eps = pair(count=1000)
    prediction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    a = levels.reshape(-1, 1, 1, 1, 1)
    x0_prediction = a.sqrt() * add_noise(x0, eps, levels) - (1 - a).sqrt() * prediction
    theirs = ((x0_prediction - x0) ** 2 / (1 - a)).flatten(1).mean(1)
    torch.testing.assert_close(v_mse(prediction, velocity(x0, eps, levels)), theirs, rtol=1e-9, atol=0)


def test_bfloat16_would_lose_the_smallest_timesteps():
    """Why the arithmetic is fp32: the reason the TypeErrors below exist."""
    levels = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=1.0).alphas_cumprod
    assert int(((1 - levels.bfloat16()) == 0).sum()) == 2
    assert int(((1 - levels.float()) == 0).sum()) == 0


@pytest.mark.parametrize("narrow", ["x0", "eps", "alpha_bar"])
def test_narrow_inputs_are_refused(narrow):
    x0, eps = pair(torch.float32)
    arguments = {"x0": x0, "eps": eps, "alpha_bar": torch.tensor([0.5])}
    arguments[narrow] = arguments[narrow].bfloat16()
    for function in (add_noise, velocity):
        with pytest.raises(TypeError, match=narrow):
            function(**arguments)
    with pytest.raises(TypeError, match="bfloat16"):
        v_mse(x0.bfloat16(), eps)


def test_the_loss_is_a_mean_per_sample():
    prediction = torch.stack([torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2) * 3])
    assert v_mse(prediction, torch.zeros_like(prediction)).tolist() == [0.0, 9.0]


def test_noise_batch_takes_each_samples_own_level():
    x0, eps = pair(torch.float32)
    batch = Batch(
        latents=x0.repeat(2, 1, 1, 1, 1),
        noise=eps.repeat(2, 1, 1, 1, 1),
        timesteps=torch.tensor([0, 999]),
        prompt_embeds=torch.zeros(2, 3, 8),
        image_latents=None,
        slots=(0, 1),
        clips=("a", "b"),
    )
    noised = noise_batch(batch, torch.linspace(1, 0, 1000))
    assert torch.equal(noised.noisy_latents, torch.cat([x0, eps])) and torch.equal(noised.velocity[1], -x0[0])


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
    never = DropoutConfig(caption_dropout=0, image_dropout=0)
    for same in (drawn(), drawn(dropout=never)):  # dropout does not move the other draws
        assert torch.equal(first.noise, same.noise) and first.timestep == same.timestep
    for other in (drawn(seed=9), drawn(step=9), drawn(slot=9), drawn(purpose="validation")):
        assert not torch.equal(first.noise, other.noise)
    assert first.noise.shape == (4, 4, 6, 5) and first.posterior_noise.shape == (4, 3, 6, 5)
    assert not drawn(image_draws=0, dropout=DropoutConfig(image_dropout=1.0)).drop_image


def test_rates_and_timesteps_follow_their_distributions():
    n = 3000
    dropout = DropoutConfig(caption_dropout=0.1, image_dropout=0.05)
    draws = [drawn(5, step, 0, latent_shape=(1, 1, 1, 1), padded_frames=1, dropout=dropout) for step in range(n)]
    # Five standard deviations of a binomial: one false alarm in two million, and the stream is fixed anyway.
    for rate, hits in ((0.1, sum(d.drop_caption for d in draws)), (0.05, sum(d.drop_image for d in draws))):
        assert abs(hits - rate * n) < 5 * math.sqrt(n * rate * (1 - rate))
    counts = torch.bincount(torch.tensor([d.timestep // 100 for d in draws]), minlength=10).double()
    chi_square = float(((counts - n / 10) ** 2 / (n / 10)).sum())
    assert chi_square < 33.7  # 9 degrees of freedom, p = 1e-4
    assert {d.image_draw for d in draws} == {0, 1, 2, 3}
