"""Pixels and captions to what the cache stores, and from there to what the transformer is given.

Encoders are used as they are given: dtype, device, tiling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.cogvideox.captions import tokenize
from finetune.cogvideox.spec import ModelSpec

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX
    from tokenizers import Tokenizer
    from transformers import T5EncoderModel


IMAGE_NOISE_LOG_MEAN = -3.0

IMAGE_NOISE_LOG_STD = 0.5
"""Pixel noise on an image condition has sigma = exp(N(-3, 0.5)), on pixels in [-1, 1]: CogVideoX's own training."""


@torch.no_grad()
def encode_video(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior, before any scaling factor.

    Args:
        vae: whether it tiles or slices is the caller's choice (``vae.enable_tiling()``).
        pixels: uint8 RGB [B, 3, F, H, W], on any device.

    Returns:
        Two float32 tensors [B, C, F', H', W'] on the VAE's device.

    Raises:
        TypeError: if ``pixels`` is not uint8.
    """
    return _posterior(vae, _to_unit_range(pixels.to(vae.device)))


@torch.no_grad()
def encode_image(
    vae: AutoencoderKLCogVideoX,
    image: Tensor,
    draws: int,
    generators: Sequence[torch.Generator],
    *,
    noise: bool = True,
) -> Tensor:
    """Posterior samples of an image condition, before any scaling factor, each of a freshly noised image.

    In training the noise goes onto the pixels, so it has to be drawn before the VAE; a cache therefore holds several
    draws for the trainer to choose from.

    Args:
        vae: as for ``encode_video``.
        image: uint8 RGB [3, H, W].
        draws: K.
        generators: K CPU generators, one per draw: everything random about a draw comes from its own, so that a draw
            depends neither on the device nor on how many are made.
        noise: False encodes the image as it is, as sampling does; the posterior is still sampled.

    Returns:
        float32 [K, C, 1, H', W'] on the VAE's device.

    Raises:
        TypeError: if ``image`` is not uint8.
        ValueError: if there is not one generator per draw.
    """
    if len(generators) != draws:
        raise ValueError(f"{draws} draws need as many generators, not {len(generators)}")
    clean = _to_unit_range(image.cpu())[None, :, None]
    samples = []
    # One at a time: a batched convolution may round otherwise, and a draw must not depend on its neighbours.
    for generator in generators:
        pixels = clean
        if noise:
            log_sigma = IMAGE_NOISE_LOG_MEAN + IMAGE_NOISE_LOG_STD * torch.randn((), generator=generator)
            pixels = clean + log_sigma.exp() * torch.randn(clean.shape, generator=generator)
        mean, std = _posterior(vae, pixels.to(vae.device))
        samples.append(mean + std * torch.randn(mean.shape, generator=generator).to(mean.device))
    return torch.cat(samples)


def _to_unit_range(pixels: Tensor) -> Tensor:
    """Uint8 to float32 in [-1, 1], in the two roundings that diffusers' ``VideoProcessor`` makes."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels are {pixels.dtype}; the encoders take uint8 RGB, 0 to 255")
    return pixels.float() / 255 * 2 - 1


def _posterior(vae: AutoencoderKLCogVideoX, pixels: Tensor) -> tuple[Tensor, Tensor]:
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    # The deviation is formed from the logarithm in float32: an exponential taken in bfloat16 would round once more.
    return posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())


@torch.no_grad()
def encode_prompts(tokenizer: Tokenizer, encoder: T5EncoderModel, captions: Sequence[str], spec: ModelSpec) -> Tensor:
    """T5 embeddings of captions, as the stock pipeline makes them.

    Captions are cut (``captions.tokenize``) and padded to ``max_text_seq_length``. There is no attention mask, neither
    in T5 nor later: CogVideoX was trained to attend to the padding, so its embeddings are part of the input.

    Args:
        tokenizer: the checkpoint's (``captions.load_tokenizer``).
        encoder: the checkpoint's.
        captions: B of them, at least one; the empty caption is the unconditional text.
        spec: of the model.

    Returns:
        [B, L, D] in the encoder's dtype, on its device.
    """
    padding = (tokenizer.padding or {"pad_id": 0})["pad_id"]  # 0 is T5's
    ids = torch.full((len(captions), spec.max_text_seq_length), padding)
    for row, caption in zip(ids, tokenize(tokenizer, captions, spec), strict=True):
        row[: len(caption.ids)] = torch.tensor(caption.ids)
    embeds: Tensor = encoder(ids.to(encoder.device))[0]
    return embeds


def pool_mask(pixels: Tensor, latents: tuple[int, int, int]) -> Tensor:
    """How white a mask is at each place of its clip's latents: a latent frame stands for the first frame of the clip or
    for the next few, and a cell of it for a square of pixels.

    Args:
        pixels: uint8 RGB [3, F, H, W].
        latents: (F', H', W') of the clip's latents, before front padding.

    Returns:
        float32 [1, F', H', W'], 0 to 1: means over frames, pixels and colours.
    """
    frames, height, width = latents
    grey = pixels.float().mean(0) / 255
    parts = [grey[:1]]
    if frames > 1:
        parts.append(grey[1:].view(frames - 1, -1, *grey.shape[1:]).mean(1))
    size = (grey.shape[1] // height, grey.shape[2] // width)
    return torch.nn.functional.avg_pool2d(torch.cat(parts), size)[None]


# ---------------------------------------------------------------------------------------- from the cache to model space


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


def control_latents(spec: ModelSpec, latents: Tensor) -> Tensor:
    """A control video as the transformer is given it: scaled as a video, which diffusers' control pipeline does for
    every model, and padded in front as the video that it goes with.

    Args:
        spec: of the model.
        latents: the mode of the VAE's posterior, unscaled, [B, C, F', H', W'].

    Returns:
        float32 [B, C, F'', H', W'], F'' = ``spec.padded_latent_frames``.
    """
    return model_latents(spec, latents, torch.zeros_like(latents), torch.zeros_like(latents))


def lay_out(latents: Mapping[int, Tensor], *, frames: int, padded_frames: int) -> Tensor:
    """The condition of a whole clip: each given frame at its place, zeros elsewhere.

    Args:
        latents: of each given frame, by its latent frame in the clip; [..., C, 1, H', W'] each, at least one.
        frames: F' of the clip.
        padded_frames: F'' after front padding. The first frame stands at the first of these, where the stock pipeline
            puts it; all others move with the clip, so that the last one stands at the last.

    Returns:
        [..., C, F'', H', W'].
    """
    some = next(iter(latents.values()))
    condition = some.new_zeros(*some.shape[:-3], padded_frames, *some.shape[-2:])
    for frame, image in latents.items():
        condition[..., frame - frames if frame else 0, :, :] = image[..., 0, :, :]
    return condition


def condition_latents(spec: ModelSpec, image_latents: Tensor) -> Tensor:
    """Scale the latents of an image condition as the stock image-to-video pipeline does.

    Args:
        spec: ``invert_scale_latents`` divides where videos are always multiplied. Training with one and sampling with
            the other is a factor of two (0.7 squared), seen as dark, saturated or grey videos.
        image_latents: unscaled, [B, C, K, H', W'].

    Returns:
        float32, same shape.
    """
    # The reciprocal first, as the pipeline forms it: the same rounding, so the same bits.
    scale = 1 / spec.scaling_factor if spec.invert_scale_latents else spec.scaling_factor
    return image_latents.float() * scale


def enable_tiling(vae: AutoencoderKLCogVideoX) -> None:
    """Have the VAE encode and decode large frames in tiles that meet.

    diffusers' overlaps are a sixth and a fifth of a tile. Where that is no whole number of latents, as in a tiny model,
    it rounds them apart in pixels and in latents, and the picture comes out in another size.

    Args:
        vae: whose overlaps are changed for good where they do not fit.
    """
    for side in ("height", "width"):
        tile, name = getattr(vae, f"tile_latent_min_{side}"), f"tile_overlap_factor_{side}"
        overlap = tile * getattr(vae, name)
        if abs(overlap - round(overlap)) > 1e-6:
            setattr(vae, name, math.ceil(overlap) / tile)
    vae.enable_tiling()
