"""Linear layers worked through in chunks: products that nobody reads, and weights that are made whole once.

A linear layer's gradient needs its input and its weight, not its output. Where a block is run again only for its
gradients and nothing behind a layer looks at what it computed, the product need not be formed a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finetune.memory.quantized_linear import QuantisedLinear


@contextmanager
def unread(*layers: nn.Module) -> Iterator[None]:
    """While it lasts, ``layers`` give zeros of the right shape instead of their output; their gradients are right.

    Inside a LoRA layer this holds for the base layer, and the update is computed as usual. A layer whose gradient does
    depend on the base's output (DoRA's magnitudes), or that is of a kind not known here, is computed as ever.

    Args:
        layers: ``nn.Linear`` and ``QuantisedLinear``, or peft's LoRA layers around them.
    """
    bases = [base for layer in layers if (base := _base(layer)) is not None]
    for base in bases:
        # mypy sees a method here; torch looks `forward` up on the instance.
        base.forward = partial(_forward, base)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for base in bases:
            del base.forward  # the instance's: the class's is there again


@contextmanager
def whole(*layers: nn.Module) -> Iterator[None]:
    """While it lasts, the quantised ones of ``layers`` keep their weight in the layer's dtype: one decoding for all
    chunks, which would otherwise cost about as much as the products.

    Args:
        layers: linear layers of any kind, or peft's LoRA layers around them.
    """
    quantised = [base for layer in layers if isinstance(base := getattr(layer, "base_layer", layer), QuantisedLinear)]
    for base in quantised:
        weight = base.dequantised()
        base.dequantised = partial(_held, weight)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for base in quantised:
            del base.dequantised  # the instance's: the class's is there again


def _held(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return weight if dtype is None else weight.to(dtype)


def _base(layer: nn.Module) -> nn.Linear | None:
    """The linear layer of which no output is needed; None if it has to be computed."""
    inner: Any = getattr(layer, "base_layer", layer)
    if inner is not layer and getattr(layer, "lora_variant", None):
        return None  # anything but `base + update`: DoRA rescales the sum, and its magnitudes' gradient is the sum's
    # A subclass may hold its weight in another shape, and an instance's own `forward` may do more than a product.
    known = type(inner) is nn.Linear or isinstance(inner, QuantisedLinear)
    return inner if known and "forward" not in vars(inner) else None


def _forward(layer: nn.Linear, features: Tensor) -> Tensor:
    weight = None if isinstance(layer, QuantisedLinear) else layer.weight
    result: Tensor = _Unread.apply(features, weight, layer.bias, layer)  # type: ignore[no-untyped-call]
    return result


class _Unread(torch.autograd.Function):
    """``features @ weight.T + bias``, of which only the gradients are formed. A quantised weight is frozen: None."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        ctx.save_for_backward(features if weight is not None and weight.requires_grad else None, weight)
        ctx.layer = layer
        return features.new_zeros(()).expand(*features.shape[:-1], layer.out_features)  # one element's memory

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        of_features, of_weight, of_bias, _ = ctx.needs_input_grad
        features, weight = ctx.saved_tensors
        if of_features and weight is None:
            weight = ctx.layer.dequantised(grad.dtype)
        rows = grad.flatten(0, -2)
        return (
            (rows @ weight).view(*grad.shape[:-1], -1) if of_features else None,
            rows.T @ features.flatten(0, -2) if of_weight else None,
            rows.sum(0) if of_bias else None,
            None,
        )
