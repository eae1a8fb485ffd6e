"""A frozen base in few bits: what is lost, what is not, and that it never exists whole while it is loaded."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from storages import StorageCounter
from torch import Tensor, nn

from finetune.cogvideox.denoise import denoise
from finetune.cogvideox.load import ModelConfig, empty_transformer, load_transformer, place, stored_tensors
from finetune.cogvideox.model_files import KNOWN_MODELS, known_model
from finetune.cogvideox.spec import read_spec
from finetune.core.errors import ModelError
from finetune.core.types import Bucket
from finetune.memory.config import Base, QuantisedFormat
from finetune.memory.quantized_linear import (
    QuantisedLinear,
    QuantisedPlacement,
    placement,
)
from finetune.methods.lora import LoraMethod

KINDS: tuple[QuantisedFormat, ...] = get_args(QuantisedFormat)
STEM = "diffusion_pytorch_model"

# Relative L2 of a weight of normal numbers, [512, 384], as it is rounded; seed 0. E4M3 has 3 fraction bits: uniform
# within a binade, 2^-4 / sqrt(3) of the number in the worst case and 0.026 on average. int8: absmax / 127 / sqrt(12) of
# a row whose absmax is near 3 sigma. nf4: 0.096 is what its quantiles give in blocks of 64.
WEIGHT_ERROR = {"fp8": 0.027, "fp8_64": 0.027, "int8": 0.0085, "nf4": 0.1}


def weight(outputs: int = 512, inputs: int = 384, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


def layers(kind: QuantisedFormat, dtype: torch.dtype) -> tuple[QuantisedLinear, nn.Linear]:
    """A quantised layer, and a plain one with the same rounded weight."""
    plain = nn.Linear(384, 512, dtype=dtype)
    ours = QuantisedLinear.like(plain, kind)
    ours.quantise(weight())
    with torch.no_grad():
        ours.bias.copy_(plain.bias)
        plain.weight.copy_(ours.dequantised())
    return ours, plain


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


# ------------------------------------------------------------------------------------------------------- one layer


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_weight_is_bounded(kind: QuantisedFormat) -> None:
    ours, _ = layers(kind, torch.float32)
    assert WEIGHT_ERROR[kind] / 2 < relative(ours.dequantised(), weight()) < WEIGHT_ERROR[kind]
    held = sum(buffer.nbytes for buffer in ours.buffers())
    assert held < {"nf4": 0.53}.get(kind, 1.07) * weight().numel()


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_a_wrong_scale_axis_is_noticed(kind: QuantisedFormat) -> None:
    """Canary: outputs that differ a thousandfold in size need a scale each."""
    uneven = weight() * torch.logspace(-4, 4, 512)[:, None]
    layer = QuantisedLinear(384, 512, kind)
    layer.quantise(uneven)
    rows = [relative(ours, theirs) for ours, theirs in zip(layer.dequantised(), uneven, strict=True)]
    assert max(rows) < 2 * WEIGHT_ERROR[kind]
    layer.scale.copy_(layer.scale.roll(1, 0))
    assert relative(layer.dequantised(), uneven) > 0.01
    transposed = QuantisedLinear(512, 384, kind)
    transposed.quantise(uneven.T)
    rows = [relative(ours, theirs) for ours, theirs in zip(transposed.dequantised().T, uneven, strict=True)]
    assert max(rows) > 2 * WEIGHT_ERROR[kind]


def test_a_scale_per_group_keeps_what_stands_beside_an_outlier() -> None:
    outlier = weight() * 1e-6
    outlier[:, 0] = 1.0
    errors = {}
    for kind in ("fp8", "fp8_64", "int8"):
        layer = QuantisedLinear(384, 512, kind)
        layer.quantise(outlier)
        errors[kind] = relative(layer.dequantised()[:, 64:], outlier[:, 64:])
    assert errors["fp8_64"] < WEIGHT_ERROR["fp8_64"] < 0.5 < min(errors["fp8"], errors["int8"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_rounded_weight(kind: QuantisedFormat, dtype: torch.dtype) -> None:
    ours, theirs = layers(kind, dtype)
    inputs = [torch.randn(2, 5, 384, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2)]
    outputs = [layer(x.requires_grad_()) for layer, x in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(ours.bias.grad, theirs.bias.grad)
    with torch.no_grad():  # canary: another weight has another gradient
        theirs.weight[0] *= 1.5
    changed = inputs[0].detach().requires_grad_()
    theirs(changed).square().mean().backward()
    assert not torch.equal(inputs[0].grad, changed.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weight_is_kept_between_the_passes(kind: QuantisedFormat) -> None:
    ours, plain = layers(kind, torch.float32)

    def kept(layer: nn.Module) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            layer(torch.ones(3, 384, requires_grad=True))
        return sum(sizes)

    assert kept(ours) == 0
    assert kept(plain) >= plain.weight.numel()


def test_the_backward_pass_reads_the_weight_where_it_is_then() -> None:
    """A streamed block has its tensors in another buffer by then, and the old one overwritten."""
    ours, theirs = layers("fp8", torch.float32)
    x, y = (torch.ones(3, 384, requires_grad=True) for _ in range(2))
    output = ours(x)
    for buffer in ours.stored.values():
        moved = buffer.clone()
        buffer.zero_()
        buffer.data = moved
    output.sum().backward()
    theirs(y).sum().backward()
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_casting_leave_codes_and_scales_alone(kind: QuantisedFormat) -> None:
    ours, _ = layers(kind, torch.float32)
    before = {name: buffer.clone() for name, buffer in ours.stored.items()}
    cast = copy.deepcopy(ours).to(torch.bfloat16).half().to("cpu", torch.bfloat16)
    assert cast.weight.dtype == cast.bias.dtype == cast.dequantised().dtype == torch.bfloat16
    for name, buffer in cast.stored.items():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    again = QuantisedLinear(384, 512, kind)
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.dequantised(), ours.dequantised())
    assert ours.to("meta").weight.device.type == "meta"


def test_the_stand_in_for_the_weight_computes_nothing() -> None:
    ours, _ = layers("int8", torch.bfloat16)
    assert (ours.weight.shape, ours.weight.dtype) == ((512, 384), torch.bfloat16)
    assert [name for name, _ in ours.named_parameters()] == ["bias"]
    with pytest.raises(AttributeError, match="dequantised"):
        ours.weight.float()
    with pytest.raises(TypeError):
        ours.weight + 1
    with pytest.raises(KeyError):
        ours.weight = nn.Parameter(weight())


def test_int8_is_what_bitsandbytes_makes_of_it() -> None:
    from bitsandbytes import functional as bnb

    ours = QuantisedLinear(384, 512, "int8")
    ours.quantise(weight())
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight())
    # A number that lies on the border between two codes may fall to either side.
    apart = (ours.codes.int() - codes.int()).abs()
    assert apart.max() <= 1 and apart.count_nonzero() <= 10
    torch.testing.assert_close(ours.scale[:, 0] * 127, absmax)


@pytest.mark.parametrize("rows", [1, 24_000])  # within one slab, and over several with a rest
def test_slabs_do_not_change_nf4(rows: int) -> None:
    from bitsandbytes import functional as bnb

    exact = torch.randn(rows, 96, generator=torch.Generator().manual_seed(3))
    ours = QuantisedLinear(96, rows, "nf4")
    ours.quantise(exact)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(exact, blocksize=64, quant_type="nf4", compress_statistics=True))
    assert torch.equal(ours.dequantised(), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_stay_zero(kind: QuantisedFormat) -> None:
    layer = QuantisedLinear(64, 8, kind, dtype=torch.bfloat16)
    layer.quantise(torch.zeros(8, 64))
    assert not layer.dequantised().any()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="32 inputs"):
        QuantisedLinear(32, 8, "fp8_64")
    with pytest.raises(ValueError, match=r"\(8, 64\)"):
        QuantisedLinear(64, 7, "fp8").quantise(torch.zeros(8, 64))


# --------------------------------------------------------------------------------------------------- a whole model


def predicted(transformer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    spec = read_spec(str(folder))
    generator = torch.Generator().manual_seed(5)
    shape = (1, spec.in_channels // spec.latent_channels, *spec.latent_shape(Bucket(9, 64, 64)))
    latents = torch.randn(shape, generator=generator)
    if spec.front_padding(shape[3]):
        latents = torch.cat([latents[..., :1, :, :]] * spec.front_padding(shape[3]) + [latents], dim=3)
    embeds = torch.randn(1, spec.max_text_seq_length, spec.text_embed_dim, generator=generator).to(dtype)
    image = latents[:, 1, :, :1] if spec.image_to_video else None
    return denoise(transformer, spec, latents[:, 0], embeds, torch.tensor([500]), image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_holds_what_quantising_it_gives(tiny_model: Callable[..., Path], kind: QuantisedFormat) -> None:
    model = ModelConfig(pretrained=str(tiny_model("5b")))
    native = load_transformer(model, dtype=torch.bfloat16)
    held = load_transformer(model, dtype=torch.bfloat16, placement=placement(kind))
    quantised = {name: layer for name, layer in held.named_modules() if isinstance(layer, QuantisedLinear)}
    blocks = len(native.transformer_blocks)
    assert len(quantised) == 6 * blocks
    stored = dict(stored_tensors(tiny_model("5b") / "transformer", STEM))
    for name, layer in quantised.items():
        exact = stored[f"{name}.weight"]
        assert relative(layer.dequantised(torch.float32), exact) < 1.2 * WEIGHT_ERROR[kind]
        assert torch.equal(layer.bias, native.get_submodule(name).bias)
    ours, theirs = dict(held.named_parameters()), dict(native.named_parameters())
    assert set(theirs) - set(ours) == {f"{name}.weight" for name in quantised}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
def test_the_output_error_is_bounded(tiny_model: Callable[..., Path], variant: str) -> None:
    folder = tiny_model(variant)
    model = ModelConfig(pretrained=str(folder))
    with torch.no_grad():
        native = predicted(load_transformer(model), folder)
        for kind, bound in (("fp8", 0.03), ("fp8_64", 0.03), ("int8", 0.006), ("nf4", 0.11)):
            assert (
                1e-5 < relative(predicted(load_transformer(model, placement=placement(kind)), folder), native) < bound
            )


@pytest.mark.parametrize("kind", ["fp8_64", "nf4"])
def test_lora_learns_around_it_as_around_the_rounded_weights(
    tiny_model: Callable[..., Path], kind: QuantisedFormat
) -> None:
    folder = tiny_model("5b")
    model = ModelConfig(pretrained=str(folder))
    ours = load_transformer(model, dtype=torch.bfloat16, placement=placement(kind))
    theirs = load_transformer(model, dtype=torch.bfloat16)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantisedLinear):
            theirs.get_submodule(name).weight.data.copy_(layer.dequantised())
    method = LoraMethod(rank=4, alpha=4, targets="attention+ff")
    losses, gradients = [], []
    for transformer in (ours, theirs):
        method.apply(transformer, seed=7)
        trainable = method.trainable(transformer)
        assert {parameter.dtype for parameter in trainable.values()} == {torch.float32}
        for number, parameter in enumerate(trainable.values()):
            generator = torch.Generator().manual_seed(number)
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)  # up projections begin at zero
        transformer.enable_gradient_checkpointing()
        transformer.train()
        loss = predicted(transformer, folder, torch.bfloat16).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: parameter.grad for name, parameter in trainable.items()})
    assert losses[0] == losses[1] and len(gradients[0]) == len(gradients[1]) == 24
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.equal(gradient, gradients[1][name]), name


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", KNOWN_MODELS)
def test_loading_gives_what_diffusers_gives(tiny_model: Callable[..., Path], variant: str, dtype: torch.dtype) -> None:
    from diffusers import CogVideoXTransformer3DModel

    folder = tiny_model(variant)
    random_state = torch.get_rng_state()
    ours = load_transformer(ModelConfig(pretrained=str(folder)), dtype=dtype)
    assert torch.equal(random_state, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    theirs = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype).to(dtype)
    for kind in ("named_parameters", "named_buffers", "state_dict"):
        a, b = (dict(getattr(module, kind)()) for module in (ours, theirs))
        assert list(a) == list(b)
        for name in a:
            assert a[name].dtype == b[name].dtype and a[name].requires_grad == b[name].requires_grad
            assert torch.equal(a[name], b[name]) and a[name].stride() == b[name].stride(), name
    configs = [{**module.config, "_name_or_path": None} for module in (ours, theirs)]
    assert configs[0] == configs[1] and not ours.training


def test_files_may_change_after_loading(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_model("5b"), tmp_path / "model"))
    transformer = load_transformer(ModelConfig(pretrained=str(folder)))
    before = transformer.proj_out.weight.clone()
    path = folder / "transformer" / f"{STEM}.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(transformer.proj_out.weight, before)


def test_shards_are_read_one_after_the_other(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_model("1.5-5b"), tmp_path / "model"))
    whole = load_transformer(ModelConfig(pretrained=str(folder)))
    shutil.rmtree(folder / "transformer")
    whole.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) >= 2
    model = ModelConfig(pretrained=str(folder), dtype="fp32")
    again = load_transformer(model).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())
    index = folder / "transformer" / f"{STEM}.safetensors.index.json"
    first = sorted(json.loads(index.read_text())["weight_map"].values())[0]
    (folder / "transformer" / first).unlink()
    with pytest.raises(ModelError, match="the transformer cannot be loaded"):
        load_transformer(model, placement=placement("fp8"))


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of 1024: its largest weight has 16 MiB, four times what is rounded at a time."""
    from finetune.testing.tiny import tiny_transformer

    folder = tmp_path_factory.mktemp("wide")
    transformer = tiny_transformer("5b", num_layers=1, num_attention_heads=16, attention_head_dim=64)
    transformer.save_pretrained(folder / "transformer")
    return folder


