"""Streaming of blocks: the same numbers, true weights at any time, few copies, and no copy before or after its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from actors import Actors
from tiny_blocks import CPU, LAYERS, LORA, build, computed_once, forward, modules, run_blocks, values
from torch import Tensor, nn

from finetune.core.errors import TrainingError
from finetune.memory import host_buffers
from finetune.memory.activation_offload import ActivationOffload
from finetune.memory.block_streaming import BlockStreaming
from finetune.memory.host_buffers import ALIGNMENT, BufferLayout, flat_buffers, rounded
from finetune.memory.quantized_linear import QuantisedLinear
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod


def streamed(
    transformer: nn.Module, indices: Sequence[int] = range(LAYERS), ring: int = 2, **options: object
) -> BlockStreaming:
    weights = BlockStreaming(modules(transformer), indices, ring, CPU, **options)
    weights.install()
    run_blocks(transformer, weights)
    return weights


def train(transformer: nn.Module, steps: int = 3, *, after: Callable[[], None] | None = None) -> list[Tensor]:
    """Losses of a few optimizer steps of two micro-batches, with a pass without gradients after each."""
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for step in range(steps):
        for micro in range(2):
            torch.manual_seed(10 * step + micro)  # of LoRA's dropout
            loss = forward(transformer, seed=10 * step + micro)
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after()
        with torch.no_grad():
            torch.manual_seed(step)
            losses.append(forward(transformer, seed=100 + step))
    return losses


def require_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) >= 60
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


# ------------------------------------------------------------------------------------------------------- same numbers


@pytest.mark.parametrize(
    ("variant", "dtype"), [("2b", torch.float32), ("5b", torch.bfloat16), ("1.5-5b", torch.float32)], ids=str
)
def test_training_is_the_same_bit_for_bit(variant, dtype):
    theirs = build(variant, dtype=dtype)
    expected = train(theirs, 2)
    ours = build(variant, dtype=dtype)
    streamed(ours)
    for loss, their_loss in zip(train(ours, 2), expected, strict=True):
        assert torch.equal(loss, their_loss)
    require_equal(values(ours), values(theirs))


@computed_once
def resident(method: LoraMethod | FullMethod, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and weights of a run whose weights stay on the device."""
    transformer = build(method=method)
    run_blocks(transformer)  # adds up the time embedding's gradient block by block, unlike plain autograd
    return torch.stack(train(transformer, steps)), values(transformer)


@pytest.mark.parametrize(("indices", "ring"), [([1], 1), ([0, 2], 3), ([3, 1, 2], 2)], ids=str)
def test_every_ring_and_choice_of_blocks(indices, ring):
    require_resident_run(LORA, indices, ring)


@pytest.mark.parametrize(("indices", "ring"), [([0, 2], 1), ([0, 1, 2, 3], 3)], ids=str)
def test_weights_that_train_stream_too(indices, ring):
    require_resident_run(FullMethod(), indices, ring)


