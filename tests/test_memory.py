"""Every memory technique: same loss, same gradients, and really at work."""

from __future__ import annotations

from itertools import pairwise
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from finetune.errors import TrainingError
from finetune.memory import MemoryConfig, assert_recompute
from finetune.memory.checkpointing import Checkpointing
from finetune.tiny import tiny_transformer
from finetune.trainers.method import FullMethod, LoraMethod
from finetune.types import Batch

KINDS = get_args(Checkpointing)
METHODS = [LoraMethod(rank=4, dropout=0.2), FullMethod()]
VARIANTS = ["5b", "1.5-5b"]


def forward(transformer: nn.Module) -> Tensor:
    config = transformer.config
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(2, 4 if config.patch_size_t else 3, config.in_channels, 8, 8, generator=generator)
    text = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    dtype = transformer.dtype
    prediction = transformer(latents.to(dtype), text.to(dtype), torch.tensor([500, 3]), return_dict=False)[0]
    return prediction.float().square().mean()


def prepared(kind: str, method: LoraMethod | FullMethod, variant: str = "5b", dtype: torch.dtype = torch.float32):
    transformer = tiny_transformer(variant).to(dtype)
    memory = MemoryConfig(checkpointing=kind)
    memory.apply(transformer)
    method.apply(transformer, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # LoRA's B is zero at first, and its A would get no gradient
        for parameter in method.trainable(transformer).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return transformer.train(), memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_same_loss_same_gradients(kind, variant, method, dtype):
    results = []
    for each in ("none", kind):
        transformer, memory = prepared(each, method, variant, dtype)
        torch.manual_seed(11)  # of LoRA's dropout
        with assert_recompute(transformer, memory):
            loss = forward(transformer)
            loss.backward()
        gradients = {name: p.grad for name, p in method.trainable(transformer).items()}
        assert all(gradient is not None for gradient in gradients.values()) and len(gradients) >= 16
        results.append((loss.detach(), gradients))
    (theirs, their_gradients), (ours, our_gradients) = results
    assert torch.equal(ours, theirs)
    for name in their_gradients:
        assert torch.equal(our_gradients[name], their_gradients[name]), name


def test_the_comparison_notices_a_difference():
    """Canary of the test above: another dropout mask is seen."""
    losses = []
    for seed in (1, 2):
        transformer, _ = prepared("full", METHODS[0])
        torch.manual_seed(seed)
        losses.append(forward(transformer).detach())
    assert not torch.equal(*losses)


def test_full_saves_activations():
    """What it is for: far fewer bytes are kept for the backward pass."""
    kept = {}
    for kind in KINDS:
        transformer, _ = prepared(kind, FullMethod())
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages=storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = forward(transformer)
        weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}
        kept[kind] = sum(size for address, size in storages.items() if address not in weights)
        assert loss.requires_grad
    assert kept["full"] < kept["none"] / 3


