"""Named tensors of a model: comparing, copying, counting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import CheckpointError


def load_strictly(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy each tensor into the parameter of the same name, bit for bit.

    Raises:
        CheckpointError: as ``require_same``; nothing is copied then.
    """
    require_same(parameters, tensors)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def require_same(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint's tensors that are not the model's; their content is not looked at.

    Raises:
        CheckpointError: if names, shapes or dtypes are not the same on both sides.
    """
    problems = differences(parameters, tensors)
    if problems:
        raise CheckpointError(
            "the checkpoint's tensors are not this model's trainable tensors: " + "; ".join(problems),
            fix="resume with the model and method the checkpoint was made with",
        )


def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = []
    if missing := sorted(expected.keys() - found.keys()):
        problems.append(f"missing: {some(missing)}")
    if unknown := sorted(found.keys() - expected.keys()):
        problems.append(f"not in this run: {some(unknown)}")
    forms = {name: (_form(expected[name]), _form(found[name])) for name in expected.keys() & found.keys()}
    if differing := [f"{name} is {a} here, {b} there" for name, (a, b) in sorted(forms.items()) if a != b]:
        problems.append(some(differing))
    return problems


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def some(names: Iterable[str], limit: int = 4) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def count_lines(transformer: nn.Module) -> list[tuple[str, str]]:
    """Trainable and frozen parameters, with their dtypes."""
    lines = []
    for label, trains in (("trainable parameters", True), ("frozen parameters", False)):
        counts: dict[str, int] = {}
        for parameter in transformer.parameters():
            if parameter.requires_grad is trains:
                dtype = str(parameter.dtype).removeprefix("torch.")
                counts[dtype] = counts.get(dtype, 0) + parameter.numel()
        for layer in () if trains else transformer.modules():
            if kind := getattr(layer, "kind", None):  # of a weight held in fewer bits, which is no parameter
                weight: Any = layer.weight
                counts[kind] = counts.get(kind, 0) + math.prod(weight.shape)
        if counts:
            lines.append((label, ", ".join(f"{count:,} in {dtype}" for dtype, count in counts.items())))
    return lines
