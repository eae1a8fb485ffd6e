"""From what the cache holds to what the transformer is trained on: the noise schedule, scaling and front padding."""

from __future__ import annotations

import torch
from torch import Tensor

from finetune.cogvideox.spec import ModelSpec


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


def model_latents(spec: ModelSpec, mean: Tensor, std: Tensor, eps: Tensor) -> Tensor:
    """One posterior sample in model space: ``(mean + std * eps) * scaling_factor``, padded in front.

    Args:
        spec: of the model.
        mean: of the VAE's posterior, unscaled, [B, C, F', H', W'].
        std: as ``mean``.
        eps: standard normal, as ``mean``.

    Returns:
        float32 [B, C, F'', H', W'], F'' = ``spec.padded_latent_frames``. The copies go in front, because that is
        where the stock pipeline discards frames after sampling.
    """
    x0 = (mean.float() + std.float() * eps.float()) * spec.scaling_factor
    copies = spec.front_padding(x0.shape[2])
    return torch.cat([x0[:, :, :1].expand(-1, -1, copies, -1, -1), x0], dim=2) if copies else x0


def condition_latents(spec: ModelSpec, image_latents: Tensor) -> Tensor:
    """Scale the latents of an image condition as the stock image-to-video pipeline does.

    Args:
        spec: ``invert_scale_latents`` divides where videos are always multiplied. Training with one and sampling with
            the other is a factor of two (0.7 squared), seen as dark, saturated or grey videos.
        image_latents: unscaled, [B, C, 1, H', W'].

    Returns:
        float32, same shape.
    """
    # The reciprocal first, as the pipeline forms it: the same rounding, so the same bits.
    scale = 1 / spec.scaling_factor if spec.invert_scale_latents else spec.scaling_factor
    return image_latents.float() * scale
