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

from finetune.memory import kernels, modulation, qk_norm  # noqa: F401  the latter two register operations
from finetune.memory.qk_norm import Affine, Normed, Rotary
from finetune.planner.work_counter import WorkCounter

EPS = 1e-6

CASES = {
    # clips, text tokens, video tokens, heads, head dim
    "5b": (1, 1, 2, 48, 64),
    "2b, without positions": (1, 1, 1, 30, 64),
    "odd sizes": (2, 1, 3, 3, 24),
    "one head, no text": (1, 0, 2, 1, 8),
    "more heads than a program takes": (1, 1, 1, 70, 16),
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

    def wide(self) -> list[Tensor]:
        """Weight and bias in float32."""
        return [parameter.float() for parameter in self.affine]

    def sums(self) -> Tensor:
        """Where gradients of weight and bias are added up."""
        return torch.zeros(2, self.heads.shape[-1])

    def empty(self) -> Normed:
        wide = self.heads.new_empty(*self.heads.shape[:3], 2 * self.heads.shape[3])
        return Normed(
            wide[..., : self.heads.shape[3]], self.heads.new_empty(*self.heads.shape[:3], 1, dtype=torch.float32)
        )


def ulps(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in units of the last place of ``ours``'s dtype; ``theirs`` is wider.

    What is near zero is a difference of larger numbers: below 1, a unit is float32's at 32.
    """
    unit = torch.finfo(ours.dtype).eps * theirs.abs() + 32 * torch.finfo(torch.float32).eps
    return float(((ours.double() - theirs.double()).abs() / unit).max())


def forward(case: Case) -> tuple[Normed, float]:
    """Through the kernel; and the largest error against the twin in float32 on the same numbers."""
    out = case.empty()
    kernels.norm_and_rotate(case.heads, case.affine, EPS, case.rotary, out)
    theirs = Normed(torch.empty(out.heads.shape), torch.empty(out.rstd.shape))
    torch.ops.finetune.norm_and_rotate(case.heads.float(), case.wide(), EPS, list(case.rotary or ()), *theirs)
    return out, max(map(ulps, out, theirs))


def backward(case: Case, result: Normed) -> tuple[Tensor, float]:
    """Through the kernel; and the largest error against the twin in float32."""
    ours = case.grad.clone(memory_format=torch.preserve_format)
    kernels.gradient(ours, result, case.affine, case.rotary)
    theirs = case.grad.to(torch.float32, copy=True)
    torch.ops.finetune.norm_and_rotate_gradient(
        theirs, result.heads.float(), result.rstd, case.wide(), list(case.rotary or ())
    )
    return ours, ulps(ours, theirs)


def trained(case: Case) -> tuple[list[Tensor], list[float]]:
    """The gradient from what was normed, and the norm's own; and the largest errors against the twin in float32."""
    ours, sums, rotary = case.grad.clone(memory_format=torch.preserve_format), case.sums(), list(case.rotary or ())
    kernels.input_gradient(ours, case.heads, case.affine, EPS, case.rotary, sums)
    theirs, their_sums = case.grad.to(torch.float32, copy=True), case.sums()
    torch.ops.finetune.norm_and_rotate_input_gradient(theirs, case.heads.float(), case.wide(), EPS, rotary, their_sums)
    return [ours, sums], [ulps(ours, theirs), ulps(sums, their_sums)]


def autograd(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients in float64, of a rotation written with complex numbers: of the heads, and of weight and bias."""
    heads, weight, bias = (t.double().requires_grad_() for t in (case.heads, *case.affine))
    normed = functional.layer_norm(heads, weight.shape, weight, bias, EPS)
    if case.rotary is not None:
        turns = torch.complex(*(table[:, None, ::2].double() for table in case.rotary))
        pairs = torch.view_as_complex(normed[:, case.text :].unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        normed = torch.cat([normed[:, : case.text], turned], 1)
    of_heads, *of_affine = torch.autograd.grad(normed, [heads, weight, bias], case.grad.double())
    return of_heads, torch.stack(of_affine)


# ------------------------------------------------------------------------------------------- modulation of the streams

STREAMS = {
    # clips, tokens, width, tokens of a program
    "5b": (1, 2, 3072, 1),
    "2b": (2, 2, 1920, 2),
    "odd sizes": (2, 5, 24, 3),
}

BLOCK_ROWS = 6
"""Rows of one tensor that shift, scale and gate are views of, as adaLN gives them."""


@dataclass
class Stream:
    """Arguments of one comparison."""

    tokens: Tensor
    features: Tensor
    grad: Tensor
    of_out: Tensor
    affine: list[Tensor]
    rows: Tensor

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> Stream:
        clips, tokens, width, _ = STREAMS[name]
        generator = torch.Generator().manual_seed(8)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        wide = [drawn(clips, tokens + 1, width + 8)[:, 1:, 8:].to(dtype) for _ in range(4)]
        affine = [(1 + 0.2 * drawn(width)).to(dtype), (0.2 * drawn(width)).to(dtype)]
        return cls(*wide, affine, drawn(clips, BLOCK_ROWS * width).to(dtype)[:, None])

    def to(self, dtype: torch.dtype) -> Stream:
        """A copy in another dtype; in the same, with the same strides."""
        wide = [t.clone().to(dtype) for t in (self.tokens, self.features, self.grad, self.of_out)]
        return Stream(*wide, [parameter.to(dtype) for parameter in self.affine], self.rows.to(dtype))

    def modulation(self) -> list[Tensor]:
        """Weight, bias, shift, scale, and the gate."""
        return [*self.affine, *self.rows.chunk(BLOCK_ROWS, dim=-1)[:3]]

    def sums(self, count: int) -> Tensor:
        """Where sums over tokens are added up."""
        return torch.zeros(len(self.tokens), count, self.tokens.shape[-1])


def streams_of(case: Stream, run: Any, gated: bool, summed: bool) -> dict[str, Tensor]:
    """Everything that the operations on a stream give.

    Args:
        case: the arguments, some of which are written to.
        run: the module of kernels, or the operations.
        gated: whether features are added in front of the norm.
        summed: whether sums are formed, and the sum in front of the norm written.
    """
    *rows, gate = case.modulation()
    out, out_sum, of_features = (torch.empty_like(case.tokens) for _ in range(3))
    features, sums = case.features, [case.sums(2 + gated), case.sums(1)] if summed else [None, None]
    run.gate_gradient(case.grad, gate, features if summed else None, of_features, sums[1])
    run.modulate(case.tokens, [features, gate] if gated else [], rows, EPS, out, out_sum if summed else None)
    arguments = (features, [*rows, gate]) if gated else (None, rows)
    run.modulate_gradient([case.of_out, case.tokens], *arguments, EPS, case.grad, sums[0])
    run.add_gated(case.tokens, case.of_out, gate)
    found = {"out": out, "of features": of_features, "of tokens": case.grad, "sum": case.tokens}
    found |= {"of added": features} if gated else {}
    return found | ({"entered": out_sum, "sums": sums[0], "gate sums": sums[1]} if summed else {})


def streams_autograd(case: Stream, gated: bool) -> dict[str, Tensor]:
    """Gradients in float64."""
    case = case.to(torch.float64)
    weight, bias, shift, scale, gate = (row.clone().requires_grad_() for row in case.modulation())
    tokens, features = case.tokens.requires_grad_(), case.features.requires_grad_()
    entered = tokens + gate * features if gated else tokens
    out = functional.layer_norm(entered, weight.shape, weight, bias, EPS) * (1 + scale) + shift
    leaves = [tokens, shift, scale, weight, bias, *([features, gate] if gated else [])]
    found = torch.autograd.grad([out, entered], leaves, [case.of_out, case.grad])
    return dict(zip(("tokens", "shift", "scale", "weight", "bias", "features", "gate"), found, strict=False))


def stream_errors(name: str, dtype: torch.dtype, gated: bool, summed: bool) -> dict[str, float]:
    """The largest error in units of the last place against the twins in float32, and of gradients against float64."""
    case = Stream.of(name, dtype)
    kernels.PROGRAMS = -(-STREAMS[name][1] // STREAMS[name][3])
    ours = streams_of(case.to(dtype), kernels, gated, summed)
    theirs = streams_of(case.to(torch.float32), torch.ops.finetune, gated, summed)
    truth = streams_autograd(case, gated)
    gradients = {"tokens": ours["of tokens"]} | ({"features": ours["of added"]} if gated else {})
    if summed:
        weight, bias, _, scale, _ = (row.double() for row in case.modulation())
        added, along, *gate = (ours["sums"][:, [row]].double() for row in range(2 + gated))
        gradients |= {"shift": added, "scale": weight * along + bias * added}
        gradients |= {"weight": ((1 + scale) * along).sum((0, 1)), "bias": ((1 + scale) * added).sum((0, 1))}
        gradients |= {"gate": gate[0]} if gated else {}
    return {
        "twin": max(ulps(ours[name], theirs[name]) for name in ours),
        "autograd": max(float((g.double() - truth[n]).norm() / truth[n].norm()) for n, g in gradients.items()),
    }


# -------------------------------------------------------------------------------------------------------------- traffic


def traffic_ratio() -> dict[str, float]:
    """Bytes that the interpreter saw, over those of every argument once."""
    case = Case.of("5b", torch.bfloat16)
    case.text, case.heads, case.grad = 0, case.heads[:, case.text :], case.grad[:, case.text :]
    out, tables = case.empty(), list(case.rotary or ())
    STREAMS["many tokens"] = (1, 70, 64, 35)
    kernels.PROGRAMS = 2
    stream = Stream.of("many tokens", torch.bfloat16)
    *rows, gate = stream.modulation()
    into = torch.empty_like(stream.tokens)
    heads = (case.heads, case.affine, EPS)
    reads = [stream.of_out, stream.tokens]
    calls: dict[str, tuple[str, tuple[Any, ...], tuple[Any, ...]]] = {
        "norm_and_rotate": ("", (*heads, case.rotary, out), (*heads, tables, *out)),
        "norm_and_rotate_gradient": (
            "gradient",
            (case.grad, out, case.affine, case.rotary),
            (case.grad, *out, list(case.affine), tables),
        ),
        "norm_and_rotate_input_gradient": (
            "input_gradient",
            (case.grad, *heads, case.rotary, case.sums()),
            (case.grad, *heads, tables, case.sums()),
        ),
        "modulate": ("", same := (stream.tokens, [stream.features, gate], rows, EPS, into, None), same),
        "modulate_gradient": ("", same := (reads, stream.features, [*rows, gate], EPS, stream.grad, None), same),
        "add_gated": ("", same := (stream.tokens, stream.features, gate), same),
        "gate_gradient": ("", same := (stream.grad, gate, None, into, None), same),
    }
    counter, ratios = Traffic(), {}
    for name, (start, arguments, declared) in calls.items():
        before = counter.bytes
        getattr(kernels, start or name)(*arguments)
        with WorkCounter() as work:
            getattr(torch.ops.finetune, name)(*declared)
        ratios[name] = (counter.bytes - before) / work.work.elementwise_bytes
    return ratios


def main() -> None:
    """Every case in every dtype."""
    rows, streams = {}, {}
    for dtype, narrow in NARROW.items():
        for name in CASES:
            case = Case.of(name, narrow)
            result, forward_ulps = forward(case)
            ours, backward_ulps = backward(case, result)
            own, trained_ulps = trained(case)
            truth = autograd(case)
            rows[f"{name}, {dtype}"] = {
                "forward": forward_ulps,
                "backward": backward_ulps,
                "trained": trained_ulps[0],
                "sums": trained_ulps[1],
                "autograd": float((ours.double() - truth[0]).norm() / truth[0].norm()),
                "trained autograd": max(
                    float((our.double() - their).norm() / their.norm()) for our, their in zip(own, truth, strict=True)
                ),
            }
        for name in STREAMS:
            for gated, summed in ((False, name == "odd sizes"), (True, name != "2b")):
                streams[f"{name}, {gated=}, {summed=}, {dtype}"] = stream_errors(name, narrow, gated, summed)
    json.dump({"errors": rows, "streams": streams, "traffic": traffic_ratio()}, sys.stdout)


if __name__ == "__main__":
    main()
