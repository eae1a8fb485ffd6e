"""Boundaries on the host: the same gradients, buffers used again, and no copy before or after its time."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from actors import Actors, RaceError, holding_nothing
from tiny_blocks import CPU, LAYERS, LORA, build, computed_once, forward, modules, run_blocks
from torch import Tensor, nn

from finetune.memory.activation_offload import ActivationOffload
from finetune.memory.runner import block_runner
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod


def offloaded(transformer: nn.Module, keep: int = 2) -> ActivationOffload:
    boundaries = ActivationOffload(LAYERS, CPU, keep=keep)
    run_blocks(transformer, activations=boundaries)
    return boundaries


def gradients(transformer: nn.Module, *, size: int = 4) -> list[Tensor]:
    """Of two passes that are both under way, one of them larger, with a pass without gradients in between."""
    for parameter in transformer.parameters():
        parameter.grad = None
    torch.manual_seed(3)  # of LoRA's dropout
    first = forward(transformer, 1, size)
    with torch.no_grad():
        forward(transformer, 9)
    second = forward(transformer, 2)
    second.backward()
    first.backward()
    forward(transformer, 3).backward()
    return [first.detach(), second.detach(), *(p.grad for p in transformer.parameters() if p.requires_grad)]


@computed_once
def expected(variant: str, method: LoraMethod | FullMethod, size: int = 4) -> list[Tensor]:
    transformer = build(variant, method)
    run_blocks(transformer)
    return gradients(transformer, size=size)


def require_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) >= 34
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("variant", "method"), [("2b", LORA), ("5b", FullMethod())])
def test_same_gradients_bit_for_bit(variant, method):
    transformer = build(variant, method)
    boundaries = offloaded(transformer)
    require_equal(gradients(transformer), expected(variant, method))
    assert boundaries.stalls == 0


@pytest.mark.parametrize("keep", [0, 1, 9])
def test_no_copy_before_or_after_its_time(keep):
    transformer = build()
    with Actors() as actors:
        boundaries = offloaded(transformer, keep)
        ours = gradients(transformer, size=8)
    require_equal(ours, expected("5b", LORA, 8))
    assert boundaries.stalls == (3 if keep == 0 else 0)  # with none kept, the first one wanted has no time to come
    away = 3 * max(LAYERS - keep, 0)
    assert actors.copied(boundaries._outward) == 2 * away and actors.copied(boundaries._inward) == away


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_pass_that_is_broken_off_is_forgotten(where):
    transformer = build()
    with Actors():
        boundaries = offloaded(transformer, keep=1)
        block, armed = modules(transformer)[1], [True]

        def fail(*_: object) -> None:
            if armed and torch.is_grad_enabled() == (where == "backward"):
                raise MemoryError("as a test has it")

        handle = block.attn1.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            forward(transformer, size=8).backward()
        handle.remove()
        gc.collect()
        ours = gradients(transformer)
    require_equal(ours, expected("5b", LORA))
    assert len(boundaries._pool._spare) == 6  # of two passes under way at once, and not of three


@pytest.mark.parametrize("waits", [True, False])
def test_nothing_arrives_in_memory_that_was_given_back(monkeypatch, waits):
    """A pass is broken off, and the model taken out of its state, while a boundary is on its way to the device."""
    if not waits:  # canary
        monkeypatch.setattr(ActivationOffload, "close", lambda self: None)
    transformer = build()
    with nullcontext() if waits else holding_nothing(), Actors() as actors:
        offloaded(transformer, keep=1)
        block = modules(transformer)[1]

        def fail(*_: object) -> None:
            if torch.is_grad_enabled():
                raise MemoryError("as a test has it")

        handle = block.attn1.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            forward(transformer).backward()
        handle.remove()
        blocks = block_runner(transformer)
        assert blocks is not None
        with nullcontext() if waits else pytest.raises(RaceError, match="freed before"):
            blocks.remove()
            del blocks
            gc.collect()
            actors.require_nothing_freed()


def test_a_loss_that_is_dropped_gives_its_buffers_back():
    transformer = build()
    boundaries = offloaded(transformer)
    loss = forward(transformer)
    assert len(boundaries._pool._spare) == 0
    del loss
    gc.collect()
    assert len(boundaries._pool._spare) == 2


def pieces(boundaries: ActivationOffload) -> list[int]:
    return sorted(piece.flat.data_ptr() for piece in boundaries._pool._spare)


def test_buffers_are_used_again_by_every_step_and_smaller_bucket():
    transformer = build()
    boundaries = offloaded(transformer)
    forward(transformer, size=8).backward()
    first = pieces(boundaries)
    assert len(first) == LAYERS - 2
    for size in (8, 4, 8):
        forward(transformer, size=size).backward()
        assert pieces(boundaries) == first


def test_a_larger_bucket_replaces_them():
    transformer = build()
    boundaries = offloaded(transformer)
    waiting = forward(transformer, size=4)
    forward(transformer, size=8).backward()
    large = {piece.flat.numel() for piece in boundaries._pool._spare}
    waiting.backward()  # its small buffers come back, and are not kept
    assert len(boundaries._pool._spare) == LAYERS - 2 and large == {p.flat.numel() for p in boundaries._pool._spare}


def test_a_boundary_is_given_once():
    boundaries = ActivationOffload(1, CPU, keep=0)
    kept = boundaries.put(0, torch.ones(1, 2, 4), torch.ones(1, 1, 4))
    boundaries.get(0, kept)
    with pytest.raises(RuntimeError, match="fetched before"):
        boundaries.get(0, kept)


# ------------------------------------------------------------------------------------------------------------- canaries


def test_memory_that_is_freed_while_it_is_copied_is_seen(monkeypatch):
    transformer = build()

    def forget(self: ActivationOffload) -> None:
        self._leaving.clear()

    monkeypatch.setattr(ActivationOffload, "_release_sent", forget)
    with holding_nothing(), Actors() as actors:
        offloaded(transformer)
        with pytest.raises(RaceError, match="freed before"):
            forward(transformer).backward()
            actors.require_nothing_freed()


def test_a_buffer_that_is_overwritten_too_early_is_seen(monkeypatch):
    """The pool gives a buffer away again while its boundary is still wanted."""
    transformer = build()
    boundaries = offloaded(transformer, keep=0)
    theirs = expected("5b", LORA)
    taken = boundaries._pool.take
    monkeypatch.setattr(boundaries._pool, "take", lambda nbytes: [p := taken(nbytes), boundaries._pool.give_back(p)][0])
    assert not all(torch.equal(*pair) for pair in zip(gradients(transformer), theirs, strict=True))
