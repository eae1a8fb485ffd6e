"""SAT's transformer, by its own names: an independent forward pass to compare a conversion with.

Written from the arithmetic of CogVideo's ``sat/dit_video_concat.py``. Epsilons are those of diffusers' published
configurations, so that both sides compute the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def velocity(
    tensors: dict[str, Tensor],
    latents: Tensor,
    text: Tensor,
    timesteps: Tensor,
    *,
    heads: int,
    rotary: tuple[Tensor, Tensor] | None,
    ofs: Tensor | None,
) -> Tensor:
    """What the model predicts, [B, T, C, H, W] for latents (with the condition behind them) [B, T, C', H, W]."""
    tensors = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in tensors.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return functional.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    def embedding(name: str, value: Tensor, width: int) -> Tensor:
        frequencies = 10_000 ** (-torch.arange(width // 2, dtype=torch.float32) / (width // 2))
        angles = value[:, None].float() * frequencies
        hidden = functional.silu(linear(f"{name}.0", torch.cat([angles.cos(), angles.sin()], dim=1)))
        return linear(f"{name}.2", hidden)

    def turned(x: Tensor, text_tokens: int) -> Tensor:
        if rotary is None:
            return x
        cos, sin = rotary
        video = x[:, :, text_tokens:]
        first, second = video[..., ::2], video[..., 1::2]
        quarter = torch.stack([-second, first], dim=-1).flatten(-2)
        return torch.cat([x[:, :, :text_tokens], video * cos + quarter * sin], dim=2)

    batch, frames, _, height, width = latents.shape
    text_tokens = text.shape[1]
    patch = tensors["mixins.patch_embed.proj.weight"]
    deep = 2 if patch.ndim == 2 else 1
    if patch.ndim == 4:
        video = functional.conv2d(latents.flatten(0, 1), patch, tensors["mixins.patch_embed.proj.bias"], stride=2)
        video = video.flatten(2).transpose(1, 2).reshape(batch, -1, len(patch))
    else:
        cells = latents.unflatten(1, (-1, 2)).unflatten(-2, (-1, 2)).unflatten(-1, (-1, 2))
        # batch, time, 2, channels, rows, 2, columns, 2: a patch is (channels, frames, rows, columns)
        video = linear("mixins.patch_embed.proj", cells.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3))
    x = torch.cat([linear("mixins.patch_embed.text_proj", text), video], dim=1)
    if (positions := tensors.get("mixins.pos_embed.pos_embedding")) is not None:
        x = x + positions[:, : x.shape[1]]
    emb = embedding("time_embed", timesteps, x.shape[-1])
    if ofs is not None:
        emb = emb + embedding("ofs_embed", ofs, len(tensors["ofs_embed.0.weight"]))

    def halves(image: Tensor, words: Tensor) -> Tensor:
        """One value for the text's tokens, another for the video's."""
        return torch.cat([words[:, None].expand(-1, text_tokens, -1), image[:, None].expand_as(video)], dim=1)

    layers = sum(name.endswith("attention.dense.weight") for name in tensors)
    for i in range(layers):
        layer = f"transformer.layers.{i}"
        parts = linear(f"mixins.adaln_layer.adaLN_modulations.{i}.1", functional.silu(emb)).chunk(12, dim=1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = map(halves, parts[:6], parts[6:])
        y = norm(f"{layer}.input_layernorm", x) * (1 + scale) + shift
        q, k, v = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(f"{layer}.attention.query_key_value", y).chunk(3, dim=-1)
        )
        q = turned(norm(f"mixins.adaln_layer.query_layernorm_list.{i}", q, 1e-6), text_tokens)
        k = turned(norm(f"mixins.adaln_layer.key_layernorm_list.{i}", k, 1e-6), text_tokens)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * linear(f"{layer}.attention.dense", attended)
        y = norm(f"{layer}.post_attention_layernorm", x) * (1 + mlp_scale) + mlp_shift
        hidden = functional.gelu(linear(f"{layer}.mlp.dense_h_to_4h", y), approximate="tanh")
        x = x + mlp_gate * linear(f"{layer}.mlp.dense_4h_to_h", hidden)
    x = norm("transformer.final_layernorm", x)[:, text_tokens:]
    shift, scale = linear("mixins.final_layer.adaLN_modulation.1", functional.silu(emb))[:, None].chunk(2, dim=-1)
    x = linear("mixins.final_layer.linear", norm("mixins.final_layer.norm_final", x) * (1 + scale) + shift)
    x = x.reshape(batch, frames // deep, height // 2, width // 2, -1, deep, 2, 2)
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, -1, height, width)