def require_resident_run(method: LoraMethod | FullMethod, indices: list[int], ring: int) -> None:
    losses, weights = resident(method, 2 if method.kind == "full" else 1)
    transformer = build(method=method)
    # An optimizer of the device's cannot take weights of the host: test_actors.py watches a strategy that can.
    full = method.kind == "full"
    with nullcontext() if full else Actors():
        residency = streamed(transformer, indices, ring, trainable=full)
        ours = train(transformer, len(losses) // 3, after=residency.invalidate if full else None)
    assert torch.equal(torch.stack(ours), losses)
    require_equal(values(transformer), weights)
    assert residency.loads >= len(indices)


def test_weights_that_train_are_stale_without_invalidation():
    """Canary of the test above."""
    losses, _ = resident(FullMethod(), 2)
    transformer = build(method=FullMethod())
    streamed(transformer, trainable=True, ring=3)
    assert not torch.equal(torch.stack(train(transformer, 2)), losses)


# -------------------------------------------------------------------------------------------- two passes, broken passes


def test_two_forward_passes_before_their_backward_passes():
    results = []
    for streams in (False, True):
        transformer = build()
        with Actors():
            if streams:
                streamed(transformer)
            torch.manual_seed(0)
            first, second = forward(transformer, 1), forward(transformer, 2)
            with torch.no_grad():
                forward(transformer, 3)
            first.backward()
            second.backward()
        results.append([p.grad for p in transformer.parameters() if p.requires_grad])
    assert len(results[0]) >= 32 and all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize(("where", "backward"), [(0, False), (2, True)], ids=["forward", "backward"])
def test_a_pass_that_fails_leaves_nothing_behind(where, backward):
    expected, _ = resident(LORA, 1)
    transformer = build()
    before = values(transformer)
    with Actors():
        streamed(transformer)
        block, armed = modules(transformer)[where], []

        def fail(*_: object) -> None:
            if armed and torch.is_grad_enabled() == backward:
                raise MemoryError("as a test has it")

        block.attn1.register_forward_pre_hook(fail)
        armed.append(True)
        loss = forward(transformer) if backward else None
        with pytest.raises(MemoryError):
            forward(transformer) if loss is None else loss.backward()
        armed.clear()
        left = values(transformer)
        for parameter in transformer.parameters():
            parameter.grad = None
        ours = train(transformer, 1)
    require_equal(left, before)
    assert torch.equal(torch.stack(ours), expected)


def test_a_block_that_was_never_released_gives_its_slot_back():
    transformer = build()
    before = values(transformer)
    weights = streamed(transformer, ring=1)
    weights.acquire(0, backward=False)
    weights.acquire(3, backward=False)
    weights.release(0, backward=False)  # too late, and harmless
    weights.release(3, backward=False)
    require_equal(values(transformer), before)


# ------------------------------------------------------------------------------------------------- how much is copied


@pytest.mark.parametrize(("count", "ring"), [(4, 1), (4, 2), (4, 3), (3, 2), (2, 2), (2, 3)])
def test_each_turn_spares_a_ring_of_copies(count, ring):
    """A step copies every streamed block twice, less what survives the two turns; and only the first block ever waits
    for its copy."""
    transformer = build()
    weights = streamed(transformer, range(count), ring)
    forward(transformer).backward()
    held = min(ring, count)
    assert (weights.loads, weights.stalls) == (count + count - held, 1)
    for step in range(1, 3):
        forward(transformer).backward()
        assert weights.loads == count + count - held + step * 2 * (count - held)
    assert weights.stalls == 1


def test_passes_without_gradients_foresee_each_other():
    transformer = build()
    weights = streamed(transformer, ring=2)
    with torch.no_grad():
        for _ in range(3):
            forward(transformer)
    assert (weights.loads, weights.stalls) == (3 * LAYERS + 2, 1)  # two for the pass that may come


# ----------------------------------------------------------------------------------------------- where the weights are


def test_weights_are_on_the_host_between_passes_and_in_the_ring_within():
    transformer = build()
    weights = streamed(transformer, [0, 2])
    block = modules(transformer)[2]
    frozen = [p for p in block.parameters() if not p.requires_grad]
    adapters = [p for p in block.parameters() if p.requires_grad]
    seen = []

    def labels(tensors: Sequence[Tensor]) -> set[object]:
        return {host_buffers.label_of(tensor.untyped_storage()) for tensor in tensors}

    block.attn1.register_forward_pre_hook(lambda *_: seen.append((labels(frozen), labels(adapters))))
    forward(transformer).backward()
    ring, home = (
        host_buffers.BufferLabel("streaming ring", False),
        host_buffers.BufferLabel("streamed weights", True, True),
    )
    assert seen == [({ring}, {None})] * 2
    assert labels(frozen) == {home}
    assert labels(modules(transformer)[1].parameters()) == {None}
    slots = {p.untyped_storage().nbytes() for p in [weights._slots[0].flat, weights._slots[1].flat]}
    assert slots == {BufferLayout.of(frozen).nbytes}


def test_the_model_may_be_moved_and_only_the_rest_moves():
    """accelerate calls ``.to`` on what it prepares; here ``meta`` stands for a device."""
    transformer = build()
    before = values(transformer)
    weights = streamed(transformer, [1])
    transformer.to("meta")
    block = modules(transformer)[1]
    assert all(p.is_meta == p.requires_grad for p in block.parameters())
    assert all(p.is_meta for p in modules(transformer)[0].parameters())
    with pytest.raises(TrainingError, match="dtype of weights that are kept on the host"):
        transformer.to(torch.bfloat16)
    weights.remove()
    for name, parameter in block.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[f"transformer_blocks.1.{name}"])
    block.to("meta")
    assert all(p.is_meta for p in block.parameters())


def test_scales_of_a_quantised_base_stay_with_their_codes():
    """The tensors that a pass binds to the device, also after ``.to`` and casts that are not meant for them."""
    transformer = build()
    feed_forward = modules(transformer)[1].ff.net
    quantised = QuantisedLinear.like(feed_forward[2], "fp8").requires_grad_(False)
    quantised.quantise(feed_forward[2].weight)
    feed_forward[2] = quantised
    before = quantised.stored
    streamed(transformer, [1])
    transformer.to("meta")
    transformer.to(torch.float32)
    assert all(tensor is before[name] and not tensor.is_meta for name, tensor in quantised.stored.items())


