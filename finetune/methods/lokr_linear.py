"""The forward pass of a linear layer with a LoKr, as it trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.lokr.layer import Linear
from torch import Tensor, nn
from torch.nn import functional


class LokrLinear(Linear):  # type: ignore[misc]
    """Peft's layer with one adapter, which is formed in float32 and multiplied by in the dtype of the input.

    Peft's own forward pass multiplies in the adapter's dtype, float32, which is slower by far on a GPU; and it draws a
    random number for every call, by which it leaves the adapter out where that number is 0.
    """

    adapter: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x`` [..., in] to [..., out], in its own dtype."""
        result: Tensor = self.base_layer(x)
        if self.disable_adapters:
            return result
        update: Tensor = self.get_delta_weight(self.adapter)
        # While the first factor is small, what it is a factor of gets gradients below fp16's last digit, 6e-8.
        if x.dtype == torch.float16:
            return (result + functional.linear(x.float(), update)).to(x.dtype)
        return result + functional.linear(x, update.to(x.dtype))


def initialise(layer: Any, adapter: str, generator: torch.Generator) -> None:
    """Have peft's layer train as ``LokrLinear``: float32, the first factor zero, the second as peft draws it.

    Args:
        layer: peft's, with the adapter in it.
        adapter: its name in the layer; the only one.
        generator: of all that is drawn, on the CPU.
    """
    for part in layer.adapter_layer_names:
        if adapter not in (factor := getattr(layer, part)):
            continue
        factor.float()  # peft creates the tensors in the base's dtype
        parameter = factor[adapter]
        drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            parameter.copy_(torch.zeros_like(drawn) if part in ("lokr_w1", "lokr_w1_a") else drawn)
    layer.__class__ = LokrLinear
    layer.adapter = adapter
