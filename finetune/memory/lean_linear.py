"""Linear layers in a lean block: what nobody reads is not formed, what is quantised is decoded once, and LoRA's
products on layers that share an input are few and large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from finetune.memory.narrowed_lora import Update, narrowed_update
from finetune.memory.quantized_linear import QuantisedLinear

# A linear layer's gradient needs its input and its weight, not its output. Where a block is run again only for its
# gradients and nothing behind a layer looks at what it computed, the product need not be formed a second time.


@contextmanager
def unread(*layers: nn.Module) -> Iterator[None]:
    """While it lasts, ``layers`` give zeros of the right shape instead of their output; their gradients are right.

    Inside a LoRA layer this holds for the base layer, and the update is computed as usual. A layer whose gradient does
    depend on the base's output (DoRA's magnitudes), or that is of a kind not known here, is computed as ever.

    Args:
        layers: ``nn.Linear`` and ``QuantisedLinear``, or peft's LoRA layers around them.
    """
    bases = [base for layer in layers if (base := _base_without_reader(layer)) is not None]
    with _replaced("forward", {base: partial(_unread_forward, base) for base in bases}):
        yield


@contextmanager
def decoded_once(*layers: nn.Module) -> Iterator[None]:
    """While it lasts, the quantised ones of ``layers`` keep their weight in the layer's dtype: one decoding for all
    chunks, which would otherwise cost about as much as the products.

    Args:
        layers: linear layers of any kind, or peft's LoRA layers around them.
    """
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    quantised = [base for base in bases if isinstance(base, QuantisedLinear)]
    with _replaced("dequantised", {base: partial(_as_dtype, base.dequantised()) for base in quantised}):
        yield


@contextmanager
def _replaced(method: str, replacements: dict[Any, Callable[..., Tensor]]) -> Iterator[None]:
    """Instances' own methods in place of their classes'."""
    for instance, replacement in replacements.items():
        setattr(instance, method, replacement)
    try:
        yield
    finally:
        for instance in replacements:
            delattr(instance, method)


def _as_dtype(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return weight if dtype is None else weight.to(dtype)


def _base_without_reader(layer: nn.Module) -> nn.Linear | None:
    """The linear layer of which no output is needed; None if it has to be computed."""
    base: Any = getattr(layer, "base_layer", layer)
    if base is not layer and getattr(layer, "lora_variant", None):
        return None  # anything but `base + update`: DoRA rescales the sum, and its magnitudes' gradient is the sum's
    # A subclass may hold its weight in another shape, and an instance's own `forward` may do more than a product.
    known = type(base) is nn.Linear or isinstance(base, QuantisedLinear)
    return base if known and "forward" not in vars(base) else None


def needs_features(layer: nn.Module) -> bool:
    """Whether a layer has to be given its real input for its gradients, even while it is ``unread``."""
    return _base_without_reader(layer) is None or any(parameter.requires_grad for parameter in layer.parameters())


def _unread_forward(layer: nn.Linear, features: Tensor) -> Tensor:
    weight = None if isinstance(layer, QuantisedLinear) else layer.weight
    result: Tensor = _Unread.apply(features, weight, layer.bias, layer)  # type: ignore[no-untyped-call]
    return result


class _Unread(torch.autograd.Function):
    """``features @ weight.T + bias``, of which only the gradients are formed. A quantised weight is frozen: None."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, layer: nn.Linear) -> Tensor:
        ctx.save_for_backward(features if weight is not None and weight.requires_grad else None, weight)
        ctx.layer = layer
        return _zeros(features, layer)

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


# ---------------------------------------------------------------------------------------- LoRA's products, all in one


