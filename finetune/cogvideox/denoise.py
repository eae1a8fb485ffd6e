"""One call of the transformer, given what the stock pipelines give it. ``[B, F, C, H, W]`` exists only in here."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from finetune.cogvideox.riflex import lower
from finetune.cogvideox.spec import ModelSpec

OFS = 2.0
"""The offset that a model with an offset embedding is given; the stock pipeline knows no other."""


def ofs_of(spec: ModelSpec) -> float | None:
    """What the model's offset embedding is given; None for a model without one."""
    return None if spec.ofs_embed_dim is None else OFS


def denoise(
    transformer: nn.Module,
    spec: ModelSpec,
    noisy_latents: Tensor,
    prompt_embeds: Tensor,
    timesteps: Tensor,
    image_latents: Tensor | None,
) -> Tensor:
    """Predict the velocity of a micro-batch. All tensors are on the transformer's device, in any floating dtype.

    Args:
        transformer: a ``CogVideoXTransformer3DModel``, or what wraps one (DDP, FSDP, ``torch.compile``); the wrapper is
            what is called, because it is the one that synchronises gradients.
        spec: of the model; nothing is read off the transformer but its dtype.
        noisy_latents: [B, C, F, H, W], F after front padding.
        prompt_embeds: [B, L, D], L = ``spec.max_text_seq_length``.
        timesteps: [B], int64.
        image_latents: scaled (``condition_latents``), [B, C, K, H, W]: what the first K <= F latent frames are given;
            one frame for a first image, F for a control video. None for a text-to-video model.

    Returns:
        float32 [B, C, F, H, W], whatever the dtype of the transformer.

    Raises:
        ValueError: if ``image_latents`` is given to a model without a condition or missing for one with it.
    """
    if (image_latents is not None) != spec.conditioned:
        raise ValueError(
            f"the model is {spec.task}, but image_latents is {'missing' if image_latents is None else 'given'}"
        )
    dtype = _dtype_of(transformer)
    hidden_states = noisy_latents.to(dtype).transpose(1, 2)
    frames, _, height, width = hidden_states.shape[1:]
    if image_latents is not None:
        # The condition stands at the first frame the transformer sees, also where that one is padding: the stock
        # pipeline rounds the frame count up before it lays out the image, so it never gets to copy the image.
        condition = torch.zeros_like(hidden_states)
        condition[:, : image_latents.shape[2]] = image_latents.to(dtype).transpose(1, 2)
        hidden_states = torch.cat([hidden_states, condition], dim=2)
    positions = None
    if spec.use_rotary:
        positions = _kept_table(transformer, spec, (frames, height, width), noisy_latents.device)
    (velocity,) = transformer(
        hidden_states=hidden_states,
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timesteps,
        ofs=None if (ofs := ofs_of(spec)) is None else hidden_states.new_full((1,), ofs),
        image_rotary_emb=positions,
        return_dict=False,
    )
    prediction: Tensor = velocity.float().transpose(1, 2)
    return prediction


def _dtype_of(transformer: nn.Module) -> torch.dtype:
    # The first parameter is the patch embedding's, whoever wraps the module: LoRA weights (float32) and quantised
    # weights (integers) come later, and layer-wise casting to float8 leaves the patch embedding alone.
    return next(parameter.dtype for parameter in transformer.parameters() if parameter.is_floating_point())


_TABLES: WeakKeyDictionary[nn.Module, dict[Any, tuple[Tensor, Tensor]]] = WeakKeyDictionary()

_MOST_TABLES = 8
"""Per model: of 9 MiB each for 49 frames at 480x720."""


def _kept_table(
    transformer: nn.Module, spec: ModelSpec, shape: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """``rotary_table`` of (frames, height, width), made once for a model: some dozens of small kernels otherwise, for
    which the device waits at the beginning of every pass.
    """
    tables = _TABLES.setdefault(transformer, {})
    key = spec, shape, device
    if key not in tables:
        while len(tables) >= _MOST_TABLES:
            del tables[next(iter(tables))]
        with torch.inference_mode(False):  # a table that sampling makes is good for training as well
            tables[key] = rotary_table(spec, *shape, device=device)
    return tables[key]


def rotary_table(
    spec: ModelSpec, frames: int, height: int, width: int, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, as the stock pipelines lay them out but for what ``riflex`` changes.

    Args:
        spec: of a model with ``use_rotary``.
        frames: latent frames after front padding.
        height: of the latents, in cells.
        width: of the latents, in cells.
        device: where the table is wanted.

    Returns:
        Two float32 tensors [video tokens, attention_head_dim].
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    grid = (height // spec.patch_size, width // spec.patch_size)
    native_height, native_width = spec.sample_height // spec.patch_size, spec.sample_width // spec.patch_size
    layout: dict[str, Any]
    if spec.patch_size_t is None:
        # First generation: the grid is stretched over the native one, keeping its aspect.
        region = get_resize_crop_region_for_grid(grid, native_width, native_height)
        layout = {"crops_coords": region, "temporal_size": frames}
    else:
        # Second generation: the grid is the corner of a table for the largest size, at the table's own pitch.
        layout = {
            "crops_coords": None,
            "temporal_size": frames // spec.patch_size_t,
            "grid_type": "slice",
            "max_size": (native_height, native_width),
        }
    cos, sin = get_3d_rotary_pos_embed(embed_dim=spec.attention_head_dim, grid_size=grid, device=device, **layout)
    if spec.riflex is not None:
        per_frame = (layout["temporal_size"], -1, spec.attention_head_dim)
        lower(spec, cos.view(per_frame), sin.view(per_frame))
    return cos, sin