def test_removing_restores_everything():
    transformer = build()
    before, attributes = values(transformer), [dict(block.__dict__) for block in modules(transformer)]
    objects = {name: id(p) for name, p in transformer.named_parameters()}
    weights = BlockStreaming(modules(transformer), range(LAYERS), 2, CPU)
    for device in (None, CPU):
        weights.install()
        blocks = run_blocks(transformer, weights)
        forward(transformer).backward()
        blocks.remove()
        weights.remove(device)
        require_equal(values(transformer), before)
        assert {name: id(p) for name, p in transformer.named_parameters()} == objects
        assert all(host_buffers.label_of(p.untyped_storage()) is None for p in transformer.parameters())
        assert [list(block.__dict__) for block in modules(transformer)] == [list(names) for names in attributes]
        assert not any(block._forward_pre_hooks for block in modules(transformer))


def test_a_block_with_nothing_to_stream_is_refused():
    transformer = build(method=FullMethod())
    with pytest.raises(TrainingError, match="block 0 has no frozen weights"):
        BlockStreaming(modules(transformer), [0], 2, CPU).install()


# --------------------------------------------------------------------------------------------------------- the arena


def test_an_arena_rounds_up_little():
    mib = 2**20
    for sizes, bound in [([252 * mib] * 42, 1.02), ([138 * mib] * 42, 1.07), ([105 * mib + 1] * 40, 1.08), ([1], 1.0)]:
        taken: list[int] = []

        def fake(nbytes: int, *, pinned: bool, what: str, taken: list[int] = taken) -> Tensor:
            taken.append(nbytes)
            return torch.empty(nbytes, dtype=torch.uint8, device="meta")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finetune.memory.host_buffers.host_buffer", fake)
            pieces = [piece.numel() for piece in flat_buffers(sizes, pinned=True, what="streamed weights")]
        assert pieces == sizes
        assert sum(map(rounded, taken)) <= bound * max(sum(sizes), ALIGNMENT)


def test_an_arena_allocates_as_it_is_used(monkeypatch):
    made = []
    monkeypatch.setattr(
        "finetune.memory.host_buffers.host_buffer",
        lambda nbytes, **_: made.append(nbytes) or torch.empty(nbytes, dtype=torch.uint8, device="meta"),
    )
    pieces = flat_buffers([2**30 - 1] * 4, pinned=True, what="streamed weights")
    next(pieces), next(pieces)
    assert len(made) == 1
    next(pieces)
    assert len(made) == 2


def test_pieces_do_not_overlap_and_are_aligned():
    pieces = list(flat_buffers([300, 1, 0, 512], pinned=False, what="streamed weights"))
    spans = sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces if piece.numel())
    assert all(a[1] <= b[0] for a, b in pairwise(spans)) and len(spans) == 3
    offsets = [piece.storage_offset() for piece in pieces]
    assert all(offset % ALIGNMENT == 0 for offset in offsets)


def test_a_host_that_refuses_to_pin_gives_pageable_memory_and_says_so(monkeypatch):
    empty = torch.empty

    def refuse(*sizes: object, pin_memory: bool = False, **options: object) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.warns(UserWarning, match="cannot be pinned for streamed weights"):
        (piece,) = flat_buffers([64], pinned=True, what="streamed weights")
    label = host_buffers.label_of(piece.untyped_storage())
    assert label == host_buffers.BufferLabel("streamed weights", True, False)


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ring", [1, 2])
def test_on_a_gpu_the_same_bit_for_bit(ring):
    """With real streams and pinned memory, and blocks large enough for copies to take their time."""
    cuda, results = torch.device("cuda", 0), []
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the same sum in every run
    for streams in (False, True):
        transformer = build(heads=64, dropout=False).to(cuda)
        if streams:
            weights = BlockStreaming(modules(transformer), range(LAYERS), ring, cuda)
            weights.install()
            run_blocks(transformer, weights, ActivationOffload(LAYERS, cuda, keep=1))
        else:
            run_blocks(transformer)
        with math:
            results.append(train(transformer, 3))
        if streams:
            assert {p.device.type for block in modules(transformer) for p in block.parameters()} == {"cpu", "cuda"}
            assert all(home.flat.is_pinned() for home in weights._homes)
    assert torch.equal(torch.stack(results[0]), torch.stack(results[1]))


# ------------------------------------------------------------------------------------------------------------- canaries


def test_a_stale_slot_is_seen(monkeypatch):
    """The comparison of losses notices a slot that keeps another block's weights."""
    expected = forward(build())
    transformer = build()
    streamed(transformer)
    monkeypatch.setattr(BlockStreaming, "_load", lambda self, slot, rank: setattr(slot, "block", rank))
    assert not torch.equal(forward(transformer), expected)
