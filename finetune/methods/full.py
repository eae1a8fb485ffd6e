"""Full fine-tuning: every weight of the transformer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from finetune.core.types import Strict
from finetune.methods.adapter import count_lines, load_strictly


class FullMethod(Strict):
    """Train every weight of the transformer, in the model's dtype; ``optimizer.weights`` says what is kept beside."""

    kind: Literal["full"] = "full"

    def apply(self, transformer: nn.Module, *, seed: int) -> None:
        """Make every parameter trainable, in place. Nothing is drawn; every method takes a ``seed``."""
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


class SummedLayerNorm(nn.LayerNorm):
    """A layer norm whose weight and bias gradients are summed over tokens in float32, on a CPU too.

    In bfloat16 and float16 torch's CPU kernel sums them in the narrow dtype, where a sum stops growing once a summand
    is less than its last digit: of 4000 tokens, up to 88 % of a gradient is lost. Its CUDA kernel sums in float32.
    Output and input gradient are torch's own, bit for bit, and so is all else in float32 and on a GPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        """As of ``nn.LayerNorm``."""
        narrow = input.dtype in (torch.bfloat16, torch.float16)
        # Fake tensors on a CPU stand for a GPU's (``planning``).
        if not narrow or input.device.type != "cpu" or isinstance(input, FakeTensor) or not torch.is_grad_enabled():
            return super().forward(input)
        output: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.normalized_shape, self.eps
        )
        return output


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...], eps: float
    ) -> Tensor:
        output, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
        ctx.save_for_backward(input, weight, bias, mean, rstd)
        ctx.shape, ctx.eps = shape, eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        input, weight, bias, mean, rstd = ctx.saved_tensors
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        gradient = torch.ops.aten.native_layer_norm_backward
        found = gradient(grad, input, ctx.shape, mean, rstd, weight, bias, [of_input, False, False])[0]
        wide = input.float()
        _, mean, rstd = torch.native_layer_norm(wide, ctx.shape, None, None, ctx.eps)
        affine = [None if tensor is None else tensor.float() for tensor in (weight, bias)]
        sums = gradient(grad.float(), wide, ctx.shape, mean, rstd, *affine, [False, of_weight, of_bias])[1:]
        return (found, *(None if total is None else total.to(grad.dtype) for total in sums), None, None)
