"""Triton kernels, and what starts them. Imported only where one is to run: Triton is not everywhere.

A kernel computes in float32, whatever the dtypes of its arguments, and rounds what it writes once. It reads each
argument once and writes each result once. What it computes is said by its twin in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finetune.memory.qk_norm import Affine, Normed, Rotary

HEADS = 64
"""Most heads that one program takes. A program works on one token, so that its cosines and sines are read once."""

WARPS = 8
"""Of one program: 64 heads of 64 elements take some 110 registers a thread."""


@triton.jit
def norm_and_rotate_kernel(
    x, out, rstd_out, weight, bias, cosines, sines,
    heads, width, eps,
    x_clip, x_token, x_head, out_clip, out_token, out_head, rstd_clip, rstd_token, rstd_head, table_token,
    rotates: tl.constexpr, most_heads: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``qk_norm.norm_and_rotate``."""
    token, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.program_id(2) * most_heads + tl.arange(0, most_heads), tl.arange(0, padded)
    here = (head < heads)[:, None] & (column < width)[None, :]
    place = head[:, None] * x_head + column[None, :]
    values = tl.load(x + clip * x_clip + token * x_token + place, here, 0.0).to(tl.float32)
    centred = tl.where(here, values - (tl.sum(values, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    scale = tl.load(weight + column, column < width, 1.0).to(tl.float32)
    shift = tl.load(bias + column, column < width, 0.0).to(tl.float32)
    values = centred * rstd[:, None] * scale[None, :] + shift[None, :]
    if rotates:
        pair = tl.arange(0, padded // 2)
        row = token * table_token + 2 * pair
        cos, sin = tl.load(cosines + row, 2 * pair < width, 1.0), tl.load(sines + row, 2 * pair < width, 0.0)
        first, second = tl.split(tl.reshape(values, (most_heads, padded // 2, 2)))
        turned = tl.join(first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :])
        values = tl.reshape(turned, (most_heads, padded))
    place = head[:, None] * out_head + column[None, :]
    tl.store(out + clip * out_clip + token * out_token + place, values.to(out.dtype.element_ty), here)
    tl.store(rstd_out + clip * rstd_clip + token * rstd_token + head * rstd_head, rstd, head < heads)


@triton.jit
def gradient_kernel(
    grad, result, rstd_in, weight, bias, cosines, sines,
    heads, width, text,
    grad_clip, grad_token, grad_head, result_clip, result_token, result_head,
    rstd_clip, rstd_token, rstd_head, table_token,
    rotates: tl.constexpr, most_heads: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``qk_norm.gradient``. ``grad`` becomes the gradient in front of the norm."""
    token, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.program_id(2) * most_heads + tl.arange(0, most_heads), tl.arange(0, padded)
    here = (head < heads)[:, None] & (column < width)[None, :]
    place = head[:, None] * result_head + column[None, :]
    values = tl.load(result + clip * result_clip + token * result_token + place, here, 0.0).to(tl.float32)
    into = grad + clip * grad_clip + token * grad_token + head[:, None] * grad_head + column[None, :]
    slope = tl.load(into, here, 0.0).to(tl.float32)
    if rotates:
        pair = tl.arange(0, padded // 2)
        row = (token - text) * table_token + 2 * pair  # of text: negative
        known = (2 * pair < width) & (row >= 0)
        cos, sin = tl.load(cosines + row, known, 1.0), tl.load(sines + row, known, 0.0)
        first, second = tl.split(tl.reshape(values, (most_heads, padded // 2, 2)))
        back = tl.join(first * cos[None, :] + second * sin[None, :], second * cos[None, :] - first * sin[None, :])
        values = tl.reshape(back, (most_heads, padded))
        first, second = tl.split(tl.reshape(slope, (most_heads, padded // 2, 2)))
        back = tl.join(first * cos[None, :] + second * sin[None, :], second * cos[None, :] - first * sin[None, :])
        slope = tl.reshape(back, (most_heads, padded))
    scale = tl.load(weight + column, column < width, 1.0).to(tl.float32)[None, :]
    shift = tl.load(bias + column, column < width, 0.0).to(tl.float32)[None, :]
    standard, slope = (values - shift) / scale, slope * scale
    mean, along = tl.sum(slope, 1) / width, tl.sum(slope * standard, 1) / width
    rstd = tl.load(rstd_in + clip * rstd_clip + token * rstd_token + head * rstd_head, head < heads, 0.0)
    slope = (slope - mean[:, None] - standard * along[:, None]) * rstd[:, None]
    tl.store(into, slope.to(grad.dtype.element_ty), here)


def norm_and_rotate(heads: Tensor, affine: Affine, eps: float, rotary: Rotary | None, out: Normed) -> None:
    """Start the kernel of this name.

    Args:
        heads: [B, n, H, head dim], with neighbouring elements of a head side by side, as in ``out``.
        affine: weight and bias.
        eps: of the norm.
        rotary: of these n tokens.
        out: written to.
    """
    cos, sin = _tables(rotary, heads.device) or (out.rstd, out.rstd)  # these are not read
    grid, sizes = _grid(heads)
    with torch.cuda.device_of(heads):
        norm_and_rotate_kernel[grid](
            heads, out.heads, out.rstd, *affine, cos, sin, *heads.shape[2:], eps,
            *heads.stride()[:3], *out.heads.stride()[:3], *out.rstd.stride()[:3], cos.stride(0),
            rotates=rotary is not None, **sizes,
        )  # fmt: skip


def gradient(grad: Tensor, result: Normed, affine: Affine, rotary: Rotary | None) -> None:
    """Start the kernel of the gradient, in place.

    Args:
        grad: [B, T + S, H, head dim], with neighbouring elements of a head side by side, as in ``result``.
        result: what ``norm_and_rotate`` gave.
        affine: weight and bias.
        rotary: of the S last tokens.
    """
    cos, sin = _tables(rotary, grad.device) or (result.rstd, result.rstd)  # these are not read
    grid, sizes = _grid(grad)
    text = grad.shape[1] - len(cos) if rotary else 0
    with torch.cuda.device_of(grad):
        gradient_kernel[grid](
            grad, result.heads, result.rstd, *affine, cos, sin, *grad.shape[2:], text,
            *grad.stride()[:3], *result.heads.stride()[:3], *result.rstd.stride()[:3], cos.stride(0),
            rotates=rotary is not None, **sizes,
        )  # fmt: skip


def _tables(rotary: Rotary | None, device: torch.device) -> Rotary | None:
    return rotary and (rotary[0].to(device).contiguous(), rotary[1].to(device).contiguous())


def _grid(heads: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Programs, and what they are compiled for."""
    clips, tokens, count, width = heads.shape
    block = min(triton.next_power_of_2(count), HEADS)
    sizes = {"most_heads": block, "padded": triton.next_power_of_2(width), "num_warps": WARPS, "enable_fp_fusion": True}
    return (tokens, clips, triton.cdiv(count, block)), sizes