class SharedInput:
    """Linear layers of one input, for one pass through a block.

    Where they carry a LoRA that is computed in the model's dtype (``LoraMethod.compute``), they are one autograd
    function: one product of the input with the A of all layers, updates added to what the bases give by the products
    with B themselves (``addmm``), the input's gradient summed likewise, alpha / rank in the copy of A. Copies in the
    model's dtype are made once for the pass. Layers of any other kind run one by one, as they are.

    Args:
        layers: ``nn.Linear`` and ``QuantisedLinear``, or peft's LoRA layers around them.
        dtype: of the input.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.layers = list(layers)
        self._parts = _parts(self.layers, dtype)
        if self._parts is None:
            return
        updates = [part.update for part in self._parts if part.update is not None]
        with torch.enable_grad():
            self._down = _copied(dtype, updates[0].scale, *(update.down for update in updates))
            self._ups = [part.update and _copied(dtype, 1.0, part.update.up) for part in self._parts]

    @property
    def together(self) -> bool:
        """Whether they are one autograd function."""
        return self._parts is not None

    def __call__(self, features: Tensor, skip: Collection[nn.Module] = ()) -> list[Tensor]:
        """Outputs [..., out] of the layers on ``features`` [..., in]; nobody reads those of ``skip`` (``unread``)."""
        if self._parts is None:
            with unread(*skip):
                return [layer(features) for layer in self.layers]
        read = [layer not in skip for layer in self.layers]
        outputs: tuple[Tensor, ...] = _Together.apply(  # type: ignore[no-untyped-call]
            features, self._parts, read, self._down, *self._ups
        )
        return list(outputs)


def shared_inputs(layers: Sequence[nn.Module], dtype: torch.dtype) -> list[SharedInput]:
    """All ``layers`` together, where that is one autograd function; else one by one, so that each is differentiated
    before the next is computed.
    """
    shared = SharedInput(layers, dtype)
    return [shared] if shared.together else [SharedInput([layer], dtype) for layer in layers]


@contextmanager
def computed_by(*inputs: SharedInput) -> Iterator[None]:
    """While it lasts, a module that calls the one layer of any of these has it computed so; ``unread`` holds inside."""
    with _replaced("forward", {each.layers[0]: partial(_alone, each) for each in inputs if each.together}):
        yield


def _alone(shared: SharedInput, features: Tensor) -> Tensor:
    (layer,) = shared.layers
    # Its base had no forward of its own when `shared` was made, so this is the one that `unread` gives it.
    is_read = "forward" not in vars(getattr(layer, "base_layer", layer))
    return shared(features, () if is_read else (layer,))[0]


class _Part(NamedTuple):
    """One of several layers that share an input."""

    base: Any
    """``nn.Linear`` or ``QuantisedLinear``, frozen."""
    update: Update | None
    columns: slice
    """Of the product with the A of all layers: its own."""


def _parts(layers: Sequence[nn.Module], dtype: torch.dtype) -> list[_Part] | None:
    """What the layers consist of; None where they cannot be computed together, or carry no narrowed LoRA."""
    parts: list[_Part] = []
    start = 0
    for layer in layers:
        base, update = _base_without_reader(layer), None
        if base is None or any(parameter.requires_grad for parameter in base.parameters()):
            return None
        if base is not layer and (update := narrowed_update(layer, dtype)) is None:
            return None
        rank = len(update.down) if update else 0
        parts.append(_Part(base, update, slice(start, start := start + rank)))
    scales = [part.update.scale for part in parts if part.update]
    # Layers of several ranks count the same, but for the last digit of alpha / rank.
    return parts if scales and all(math.isclose(scale, scales[0]) for scale in scales) else None


def _copied(dtype: torch.dtype, scale: float, *weights: Tensor) -> Tensor:
    copy: Tensor = _Copied.apply(dtype, scale, *weights)  # type: ignore[no-untyped-call]
    return copy


class _Copied(torch.autograd.Function):
    """Weights below each other, times a scale, in a narrower dtype. Their gradient is widened first.

    Nothing is saved for it, so that the graphs of any number of chunks may end here, one after the other.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, scale: float, *weights: Tensor) -> Tensor:
        ctx.dtype, ctx.scale, ctx.rows = weights[0].dtype, scale, [len(weight) for weight in weights]
        whole = torch.cat(weights) if len(weights) > 1 else weights[0]
        return (whole if scale == 1 else whole * scale).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide = grad.to(ctx.dtype)
        if ctx.scale != 1:
            wide *= ctx.scale
        return (None, None, *torch.split(wide, ctx.rows))


class _Together(torch.autograd.Function):
    """Frozen linear layers and their narrowed updates on one input; gradients of that input, of A and of every B."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, parts: Sequence[_Part], read: Sequence[bool], down: Tensor, *ups: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows, shape = features.flatten(0, -2), features.shape[:-1]
        reduced = rows @ down.T  # [n, ranks of all]
        outputs = []
        for part, is_read, up in zip(parts, read, ups, strict=True):
            if not is_read:
                outputs.append(_zeros(features, part.base))
                continue
            output = functional.linear(rows, _weight(part.base, rows.dtype), part.base.bias)
            if up is not None:
                output.addmm_(reduced[:, part.columns], up.T)
            outputs.append(output.view(*shape, -1))
        ctx.parts = parts
        ctx.save_for_backward(features, reduced, down, *ups)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        features, reduced, down, *ups = ctx.saved_tensors
        of_reduced, of_features, of_ups = torch.empty_like(reduced), None, []
        for part, up, grad in zip(ctx.parts, ups, grads, strict=True):
            rows = grad.flatten(0, -2)
            if up is not None:
                torch.mm(rows, up, out=of_reduced[:, part.columns])
            of_ups.append(None if up is None else rows.T @ reduced[:, part.columns])
            if ctx.needs_input_grad[0]:
                weight = _weight(part.base, rows.dtype)
                of_features = rows @ weight if of_features is None else of_features.addmm_(rows, weight)
        if of_features is not None:
            of_features = of_features.addmm_(of_reduced, down).view_as(features)
        return of_features, None, None, of_reduced.T @ features.flatten(0, -2), *of_ups


def _weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """As it is now: a streamed block has its weights elsewhere in the backward pass."""
    return layer.dequantised(dtype) if isinstance(layer, QuantisedLinear) else layer.weight


def _zeros(features: Tensor, layer: nn.Linear) -> Tensor:
    """In place of a layer's output; one element's memory."""
    return features.new_zeros(()).expand(*features.shape[:-1], layer.out_features)