# ----------------------------------------------------------------------------------------------------------- the guard


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_passes_over_accumulated_micro_batches_and_validation(kind):
    transformer, memory = prepared(kind, METHODS[0])
    with assert_recompute(transformer, memory):
        for _ in range(3):
            forward(transformer).backward()
        with torch.no_grad():
            forward(transformer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_a_flag_unset_behind_its_back_is_seen():
    transformer, memory = prepared("full", METHODS[0])
    transformer.gradient_checkpointing = False
    with (
        pytest.raises(TrainingError, match="block 0 ran forward 1 times and was run again 0 times") as caught,
        assert_recompute(transformer, memory),
    ):
        forward(transformer).backward()
    assert "2 of 2 blocks" in str(caught.value) and caught.value.fix


def test_recompute_nobody_asked_for_is_seen():
    transformer, memory = prepared("none", METHODS[0])
    transformer.enable_gradient_checkpointing()
    with (
        pytest.raises(TrainingError, match="was run again 1 times in the backward pass, expected 0"),
        assert_recompute(transformer, memory),
    ):
        forward(transformer).backward()


def test_one_block_that_is_not_run_again_is_seen():
    transformer, memory = prepared("full", METHODS[0])
    checkpoint = transformer._gradient_checkpointing_func
    last = transformer.transformer_blocks[-1]
    transformer._gradient_checkpointing_func = lambda block, *a: block(*a) if block is last else checkpoint(block, *a)
    with pytest.raises(TrainingError, match=r"block 1 .* \(1 of 2 blocks"), assert_recompute(transformer, memory):
        forward(transformer).backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_that_saw_nothing_says_so(kind):
    transformer, memory = prepared(kind, METHODS[0])
    with (
        pytest.raises(TrainingError, match="no block of the transformer ran with gradients"),
        assert_recompute(transformer, memory),
        torch.no_grad(),
    ):
        forward(transformer)


def test_blocks_in_front_of_the_first_adapter_have_nothing_to_run_again():
    transformer, memory = prepared("full", LoraMethod(rank=4, targets=r"transformer_blocks\.1\..*"))
    with assert_recompute(transformer, memory):
        forward(transformer).backward()


def test_an_error_inside_is_not_hidden():
    transformer, memory = prepared("full", METHODS[0])
    with pytest.raises(ZeroDivisionError), assert_recompute(transformer, memory):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


def test_applying_again_changes_the_kind():
    transformer, _ = prepared("full", METHODS[0])
    assert transformer.gradient_checkpointing
    MemoryConfig(checkpointing="none").apply(transformer)
    assert not transformer.gradient_checkpointing
    with pytest.raises(ValidationError):
        MemoryConfig(checkpointing="some")


# ------------------------------------------------------------------------------------------- splitting, and the notches


def a_batch(clips: int, *, image: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(clips, *shape, generator=generator)

    return Batch(
        latents=noise(4, 3, 8, 8),
        noise=noise(4, 3, 8, 8),
        timesteps=torch.arange(clips) * 100,
        prompt_embeds=noise(16, 32),
        image_latents=noise(4, 1, 8, 8) if image else None,
        slots=tuple(range(10, 10 + clips)),
        clips=tuple(f"{number}.mp4" for number in range(clips)),
    )


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("clips,sizes", [(None, [5]), (5, [5]), (9, [5]), (3, [3, 2]), (1, [1] * 5)])
def test_parts_are_the_whole_in_its_order(clips, sizes, image):
    batch = a_batch(5, image=image)
    parts = list(MemoryConfig(clips_at_once=clips).parts(batch))
    assert [len(part.slots) for part in parts] == sizes
    assert sum((part.slots for part in parts), ()) == batch.slots
    assert sum((part.clips for part in parts), ()) == batch.clips
    for name in ("latents", "noise", "timesteps", "prompt_embeds", "image_latents"):
        whole = getattr(batch, name)
        if whole is None:
            assert all(getattr(part, name) is None for part in parts)
        else:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)


@pytest.mark.parametrize("method", [LoraMethod(rank=4), FullMethod()], ids=lambda method: method.kind)
def test_splitting_keeps_losses_and_gradients_to_rounding(method):
    """Float32 on a CPU: every loss to 1e-6 of itself, the gradient to 1e-5 of its norm."""
    results = []
    for clips in (None, 2, 1):
        transformer, _ = prepared("none", method)
        losses = []
        for part in MemoryConfig(clips_at_once=clips).parts(a_batch(4)):
            prediction = transformer(
                part.latents.transpose(1, 2), part.prompt_embeds, part.timesteps, return_dict=False
            )[0]
            loss = prediction.square().flatten(1).mean(1)
            loss.sum().backward()
            losses.append(loss.detach())
        gradients = torch.cat([p.grad.flatten() for p in method.trainable(transformer).values()])
        results.append((torch.cat(losses), gradients))
    (losses, gradients), *others = results
    assert gradients.norm() > 0
    for their_losses, their_gradients in others:
        torch.testing.assert_close(their_losses, losses, rtol=1e-6, atol=0)
        assert (their_gradients - gradients).norm() < 1e-5 * gradients.norm()


def said(memory: MemoryConfig, batch_size: int) -> list[str]:
    """Each notch in the words of the one before."""
    notches = memory.notches(batch_size)
    assert notches[0] is memory
    return [before.difference(after) for before, after in pairwise(notches)]


@pytest.mark.parametrize(
    "memory,batch_size,steps",
    [
        (MemoryConfig(checkpointing="none"), 1, ["memory.checkpointing: full"]),
        (MemoryConfig(), 1, []),
        (MemoryConfig(), 5, ["memory.clips_at_once: 3", "memory.clips_at_once: 2", "memory.clips_at_once: 1"]),
        (MemoryConfig(checkpointing="none"), 2, ["memory.checkpointing: full", "memory.clips_at_once: 1"]),
        (MemoryConfig(clips_at_once=2), 8, ["memory.clips_at_once: 1"]),
        (MemoryConfig(clips_at_once=8), 4, ["memory.clips_at_once: 2", "memory.clips_at_once: 1"]),
    ],
)
def test_notches_go_down_one_technique_at_a_time(memory, batch_size, steps):
    assert said(memory, batch_size) == steps


def test_every_notch_can_be_written_into_a_configuration():
    for notch in MemoryConfig(checkpointing="none").notches(7):
        assert MemoryConfig.model_validate(notch.model_dump(mode="json")) == notch
    first, *_, last = MemoryConfig(checkpointing="none").notches(7)
    assert first.difference(last) == "memory.checkpointing: full, memory.clips_at_once: 1"
    assert not first.difference(first)
