"""Gradient checkpointing: keep only what enters each block, and run the block again when its gradients are due.

diffusers acts on a flag that other code can unset, and then the only symptom is an out-of-memory error, or none at all
on a large card. ``assert_recompute`` watches a training step and fails when blocks are not run again as asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune.errors import TrainingError

Checkpointing = Literal["full", "none"]
"""``full``: every block is run again in the backward pass, a third more compute for the least memory. ``none``: all
activations are kept."""


def apply(transformer: nn.Module, kind: Checkpointing) -> None:
    """Set up ``transformer`` (a diffusers CogVideoX transformer) in place; may be called again with another kind."""
    model: Any = transformer
    if kind == "full":
        # diffusers' default is torch's non-reentrant variant: gradients reach adapters in the first block although the
        # frozen model's input needs none, and dropout draws the same mask again.
        model.enable_gradient_checkpointing()
    else:
        model.disable_gradient_checkpointing()


@contextmanager
def assert_recompute(transformer: nn.Module, kind: Checkpointing) -> Iterator[None]:
    """Check that the blocks are run again in the enclosed backward passes exactly as often as ``kind`` says.

    Wrap it around one optimizer step, forward and backward. Only blocks through which a gradient flows count: those in
    front of the first trainable layer have nothing to run again. Forward passes without gradients do not count either.

    Raises:
        TrainingError: if a block was not run again (``full``), was run again (``none``), or no block was seen at all.
    """
    blocks = list(enumerate(transformer.get_submodule("transformer_blocks").children()))
    first_runs = [0] * len(blocks)
    repeats = [0] * len(blocks)
    forward_depth = 0

    def enter_model(*_: object) -> None:
        nonlocal forward_depth
        forward_depth += 1

    def leave_model(*_: object) -> None:
        nonlocal forward_depth
        forward_depth -= 1

    def leave_block(index: int, output: tuple[Tensor, ...]) -> None:
        if forward_depth and any(tensor.requires_grad for tensor in output):
            first_runs[index] += 1

    def enter_block(index: int) -> None:
        # Counted on entry: torch ends a repeated run early, as soon as the last tensor that it needs is there.
        if not forward_depth and torch.is_grad_enabled():
            repeats[index] += 1

    hooks = [
        transformer.register_forward_pre_hook(enter_model),
        transformer.register_forward_hook(leave_model, always_call=True),
    ]
    for index, block in blocks:
        hooks.append(block.register_forward_pre_hook(lambda *_, index=index: enter_block(index)))
        hooks.append(block.register_forward_hook(lambda _m, _i, output, index=index: leave_block(index, output)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    expected = first_runs if kind == "full" else [0] * len(blocks)
    wrong = [index for index, _ in blocks if repeats[index] != expected[index]]
    if not any(first_runs):
        raise TrainingError(
            "gradient checkpointing could not be checked: no block of the transformer ran with gradients",
            where=f"memory.checkpointing: {kind}",
            fix="wrap the guard around the transformer that trains, and around its forward and backward pass",
        )
    if wrong:
        index = wrong[0]
        raise TrainingError(
            f"gradient checkpointing does not do what was asked: block {index} ran forward {first_runs[index]} times "
            f"and was run again {repeats[index]} times in the backward pass, expected {expected[index]} "
            f"({len(wrong)} of {len(blocks)} blocks differ)",
            where=f"memory.checkpointing: {kind}",
            fix="leave the transformer's gradient_checkpointing flag alone between MemoryConfig.apply and training",
        )
