"""Selective checkpointing through torch: attention once per kept block, the same gradients, a guard that sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from storages import StorageCounter
from tiny_blocks import LAYERS, LORA, build, computed_once, forward, modules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.core.errors import TrainingError
from finetune.memory import checkpointing
from finetune.memory.checkpointing import SavedAttention, is_attention, watch_recompute
from finetune.methods.full import FullMethod

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.of: dict[Any, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.of[func] = self.of.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def set_up(kind: str, keep: int | None = None, **options: Any) -> nn.Module:
    transformer = build(**options)
    checkpointing.apply(transformer, kind, keep)
    return transformer


def gradients(transformer: nn.Module) -> list[Tensor]:
    torch.manual_seed(2)  # of LoRA's dropout
    loss = forward(transformer)
    loss.backward()
    return [loss.detach(), *(p.grad for p in transformer.parameters() if p.requires_grad)]


@computed_once
def expected(variant: str, method: Any, dtype: torch.dtype) -> list[Tensor]:
    return gradients(set_up("none", variant=variant, method=method, dtype=dtype))


@pytest.mark.parametrize(
    ("variant", "method", "dtype", "keep"),
    [
        ("5b", LORA, torch.float32, 1),
        ("5b", LORA, torch.bfloat16, 3),
        ("1.5-5b", LORA, torch.float32, LAYERS + 5),
        ("5b", FullMethod(), torch.bfloat16, None),
    ],
    ids=["5b", "5b-bf16", "1.5", "full"],
)
def test_attention_runs_once_in_kept_blocks_and_gradients_are_the_same(variant, method, dtype, keep):
    transformer = set_up("selective", keep, variant=variant, method=method, dtype=dtype)
    with Count() as count, watch_recompute(transformer, "selective", keep):
        ours = gradients(transformer)
    theirs = expected(variant, method, dtype)
    assert len(ours) == len(theirs) >= 33
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    kept = min(keep or LAYERS, LAYERS)
    assert count.of[FORWARD] == kept + 2 * (LAYERS - kept)
    assert count.of[BACKWARD] == LAYERS


def test_what_is_kept_is_one_token_tensor_and_a_logsumexp():
    """Per block: the output, as large as the tokens, and a float32 for each token and head; with ``none`` it is all."""
    kept = {}
    for kind in ("full", "selective", "none"):
        transformer = set_up(kind)
        with StorageCounter() as counter:
            loss = forward(transformer)
        kept[kind] = counter.now
        assert loss.requires_grad
    tokens, heads, width = 2 * (8 + 3 * 2 * 2), 2, 32
    assert kept["selective"] - kept["full"] == LAYERS * tokens * (width + heads) * 4
    assert kept["none"] > kept["selective"]


def test_it_can_be_changed_again():
    transformer = set_up("selective", 1)
    for kind, keep, runs in [("full", None, 2 * LAYERS), ("selective", 2, 2 * LAYERS - 2), ("none", None, LAYERS)]:
        checkpointing.apply(transformer, kind, keep)
        with Count() as count, watch_recompute(transformer, kind, keep):
            gradients(transformer)
        assert count.of[FORWARD] == runs


def test_adapters_in_the_last_blocks_only():
    """Blocks in front of the first adapter have no gradient, and nothing to run again."""
    transformer = set_up("selective", 3)
    for block in modules(transformer)[:2]:
        block.requires_grad_(False)
    with Count() as count, watch_recompute(transformer, "selective", 3):
        forward(transformer).backward()
    assert count.of[FORWARD] == LAYERS


# ------------------------------------------------------------------------------------------------------------ the guard


@pytest.mark.parametrize(
    ("kind", "keep", "asked", "message"),
    [
        ("full", None, None, "attention of block 0 ran forward 1 times and was run again 1 times"),
        ("selective", 2, 3, "attention of block 1 .*1 of 4 blocks"),
        ("selective", 3, 2, "attention of block 1 .* again 0 times in the backward pass, expected 1"),
        ("none", None, None, "block 0 ran forward 1 times and was run again 0 times"),
    ],
)
def test_attention_that_is_not_kept_as_asked_is_seen(kind, keep, asked, message):
    transformer = set_up(kind, keep)
    with pytest.raises(TrainingError, match=message) as caught, watch_recompute(transformer, "selective", asked):
        gradients(transformer)
    assert caught.value.fix and "memory.checkpointing" in caught.value.where


def test_the_operations_are_complete():
    """Every operation of torch that gives attention's output and logsumexp, by its schema, is one that is kept."""
    found = set()
    for name in dir(torch.ops.aten):
        if name.startswith("_scaled_dot_product_") and not name.endswith("_backward") and "math" not in name:
            packet = getattr(torch.ops.aten, name)
            found |= {getattr(packet, overload) for overload in packet.overloads()}
    assert len(found) >= 5 and all(map(is_attention, found))
    assert not any(
        map(is_attention, (torch.ops.aten.mm.default, torch.ops.aten._scaled_dot_product_attention_math.default))
    )


@pytest.mark.parametrize("kept", [True, False])
def test_a_kernel_of_its_own_is_kept_too(kept):
    """Under the name that FA3's package gives its operation; the autograd function around it is of the same form."""
    calls = []

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            output, logsumexp = torch.ops.flash_attn_3._flash_attn_forward(q, k, v)
            ctx.save_for_backward(q, k, v, output, logsumexp)
            return output

        @staticmethod
        def backward(ctx, gradient):
            q, k, v, output, logsumexp = ctx.saved_tensors
            again = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return again(gradient, q, k, v, output, logsumexp, 0.0, False)

    def forward(q, k, v):
        calls.append(1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]

    with torch.library._scoped_library("flash_attn_3", "DEF") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
        library.impl("_flash_attn_forward", forward, "CPU")
        inputs = [torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3)]
        tape = SavedAttention(enabled=kept)
        with tape.recording(), torch.no_grad():
            Attention.apply(*inputs)
        with tape.replaying():
            Attention.apply(*inputs).sum().backward()
    assert len(calls) == (1 if kept else 2)
    expected = torch.autograd.grad(nn.functional.scaled_dot_product_attention(*inputs).sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient)