def is_mapped(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor lies in a file of ``folder`` and not in memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return str(folder) in line
    return False


def peak_of_loading(folder: Path, kind: QuantisedFormat | None, *, at_once: bool = False) -> tuple[int, int]:
    """Peak of the memory taken while a transformer is filled, and what remains taken, in bytes."""
    module = empty_transformer(folder, dtype=torch.float32, device="meta")
    own = folder / "transformer"
    mapped = dict(stored_tensors(own, STEM))
    assert all(is_mapped(tensor, own) for tensor in mapped.values())
    with StorageCounter() as counter:
        for tensor in mapped.values():
            counter.ignore(tensor)
        read = {name: tensor.clone() for name, tensor in mapped.items()} if at_once else mapped
        chosen = placement(kind) if kind else None
        place(module, read.items(), torch.device("cpu"), chosen)
        del read
    # bitsandbytes keeps a table of 1 KiB for itself.
    assert 0 <= counter.now - sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) <= 2048
    return counter.peak, counter.now


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells mapped files from memory by Linux' /proc")
@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_the_whole_model_never_exists_beside_what_it_becomes(wide_model: Path, kind: QuantisedFormat | None) -> None:
    largest = max(tensor.nbytes for _, tensor in stored_tensors(wide_model / "transformer", STEM))
    peak, left = peak_of_loading(wide_model, kind)
    assert largest == 16 << 20
    assert left <= peak <= left + largest


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells mapped files from memory by Linux' /proc")
def test_a_model_that_is_read_whole_is_seen(wide_model: Path) -> None:
    peak, left = peak_of_loading(wide_model, "nf4", at_once=True)
    assert peak > left + 2 * (16 << 20)


