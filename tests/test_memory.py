"""Every memory technique: same loss, same gradients, and really at work."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from typing import get_args

import pytest
import torch
from tiny_blocks import covering
from torch import Tensor, nn

from finetune.cogvideox.load import place
from finetune.core.errors import TrainingError
from finetune.core.types import Batch
from finetune.memory.config import Checkpointing, MemoryConfig, Traits
from finetune.memory.quantized_linear import placement
from finetune.memory.runner import assert_recompute, undo
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import tiny_transformer

KINDS = get_args(Checkpointing)
METHODS = [LoraMethod(rank=4, dropout=0.2), FullMethod()]


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


@pytest.mark.parametrize(
    ("kind", "variant", "method", "dtype"),
    [
        ("full", "5b", METHODS[0], torch.bfloat16),
        ("full", "1.5-5b", METHODS[1], torch.float32),
        ("selective", "5b", METHODS[1], torch.bfloat16),
        ("selective", "1.5-5b", METHODS[0], torch.float32),
    ],
    ids=str,
)
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


def test_an_error_inside_is_not_hidden():
    transformer, memory = prepared("full", METHODS[0])
    with pytest.raises(ZeroDivisionError), assert_recompute(transformer, memory):
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())


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
    parts = list(MemoryConfig(clips_at_once=clips).split(batch))
    assert [len(part.slots) for part in parts] == sizes
    assert sum((part.slots for part in parts), ()) == batch.slots
    assert sum((part.clips for part in parts), ()) == batch.clips
    for name in ("latents", "noise", "timesteps", "prompt_embeds", "image_latents"):
        whole = getattr(batch, name)
        if whole is None:
            assert all(getattr(part, name) is None for part in parts)
        else:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)


def said(memory: MemoryConfig, traits: Traits) -> list[str]:
    """Each notch in the words of the one before."""
    notches = memory.fallbacks(traits)
    assert notches[0] is memory
    return [before.difference(after) for before, after in pairwise(notches)]


LORA, EVERYTHING = Traits(), Traits(full=True)
DOWN = ["memory.block: lean", "memory.modulation: host", "memory.activations: host", "memory.streamed_blocks: all"]


def clips(*numbers: int) -> list[str]:
    return [f"memory.clips_at_once: {number}" for number in numbers]


@pytest.mark.parametrize(
    "memory,traits,steps",
    [
        (MemoryConfig(checkpointing="none"), LORA, ["memory.checkpointing: full", *DOWN]),
        (
            MemoryConfig(checkpointing="selective", keep_attention=1, block="lean"),
            LORA,
            ["memory.checkpointing: full, memory.keep_attention: null", *DOWN[1:]],
        ),
        (MemoryConfig(), EVERYTHING, [DOWN[0], DOWN[2]]),
        (MemoryConfig(), replace(LORA, adapts_adaln=True), [DOWN[0], DOWN[2], DOWN[3]]),
        (MemoryConfig(base="fp8"), LORA, DOWN),
        (MemoryConfig(), replace(LORA, processes=2), [DOWN[0], DOWN[2]]),
        (MemoryConfig(checkpointing="none"), replace(LORA, processes=2, sharded=True), ["memory.checkpointing: full"]),
        (MemoryConfig(), replace(LORA, sharded=True, batch_size=5), clips(3, 2, 1)),
        (MemoryConfig(clips_at_once=2), replace(LORA, batch_size=8), [*DOWN, *clips(1)]),
        (MemoryConfig(clips_at_once=8), replace(LORA, batch_size=4), [*DOWN, *clips(2, 1)]),
        (
            MemoryConfig(block="lean", gradient_release="exact", optimizer_states="host"),
            replace(EVERYTHING, batch_size=2),
            [DOWN[2], DOWN[3]],
        ),
    ],
)
def test_notches_go_down_one_technique_at_a_time(memory, traits, steps):
    assert said(memory, traits) == steps


def test_every_notch_can_be_written_into_a_configuration():
    notches = MemoryConfig(checkpointing="none").fallbacks(replace(LORA, batch_size=7))
    assert len(notches) == 9
    for notch in notches:
        assert MemoryConfig.model_validate(notch.model_dump(mode="json")) == notch
        assert not notch.faults(replace(LORA, batch_size=7))
    first, *_, last = notches
    assert first.difference(last) == ", ".join(["memory.checkpointing: full", *sorted_like(DOWN), *clips(1)])
    assert not first.difference(first)


def sorted_like(steps: list[str]) -> list[str]:
    """In the order of the section's fields."""
    fields = list(MemoryConfig.model_fields)
    return sorted(steps, key=lambda step: fields.index(step.removeprefix("memory.").split(":")[0]))


