"""Full fine-tuning: every weight of the transformer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from finetune.core.types import Strict
from finetune.methods.adapter import count_lines, load_strictly

if TYPE_CHECKING:
    from torch import Tensor, nn


class FullMethod(Strict):
    """Train every weight of the transformer, in the model's dtype; ``optimizer.weights`` says what is kept beside."""

    kind: Literal["full"] = "full"

    @property
    def summary(self) -> str:
        """For titles."""
        return "full fine-tuning"

    def apply(self, transformer: nn.Module, *, seed: int) -> None:
        """Make every parameter trainable, in place. Nothing is drawn; every method takes a ``seed``."""
        from torch import nn

        from finetune.methods.layer_norm import SummedLayerNorm

        transformer.requires_grad_(True)
        for module in transformer.modules():
            if type(module) is nn.LayerNorm:
                module.__class__ = SummedLayerNorm

    def trainable(self, transformer: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters by their diffusers names, in the model's order."""
        return dict(transformer.named_parameters())

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """The trainable tensors (not copies), named as in ``trainable``."""
        return {name: parameter.detach() for name, parameter in self.trainable(transformer).items()}

    def load_state(self, transformer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the model; see ``load_strictly``."""
        load_strictly(self.trainable(transformer), tensors)

    def describe(self, transformer: nn.Module) -> list[tuple[str, str]]:
        """What trains, as lines of (label, value)."""
        return [("method", "full fine-tuning"), *count_lines(transformer)]
