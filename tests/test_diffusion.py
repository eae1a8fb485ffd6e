"""The objective against other people's arithmetic: CogVideo's published loss; and every random choice of a sample."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from finetune.cogvideox.config import DropoutConfig, ObjectiveConfig
from finetune.cogvideox.encode import pool_mask
from finetune.cogvideox.model_files import known_model
from finetune.cogvideox.objective import (
    NoiseSample,
    add_noise,
    loss_mask,
    masked_v_mse,
    noise_batch,
    sample_noise,
    sample_timestep,
    timestep_weights,
    v_mse,
    velocity,
)
from finetune.cogvideox.spec import read_spec
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


LEVELS = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=1.0).alphas_cumprod.double()


@pytest.mark.parametrize("kind", ["noise", "clean"])
def test_a_weight_by_timestep_makes_the_error_that_of_what_the_velocity_implies(kind):
    weights = timestep_weights(ObjectiveConfig(weighting=kind).weighting, LEVELS)
    x0, eps = pair(count=1000)
    noisy, target = add_noise(x0, eps, LEVELS), velocity(x0, eps, LEVELS)
    prediction = target + torch.randn(x0.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    a = LEVELS.reshape(-1, 1, 1, 1, 1)
    implied, truth = a.sqrt() * prediction + (1 - a).sqrt() * noisy, eps
    if kind == "clean":
        implied, truth = a.sqrt() * noisy - (1 - a).sqrt() * prediction, x0
    torch.testing.assert_close(weights * v_mse(prediction, target), v_mse(implied, truth), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_is_the_published_weight_for_velocity(gamma):
    """As diffusers' training scripts have it: min(SNR, gamma) / SNR for noise, and over SNR + 1 for velocity."""
    weighting = ObjectiveConfig(weighting={"kind": "min_snr", "gamma": gamma}).weighting
    scheduler = CogVideoXDDIMScheduler(**SCHEDULER, snr_shift_scale=1.0)
    snr = compute_snr(scheduler, torch.arange(999)).double()  # at the last one it is 0 / 1
    theirs = torch.minimum(snr, torch.tensor(gamma)) / (snr + 1)
    weights = timestep_weights(weighting, LEVELS)
    torch.testing.assert_close(weights[:-1], theirs, rtol=1e-4, atol=1e-7)
    assert weights[-1] == 0 and timestep_weights(ObjectiveConfig().weighting, LEVELS) is None


def timesteps_of(sampling: object, count: int = 4000) -> torch.Tensor:
    config = ObjectiveConfig(timesteps=sampling).timesteps
    return torch.tensor([sample_timestep(3, step, 0, 1000, config) for step in range(count)]).double()


def test_logit_normal_timesteps_are_distributed_as_the_reference():
    reference = torch.Generator().manual_seed(1)
    theirs = compute_density_for_timestep_sampling("logit_normal", 100_000, 0.5, 0.8, generator=reference).double()
    ours = timesteps_of({"kind": "logit_normal", "mean": 0.5, "std": 0.8})
    places = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    assert (ours.quantile(places) / 1000 - theirs.quantile(places)).abs().max() < 0.02
    assert ours.min() >= 0 and ours.max() <= 999


def test_bands_are_drawn_by_their_shares_and_are_even_within():
    low, high = {"first": 100, "last": 199, "share": 1}, {"first": 600, "last": 999, "share": 3}
    drawn = timesteps_of({"kind": "bands", "bands": [low, high]})
    below = drawn[drawn < 600]
    assert abs(len(below) / len(drawn) - 0.25) < 0.03
    assert below.min() == 100 and below.max() == 199 and abs(below.mean() - 149.5) < 5
    assert drawn.max() == 999 and abs(drawn[drawn >= 600].mean() - 799.5) < 10


# ---------------------------------------------------------------------------------------------------------- masked loss


def test_a_masked_loss_is_a_weighted_mean_and_has_no_gradient_outside():
    prediction, target = pair(count=3)
    prediction.requires_grad_()
    mask = torch.rand(3, 1, 3, 6, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    mask[2] = 1.0
    mask[0, :, 0], mask[1, :, :, 2:] = 0.0, 0.0
    ours = masked_v_mse(prediction, target, mask)
    for row in range(3):
        weights = mask[row].expand_as(target[row])
        theirs = torch.nn.functional.mse_loss(prediction[row], target[row], weight=weights)
        torch.testing.assert_close(ours[row], theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours[2], v_mse(prediction, target)[2], rtol=1e-12, atol=0)
    ours.sum().backward()
    assert torch.equal(prediction.grad != 0, (mask != 0).expand_as(prediction))


def test_a_mask_is_pooled_as_the_video_encoder_compresses():
    frames = torch.zeros(3, 9, 16, 24, dtype=torch.uint8)
    frames[:, 0, :8, :8] = 255  # the first frame alone is a latent frame
    frames[:, 1, :, 8:16] = 255  # one of the next four
    frames[:, 5:, 8:12, 16:] = 255  # half of a cell, in all of the last four
    pooled = pool_mask(frames, (3, 2, 3))
    assert pooled.shape == (1, 3, 2, 3)
    expected = [[[1, 0, 0], [0, 0, 0]], [[0, 0.25, 0], [0, 0.25, 0]], [[0, 0, 0], [0, 0, 0.5]]]
    torch.testing.assert_close(pooled[0], torch.tensor(expected))
    assert pool_mask(frames[:, :1], (1, 2, 3)).shape == (1, 1, 2, 3)

    second = read_spec(str(known_model("1.5-5b")))
    weights = loss_mask(second, pooled, 0.2)
    assert weights.shape == (1, 4, 2, 3) and torch.equal(weights[:, 0], weights[:, 1])
    torch.testing.assert_close(weights[:, 1:], 0.2 + 0.8 * pooled)