@pytest.mark.parametrize(
    "memory,traits,option,words",
    [
        ({"keep_attention": 2}, LORA, "keep_attention", "only selective checkpointing keeps attention"),
        ({"checkpointing": "none", "block": "lean"}, LORA, "block", "asks for the opposite"),
        ({"checkpointing": "none", "activations": "host"}, LORA, "activations", "asks for the opposite"),
        ({"checkpointing": "none", "streamed_blocks": 1}, LORA, "streamed_blocks", "asks for the opposite"),
        ({"base": "nf4"}, EVERYTHING, "base", "full fine-tuning trains it"),
        ({"base": "fp8"}, Traits(dora=True), "base", "DoRA needs the norms"),
        ({"modulation": "host"}, EVERYTHING, "modulation", "the adaLN layers train"),
        ({"modulation": "host"}, Traits(adapts_adaln=True), "modulation", "the adaLN layers train"),
        ({"gradient_release": "exact"}, LORA, "gradient_release", "gradients are small"),
        ({"gradient_release": "exact"}, Traits(full=True, accumulation=2), "gradient_release", "cannot be accumulated"),
        (
            {"gradient_release": "per_parameter", "clips_at_once": 1},
            Traits(full=True, batch_size=2),
            "gradient_release",
            "cannot be accumulated",
        ),
        ({"optimizer_states": "host"}, EVERYTHING, "optimizer_states", "gradients that are released"),
        ({"optimizer_states": "host"}, LORA, "optimizer_states", "states are small"),
        (
            {"streamed_blocks": "all", "gradient_release": "exact"},
            EVERYTHING,
            "streamed_blocks",
            "only stream if they are updated on the host",
        ),
        ({"streamed_blocks": 3}, Traits(processes=2), "streamed_blocks", "works in a single process"),
        ({"modulation": "host"}, Traits(processes=2), "modulation", "works in a single process"),
        ({"block": "lean"}, Traits(processes=2, sharded=True), "block", "FSDP2 and ZeRO"),
        ({"base": "int8"}, Traits(processes=1, sharded=True), "base", "FSDP2 and ZeRO"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(memory, traits, option, words):
    (fault,) = MemoryConfig.model_validate(memory).faults(traits)
    assert fault.option == option and words in fault.what and fault.fix


def test_what_goes_together_is_not_refused():
    """Canary of the test above: without the one thing that does not fit, nothing is said."""
    assert not MemoryConfig().faults(LORA) and not MemoryConfig().faults(EVERYTHING)
    everything = {"checkpointing": "selective", "block": "lean", "activations": "host", "streamed_blocks": "all"}
    assert not MemoryConfig.model_validate(everything | {"base": "fp8", "modulation": "host"}).faults(LORA)
    released = {"gradient_release": "exact", "optimizer_states": "host"}
    assert not MemoryConfig.model_validate(everything | released).faults(EVERYTHING)


# ---------------------------------------------------------------------------- every technique, and every pair that goes

TECHNIQUES: dict[str, dict[str, object]] = {
    "selective": {"checkpointing": "selective"},
    "one-attention": {"checkpointing": "selective", "keep_attention": 1},
    "lean": {"block": "lean"},
    "offload": {"activations": "host"},
    "stream": {"streamed_blocks": "all", "ring": 1},
    "stream-one": {"streamed_blocks": 1},
    "fp8": {"base": "fp8"},
    "fp8-64": {"base": "fp8_64"},
    "int8": {"base": "int8"},
    "nf4": {"base": "nf4"},
    "modulation": {"modulation": "host"},
    "split": {"clips_at_once": 1},
}


OFF: dict[str, object] = {}
CHOICES = [
    [OFF, TECHNIQUES["selective"], TECHNIQUES["one-attention"]],
    [OFF, TECHNIQUES["lean"]],
    [OFF, TECHNIQUES["offload"]],
    [OFF, TECHNIQUES["split"]],
]
OF_ADAPTERS = [
    [OFF, TECHNIQUES["modulation"]],
    [OFF, TECHNIQUES["stream"], TECHNIQUES["stream-one"]],
    [OFF, *(TECHNIQUES[name] for name in ("fp8", "fp8-64", "int8", "nf4"))],
]
TRAITS = {"lora": replace(LORA, batch_size=2), "full": replace(EVERYTHING, batch_size=2)}


def _states(kind: str) -> dict[str, MemoryConfig]:
    """Every technique alone, and some states in which every two of them are together."""
    together = covering([*CHOICES, *(OF_ADAPTERS if kind == "lora" else [])], TRAITS[kind])
    states = (MemoryConfig.model_validate(state) for state in (*TECHNIQUES.values(), *together))
    return {f"{kind}, {state}": state for state in states if not state.faults(TRAITS[kind])}


STATES = {
    name: (method, state)
    for method in (LoraMethod(rank=4), FullMethod())
    for name, state in _states(method.kind).items()
}
EXACT = 0.0
ROUNDED = 1e-5
"""Of the norm, in float32: where sums are formed in another order."""


CPU = torch.device("cpu")


def trained(method, memory: MemoryConfig, variant: str, device: torch.device = CPU) -> nn.Module:
    """A transformer with what trains in it, its base held as ``memory`` says, in the state ``memory``."""
    whole = tiny_transformer(variant)
    transformer = tiny_transformer(variant).to("meta")
    place(transformer, whole.state_dict().items(), CPU, placement(memory.base))
    for name, buffer in whole.named_buffers():
        if name not in whole.state_dict():
            owner, _, leaf = name.rpartition(".")
            transformer.get_submodule(owner)._buffers[leaf] = buffer
    method.apply(transformer, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable(transformer).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    memory.apply(transformer, device)
    return transformer.train()


def step_of(
    method, memory: MemoryConfig, variant: str = "5b", device: torch.device = CPU
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of one micro-batch, on the CPU."""
    transformer = trained(method, memory, variant, device)
    batch = on(device, a_batch(2))
    losses = []
    with assert_recompute(transformer, memory):
        for part in memory.split(batch):
            prediction = denoise_tiny(transformer, part)
            loss = prediction.square().flatten(1).mean(1)
            loss.sum().backward()
            losses.append(loss.detach())
    gradients = {name: p.grad.cpu().clone() for name, p in method.trainable(transformer).items()}
    with torch.no_grad():  # as validation and sampling do, in the same state
        again = denoise_tiny(transformer, batch).square().flatten(1).mean(1)
    torch.testing.assert_close(again, torch.cat(losses), rtol=1e-5, atol=0)
    undo(transformer)
    return torch.cat(losses).cpu(), gradients


def on(device: torch.device, batch: Batch) -> Batch:
    """The batch on ``device``."""
    tensors = {name: value.to(device) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def denoise_tiny(transformer: nn.Module, batch: Batch) -> Tensor:
    arguments = (batch.latents.transpose(1, 2), batch.prompt_embeds, batch.timesteps)
    prediction: Tensor = transformer(*arguments, return_dict=False)[0]
    return prediction.float()


@cache
def reference(kind: str, base: str, device: torch.device = CPU) -> tuple[Tensor, dict[str, Tensor]]:
    """What is computed without any technique but the base's format."""
    method = LoraMethod(rank=4) if kind == "lora" else FullMethod()
    return step_of(method, MemoryConfig.model_validate({"checkpointing": "none", "base": base}), device=device)


@pytest.mark.parametrize("name", STATES)
def test_every_technique_alone_and_with_others_gives_the_same_loss_and_gradients(name):
    method, memory = STATES[name]
    losses, gradients = step_of(method, memory)
    their_losses, their_gradients = reference(method.kind, memory.base)
    reordered = memory.block == "lean" or memory.clips_at_once is not None
    torch.testing.assert_close(losses, their_losses, rtol=ROUNDED if reordered else EXACT, atol=0)
    assert gradients.keys() == their_gradients.keys() and len(gradients) >= 16
    largest = max(theirs.norm() for theirs in their_gradients.values())
    for key, theirs in their_gradients.items():
        # The time embedding's gradient is a sum over blocks, which autograd forms in an order of its own.
        bound = ROUNDED if reordered or key.startswith("time_embedding") else EXACT
        # Some gradients are zero but for rounding: a bias on all keys alike hardly moves a softmax.
        assert (gradients[key] - theirs).norm() <= bound * max(theirs.norm(), 1e-4 * largest), key


@pytest.mark.parametrize("state", [{}, {"activations": "host"}, {"block": "lean"}], ids=str)
def test_attention_that_cannot_be_kept_is_seen(state):
    """torch's ``math`` fallback is many operations: nothing would be kept, and nobody would know."""
    transformer, _ = prepared("none", LoraMethod(rank=4))
    memory = MemoryConfig.model_validate({"checkpointing": "selective", **state})
    memory.apply(transformer)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with (
        math,
        pytest.raises(TrainingError, match="attention cannot be kept"),
        assert_recompute(transformer, memory),
    ):
        forward(transformer).backward()
    with assert_recompute(transformer, memory):
        forward(transformer).backward()
    undo(transformer)


@pytest.mark.gpu
@pytest.mark.parametrize("name", STATES)
def test_the_same_holds_where_streams_and_pinned_memory_are_real(name):
    """On a GPU, three times over: a copy that comes too late does so now and then. Float32; attention's backward pass
    adds up in no fixed order there, and modulations computed on the CPU are rounded otherwise.
    """
    method, memory = STATES[name]
    device = torch.device("cuda", 0)
    their_losses, their_gradients = reference(method.kind, memory.base, device)
    largest = max(theirs.norm() for theirs in their_gradients.values())
    for _ in range(3):
        losses, gradients = step_of(method, memory, device=device)
        torch.testing.assert_close(losses, their_losses, rtol=1e-4, atol=0)
        for key, theirs in their_gradients.items():
            assert (gradients[key] - theirs).norm() <= 1e-3 * max(theirs.norm(), 1e-4 * largest), key


DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
@pytest.mark.parametrize("block", ["stock", "lean"])
def test_attention_is_kept_in_bfloat16_with_heads_of_the_published_width(block, device):
    """So that a GPU takes the kernels that it takes for the published models, forward without recording gradients and
    again with. There, their backward pass adds up in no fixed order.
    """
    found = []
    for kind in ("full", "selective"):
        memory = MemoryConfig.model_validate({"checkpointing": kind, "block": block, "activations": "host"})
        transformer = tiny_transformer("5b", num_attention_heads=2, attention_head_dim=64).to(torch.bfloat16)
        method = LoraMethod(rank=4)
        method.apply(transformer, seed=0)
        with torch.no_grad():
            for parameter in method.trainable(transformer).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        memory.apply(transformer.train(), device)
        batch = on(device, a_batch(2))
        batch = replace(batch, latents=batch.latents.bfloat16(), prompt_embeds=batch.prompt_embeds.bfloat16())
        with assert_recompute(transformer, memory):  # attention does run as an operation that can be kept
            loss = denoise_tiny(transformer, batch).square().mean()
            loss.backward()
        found.append((loss.detach(), [p.grad for p in method.trainable(transformer).values()]))
        undo(transformer)
    (loss, gradients), (their_loss, their_gradients) = found
    assert torch.equal(loss, their_loss) and len(gradients) >= 16
    bound = EXACT if device == CPU else 2e-2
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm()


def test_every_two_techniques_that_go_together_are_together_in_some_state():
    """Canary of the selection: nothing is left out by a rule that grew too wide."""
    counts = {}
    for kind, traits in TRAITS.items():
        states = [state for method, state in STATES.values() if method.kind == kind]
        pairs = [one | other for one, other in combinations(TECHNIQUES.values(), 2) if not one.keys() & other.keys()]
        pairs = [pair for pair in pairs if not MemoryConfig.model_validate(pair).faults(traits)]
        assert all(any(pair.items() <= state.changed().items() for state in states) for pair in pairs)
        counts[kind] = len(pairs)
    assert counts == {"lora": 58, "full": 9}


def test_a_compiled_block_is_two_graphs_per_bucket_and_computes_the_same(monkeypatch):
    """The first block's inputs need no gradient; the others are one graph. The counting compiler runs it as it is."""
    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr("finetune.memory.runner.COMPILER", lambda graph, inputs: graphs.append(graph) or graph.forward)

    def gradients(state: MemoryConfig) -> list[Tensor]:
        transformer, _ = prepared("full", LoraMethod(rank=4))
        transformer.transformer_blocks.append(deepcopy(transformer.transformer_blocks[-1]))
        state.apply(transformer)
        for side in (8, 12, 8):
            latents = torch.randn(
                1, 3, transformer.config.in_channels, 8, side, generator=torch.Generator().manual_seed(5)
            )
            text = torch.ones(1, transformer.config.max_text_seq_length, transformer.config.text_embed_dim)
            transformer(latents, text, torch.tensor([500]), return_dict=False)[0].square().mean().backward()
        undo(transformer)
        found, count = [p.grad for p in transformer.parameters() if p.grad is not None], len(graphs)
        forward(transformer)
        assert len(graphs) == count, "undone, nothing is compiled any more"
        return found

    plain = gradients(MemoryConfig())
    assert not graphs
    compiled = gradients(MemoryConfig(compile="block"))
    assert len(graphs) == 2 * 2
    assert len(plain) == len(compiled) and all(map(torch.equal, plain, compiled))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block": "lean"}, "only stock blocks are compiled"),
        ({"activations": "host"}, "only stock blocks are compiled"),
        ({"base": "fp8"}, "only stock blocks are compiled"),
        ({"checkpointing": "selective"}, "a compiled one shows none"),
    ],
)
def test_what_cannot_be_compiled_is_refused(changes, words):
    (fault,) = MemoryConfig(compile="block", **changes).faults(Traits())
    assert fault.option == "compile" and words in fault.what
    assert MemoryConfig(compile="block").faults(Traits()) == []
