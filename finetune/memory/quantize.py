"""Which layers are held in few bits, and how they come to be so while a checkpoint is loaded.

The base of an adapter only has to compute; nobody updates it. In the blocks, the attention and feed-forward layers are
quantised. Embeddings, norms, the modulation (adaLN) and the output head stay as they are: what they compute scales or
shifts whole rows, so their rounding would not average out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune.errors import ModelError
from finetune.memory.quantized_linear import Kind, QuantisedLinear

Base = Literal["native", "fp8", "fp8_64", "int8", "nf4"]
"""How a frozen base's weights are held: ``native``, in the model's dtype, or in a format of ``quantized_linear``."""
TextEncoder = Literal["device", "streamed", "int8"]
"""Where T5 is while it encodes: whole on the device in the model's dtype, there block by block, or there in int8."""

_TRANSFORMER = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


@dataclass(frozen=True)
class QuantisedPlacement:
    """Has the linear layers of a model quantised as their weights are read; a ``cogvideox.Placement``."""

    kind: Kind
    pattern: str
    """Of whole module names."""

    def prepare(self, module: nn.Module) -> None:
        """Put empty quantised layers in the places of those that ``pattern`` names; ``module`` is on the meta device.

        Raises:
            ModelError: if it names none, or a layer cannot be held in this format.
        """
        chosen = [
            (name, layer)
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and re.fullmatch(self.pattern, name)
        ]
        if not chosen:
            raise ModelError(f"a {type(module).__name__} has no layer to quantise", fix="hold its weights natively")
        for name, layer in chosen:
            try:
                module.set_submodule(name, QuantisedLinear.like(layer, self.kind))
            except ModelError as error:
                raise ModelError(error.what, where=f"{name}, as {self.kind}", fix=error.fix) from None

    def put(self, module: nn.Module, name: str, tensor: Tensor, device: torch.device) -> bool:
        """Quantise the weight ``name`` into its layer on ``device``; False if it belongs to no quantised layer."""
        owner, _, leaf = name.rpartition(".")
        layer = module.get_submodule(owner)
        if not isinstance(layer, QuantisedLinear) or leaf != "weight":
            return False
        layer.quantise(tensor, device)
        return True


def placement(base: Base) -> QuantisedPlacement | None:
    """How ``load_transformer`` places a transformer's weights for ``base``; None for as they are."""
    return None if base == "native" else QuantisedPlacement(base, _TRANSFORMER)


def is_quantised(module: nn.Module) -> bool:
    """Whether any layer of ``module`` is held in few bits."""
    return any(isinstance(layer, QuantisedLinear) for layer in module.modules())


@dataclass(frozen=True)
class OutputError:
    """How far an output is from the one it stands for."""

    relative_l2: float
    """Norm of the difference over the norm of the reference."""
    cosine: float
    """Of the angle between the two, each taken as one vector."""


def output_error(output: Tensor, reference: Tensor) -> OutputError:
    """Compare two outputs of one shape; computed in float32 on their device.

    Raises:
        ValueError: if they differ in shape, or the reference is zero.
    """
    ours, theirs = output.detach().float().flatten(), reference.detach().float().flatten()
    if output.shape != reference.shape or not theirs.any():
        raise ValueError(f"{tuple(output.shape)} cannot be compared with {tuple(reference.shape)}, or that is zero")
    distance = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)
    return OutputError(distance.item(), functional.cosine_similarity(ours, theirs, dim=0).item())
