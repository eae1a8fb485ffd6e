"""Triton kernels, and what starts them. Imported only where one is to run: Triton is not everywhere.

A kernel computes in float32, whatever the dtypes of its arguments, and rounds what it writes once. It reads each
argument once and writes each result once. What it computes is said by its twin in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    heads, width, text, eps,
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
        row = (token - text) * table_token + 2 * pair  # of text: negative
        known = (2 * pair < width) & (row >= 0)
        cos, sin = tl.load(cosines + row, known, 1.0), tl.load(sines + row, known, 0.0)
        first, second = tl.split(tl.reshape(values, (most_heads, padded // 2, 2)))
        turned = tl.join(first * cos[None, :] - second * sin[None, :], second * cos[None, :] + first * sin[None, :])
        values = tl.reshape(turned, (most_heads, padded))
    place = head[:, None] * out_head + column[None, :]
    tl.store(out + clip * out_clip + token * out_token + place, values.to(out.dtype.element_ty), here)
    tl.store(rstd_out + clip * rstd_clip + token * rstd_token + head * rstd_head, rstd, head < heads)


@triton.jit
def gradient_kernel(
    grad, heads_in, rstd_in, weight, bias, cosines, sines, sums,
    heads, width, text, eps,
    grad_clip, grad_token, grad_head, in_clip, in_token, in_head, rstd_clip, rstd_token, rstd_head, table_token,
    undoes: tl.constexpr, rotates: tl.constexpr, most_heads: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twins: ``qk_norm.gradient``, which ``undoes`` the norm, and ``input_gradient``. ``grad`` becomes the gradient in
    front of the norm.
    """
    token, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.program_id(2) * most_heads + tl.arange(0, most_heads), tl.arange(0, padded)
    here = (head < heads)[:, None] & (column < width)[None, :]
    place = head[:, None] * in_head + column[None, :]
    values = tl.load(heads_in + clip * in_clip + token * in_token + place, here, 0.0).to(tl.float32)
    into = grad + clip * grad_clip + token * grad_token + head[:, None] * grad_head + column[None, :]
    slope = tl.load(into, here, 0.0).to(tl.float32)
    scale = tl.load(weight + column, column < width, 1.0).to(tl.float32)[None, :]
    if rotates:
        pair = tl.arange(0, padded // 2)
        row = (token - text) * table_token + 2 * pair  # of text: negative
        known = (2 * pair < width) & (row >= 0)
        cos, sin = tl.load(cosines + row, known, 1.0), tl.load(sines + row, known, 0.0)
        first, second = tl.split(tl.reshape(slope, (most_heads, padded // 2, 2)))
        back = tl.join(first * cos[None, :] + second * sin[None, :], second * cos[None, :] - first * sin[None, :])
        slope = tl.reshape(back, (most_heads, padded))
        if undoes:
            first, second = tl.split(tl.reshape(values, (most_heads, padded // 2, 2)))
            back = tl.join(first * cos[None, :] + second * sin[None, :], second * cos[None, :] - first * sin[None, :])
            values = tl.reshape(back, (most_heads, padded))
    if undoes:
        shift = tl.load(bias + column, column < width, 0.0).to(tl.float32)[None, :]
        standard = (values - shift) / scale
        rstd = tl.load(rstd_in + clip * rstd_clip + token * rstd_token + head * rstd_head, head < heads, 0.0)
    else:
        centred = tl.where(here, values - (tl.sum(values, 1) / width)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
        standard = centred * rstd[:, None]
        program = (clip * tl.num_programs(0) + token) * tl.num_programs(2) + tl.program_id(2)
        own = sums + program * 2 * width + column
        tl.store(own, tl.sum(slope * standard, 0), column < width)
        tl.store(own + width, tl.sum(slope, 0), column < width)
    slope *= scale
    mean, along = tl.sum(slope, 1) / width, tl.sum(slope * standard, 1) / width
    slope = (slope - mean[:, None] - standard * along[:, None]) * rstd[:, None]
    tl.store(into, slope.to(grad.dtype.element_ty), here)


def norm_and_rotate(heads: Tensor, affine: Affine, eps: float, rotary: Rotary | None, out: Normed) -> None:
    """Start the kernel of this name.

    Args:
        heads: [B, T + S, H, head dim], with neighbouring elements of a head side by side, as in ``out``.
        affine: weight and bias.
        eps: of the norm.
        rotary: of the S last tokens.
        out: written to.
    """
    cos, sin = _tables(rotary, heads.device) or (out.rstd, out.rstd)  # these are not read
    grid, sizes = _grid(heads)
    with torch.cuda.device_of(heads):
        norm_and_rotate_kernel[grid](
            heads, out.heads, out.rstd, *affine, cos, sin, *heads.shape[2:], _text(heads, rotary), eps,
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
    with torch.cuda.device_of(grad):
        gradient_kernel[grid](
            grad, result.heads, result.rstd, *affine, cos, sin, result.rstd,  # there are no sums
            *grad.shape[2:], _text(grad, rotary), 0.0,
            *grad.stride()[:3], *result.heads.stride()[:3], *result.rstd.stride()[:3], cos.stride(0),
            undoes=True, rotates=rotary is not None, **sizes,
        )  # fmt: skip


def input_gradient(
    grad: Tensor, heads: Tensor, affine: Affine, eps: float, rotary: Rotary | None, sums: Tensor
) -> None:
    """Start the kernel of the gradient, in place, from what was normed.

    Args:
        grad: [B, T + S, H, head dim], with neighbouring elements of a head side by side, as in ``heads``.
        heads: what ``norm_and_rotate`` was given.
        affine: weight and bias.
        eps: of the norm.
        rotary: of the S last tokens.
        sums: gradients of weight and bias, float32 [2, head dim], added to.
    """
    grid, sizes = _grid(grad)
    parts = sums.new_empty(grid[0] * grid[1] * grid[2], *sums.shape)
    cos, sin = _tables(rotary, grad.device) or (parts, parts)  # these are not read, and neither is rstd
    with torch.cuda.device_of(grad):
        gradient_kernel[grid](
            grad, heads, parts, *affine, cos, sin, parts, *grad.shape[2:], _text(grad, rotary), eps,
            *grad.stride()[:3], *heads.stride()[:3], *parts.stride(), cos.stride(0),
            undoes=False, rotates=rotary is not None, **sizes,
        )  # fmt: skip
    sums += parts.sum(0)


def _tables(rotary: Rotary | None, device: torch.device) -> Rotary | None:
    return rotary and (rotary[0].to(device).contiguous(), rotary[1].to(device).contiguous())


def _text(heads: Tensor, rotary: Rotary | None) -> int:
    """How many tokens have no position."""
    return heads.shape[1] - len(rotary[0]) if rotary else 0


def _grid(heads: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Programs, and what they are compiled for."""
    clips, tokens, count, width = heads.shape
    block = min(triton.next_power_of_2(count), HEADS)
    sizes = {"most_heads": block, "padded": triton.next_power_of_2(width), "num_warps": WARPS, "enable_fp_fusion": True}
    return (tokens, clips, triton.cdiv(count, block)), sizes


# ----------------------------------------------------------------------------------------- modulation of token streams

PROGRAMS = 512
"""Most programs for a clip. Each works through neighbouring tokens, one by one, so that it reads the rows once."""

STREAM_WARPS = 16
"""Of such a program: with 3072 elements of a token, and sums as wide, they take some 100 registers a thread."""


@triton.jit
def modulate_kernel(
    x, features, gate, weight, bias, shift, scale, out_sum, out,
    tokens, width, span, eps,
    x_clip, x_token, features_clip, features_token, sum_clip, sum_token, out_clip, out_token, gate_clip, row_clip,
    gated: tl.constexpr, summed: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``modulation.modulate``; ``summed`` also writes what enters the norm."""
    first, clip = tl.program_id(0).to(tl.int64) * span, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, padded)
    here = column < width
    factor = 1.0 + tl.load(scale + clip * row_clip + column, here, 0.0).to(tl.float32)
    added = tl.load(shift + clip * row_clip + column, here, 0.0).to(tl.float32)
    added += factor * tl.load(bias + column, here, 0.0).to(tl.float32)
    factor *= tl.load(weight + column, here, 0.0).to(tl.float32)
    if gated:
        gates = tl.load(gate + clip * gate_clip + column, here, 0.0).to(tl.float32)
    for token in range(first, tl.minimum(first + span, tokens)):
        values = tl.load(x + clip * x_clip + token * x_token + column, here, 0.0).to(tl.float32)
        if gated:
            own = tl.load(features + clip * features_clip + token * features_token + column, here, 0.0)
            values += gates * own.to(tl.float32)
        if summed:
            tl.store(out_sum + clip * sum_clip + token * sum_token + column, values.to(out_sum.dtype.element_ty), here)
        centred = tl.where(here, values - tl.sum(values, 0) / width, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        values = centred * rstd * factor + added
        tl.store(out + clip * out_clip + token * out_token + column, values.to(out.dtype.element_ty), here)


@triton.jit
def modulate_gradient_kernel(
    of_out, x, features, gate, weight, scale, grad, sums,
    tokens, width, span, eps,
    of_clip, of_token, x_clip, x_token, features_clip, features_token, grad_clip, grad_token, gate_clip, row_clip,
    gated: tl.constexpr, summed: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``modulation.modulate_gradient``; ``sums`` has a row for each sum of each program."""
    program, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = program * span
    column = tl.arange(0, padded)
    here = column < width
    factor = 1.0 + tl.load(scale + clip * row_clip + column, here, 0.0).to(tl.float32)
    factor *= tl.load(weight + column, here, 0.0).to(tl.float32)
    if gated:
        gates = tl.load(gate + clip * gate_clip + column, here, 0.0).to(tl.float32)
    if summed:
        of_shift, of_scale = tl.zeros((padded,), tl.float32), tl.zeros((padded,), tl.float32)
        of_gate = tl.zeros((padded,), tl.float32)
    for token in range(first, tl.minimum(first + span, tokens)):
        values = tl.load(x + clip * x_clip + token * x_token + column, here, 0.0).to(tl.float32)
        if gated:
            place = features + clip * features_clip + token * features_token + column
            own = tl.load(place, here, 0.0).to(tl.float32)
            values += gates * own
        centred = tl.where(here, values - tl.sum(values, 0) / width, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        standard = centred * rstd
        slope = tl.load(of_out + clip * of_clip + token * of_token + column, here, 0.0).to(tl.float32)
        if summed:
            of_shift += slope
            of_scale += slope * standard
        slope *= factor
        mean, along = tl.sum(slope, 0) / width, tl.sum(slope * standard, 0) / width
        into = grad + clip * grad_clip + token * grad_token + column
        total = tl.load(into, here, 0.0).to(tl.float32) + (slope - mean - standard * along) * rstd
        tl.store(into, total.to(grad.dtype.element_ty), here)
        if gated:
            if summed:
                of_gate += total * own
            tl.store(place, (total * gates).to(features.dtype.element_ty), here)
    if summed:
        count = 3 if gated else 2
        row = sums + (clip * tl.num_programs(0) + program) * count * width + column
        tl.store(row, of_shift, here)
        tl.store(row + width, of_scale, here)
        if gated:
            tl.store(row + 2 * width, of_gate, here)


@triton.jit
def add_gated_kernel(
    x, features, gate,
    tokens, width, span,
    x_clip, x_token, features_clip, features_token, gate_clip,
    padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``modulation.add_gated``."""
    first, clip = tl.program_id(0).to(tl.int64) * span, tl.program_id(1).to(tl.int64)
    column = tl.arange(0, padded)
    here = column < width
    gates = tl.load(gate + clip * gate_clip + column, here, 0.0).to(tl.float32)
    for token in range(first, tl.minimum(first + span, tokens)):
        into = x + clip * x_clip + token * x_token + column
        values = tl.load(into, here, 0.0).to(tl.float32)
        own = tl.load(features + clip * features_clip + token * features_token + column, here, 0.0).to(tl.float32)
        tl.store(into, (values + gates * own).to(x.dtype.element_ty), here)


@triton.jit
def gate_gradient_kernel(
    grad, features, gate, out, sums,
    tokens, width, span,
    grad_clip, grad_token, features_clip, features_token, out_clip, out_token, gate_clip,
    summed: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Twin: ``modulation.gate_gradient``; ``sums`` has a row for each program."""
    program, clip = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = program * span
    column = tl.arange(0, padded)
    here = column < width
    gates = tl.load(gate + clip * gate_clip + column, here, 0.0).to(tl.float32)
    if summed:
        of_gate = tl.zeros((padded,), tl.float32)
    for token in range(first, tl.minimum(first + span, tokens)):
        slope = tl.load(grad + clip * grad_clip + token * grad_token + column, here, 0.0).to(tl.float32)
        if summed:
            own = tl.load(features + clip * features_clip + token * features_token + column, here, 0.0)
            of_gate += slope * own.to(tl.float32)
        into = out + clip * out_clip + token * out_token + column
        tl.store(into, (slope * gates).to(out.dtype.element_ty), here)
    if summed:
        tl.store(sums + (clip * tl.num_programs(0) + program) * width + column, of_gate, here)


def modulate(
    tokens: Tensor, gated: Sequence[Tensor], rows: Sequence[Tensor], eps: float, out: Tensor, out_sum: Tensor | None
) -> None:
    """Start the kernel of this name.

    Args:
        tokens: [B, n, D], with neighbouring elements of a token side by side, as in all that follow.
        gated: features and gate that are added, or nothing.
        rows: weight and bias of the norm, shift and scale.
        eps: of the norm.
        out: written to.
        out_sum: written to, where it is wanted.
    """
    features, gate = gated or (tokens, rows[2])  # these are not read
    into = tokens if out_sum is None else out_sum  # nor is this written to
    grid, sizes = _token_grid(tokens)
    with torch.cuda.device_of(tokens):
        modulate_kernel[grid](
            tokens, features, gate, *rows, into, out, *tokens.shape[1:], _span(tokens), eps,
            *tokens.stride()[:2], *features.stride()[:2], *into.stride()[:2], *out.stride()[:2],
            gate.stride(0), rows[3].stride(0), gated=bool(gated), summed=out_sum is not None, **sizes,
        )  # fmt: skip


def modulate_gradient(
    reads: Sequence[Tensor],
    features: Tensor | None,
    rows: Sequence[Tensor],
    eps: float,
    grad: Tensor,
    sums: Tensor | None,
) -> None:
    """Start the kernel of this name.

    Args:
        reads: gradient of the result, and tokens, [B, n, D].
        features: that were added, turned into their gradient; None for nothing.
        rows: weight and bias of the norm, shift and scale; with ``features``, the gate.
        eps: of the norm.
        grad: of the tokens, added to.
        sums: [B, 2 or 3, D], added to, where they are wanted.
    """
    of_out, tokens = reads
    weight, _, _, scale, *others = rows
    gate, own = others[0] if others else scale, tokens if features is None else features  # not read without features
    grid, sizes = _token_grid(tokens)
    parts = _parts(sums, grid)
    with torch.cuda.device_of(tokens):
        modulate_gradient_kernel[grid](
            of_out, tokens, own, gate, weight, scale, grad, grad if parts is None else parts,
            *tokens.shape[1:], _span(tokens), eps,
            *of_out.stride()[:2], *tokens.stride()[:2], *own.stride()[:2], *grad.stride()[:2],
            gate.stride(0), scale.stride(0), gated=features is not None, summed=parts is not None, **sizes,
        )  # fmt: skip
    _add_parts(sums, parts)


def add_gated(tokens: Tensor, features: Tensor, gate: Tensor) -> None:
    """Start the kernel of this name.

    Args:
        tokens: [B, n, D], added to.
        features: [B, n, D].
        gate: [B, 1, D].
    """
    grid, sizes = _token_grid(tokens)
    with torch.cuda.device_of(tokens):
        add_gated_kernel[grid](
            tokens, features, gate, *tokens.shape[1:], _span(tokens),
            *tokens.stride()[:2], *features.stride()[:2], gate.stride(0), **sizes,
        )  # fmt: skip


def gate_gradient(grad: Tensor, gate: Tensor, features: Tensor | None, out: Tensor, sums: Tensor | None) -> None:
    """Start the kernel of this name.

    Args:
        grad: of the sum, [B, n, D].
        gate: [B, 1, D].
        features: [B, n, D], where ``sums`` are wanted.
        out: gradient of the features, written to.
        sums: [B, 1, D], added to.
    """
    grid, sizes = _token_grid(grad)
    own, parts = grad if features is None else features, _parts(sums, grid)
    with torch.cuda.device_of(grad):
        gate_gradient_kernel[grid](
            grad, own, gate, out, out if parts is None else parts, *grad.shape[1:], _span(grad),
            *grad.stride()[:2], *own.stride()[:2], *out.stride()[:2], gate.stride(0),
            summed=parts is not None, **sizes,
        )  # fmt: skip
    _add_parts(sums, parts)


def _span(tokens: Tensor) -> int:
    """Tokens of a program."""
    return int(triton.cdiv(tokens.shape[1], PROGRAMS))


def _token_grid(tokens: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs, and what they are compiled for."""
    clips, count, width = tokens.shape
    sizes = {"padded": triton.next_power_of_2(width), "num_warps": STREAM_WARPS, "enable_fp_fusion": True}
    return (triton.cdiv(count, _span(tokens)), clips), sizes


def _parts(sums: Tensor | None, grid: tuple[int, int]) -> Tensor | None:
    """Room for every program's share of ``sums``. Added up afterwards, they are the same in every run."""
    return None if sums is None else sums.new_empty(len(sums), grid[0], *sums.shape[1:])


def _add_parts(sums: Tensor | None, parts: Tensor | None) -> None:
    if sums is not None and parts is not None:
        sums += parts.sum(1)
