"""adaLN on the host: the same numbers, the same names, and the right rows for every pass."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_blocks import CPU, build, forward, modules, run_blocks, values
from torch import Tensor, nn

from finetune.cogvideox.denoise import OFS
from finetune.core.errors import ConfigError, TrainingError
from finetune.memory import adaln_offload, checkpointing, host_buffers
from finetune.memory.adaln_offload import AdaLnOffload, announced, prepare
from finetune.memory.block_streaming import BlockStreaming
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.testing.tiny import tiny_transformer


def install(transformer: nn.Module) -> AdaLnOffload:
    modulation = AdaLnOffload(transformer, CPU)
    modulation.install()
    return modulation


def gradients(transformer: nn.Module) -> list[Tensor]:
    """Of two passes with other timesteps that are both under way, with one without gradients in between."""
    torch.manual_seed(3)  # of LoRA's dropout
    first = forward(transformer, 1)
    with torch.no_grad():
        forward(transformer, 9)
    second = forward(transformer, 2)
    first.backward()
    second.backward()
    return [first.detach(), second.detach(), *(p.grad for p in transformer.parameters() if p.requires_grad)]


def require_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) >= 34
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("variant", "dtype", "runner"),
    [
        ("5b", torch.float32, "torch"),
        ("5b", torch.float32, "blocks"),
        ("5b", torch.bfloat16, "blocks"),
        ("5b", torch.float32, "streamed"),
        ("2b", torch.bfloat16, "blocks"),
        ("1.5-5b", torch.bfloat16, "torch"),
        ("1.5-5b-i2v", torch.float32, "blocks"),
        ("1.5-5b-i2v", torch.bfloat16, "streamed"),
    ],
    ids=str,
)
def test_same_gradients_bit_for_bit(variant, dtype, runner):
    expected = gradients(build(variant, dtype=dtype))
    transformer = build(variant, dtype=dtype)
    adaln = install(transformer)
    if runner == "torch":
        checkpointing.apply(transformer, "full")
    else:
        weights = (
            BlockStreaming(modules(transformer), [0, 2], 1, CPU, leave=adaln.weights())
            if runner == "streamed"
            else None
        )
        if isinstance(weights, BlockStreaming):
            weights.install()
        run_blocks(transformer, weights)
    require_equal(gradients(transformer), expected)


def test_rows_agree_with_float64():
    """The bound that the module states, at 5B's widths: how far arithmetic of each dtype is from exact. A GPU's own
    rounding is as far, in another direction."""
    for dtype, bound in [(torch.float32, 5e-6), (torch.bfloat16, 5e-3)]:
        torch.manual_seed(0)
        embedding = nn.Sequential(
            nn.Linear(3072, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 18432)
        )
        with torch.no_grad():
            angles = 999 * torch.exp(torch.arange(1536) / -1536 * torch.tensor(10000.0).log())
            time = torch.cat([angles.cos(), angles.sin()])[None].to(dtype)
            ours = embedding.to(dtype)(time)
            exact = embedding.double()(time.double())
        assert (ours.double() - exact).abs().max() < bound * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_on_a_gpu_rows_agree_within_the_bound(dtype, bound):
    cuda, seen = torch.device("cuda", 0), {}
    for ours in (False, True):
        transformer = build(dtype=dtype, dropout=False).to(cuda)
        if ours:
            modulation = AdaLnOffload(transformer, cuda)
            modulation.install()
        for number, block in enumerate(modules(transformer)):
            block.norm1.linear.register_forward_hook(lambda _m, _i, rows, at=(ours, number): seen.update({at: rows}))
        forward(transformer).backward()
    for number in range(4):
        theirs = seen[False, number].float()
        assert seen[True, number].is_cuda
        assert (seen[True, number].float() - theirs).abs().max() < bound * theirs.abs().max()


def test_names_weights_and_modules_stay_and_come_back():
    transformer = build()
    before, layout = values(transformer), str(transformer)
    attributes = {name: list(module.__dict__) for name, module in transformer.named_modules()}
    objects = {name: id(p) for name, p in transformer.named_parameters()}
    modulation = AdaLnOffload(transformer, CPU)
    for device in (None, CPU):
        modulation.install()
        forward(transformer).backward()
        during = values(transformer)
        assert during.keys() == before.keys() and all(torch.equal(during[name], before[name]) for name in before)
        modulation.remove(device)
        assert str(transformer) == layout
        assert {name: id(p) for name, p in transformer.named_parameters()} == objects
        assert {name: list(module.__dict__) for name, module in transformer.named_modules()} == attributes
        assert all(host_buffers.label_of(p.untyped_storage()) is None for p in transformer.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in values(transformer).items())
        assert not transformer._forward_pre_hooks
    modulation.remove()  # once more is harmless


def test_the_weights_are_on_the_host_and_stay_there():
    transformer = build()
    adaln = install(transformer)
    host = [
        p for block in modules(transformer) for norm in (block.norm1, block.norm2) for p in norm.linear.parameters()
    ]
    assert {host_buffers.label_of(p.untyped_storage()) for p in host} == {
        host_buffers.BufferLabel("modulation", True, False)
    }
    weights = BlockStreaming(modules(transformer), [0], 1, CPU, leave=adaln.weights())
    weights.install()  # takes the rest of the block, and leaves these
    assert {host_buffers.label_of(p.untyped_storage()) for p in host} == {
        host_buffers.BufferLabel("modulation", True, False)
    }
    weights.remove()
    transformer.to("meta")
    assert not any(p.is_meta for p in host) and len(host) == 16
    assert modules(transformer)[0].norm1.norm.weight.is_meta


def test_rows_of_a_pass_are_computed_once():
    transformer = build()
    install(transformer)
    checkpointing.apply(transformer, "full")
    calls = []
    linear = torch.nn.functional.linear
    weights = {p.data_ptr() for block in modules(transformer) for p in block.norm1.linear.parameters()}

    def counting(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.data_ptr() in weights)
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", counting)
        forward(transformer).backward()
    assert sum(calls) == 4 and len(calls) > 40


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
@torch.no_grad()
def test_rows_computed_ahead_are_those_of_the_pass(variant):
    """In another thread, and nobody asks the device for timesteps; what was not announced, or not ahead, is as ever."""
    transformer = build(variant, dtype=torch.bfloat16, dropout=False)
    ofs = OFS if transformer.config.ofs_embed_dim else None
    expected = {seed: forward(transformer, seed).detach() for seed in (1, 2)}
    install(transformer)
    numbers = {seed: (500, seed) for seed in (1, 2)}
    with ThreadPoolExecutor(1) as pool:
        pool.submit(prepare, transformer, numbers[1], ofs).result()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaln_offload, "_on_host", None)
        for seed in (1, 1, 2):  # ahead, and the same and another one that are not
            with announced(transformer, numbers[seed], ofs):
                assert torch.equal(forward(transformer, seed), expected[seed])
    with announced(transformer, numbers[1], ofs):
        pass  # a pass that never came
    assert torch.equal(forward(transformer, 2), expected[2])


def test_nothing_grows_with_the_number_of_passes():
    transformer = build()
    modulation = install(transformer)
    for seed in range(5):
        forward(transformer, seed).backward()
        with torch.no_grad():
            forward(transformer, seed)
    gc.collect()
    modulation._forget_passes()
    assert len(modulation._passes) == 0


def test_a_pass_that_breaks_off_does_not_lend_its_rows_to_the_next():
    expected = gradients(build())
    transformer = build()
    install(transformer)
    for where in (transformer.patch_embed, modules(transformer)[2]):

        def fail(*_: object) -> None:
            raise MemoryError("as a test has it")

        handle = where.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            forward(transformer, 77)
        handle.remove()
    require_equal(gradients(transformer), expected)


def test_another_pass_has_other_rows():
    """Canary: rows of the wrong pass change the gradients."""
    expected = gradients(build())
    transformer = build()
    modulation = install(transformer)
    checkpointing.apply(transformer, "full")
    pass_of = modulation._pass_of
    latest = []

    def wrong(temb: Tensor) -> object:
        latest.append(pass_of(temb))
        return latest[0]

    modulation._pass_of = wrong
    assert not all(torch.equal(*pair) for pair in zip(gradients(transformer), expected, strict=True))


def test_a_block_outside_of_a_pass_is_refused():
    transformer = build()
    install(transformer)
    with pytest.raises(TrainingError, match="no forward pass of the transformer has made") as caught:
        modules(transformer)[0](torch.zeros(1, 4, 32), torch.zeros(1, 2, 32), torch.zeros(1, 32))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (FullMethod(), r"transformer_blocks\.0\.norm1\.linear trains"),
        (
            LoraMethod(rank=2, targets=r"transformer_blocks\.3\.norm2\.linear"),
            r"transformer_blocks\.3\.norm2\.linear trains",
        ),
        (LoraMethod(rank=2, targets=r"time_embedding\.linear_1"), "time_embedding trains"),
        (LoraMethod(rank=2, targets=r"ofs_embedding\.linear_2"), "ofs_embedding trains"),
    ],
)
def test_layers_that_train_are_refused_by_name(method, name):
    transformer = tiny_transformer("1.5-5b-i2v", num_layers=4)
    method.apply(transformer, seed=0)
    before = values(transformer)
    with pytest.raises(ConfigError, match=name) as caught:
        AdaLnOffload(transformer, CPU).install()
    assert "memory.modulation" in caught.value.where and caught.value.fix
    assert values(transformer).keys() == before.keys() and not transformer._forward_pre_hooks


def test_an_adapter_that_does_not_train_is_refused_too():
    transformer = tiny_transformer("5b", num_layers=1)
    LoraMethod(rank=2, targets=r".*norm1\.linear").apply(transformer, seed=0)
    transformer.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"norm1\.linear is not a plain linear layer"):
        AdaLnOffload(transformer, CPU).install()
