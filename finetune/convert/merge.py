"""Putting an adapter into the weights it adapts, in float32, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finetune.methods.lora import ADAPTER


@dataclass(frozen=True)
class Merged:
    """What became of an adapter that was merged."""

    strength: float
    """1 as trained, 0 the base itself."""
    rounding: float
    """Root mean square of what rounding to the base's dtype changed, as a share of the update's; 0 in float32, where
    nothing is rounded."""

    def __str__(self) -> str:
        words = f"the adapter is merged into the base at strength {self.strength:g}"
        if self.rounding:
            words += f"; rounding to the base's dtype is {self.rounding:.1%} of its update"
        return words


def set_strength(transformer: nn.Module, strength: float) -> None:
    """Let the adapter count ``strength`` times what it was trained at, as ``pipeline.set_adapters`` does."""
    for _, layer in adapted_layers(transformer):
        layer.set_scale(ADAPTER, strength)


@torch.no_grad()
def merge(transformer: nn.Module, strength: float) -> Merged:
    """Replace every adapted layer by a plain one that computes the same, in place.

    W becomes W + s B A, s being ``strength`` times alpha / rank (alpha / sqrt(rank) with rsLoRA); with DoRA, each row
    of that is stretched to its learned magnitude. The sum is formed in float32 and rounded to the base's dtype once,
    so that an element is off by at most half a unit in its last place: 2^-8 of itself in bfloat16, 2^-11 in float16.

    Args:
        transformer: with one adapter, as ``LoraMethod.apply`` inserts it.
        strength: as ``set_strength`` takes it. 0 gives the base's own weights, bit for bit, with DoRA too.
    """
    lost, update = 0.0, 0.0
    for _, layer in adapted_layers(transformer) if strength != 0 else ():
        layer.set_scale(ADAPTER, strength)
        weight: Tensor = layer.base_layer.weight
        exact = _merged_weight(layer)
        rounded = exact.to(weight.dtype)
        lost += (rounded.float() - exact).square().sum().item()
        update += (exact - weight.float()).square().sum().item()
        weight.copy_(rounded)
    unloading: Any = transformer
    unloading.unload_lora()
    return Merged(strength, math.sqrt(lost / update) if update else 0.0)


def _merged_weight(layer: Any) -> Tensor:
    """What an adapted linear layer multiplies by, float32 [out, in]."""
    down, up = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    weight: Tensor = layer.base_layer.weight.float() + layer.scaling[ADAPTER] * (up @ down)
    if layer.use_dora[ADAPTER]:
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float()
        weight *= (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def adapted_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every layer with an adapter."""
    for name, module in transformer.named_modules():
        if ADAPTER in getattr(module, "scaling", {}):
            yield name, module
