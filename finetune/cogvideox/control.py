"""A transformer that takes a control video beside the latents: the patch embedding, widened, and what trains of it.

The layout is that of diffusers' ``CogVideoXFunControlPipeline``: the control's latents are concatenated on channels,
behind those that are denoised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

UPDATES = {"weight": "weight_update", "bias": "bias_update"}
"""Of the widened projection: its parameters, and what is added to each while it trains beside a LoRA."""

PROJECTION = "patch_embed.proj"
"""Its name in the transformer."""


class _Widened(nn.Module):
    """A projection whose inputs are twice those of the text-to-video model that it was made of.

    The halves are projected one by one and added: a product of twice the length may be summed in another order, and as
    long as the new half is zero the sum is so what the model computed before, bit for bit.

    Beside a LoRA the weights stay as they are, in the model's dtype, and what trains is added to them in float32: the
    first parameter of a transformer tells everybody its dtype.
    """

    strength: float = 1.0
    """What the update counts."""
    divided: bool = True
    """Whether the halves are projected one by one; else as diffusers does it."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.divided:
            projected: Tensor = super().forward(input)
            return projected
        weight, bias = (None if tensor is None else tensor.to(input.dtype) for tensor in self.effective())
        assert weight is not None
        half = weight.shape[1] // 2
        dim = 1 if weight.ndim == 4 else -1
        noisy, control = (part.contiguous() for part in torch.split(input, half, dim=dim))
        return self._project(noisy, weight[:, :half], bias) + self._project(control, weight[:, half:], None)

    def effective(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they act: float32 where there are updates."""
        own: Any = self
        if not hasattr(self, UPDATES["weight"]):
            return own.weight, own.bias
        bias = None if own.bias is None else own.bias.float() + self.strength * own.bias_update
        return own.weight.float() + self.strength * own.weight_update, bias

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


class WidenedConv(_Widened, nn.Conv2d):
    """Of the first generation: patches of one frame, [B, 2 C, H, W]."""

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(input, weight, bias, stride=self.stride)


class WidenedLinear(_Widened, nn.Linear):
    """Of the second: flattened patches, whose features begin with the channel."""

    def _project(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(input, weight, bias)


def widen(transformer: Any) -> None:
    """Make a text-to-video transformer take a control video, in place: its new channels are zero, and change nothing.

    One that has the channels already, as those of ``CogVideoXFunControlPipeline``, is left as it is.

    Args:
        transformer: a ``CogVideoXTransformer3DModel``.
    """
    channels = transformer.config.out_channels
    if transformer.config.in_channels != channels:
        return
    projection = transformer.patch_embed.proj
    weight = torch.cat([projection.weight.detach(), torch.zeros_like(projection.weight)], dim=1)
    projection.weight = nn.Parameter(weight, requires_grad=projection.weight.requires_grad)
    if isinstance(projection, nn.Conv2d):
        projection.__class__, projection.in_channels = WidenedConv, 2 * projection.in_channels
    else:
        projection.__class__, projection.in_features = WidenedLinear, 2 * projection.in_features
    transformer.register_to_config(in_channels=2 * channels)


def widened(transformer: Any) -> WidenedConv | WidenedLinear | None:
    """The projection that ``widen`` made; None where it made none."""
    projection = transformer.patch_embed.proj
    return projection if isinstance(projection, WidenedConv | WidenedLinear) else None


@contextmanager
def projection_strength(transformer: Any, strength: float) -> Iterator[None]:
    """Inside, a widened projection's updates count ``strength`` times; at 0 it is the base's, bit for bit."""
    projection = widened(transformer)
    if projection is None:
        yield
        return
    before, projection.strength = projection.strength, strength
    try:
        yield
    finally:
        projection.strength = before


def train_projection(transformer: Any) -> None:
    """Give a widened projection what trains beside a LoRA: updates of its weight and bias, float32, zero."""
    projection = widened(transformer)
    if projection is None:
        return
    for name, update in UPDATES.items():
        tensor = getattr(projection, name)
        if tensor is not None:
            projection.register_parameter(update, nn.Parameter(torch.zeros_like(tensor, dtype=torch.float32)))


def merge_projection(transformer: Any, strength: float) -> None:
    """Add a widened projection's updates to its weights, which are rounded once, and drop them, in place."""
    projection = widened(transformer)
    if projection is None or not hasattr(projection, UPDATES["weight"]):
        return
    projection.strength = strength
    effective = dict(zip(UPDATES, projection.effective(), strict=True))
    for name, update in UPDATES.items():
        if (tensor := effective[name]) is not None:
            getattr(projection, name).data.copy_(tensor.detach())
            delattr(projection, update)


def projection_state(transformer: Any) -> dict[str, Tensor]:
    """Weight and bias of a widened projection as they act, float32, by their names in the transformer; empty if none
    trains beside a LoRA.
    """
    projection = widened(transformer)
    if projection is None or not hasattr(projection, UPDATES["weight"]):
        return {}
    effective = zip(UPDATES, projection.effective(), strict=True)
    return {f"{PROJECTION}.{name}": tensor.detach().clone() for name, tensor in effective if tensor is not None}


def updates_of(transformer: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What weights that ``projection_state`` gave, or the updates themselves, add to a widened transformer's.

    Args:
        transformer: without updates of its own in effect.
        tensors: of an export (``CONTROL_FILE``) or of a checkpoint.

    Returns:
        float32, by ``weight`` and ``bias``.

    Raises:
        ValueError: if the transformer is not widened, or names or shapes are not its own.
    """
    projection: Any = widened(transformer)
    if projection is None:
        raise ValueError(f"{PROJECTION} is not widened in this model")
    updates = {}
    for name, update in UPDATES.items():
        own = getattr(projection, name)
        if f"{PROJECTION}.{update}" in tensors:
            updates[name] = tensors[f"{PROJECTION}.{update}"].float()
        elif own is not None and f"{PROJECTION}.{name}" in tensors:
            updates[name] = tensors[f"{PROJECTION}.{name}"].float() - own.detach().float().cpu()
        if own is not None and (name not in updates or updates[name].shape != own.shape):
            raise ValueError(f"{PROJECTION}.{name} is not there, or of another shape")
    if len(updates) != len(tensors):
        raise ValueError(f"{PROJECTION} is not this model's")
    return updates


def load_updates(transformer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Let a widened transformer's updates be those of ``updates_of``. Raises as that does."""
    projection: Any = widened(transformer)
    for name, tensor in updates_of(transformer, tensors).items():
        getattr(projection, UPDATES[name]).data.copy_(tensor)


class Projections:
    """A widened transformer's projection while videos are sampled: the base's own, and what adapters add to it.

    Args:
        transformer: widened, or any other, of which nothing is then asked.
    """

    def __init__(self, transformer: Any) -> None:
        self._projection: Any = widened(transformer)
        self._transformer = transformer
        if self._projection is not None:  # videos are those of the stock pipeline, to the bit
            self._projection.divided = False
        self._base = (
            {}
            if self._projection is None
            else {
                name: tensor.detach().clone()
                for name in UPDATES
                if (tensor := getattr(self._projection, name)) is not None
            }
        )

    def use(self, adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> None:
        """Let these act, each with its strength, and no others; rounded once to the model's dtype.

        Raises:
            ValueError: as ``updates_of``.
        """
        for name, own in self._base.items():
            getattr(self._projection, name).data.copy_(own)
        if not adapters:
            return
        changes = [(updates_of(self._transformer, tensors), strength) for tensors, strength in adapters]
        for name, own in self._base.items():
            total = own.float()
            for updates, strength in changes:
                total = total + strength * updates[name].to(own.device)
            getattr(self._projection, name).data.copy_(total)
