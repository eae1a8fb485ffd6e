"""Triton's kernels under its interpreter, beside their twins: a table of errors and bytes as JSON on stdout.

A process of its own, because Triton reads ``TRITON_INTERPRET`` when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from triton.runtime import interpreter

from finetune.memory import kernels, qk_norm
from finetune.memory.qk_norm import Affine, Normed, Rotary
from finetune.planner.work_counter import WorkCounter

EPS = 1e-6

CASES = {
    # clips, text tokens, video tokens, heads, head dim
    "5b": (1, 3, 4, 48, 64),
    "2b, without positions": (2, 2, 3, 30, 64),
    "odd sizes": (2, 1, 5, 3, 24),
    "one head, no text": (1, 0, 2, 1, 8),
    "more heads than a program takes": (1, 1, 2, 70, 16),
}

NARROW = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Traffic:
    """Bytes that kernels read and write: an element as often as a program asks for it."""

    def __init__(self) -> None:
        self.bytes = 0
        builder = interpreter.InterpreterBuilder
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        builder.create_masked_load = self._counting(self._load, 1)
        builder.create_masked_store = self._counting(self._store, 2)

    def _counting(self, call: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def counted(builder: Any, pointers: Any, *arguments: Any) -> Any:
            mask = np.broadcast_to(arguments[mask_at - 1].data, pointers.data.shape)
            self.bytes += int(mask.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return call(builder, pointers, *arguments)

        return counted


@dataclass
class Case:
    """Arguments of one comparison."""

    heads: Tensor
    grad: Tensor
    affine: Affine
    rotary: Rotary | None
    text: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> Case:
        clips, text, video, count, width = CASES[name]
        generator = torch.Generator().manual_seed(7)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        # Neither starts at a tensor's beginning, and tokens do not lie side by side.
        heads, grad = (drawn(clips, text + video + 1, count + 1, width)[:, 1:, 1:].to(dtype) for _ in range(2))
        affine = (1 + 0.2 * drawn(width)).to(dtype), (0.2 * drawn(width)).to(dtype)
        angles = drawn(video, width // 2)
        rotary = angles.cos().repeat_interleave(2, 1), angles.sin().repeat_interleave(2, 1)
        return cls(heads, grad, affine, None if "without" in name else rotary, text)

    def empty(self) -> Normed:
        wide = self.heads.new_empty(*self.heads.shape[:3], 2 * self.heads.shape[3])
        return Normed(
            wide[..., : self.heads.shape[3]], self.heads.new_empty(*self.heads.shape[:3], 1, dtype=torch.float32)
        )

    def streams(self) -> list[tuple[slice, Rotary | None]]:
        """Text and video: where, and with which positions."""
        return [(slice(0, self.text), None), (slice(self.text, None), self.rotary)]


def ulps(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the last place of ``ours``'s dtype; ``theirs`` is wider.

    What is near zero is a difference of larger numbers: below 1, a unit is float32's at 32.
    """
    unit = torch.finfo(ours.dtype).eps * theirs.abs() + 32 * torch.finfo(torch.float32).eps
    return float(((ours.double() - theirs.double()).abs() / unit).max())


def forward(case: Case) -> tuple[Normed, float]:
    """Through the kernel; and the largest error against float32 arithmetic on the same numbers."""
    out, errors = case.empty(), [0.0]
    for here, rotary in case.streams():
        own = Normed(out.heads[:, here], out.rstd[:, here])
        if own.heads.numel():
            kernels.norm_and_rotate(case.heads[:, here], case.affine, EPS, rotary, own)
            wide = tuple(parameter.float() for parameter in case.affine)
            theirs = qk_norm.norm_and_rotate(case.heads[:, here].float(), (wide[0], wide[1]), EPS, rotary)
            errors += [ulps(own.heads, theirs.heads), ulps(own.rstd, theirs.rstd)]
    return out, max(errors)


def backward(case: Case, result: Normed) -> tuple[Tensor, float]:
    """Through the kernel; and the largest error against the twin in float32."""
    ours = case.grad.clone(memory_format=torch.preserve_format)
    kernels.gradient(ours, result, case.affine, case.rotary)
    theirs = case.grad.to(torch.float32, copy=True)
    wide = Normed(result.heads.float(), result.rstd)
    affine = [parameter.float() for parameter in case.affine]
    torch.ops.finetune.norm_and_rotate_gradient(theirs, wide.heads, wide.rstd, affine, list(case.rotary or ()))
    return ours, ulps(ours, theirs)


def autograd(case: Case) -> Tensor:
    """The gradient in float64, of a rotation written with complex numbers."""
    heads = case.heads.double().requires_grad_()
    weight, bias = (parameter.double() for parameter in case.affine)
    normed = functional.layer_norm(heads, weight.shape, weight, bias, EPS)
    if case.rotary is not None:
        turns = torch.complex(*(table[:, None, ::2].double() for table in case.rotary))
        pairs = torch.view_as_complex(normed[:, case.text :].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        normed = torch.cat([normed[:, : case.text], turned], 1)
    return torch.autograd.grad(normed, heads, case.grad.double())[0]


def traffic_ratio(case: Case) -> dict[str, float]:
    """Bytes that the interpreter saw, over those of every argument once."""
    counter, ratios = Traffic(), {}
    out = case.empty()
    calls = {
        "norm_and_rotate": (
            lambda: kernels.norm_and_rotate(case.heads, case.affine, EPS, case.rotary, out),
            (case.heads, list(case.affine), EPS, list(case.rotary or ()), *out),
        ),
        "norm_and_rotate_gradient": (
            lambda: kernels.gradient(case.grad, out, case.affine, case.rotary),
            (case.grad, *out, list(case.affine), list(case.rotary or ())),
        ),
    }
    for name, (start, arguments) in calls.items():
        before = counter.bytes
        start()
        with WorkCounter() as declared:
            getattr(torch.ops.finetune, name)(*arguments)
        ratios[name] = (counter.bytes - before) / declared.work.elementwise_bytes
    return ratios


def main() -> None:
    """Every case in every dtype."""
    rows = {}
    for name in CASES:
        for dtype in NARROW:
            case = Case.of(name, NARROW[dtype])
            result, forward_ulps = forward(case)
            ours, backward_ulps = backward(case, result)
            truth = autograd(case)
            error = float((ours.double() - truth).norm() / truth.norm())
            rows[f"{name}, {dtype}"] = {"forward": forward_ulps, "backward": backward_ulps, "autograd": error}
    case = Case.of("5b", torch.bfloat16)
    case.text, case.heads, case.grad = 0, case.heads[:, case.text :], case.grad[:, case.text :]
    json.dump({"errors": rows, "traffic": traffic_ratio(case)}, sys.stdout)


if __name__ == "__main__":
    main()
