"""LoRA's products in the dtype of the model, over weights that stay float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class NarrowedLinear(nn.Linear):
    """``nn.Linear`` that multiplies by a copy of its weight in the dtype of its input.

    The weight's gradient is formed in that dtype and widened before anything is added to it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``input`` [..., in] to [..., out], in its own dtype."""
        return functional.linear(input, self.weight.to(input.dtype))


def narrow(layer: Any, adapter: str) -> None:
    """Have a layer that peft has adapted compute its update in the dtype of its input, in place.

    Its forward pass stays peft's own, which casts the input up to the dtype of A unless it is told not to.

    Args:
        layer: peft's.
        adapter: its name in the layer; the only one.
    """
    layer.cast_input_dtype_enabled = False
    for half in (layer.lora_A, layer.lora_B):
        wide = half[adapter]
        narrowed = NarrowedLinear(wide.in_features, wide.out_features, bias=False, device="meta")
        narrowed.weight = wide.weight
        half[adapter] = narrowed


class Update(NamedTuple):
    """``scale x up x down``, which is added to a linear layer's weight."""

    down: Tensor
    """A, [rank, in]."""
    up: Tensor
    """B, [out, rank]."""
    scale: float


def narrowed_update(layer: Any, dtype: torch.dtype) -> Update | None:
    """What an adapted layer adds to its base's output, where that is two products in a ``dtype`` narrower than its
    weights and nothing else; else None, and its own forward pass has to be called.

    Nothing else: no dropout, no variant such as DoRA, no second adapter, none that is merged or switched off.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1 or layer.lora_variant:
        return None
    (adapter,) = layer.active_adapters
    if adapter not in layer.lora_A:
        return None
    down, up, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if not (isinstance(down, NarrowedLinear) and isinstance(up, NarrowedLinear)) or down.weight.dtype == dtype:
        return None
    if isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training:
        return None
    return Update(down.weight, up.weight, layer.scaling[adapter])
