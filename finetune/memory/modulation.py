"""What adaLN does to a block's token streams, as few operations: the norm with its shift and scale, and the gates.

With ``x`` a stream, ``y`` what a part of the block made of it and ``gate``, ``shift``, ``scale`` one row per clip:

- ``modulate``: ``norm(x) * (1 + scale) + shift``, of ``x`` or of ``x + gate * y``;
- ``modulate_gradient``: its gradient. Mean and deviation are computed again from what is read anyway, so nothing but
  ``x`` and ``y`` has to wait for it;
- ``add_gated``: ``x += gate * y``;
- ``gate_gradient``: the gradient of ``y`` in it.

Sums over tokens, of which the gradients of rows and of the norm's own parameters are made, are formed only where asked
for. Each is one operation, ``finetune::modulate`` and so on, which writes into tensors that are given to it. What it
computes is said in plain torch; on CUDA a Triton kernel computes it. None records a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from finetune.memory.kernel_choice import kernels_for

_PIECE = 2048
"""Tokens per clip that plain torch works on at once: its temporary copies stay small beside a stream."""


class Modulation(NamedTuple):
    """A norm and what adaLN does behind it."""

    norm: nn.LayerNorm
    """Over the last axis, with weight and bias."""
    shift: Tensor
    """[B, 1, D], as ``scale``; both views of one tensor."""
    scale: Tensor

    def rows(self) -> list[Tensor]:
        """What multiplies and is added."""
        return [self.norm.weight, self.norm.bias, self.shift, self.scale]


class Gated(NamedTuple):
    """What is added to a stream."""

    features: Tensor
    """[B, n, D]."""
    gate: Tensor
    """[B, 1, D]."""


def modulate(
    tokens: Tensor, gated: Gated | None, modulation: Modulation, out: Tensor, out_sum: Tensor | None = None
) -> None:
    """``norm(x) * (1 + scale) + shift``, where ``x = tokens + gate * features``.

    Args:
        tokens: [B, n, D].
        gated: what is added to them; None for nothing.
        modulation: norm, shift and scale.
        out: [B, n, D], written to.
        out_sum: ``x``, written to, where it is wanted.
    """
    _modulate(tokens, list(gated or ()), modulation.rows(), modulation.norm.eps, out, out_sum)


def modulate_gradient(
    of_out: Tensor, tokens: Tensor, gated: Gated | None, modulation: Modulation, grad: Tensor, sums: Tensor | None
) -> None:
    """Through ``modulate``: add to the gradient of ``x``; with ``gated``, go on to that of the features.

    Args:
        of_out: gradient of ``modulate``'s result, [B, n, D].
        tokens: as in ``modulate``.
        gated: likewise; its features become their own gradient, ``gate * grad``.
        modulation: likewise.
        grad: gradient of ``x`` that comes from elsewhere, [B, n, D]; becomes the whole.
        sums: added to, where wanted: [B, 2, D], sums over tokens of ``of_out`` and of ``of_out`` times the standardised
            ``x``; with ``gated`` [B, 3, D], and the sum of ``grad * features``.
    """
    features, gate = (gated.features, [gated.gate]) if gated else (None, [])
    _modulate_gradient([of_out, tokens], features, modulation.rows() + gate, modulation.norm.eps, grad, sums)


def add_gated(tokens: Tensor, gated: Gated) -> None:
    """``tokens += gate * features``.

    Args:
        tokens: [B, n, D], written to.
        gated: what is added.
    """
    _add_gated(tokens, gated.features, gated.gate)


def gate_gradient(
    grad: Tensor, gate: Tensor, out: Tensor, features: Tensor | None = None, sums: Tensor | None = None
) -> None:
    """The gradient of the features in ``add_gated``.

    Args:
        grad: of its result, [B, n, D].
        gate: [B, 1, D].
        out: ``gate * grad``, written to.
        features: [B, n, D], where the gate's own gradient is wanted.
        sums: then added to, [B, 1, D]: sums of ``grad * features`` over tokens.
    """
    _gate_gradient(grad, gate, features, out, sums)


# ------------------------------------------------------------------------------------------------ as one operation each


@torch.library.custom_op("finetune::modulate", mutates_args=("out", "out_sum"))
def _modulate(
    tokens: Tensor, gated: Sequence[Tensor], rows: Sequence[Tensor], eps: float, out: Tensor, out_sum: Tensor | None
) -> None:
    wide = [tokens, *gated[:1], out, *([] if out_sum is None else [out_sum])]
    if (kernels := kernels_for(*wide)) is not None:
        kernels.modulate(tokens, gated, rows, eps, out, out_sum)
        return
    weight, bias, shift, scale = rows
    for piece in _pieces(tokens):
        entered = tokens[:, piece]
        if gated:
            entered = entered + gated[1] * gated[0][:, piece]
        if out_sum is not None:
            out_sum[:, piece] = entered
        normed = torch.native_layer_norm(entered, weight.shape, weight, bias, eps)[0]
        out[:, piece] = normed.mul_(1 + scale).add_(shift)


@torch.library.custom_op("finetune::modulate_gradient", mutates_args=("features", "grad", "sums"))
def _modulate_gradient(
    reads: Sequence[Tensor],
    features: Tensor | None,
    rows: Sequence[Tensor],
    eps: float,
    grad: Tensor,
    sums: Tensor | None,
) -> None:
    of_out, tokens = reads
    wide = [*reads, grad, *([] if features is None else [features])]
    if (kernels := kernels_for(*wide)) is not None:
        kernels.modulate_gradient(reads, features, rows, eps, grad, sums)
        return
    dtype = torch.promote_types(grad.dtype, torch.float32)
    weight, _, _, scale, *gate = (row.to(dtype) for row in rows)
    for piece in _pieces(tokens):
        entered = tokens[:, piece]
        if features is not None:
            entered = entered + rows[4] * features[:, piece]
        entered, slope = entered.to(dtype), of_out[:, piece].to(dtype)
        standard, mean, rstd = torch.native_layer_norm(entered, weight.shape, None, None, eps)
        if sums is not None:
            sums[:, 0] += slope.sum(1)
            sums[:, 1] += (slope * standard).sum(1)
        slope = slope * ((1 + scale) * weight)
        through = torch.ops.aten.native_layer_norm_backward(
            slope, entered, weight.shape, mean, rstd, None, None, [True, False, False]
        )
        total = grad[:, piece] + through[0]
        grad[:, piece] = total
        if features is not None:
            if sums is not None:
                sums[:, 2] += (total * features[:, piece]).sum(1)
            features[:, piece] = total * gate[0]


@torch.library.custom_op("finetune::add_gated", mutates_args=("tokens",))
def _add_gated(tokens: Tensor, features: Tensor, gate: Tensor) -> None:
    if (kernels := kernels_for(tokens, features)) is not None:
        kernels.add_gated(tokens, features, gate)
        return
    tokens.add_(gate * features)


@torch.library.custom_op("finetune::gate_gradient", mutates_args=("out", "sums"))
def _gate_gradient(grad: Tensor, gate: Tensor, features: Tensor | None, out: Tensor, sums: Tensor | None) -> None:
    wide = [grad, out, *([] if features is None else [features])]
    if (kernels := kernels_for(*wide)) is not None:
        kernels.gate_gradient(grad, gate, features, out, sums)
        return
    torch.mul(grad, gate, out=out)
    if features is not None and sums is not None:
        for piece in _pieces(grad):
            sums[:, 0] += (grad[:, piece].to(sums.dtype) * features[:, piece].to(sums.dtype)).sum(1)


def _pieces(tokens: Tensor) -> Iterator[slice]:
    return (slice(first, first + _PIECE) for first in range(0, tokens.shape[1], _PIECE))


# All that they give is given to them: there is nothing to make of fake tensors.
for _operation in (_modulate, _modulate_gradient, _add_gated, _gate_gradient):
    _operation.register_fake(lambda *_: None)
