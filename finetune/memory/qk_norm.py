"""The norm of queries and keys with the rotary embedding, its gradient, and how both are computed on a device.

Both steps can be undone: a rotation by its transpose, ``normed * weight + bias`` by a division. So attention's rotated
queries and keys, which its own backward pass keeps anyway, and one number per head say all that the gradient of the
norm needs, and the unnormed ones are not computed again.

Where the norm itself trains, or cannot be undone, the gradient starts from the unnormed ones.

Each direction is one operation over text and video, ``finetune::norm_and_rotate``, ``norm_and_rotate_gradient`` and
``norm_and_rotate_input_gradient``, which writes into tensors that are given to it. What it computes is said in plain
torch; on CUDA a Triton kernel computes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from finetune.memory.kernel_choice import kernels_for

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32 [n, head dim], neighbouring pairs equal; a rotation of each pair."""

Affine = tuple[Tensor, Tensor]
"""Weight and bias of the norm, [head dim]."""

STEEPEST = 8.0
"""Most that rounding errors may grow when the norm is undone; see ``undoable``."""


class Normed(NamedTuple):
    """Normed and rotated queries or keys."""

    heads: Tensor
    """[B, n, H, head dim]."""
    rstd: Tensor
    """Reciprocal standard deviation of each head, [B, n, H, 1]."""


def rotate(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """The rotary embedding, to the digit as diffusers' CogVideoX processor applies it.

    Args:
        heads: [B, n, H, head dim].
        rotary: of these n tokens; None leaves ``heads`` alone.
    """
    if rotary is None:
        return heads
    cos, sin = (table[:, None, :].to(heads.device) for table in rotary)
    # One expression: under a name, the turned heads would stand beside their own fp32 copy, a chunk more at the peak.
    return (heads.float() * cos + _turned(heads).float() * sin).to(heads.dtype)


def _turned(heads: Tensor) -> Tensor:
    """Each pair (a, b) of the last axis as (-b, a)."""
    first, second = heads.reshape(*heads.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-second, first], dim=-1).flatten(-2)


