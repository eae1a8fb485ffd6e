"""What ComfyUI and kijai's wrapper do with a LoRA's file, written down from their rules; neither is on PyPI.

ComfyUI: ``comfy/lora.py`` (``model_lora_keys_unet``, ``load_lora``), ``comfy/weight_adapter/lora.py``, and the modules
of ``comfy/ldm/cogvideo/model.py``. The wrapper: ``model_loading.py`` and ``lora_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

COMFYUI_BLOCK = {
    "q": "attn1.to_q",
    "k": "attn1.to_k",
    "v": "attn1.to_v",
    "attn_out": "attn1.to_out.0",
    "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2",
    "norm1.linear": "norm1.linear",
    "norm2.linear": "norm2.linear",
}
COMFYUI_REST = {
    "patch_embed.proj": "patch_embed.proj",
    "patch_embed.text_proj": "patch_embed.text_proj",
    "time_embedding_linear_1": "time_embedding.linear_1",
    "time_embedding_linear_2": "time_embedding.linear_2",
    "ofs_embedding_linear_1": "ofs_embedding.linear_1",
    "ofs_embedding_linear_2": "ofs_embedding.linear_2",
    "norm_out.linear": "norm_out.linear",
    "proj_out": "proj_out",
}

HALVES = (("lora_up", "lora_down"), ("lora_B", "lora_A"))


def comfyui_updates(transformer: nn.Module, lora: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The weights that ComfyUI computes with, by diffusers' names, and the keys of ``lora`` that it does not read."""
    blocks = len(transformer.transformer_blocks)
    modules = {
        f"blocks.{i}.{a}": f"transformer_blocks.{i}.{b}" for i in range(blocks) for a, b in COMFYUI_BLOCK.items()
    }
    modules |= COMFYUI_REST
    stems = {f"diffusion_model.{theirs}": ours for theirs, ours in modules.items()}
    stems |= {f"lora_unet_{theirs.replace('.', '_')}": ours for theirs, ours in modules.items()}
    weights, unread = {}, set(lora)
    for stem, module in stems.items():
        halves = [
            (f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"),
            (f"{stem}.lora_B.weight", f"{stem}.lora_A.weight"),
        ]
        for up, down in halves:
            if up not in lora:
                continue
            unread -= {up, down, f"{stem}.alpha", f"{stem}.dora_scale"}
            alpha = lora[f"{stem}.alpha"].item() / lora[down].shape[0] if f"{stem}.alpha" in lora else 1.0
            weight = transformer.get_submodule(module).weight
            update = (lora[up].flatten(1) @ lora[down].flatten(1)).reshape(weight.shape)
            merged = weight + alpha * update
            if (magnitude := lora.get(f"{stem}.dora_scale")) is not None:
                assert magnitude.shape == (len(weight), 1)  # of another shape it would scale inputs, not outputs
                merged = merged * (magnitude / weight.flatten(1).norm(dim=1, keepdim=True))  # a DoRA: merged's norms
            weights[module] = merged
    return weights, unread


def kijai_updates(transformer: nn.Module, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights after the wrapper merged a file without ``lora_B``, by diffusers' names; KeyError where it fails."""
    assert not any("lora_B" in key for key in lora), "that is left to diffusers"
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.items():
        layer, _, part = key.partition(".")
        layers.setdefault(layer, {})[part] = tensor
    weights = {}
    for layer, parts in layers.items():
        module, path, words = transformer, [], layer.split("lora_unet_")[-1].split("_")
        while words:  # it walks down as soon as the first words are the name of a module inside
            children = dict(module.named_children())
            name = next(
                ("_".join(words[:n]) for n in range(1, len(words) + 1) if "_".join(words[:n]) in children), None
            )
            if name is None and words[0]:
                raise KeyError(layer)
            module = children[name] if name else module
            path, words = [*path, *([name] if name else [])], words[name.count("_") + 1 if name else 1 :]
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        alpha = parts["alpha"].item() / up.shape[1] if "alpha" in parts else 1.0
        weights[".".join(path)] = module.weight + alpha * torch.mm(up, down)
    return weights
