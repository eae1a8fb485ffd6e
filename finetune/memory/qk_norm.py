"""The norm of queries and keys with the rotary embedding, its gradient, and how both are computed on a device.

Both steps can be undone: a rotation by its transpose, ``normed * weight + bias`` by a division. So attention's rotated
queries and keys, which its own backward pass keeps anyway, and one number per head say all that the gradient of the
norm needs, and the unnormed ones are not computed again.

Each direction is one operation, ``finetune::norm_and_rotate`` and ``finetune::norm_and_rotate_gradient``, which writes
into tensors that are given to it. What it computes is said in plain torch; on CUDA a Triton kernel computes it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

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
    slope = rotate_back(grad, rotary) * weight
    mean, along = slope.mean(-1, keepdim=True), torch.linalg.vecdot(slope, standard)[..., None] / len(weight)
    return slope.sub_(mean).addcmul_(standard, along, value=-1).mul_(result.rstd.float()).to(grad.dtype)


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

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def norm_and_rotate_into(heads: Tensor, norm: nn.LayerNorm, rotary: Rotary | None, out: Normed) -> None:
    """``norm_and_rotate`` as one operation that writes into ``out``; it records no gradient.

    Args:
        heads: [B, n, H, head dim], as the linear layer gave them.
        norm: ``norm_q`` or ``norm_k``.
        rotary: of these n tokens.
        out: written to; its ``rstd`` is float32.
    """
    _norm_and_rotate(heads, [norm.weight, norm.bias], norm.eps, list(rotary or ()), out.heads, out.rstd)


def gradient_in_place(grad: Tensor, result: Normed, norm: nn.LayerNorm, rotary: Rotary | None) -> None:
    """``gradient`` as one operation over text and video; ``grad`` becomes the gradient in front of the norm.

    Args:
        grad: of ``result.heads``, [B, T + S, H, head dim]; written to.
        result: what ``norm_and_rotate_into`` gave for both streams, text first.
        norm: the norm, ``undoable``.
        rotary: of the S video tokens.
    """
    _gradient(grad, result.heads, result.rstd, [norm.weight, norm.bias], list(rotary or ()))


@torch.library.custom_op("finetune::norm_and_rotate", mutates_args=("out", "out_rstd"))
def _norm_and_rotate(
    heads: Tensor, affine: Sequence[Tensor], eps: float, rotary: Sequence[Tensor], out: Tensor, out_rstd: Tensor
) -> None:
    tables = (rotary[0], rotary[1]) if rotary else None
    if (kernels := _kernels_for(heads, out)) is not None:
        kernels.norm_and_rotate(heads, (affine[0], affine[1]), eps, tables, Normed(out, out_rstd))
        return
    result = norm_and_rotate(heads, (affine[0], affine[1]), eps, tables)
    out.copy_(result.heads)
    out_rstd.copy_(result.rstd)


@torch.library.custom_op("finetune::norm_and_rotate_gradient", mutates_args=("grad",))
def _gradient(grad: Tensor, result: Tensor, rstd: Tensor, affine: Sequence[Tensor], rotary: Sequence[Tensor]) -> None:
    tables = (rotary[0], rotary[1]) if rotary else None
    if (kernels := _kernels_for(grad, result)) is not None:
        kernels.gradient(grad, Normed(result, rstd), (affine[0], affine[1]), tables)
        return
    tokens = grad.shape[1]
    text = tokens - len(tables[0]) if tables else 0
    for first, last in pairwise([0, *range(text, tokens, _PIECE), tokens]):
        here, own = slice(first, last), slice(first - text, last - text)
        positions = (tables[0][own], tables[1][own]) if tables and first >= text else None
        piece = Normed(result[:, here], rstd[:, here])
        grad[:, here] = gradient(grad[:, here], piece, (affine[0], affine[1]), positions)


# All that they give is given to them: there is nothing to make of fake tensors.
_norm_and_rotate.register_fake(lambda *_: None)
_gradient.register_fake(lambda *_: None)


def _kernels_for(*heads: Tensor) -> ModuleType | None:
    """The Triton kernels, if they can compute on these; None for plain torch."""
    fit = all(t.is_cuda and t.stride(-1) == 1 and t.dtype in _KERNEL_DTYPES for t in heads)
    return triton_kernels() if fit else None


@functools.cache
def triton_kernels() -> ModuleType | None:
    try:
        import finetune.memory.kernels as kernels
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}): the norm of queries and keys and their rotary embedding run in"
            " plain torch, which computes the same in several times the memory traffic",
            stacklevel=1,
        )
        return None
    return kernels