def rotate_back(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """The inverse of ``rotate``, which is also its transpose and so its backward pass; float32, not differentiable."""
    wide = heads.float()
    if rotary is None:
        return wide
    cos, sin = (table[:, None, :].to(heads.device) for table in rotary)
    first, second = wide[..., 0::2], wide[..., 1::2]
    back = wide * cos
    back[..., 0::2].addcmul_(second, sin[..., 1::2])
    back[..., 1::2].addcmul_(first, sin[..., 0::2], value=-1)
    return back


def norm_and_rotate(heads: Tensor, affine: Affine, eps: float, rotary: Rotary | None) -> Normed:
    """Queries or keys as attention takes them, with what ``gradient`` needs beside them.

    Args:
        heads: [B, n, H, head dim], as the linear layer gave them.
        affine: of ``norm_q`` or ``norm_k``.
        eps: of the norm.
        rotary: of these n tokens.
    """
    weight, bias = affine
    normed, _, rstd = torch.native_layer_norm(heads, weight.shape, weight, bias, eps)
    return Normed(rotate(normed, rotary), rstd)


def gradient(grad: Tensor, result: Normed, affine: Affine, rotary: Rotary | None) -> Tensor:
    """The gradient of the unnormed queries or keys, in ``grad``'s dtype.

    Args:
        grad: of ``result.heads``.
        result: what ``norm_and_rotate`` gave.
        affine: of the norm, which is ``undoable``.
        rotary: as in the forward pass.
    """
    weight, bias = (parameter.float() for parameter in affine)
    standard = (rotate_back(result.heads, rotary) - bias) / weight
    return _through_norm(rotate_back(grad, rotary) * weight, standard, result.rstd.float()).to(grad.dtype)


def input_gradient(
    grad: Tensor, heads: Tensor, affine: Affine, eps: float, rotary: Rotary | None
) -> tuple[Tensor, Tensor]:
    """The same from what the linear layer gave, for any norm; and the gradients of the norm's own parameters.

    Args:
        grad: of what ``norm_and_rotate`` gave.
        heads: what it was given.
        affine: of the norm.
        eps: of the norm.
        rotary: as in the forward pass.

    Returns:
        The gradient of ``heads`` in ``grad``'s dtype, and of weight and bias, float32 [2, head dim].
    """
    standard, _, rstd = torch.native_layer_norm(heads.float(), affine[0].shape, None, None, eps)
    slope = rotate_back(grad, rotary)
    sums = torch.stack([(slope * standard).sum((0, 1, 2)), slope.sum((0, 1, 2))])
    return _through_norm(slope * affine[0].float(), standard, rstd).to(grad.dtype), sums


def _through_norm(slope: Tensor, standard: Tensor, rstd: Tensor) -> Tensor:
    """From the gradient of the standardised to that of the input; ``slope`` is written to."""
    mean, along = slope.mean(-1, keepdim=True), torch.linalg.vecdot(slope, standard)[..., None] / slope.shape[-1]
    return slope.sub_(mean).addcmul_(standard, along, value=-1).mul_(rstd)


def undoable(norm: nn.LayerNorm) -> bool:
    """Whether ``gradient`` may stand in for running ``norm`` again.

    It gives no gradient of the norm's own parameters, so they must be frozen. And a result is known to its rounding
    error, relative to the larger of the pair that the rotation mixes: divided by a much smaller weight, the error would
    be all that is left. Weights without values (fake or meta tensors) are taken for usual ones.
    """
    if norm.weight.requires_grad or norm.bias.requires_grad:
        return False
    weight, bias = norm.weight.detach().float().abs(), norm.bias.detach().float().abs()
    reach = (weight + bias).view(-1, 2).amax(-1).repeat_interleave(2)
    fits = (STEEPEST * weight >= reach).all()
    return True if fits.is_meta or isinstance(fits, FakeTensor) else bool(fits)


# ------------------------------------------------------------------------------------------------ as one operation each

_PIECE = 2048
"""Tokens that plain torch works on at once: its float32 copies stay small beside a stream."""


def norm_and_rotate_into(heads: Tensor, norm: nn.LayerNorm, rotary: Rotary | None, out: Normed) -> None:
    """``norm_and_rotate`` as one operation over text and video, which writes into ``out``; it records no gradient.

    Args:
        heads: [B, T + S, H, head dim], as the linear layer gave them, text first.
        norm: ``norm_q`` or ``norm_k``.
        rotary: of the S video tokens.
        out: written to; its ``heads`` may be ``heads``, its ``rstd`` is float32.
    """
    _norm_and_rotate(heads, [norm.weight, norm.bias], norm.eps, list(rotary or ()), out.heads, out.rstd)


def gradient_in_place(grad: Tensor, result: Normed, norm: nn.LayerNorm, rotary: Rotary | None) -> None:
    """``gradient`` as one operation over text and video; ``grad`` becomes the gradient in front of the norm.

    Args:
        grad: of ``result.heads``, [B, T + S, H, head dim]; written to.
        result: what ``norm_and_rotate_into`` gave.
        norm: the norm, ``undoable``.
        rotary: of the S video tokens.
    """
    _gradient(grad, result.heads, result.rstd, [norm.weight, norm.bias], list(rotary or ()))


def input_gradient_in_place(grad: Tensor, heads: Tensor, norm: nn.LayerNorm, rotary: Rotary | None) -> Tensor:
    """``input_gradient`` as one operation over text and video; ``grad`` becomes the gradient in front of the norm.

    Args:
        grad: of what ``norm_and_rotate_into`` gave, [B, T + S, H, head dim]; written to.
        heads: what it was given.
        norm: the norm.
        rotary: of the S video tokens.

    Returns:
        Gradients of weight and bias, float32 [2, head dim].
    """
    sums = grad.new_zeros(2, grad.shape[-1], dtype=torch.float32)
    _input_gradient(grad, heads, [norm.weight, norm.bias], norm.eps, list(rotary or ()), sums)
    return sums


@torch.library.custom_op("finetune::norm_and_rotate", mutates_args=("out", "out_rstd"))
def _norm_and_rotate(
    heads: Tensor, affine: Sequence[Tensor], eps: float, rotary: Sequence[Tensor], out: Tensor, out_rstd: Tensor
) -> None:
    weight, bias = affine
    if (kernels := kernels_for(heads, out)) is not None:
        kernels.norm_and_rotate(heads, (weight, bias), eps, _tables(rotary), Normed(out, out_rstd))
        return
    for here, positions in _pieces(heads.shape[1], rotary):
        piece = norm_and_rotate(heads[:, here], (weight, bias), eps, positions)
        out[:, here], out_rstd[:, here] = piece


@torch.library.custom_op("finetune::norm_and_rotate_gradient", mutates_args=("grad",))
def _gradient(grad: Tensor, result: Tensor, rstd: Tensor, affine: Sequence[Tensor], rotary: Sequence[Tensor]) -> None:
    weight, bias = affine
    if (kernels := kernels_for(grad, result)) is not None:
        kernels.gradient(grad, Normed(result, rstd), (weight, bias), _tables(rotary))
        return
    for here, positions in _pieces(grad.shape[1], rotary):
        grad[:, here] = gradient(grad[:, here], Normed(result[:, here], rstd[:, here]), (weight, bias), positions)


@torch.library.custom_op("finetune::norm_and_rotate_input_gradient", mutates_args=("grad", "sums"))
def _input_gradient(
    grad: Tensor, heads: Tensor, affine: Sequence[Tensor], eps: float, rotary: Sequence[Tensor], sums: Tensor
) -> None:
    weight, bias = affine
    if (kernels := kernels_for(grad, heads)) is not None:
        kernels.input_gradient(grad, heads, (weight, bias), eps, _tables(rotary), sums)
        return
    for here, positions in _pieces(grad.shape[1], rotary):
        of_heads, own = input_gradient(grad[:, here], heads[:, here], (weight, bias), eps, positions)
        grad[:, here] = of_heads
        sums += own


def _tables(rotary: Sequence[Tensor]) -> Rotary | None:
    return (rotary[0], rotary[1]) if rotary else None


def _pieces(tokens: int, rotary: Sequence[Tensor]) -> Iterator[tuple[slice, Rotary | None]]:
    """A few tokens of one stream at a time, with their positions; text, which has none, comes first."""
    text = tokens - len(rotary[0]) if rotary else tokens
    for start, stop, positioned in ((0, text, False), (text, tokens, True)):
        for first in range(start, stop, _PIECE):
            last = min(first + _PIECE, stop)
            own = slice(first - text, last - text)
            yield slice(first, last), (rotary[0][own], rotary[1][own]) if positioned else None


# All that they give is given to them: there is nothing to make of fake tensors.
for _operation in (_norm_and_rotate, _gradient, _input_gradient):
    _operation.register_fake(lambda *_: None)