@pytest.mark.parametrize(
    ("variant", "base"), [("2b", "native"), ("5b-i2v", "fp8"), ("1.5-5b-i2v", "fp8_64"), ("5b", "int8"), ("5b", "nf4")]
)
def test_an_empty_transformer_has_the_shapes_of_a_loaded_one(
    tiny_model: Callable[..., Path], variant: str, base: Base
) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    model, chosen = ModelConfig(pretrained=str(tiny_model(variant))), placement(base)
    ours = load_transformer(model, dtype=torch.bfloat16, placement=chosen)
    with FakeTensorMode():
        fake = empty_transformer(tiny_model(variant), dtype=torch.bfloat16, placement=chosen)
        assert all(isinstance(t, FakeTensor) for t in [*fake.parameters(), *fake.buffers()])
        output = predicted(fake, tiny_model(variant), torch.bfloat16)
    assert output.shape == predicted(ours, tiny_model(variant), torch.bfloat16).shape
    for names in ("named_parameters", "named_buffers"):
        a, b = ({n: (t.shape, t.dtype) for n, t in getattr(module, names)()} for module in (ours, fake))
        assert a == b


def test_what_a_full_size_base_takes() -> None:
    """GiB of the 5B model's weights: its attention and feed-forward layers are 4.76 of 5.57 billion."""
    sizes = {}
    for base in ("native", "fp8", "nf4"):
        module = empty_transformer(known_model("5b"), dtype=torch.bfloat16, device="meta", placement=placement(base))
        sizes[base] = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()]) / 2**30
    assert sizes == pytest.approx({"native": 10.38, "fp8": 5.95, "nf4": 3.80}, abs=0.01)


def test_a_placement_that_matches_nothing_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = ModelConfig(pretrained=str(tiny_model("5b")))
    with pytest.raises(ModelError, match="no layer to quantise"):
        load_transformer(model, placement=QuantisedPlacement("fp8", r"blocks\.0"))
    with pytest.raises(ModelError, match="whole groups") as raised:
        load_transformer(model, placement=QuantisedPlacement("fp8_64", r"patch_embed\.text_proj"))
    assert raised.value.where == "patch_embed.text_proj, as fp8_64"


def test_an_unknown_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        empty_transformer(tmp_path, dtype=torch.float32)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"num_layers": "many"}')
    with pytest.raises(ModelError, match="num_layers: Input should be a valid integer"):
        empty_transformer(tmp_path, dtype=torch.float32)
