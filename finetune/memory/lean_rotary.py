"""The norm of queries and keys together with the rotary embedding, and its backward pass from its own result.

Both steps can be undone: a rotation by its transpose, ``normed * weight + bias`` by a division. So attention's rotated
queries and keys, which its own backward pass keeps anyway, and one number per head say all that the gradient of the
norm needs, and the unnormed ones are not computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, float32 [n, head dim], neighbouring pairs equal; a rotation of each pair."""

STEEPEST = 8.0
"""Most that rounding errors may grow when the norm is undone; see ``undoable``."""


class Normed(NamedTuple):
    """Normed and rotated queries or keys."""

    heads: Tensor
    """[B, n, H, head dim]."""
    rstd: Tensor
    """Reciprocal standard deviation of each head, [B, n, H, 1]."""


def _turned(heads: Tensor) -> Tensor:
    """Each pair (a, b) of the last axis as (-b, a)."""
    first, second = heads.reshape(*heads.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-second, first], dim=-1).flatten(-2)


def rotate(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """The rotary embedding, to the digit as diffusers' CogVideoX processor applies it.

    Args:
        heads: [B, n, H, head dim].
        rotary: of these n tokens; None leaves ``heads`` alone.
    """
    if rotary is None:
        return heads
    cos, sin = (table[:, None, :].to(heads.device) for table in rotary)
    return (heads.float() * cos + _turned(heads).float() * sin).to(heads.dtype)


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


def norm_and_rotate(heads: Tensor, norm: nn.LayerNorm, rotary: Rotary | None) -> Normed:
    """Queries or keys as attention takes them, with what ``gradient`` needs beside them.

    Args:
        heads: [B, n, H, head dim], as the linear layer gave them.
        norm: ``norm_q`` or ``norm_k``.
        rotary: of these n tokens.
    """
    normed, _, rstd = torch.native_layer_norm(heads, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return Normed(rotate(normed, rotary), rstd)


def gradient(result: Normed, grad: Tensor, norm: nn.LayerNorm, rotary: Rotary | None) -> Tensor:
    """The gradient of the unnormed queries or keys, in ``grad``'s dtype.

    Args:
        result: what ``norm_and_rotate`` gave.
        grad: of ``result.heads``.
        norm: the norm, ``undoable``.
        rotary: as in the forward pass.
    """
    weight = norm.weight.float()
    standard = (rotate_back(result.heads, rotary) - norm.bias.float()) / weight
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
