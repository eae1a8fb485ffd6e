"""What trains: names, dtypes, determinism, and adapters that continue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from finetune.checkpoint import folders
from finetune.checkpoint.folders import CheckpointConfig
from finetune.checkpoint.save import CheckpointContent, save_checkpoint
from finetune.cogvideox.spec import BLOCK_LAYERS, read_spec
from finetune.config.schema import MethodConfig
from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.tensor_files import atomic_save_tensors
from finetune.core.types import RunState
from finetune.memory.narrowed_lora import narrowed_update
from finetune.methods import adapter, lora
from finetune.methods.adapter import read_adapter
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.planner.work_counter import WorkCounter
from finetune.testing.tiny import VARIANTS, tiny_transformer

MODELS = Path(__file__).parents[1] / "finetune" / "assets" / "models"


def predict(transformer: nn.Module, variant: str = "5b", seed: int = 5) -> Tensor:
    """One forward pass on random latents at the model's native size."""
    config = transformer.config
    generator = torch.Generator().manual_seed(seed)
    dtype = transformer.proj_out.weight.dtype if hasattr(transformer.proj_out, "weight") else torch.float32
    frames = 4 if config.patch_size_t else 3
    latents = torch.randn(1, frames, config.in_channels, 8, 8, generator=generator).to(dtype)
    text = torch.randn(1, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(dtype)
    ofs = torch.tensor([2.0], dtype=dtype) if config.ofs_embed_dim else None
    return transformer(latents, text, torch.tensor([500]), ofs=ofs, return_dict=False)[0]


def perturb(parameters: dict[str, nn.Parameter], seed: int = 3) -> None:
    """As if trained: every trainable tensor moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def applied(method: LoraMethod | FullMethod, variant: str = "5b", *, seed: int = 0, dtype=torch.float32) -> nn.Module:
    transformer = tiny_transformer(variant).to(dtype)
    method.apply(transformer, seed=seed)
    return transformer


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(("variant", "layers", "parameters"), [("2b", 120, 58_982_400), ("5b", 168, 132_120_576)])
def test_the_default_is_cogvideos_own_lora(variant, layers, parameters):
    """The published counts of the real models, on tensors without data."""
    from diffusers import CogVideoXTransformer3DModel

    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel.from_config(
            json.loads((MODELS / variant / "transformer" / "config.json").read_text())
        )
        method = LoraMethod()
        method.apply(transformer, seed=0)
    trainable = method.trainable(transformer)
    assert len(trainable) == 2 * layers
    assert sum(p.numel() for p in trainable.values()) == parameters
    assert method.lora_metadata(transformer)["target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    assert ("adapted layers", f"{layers} (attention)") in method.describe(transformer)


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_are_linear_layers_of_every_variant(variant):
    transformer = tiny_transformer(variant)
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    attention = set(LoraMethod(targets="attention").target_modules(transformer))
    feed_forward = set(LoraMethod(targets="attention+ff").target_modules(transformer))
    assert len(attention) == 8 and len(feed_forward) == 12 and attention < feed_forward
    assert set(LoraMethod(targets="all-linear").target_modules(transformer)) == linear
    # 1.0 embeds patches with a convolution, 1.5 with a linear layer: neither may be assumed.
    assert ("patch_embed.proj" in linear) == variant.startswith("1.5")
    applied(LoraMethod(targets="all-linear", rank=2, alpha=2), variant)


def test_patterns_match_whole_names_of_linear_layers_and_unite():
    transformer = tiny_transformer()
    method = LoraMethod(targets=(r".*\.to_q", r"transformer_blocks\.1\..*"))
    chosen = method.target_modules(transformer)
    block = [name for name in LoraMethod(targets="all-linear").target_modules(transformer) if "blocks.1." in name]
    assert chosen == ["transformer_blocks.0.attn1.to_q", *block] and len(block) == 8


@pytest.mark.parametrize(
    ("targets", "message", "hint"),
    [
        ("to_q", "no linear layer has such a name", "transformer_blocks.0.attn1.to_q"),
        (r"transformer_blocks\.0\.attn1\.to_qq", "no linear layer has such a name", "transformer_blocks.0.attn1.to_q"),
        (r"transformer_blocks\.0\.attn1", "no linear layer has such a name", "attention+ff"),
        (("attention", "nothing_like_it"), "'nothing_like_it'", "attention"),
    ],
)
def test_a_target_that_selects_nothing_is_an_error(targets, message, hint):
    with pytest.raises(ConfigError) as caught:
        applied(LoraMethod(targets=targets))
    assert message in str(caught.value) and hint in caught.value.fix and caught.value.where == "method.targets"


def test_layers_may_have_ranks_of_their_own_and_count_the_same():
    method = LoraMethod(rank=4, alpha=6, targets="attention+ff", ranks={"ff.": 2, "transformer_blocks.0.": 8})
    transformer = applied(method)
    layers = dict(lora.adapted_layers(transformer))
    expected = {"transformer_blocks.0.ff.net.2": 2, "transformer_blocks.0.attn1.to_q": 8}
    expected["transformer_blocks.1.attn1.to_q"] = 4
    for name, rank in expected.items():
        assert layers[name].lora_A["default"].weight.shape[0] == rank == method.rank_of(name)
    assert {layer.scaling["default"] for layer in layers.values()} == {1.5}
    many = [f"transformer_blocks.{block}.{name}" for block in range(42) for name in BLOCK_LAYERS]
    named = lora.ranks_by_name({name: method.rank_of(name) for name in many}, 4)
    again = method.model_copy(update={"ranks": named})
    assert len(named) < 12 and all(again.rank_of(name) == method.rank_of(name) for name in many)
    assert not method.alike(2) and method.model_copy(update={"ranks": {"ff.": 2}}).alike(2)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"attn1.to_w": 8}, "no adapted layer has 'attn1.to_w' in its name; did you mean 'attn1.to_"),
        ({"ff.net": 8}, "no adapted layer has 'ff.net' in its name"),
        ({"to_": 8, "to_q": 4}, "'to_q' decides no rank"),
    ],
)
def test_a_rank_for_no_layer_is_an_error(ranks, message):
    with pytest.raises(ConfigError) as caught:
        applied(LoraMethod(rank=4, ranks=ranks))
    assert message in caught.value.what and caught.value.where == "method.ranks"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_models_json_names_its_linear_layers(variant, tiny_model):
    linear = {name for name, module in tiny_transformer(variant).named_modules() if isinstance(module, nn.Linear)}
    assert linear == set(read_spec(str(tiny_model(variant))).linear_layers)


def test_what_is_no_pattern_is_refused_when_read():
    for targets in ("to_(q", (), ""):
        with pytest.raises(ValidationError):
            LoraMethod(targets=targets)
    assert isinstance(TypeAdapter(MethodConfig).validate_python({"kind": "full"}), FullMethod)


# ----------------------------------------------------------------------------------------------------- initial values


def test_initial_values_follow_from_the_seed_alone():
    method = LoraMethod(rank=4, alpha=4)
    reference = method.state(applied(method, seed=7))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = applied(method, seed=7)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must stay where it was"
    narrow = applied(method, seed=7, dtype=torch.bfloat16)
    wider = LoraMethod(rank=4, alpha=4, targets="attention+ff")
    more = wider.state(applied(wider, seed=7))
    assert len(reference) == 16
    for name, tensor in reference.items():
        assert torch.equal(tensor, method.state(again)[name])
        assert torch.equal(tensor, method.state(narrow)[name]), "the base's dtype must not round them"
        assert torch.equal(tensor, more[name]), "another target must not move them"
    other = method.state(applied(method, seed=8))
    assert not torch.equal(
        reference["transformer_blocks.0.attn1.to_q.lora_A.weight"],
        other["transformer_blocks.0.attn1.to_q.lora_A.weight"],
    )
    assert not torch.equal(
        reference["transformer_blocks.0.attn1.to_q.lora_A.weight"],
        reference["transformer_blocks.0.attn1.to_k.lora_A.weight"],
    )


def test_initial_values_have_pefts_distribution():
    from peft import LoraConfig

    torch.manual_seed(0)
    ours, theirs = tiny_transformer(attention_head_dim=64), tiny_transformer(attention_head_dim=64)
    method = LoraMethod(rank=64)
    method.apply(ours, seed=0)
    theirs.add_adapter(LoraConfig(r=64, target_modules=method.target_modules(tiny_transformer(attention_head_dim=64))))
    name = "transformer_blocks.0.attn1.to_q"
    down, up = (ours.get_submodule(name).lora_A["default"].weight, ours.get_submodule(name).lora_B["default"].weight)
    reference = theirs.get_submodule(name).lora_A["default"].weight
    assert float(down.detach().abs().max()) == pytest.approx(float(reference.detach().abs().max()), rel=0.01)
    assert float(down.detach().std()) == pytest.approx(float(reference.detach().std()), rel=0.03)
    assert float(down.detach().mean()) == pytest.approx(0, abs=3 * float(down.detach().std()) / 64**0.5 / 16)
    assert not up.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variation", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_an_untrained_adapter_changes_nothing(variation, dtype):
    theirs = predict(tiny_transformer().to(dtype))
    ours = predict(applied(LoraMethod(rank=4, alpha=3, **variation), dtype=dtype))
    assert ours.dtype == dtype
    # DoRA adds its (zero) correction in another order.
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.0}[dtype] if variation.get("use_dora") else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_a_trained_adapter_changes_something():
    """Canary of the test above."""
    method = LoraMethod(rank=4, alpha=3)
    transformer = applied(method)
    perturb(method.trainable(transformer))
    assert float((predict(transformer) - predict(tiny_transformer())).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("variation", [{}, {"use_dora": True, "dropout": 0.1}], ids=str)
@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_fp32_lora_on_a_bf16_base_trains_every_target(variant, variation):
    """Without autocast, and with gradient checkpointing, through which gradients must still reach the first block."""
    method = LoraMethod(rank=4, targets="all-linear", **variation)
    transformer = applied(method, variant, dtype=torch.bfloat16).train()
    transformer.enable_gradient_checkpointing()
    trainable = method.trainable(transformer)
    perturb(trainable)
    predict(transformer, variant).float().square().mean().backward()
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    silent = [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert silent == []
    base = [p for name, p in transformer.named_parameters() if "lora" not in name]
    assert base and all(p.dtype == torch.bfloat16 and p.grad is None and not p.requires_grad for p in base)


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({}, ["bfloat16"]),
        ({"dropout": 0.3}, ["bfloat16"]),
        ({"compute": "float32"}, ["bfloat16", "float32"]),
        ({"use_dora": True}, ["bfloat16", "float32"]),
    ],
    ids=str,
)
def test_the_update_is_computed_in_what_is_asked_for(options, dtypes):
    method = LoraMethod(rank=4, alpha=6, **options)
    transformer = applied(method, dtype=torch.bfloat16).train()
    perturb(method.trainable(transformer))
    layer: Any = transformer.transformer_blocks[0].attn1.to_q
    features = torch.randn(8, layer.in_features).bfloat16().requires_grad_()
    with WorkCounter() as counter:
        layer(features).sum().backward()
    assert sorted(counter.work.flops) == dtypes
    gradients = [p.grad for p in layer.parameters() if p.requires_grad]
    assert len(gradients) >= 2 and all(gradient.dtype == torch.float32 and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"dropout": 0.3}], ids=str)
def test_in_float32_both_ways_to_compute_are_one(options):
    models = [applied(LoraMethod(rank=4, compute=compute, **options)).train() for compute in ("model", "float32")]
    gradients = []
    for transformer in models:
        trainable = LoraMethod().trainable(transformer)
        perturb(trainable)
        torch.manual_seed(3)
        predict(transformer).square().mean().backward()
        gradients.append([p.grad for p in trainable.values()])
    assert all(map(torch.equal, *gradients)) and len(gradients[0]) == 16


def test_what_is_read_of_pefts_layer_is_what_it_computes():
    """Fails where an installed peft computes more or other than ``narrowed_update`` knows of."""
    method = LoraMethod(rank=4, alpha=6)
    transformer = applied(method, dtype=torch.bfloat16)
    perturb(method.trainable(transformer))
    layer: Any = transformer.transformer_blocks[0].attn1.to_q
    features = torch.randn(50, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()

    def difference() -> float:
        update = narrowed_update(layer, torch.bfloat16)
        assert update is not None
        weight = layer.base_layer.weight.double() + update.scale * update.up.double() @ update.down.double()
        expected = features.double() @ weight.T + layer.base_layer.bias.double()
        return float((layer(features).double() - expected).norm() / expected.norm())

    assert difference() < 0.005
    lora.set_strength(transformer, 3.0)
    assert difference() < 0.005 and narrowed_update(layer, torch.bfloat16).scale == 4.5
    assert narrowed_update(layer, torch.float32) is None, "nothing to narrow"
    layer.enable_adapters(False)
    assert narrowed_update(layer, torch.bfloat16) is None
    layer.enable_adapters(True)
    layer.merge()
    assert narrowed_update(layer, torch.bfloat16) is None
    layer.unmerge()
    from peft import LoraConfig

    model: Any = transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "second")
    model.set_adapters(["default", "second"])
    assert narrowed_update(layer, torch.bfloat16) is None
    assert layer(features).dtype == torch.bfloat16


def test_an_adapter_is_not_put_on_an_adapter():
    transformer = applied(LoraMethod(rank=4))
    with pytest.raises(ConfigError, match="already carries an adapter"):
        LoraMethod(rank=4).apply(transformer, seed=0)


# ----------------------------------------------------------------------------------------------------- names and state


@pytest.mark.parametrize("use_dora", [False, True])
def test_names_are_pefts(use_dora):
    from peft import get_peft_model_state_dict

    method = LoraMethod(rank=4, targets="attention+ff", use_dora=use_dora)
    transformer = applied(method)
    theirs = get_peft_model_state_dict(transformer, adapter_name="default")
    ours = method.state(transformer)
    assert ours.keys() == theirs.keys() and len(ours) == (36 if use_dora else 24)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_trains_every_parameter_and_no_buffer(variant):
    method = FullMethod()
    transformer = applied(method, variant, dtype=torch.bfloat16)
    theirs = transformer.state_dict()
    buffers = {name for name, _ in transformer.named_buffers()}
    assert method.state(transformer).keys() == theirs.keys() - buffers
    assert {p.dtype for p in method.trainable(transformer).values()} == {torch.bfloat16}
    predict(transformer, variant).float().square().mean().backward()
    assert sum(p.grad is not None for p in transformer.parameters()) == len(method.trainable(transformer))


@pytest.mark.parametrize("method", [LoraMethod(rank=4), FullMethod()], ids=lambda method: method.kind)
def test_state_goes_out_and_in(method):
    transformer = applied(method)
    perturb(method.trainable(transformer))
    expected = predict(transformer)
    fresh = applied(method, seed=1)
    method.load_state(fresh, {name: tensor.clone() for name, tensor in method.state(transformer).items()})
    assert torch.equal(predict(fresh), expected)
    assert method.describe(fresh)[0][0] == "method"


@pytest.mark.parametrize("method", [LoraMethod(rank=4), FullMethod()], ids=lambda method: method.kind)
def test_state_that_does_not_fit_is_refused_and_nothing_is_copied(method):
    transformer = applied(method)
    state = {name: torch.full_like(tensor, 9.0) for name, tensor in method.state(transformer).items()}
    first, second, third, *_ = state
    untouched = {name: tensor.clone() for name, tensor in method.state(transformer).items()}
    del state[first]
    state["stranger"] = torch.zeros(1)
    state[second] = state[second][:1]
    state[third] = state[third].half()
    with pytest.raises(CheckpointError) as caught:
        method.load_state(transformer, state)
    for said in (f"missing: {first}", "not in this run: stranger", f"{second} is float32", f"{third} is", "float16"):
        assert said in str(caught.value)
    assert all(torch.equal(tensor, untouched[name]) for name, tensor in method.state(transformer).items())


# ------------------------------------------------------------------------------------------------ continuing an adapter

VARIATIONS = [
    {},
    {"alpha": 2.5},
    {"use_rslora": True},
    {"use_dora": True},
    {"targets": "attention+ff"},
    {"targets": (r".*\.to_[qk]", "proj_out")},
    {"targets": "attention+ff", "ranks": {"ff.net.2": 3, "transformer_blocks.0.": 8}},
    {"use_rslora": True, "ranks": {"to_v": 2}},
]


def exported(folder: Path, method: LoraMethod, transformer: nn.Module) -> Path:
    """As a diffusers pipeline saves it."""
    from diffusers import CogVideoXPipeline

    CogVideoXPipeline.save_lora_weights(
        str(folder),
        transformer_lora_layers=method.peft_state(transformer),
        transformer_lora_adapter_metadata=method.lora_metadata(transformer),
    )
    return folder


def saved(folder: Path, method: LoraMethod, transformer: nn.Module) -> Path:
    """As one of our checkpoints."""
    return save_checkpoint(
        folder,
        CheckpointContent(
            RunState(step=3, cache_digest=""),
            trainable=method.state(transformer),
            optimizer=({}, {}),
            ema=None,
            config={"method": method.model_dump(mode="json")},
        ),
        CheckpointConfig(),
    )


@pytest.mark.parametrize("write", [exported, saved])
@pytest.mark.parametrize("variation", VARIATIONS, ids=str)
def test_continuing_means_the_same_function(variation, write, tmp_path):
    method = LoraMethod(**{"rank": 4, "alpha": 6, **variation})
    transformer = applied(method)
    perturb(method.trainable(transformer))
    source = write(tmp_path, method, transformer)
    continued = method.model_copy(update={"init_from": source})
    assert torch.equal(predict(applied(continued, seed=99)), predict(transformer))
    if write is exported:
        file = method.model_copy(update={"init_from": source / adapter.LORA_FILE})
        assert torch.equal(predict(applied(file)), predict(transformer))
        theirs = tiny_transformer()
        theirs.load_lora_adapter(str(source), weight_name=adapter.LORA_FILE, prefix="transformer")
        torch.testing.assert_close(predict(theirs), predict(transformer), rtol=0, atol=0)


@pytest.mark.parametrize(("alpha", "kind"), [(64, int), (2.5, float)])
def test_the_settings_are_those_that_every_peft_knows(alpha, kind):
    from peft import LoraConfig

    method = LoraMethod(rank=4, alpha=alpha, dropout=0.5, use_rslora=True)
    settings = method.lora_metadata(applied(method))
    patterns = {"rank_pattern", "alpha_pattern"}  # empty; diffusers 0.36 asks for them
    assert settings.keys() == {"r", "lora_alpha", "use_rslora", "use_dora", "target_modules"} | patterns
    assert json.loads(json.dumps(settings)) == settings
    again = LoraConfig(**settings)
    assert (again.r, again.lora_alpha, again.use_rslora, again.use_dora) == (4, alpha, True, False)
    assert again.lora_dropout == 0, "diffusers leaves a loaded adapter in training mode"
    assert type(settings["lora_alpha"]) is kind, "a whole alpha stays an integer, which is what other readers expect"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 8}, "method.rank is 8, the adapter has 4"),
        ({"alpha": 4.0}, "method.alpha is 4.0, the adapter has 6.0"),
        ({"use_rslora": True}, "method.use_rslora is True, the adapter has False"),
        ({"use_dora": True}, "method.use_dora is True, the adapter has False"),
        ({"ranks": {"to_q": 2}}, 'method.ranks is {"to_q": 2}, the adapter has {}'),
        ({"targets": "attention+ff"}, "missing: transformer_blocks.0.ff.net.0.proj.lora_A.weight"),
        ({"targets": r".*\.to_q"}, "not in this run: transformer_blocks.0.attn1.to_k.lora_A.weight"),
    ],
)
def test_settings_that_differ_from_the_adapters_are_refused(change, message, tmp_path):
    method = LoraMethod(rank=4, alpha=6)
    source = exported(tmp_path, method, applied(method))
    with pytest.raises(ConfigError) as caught:
        applied(method.model_copy(update={"init_from": source, **change}))
    assert message in str(caught.value) and str(source) in caught.value.where


def test_an_adapter_of_a_wider_model_is_refused(tmp_path):
    method = LoraMethod(rank=4, alpha=6)
    wide = tiny_transformer(num_attention_heads=8)
    method.apply(wide, seed=0)
    with pytest.raises(ConfigError, match=r"float32 \[4, 64\] here, float32 \[4, 128\] there"):
        applied(method.model_copy(update={"init_from": exported(tmp_path, method, wide)}))


def test_without_settings_an_adapter_is_read_as_diffusers_reads_it(tmp_path):
    method = LoraMethod(rank=4, alpha=4)
    transformer = applied(method)
    perturb(method.trainable(transformer))
    file = tmp_path / "somebodys.safetensors"
    atomic_save_tensors(file, {f"transformer.{name}": t.half() for name, t in method.state(transformer).items()})
    ours = applied(method.model_copy(update={"init_from": file}))
    theirs = tiny_transformer()
    theirs.load_lora_adapter(str(tmp_path), weight_name=file.name, prefix="transformer")
    torch.testing.assert_close(predict(ours), predict(theirs), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="the adapter has 4") as caught:
        applied(LoraMethod(rank=4, alpha=8, init_from=file))
    assert "does not state its alpha" in caught.value.fix


def test_a_checkpoint_in_shares_is_refused_with_the_way_out(tmp_path):
    from finetune.checkpoint.shares import part_of

    (tmp_path / part_of(adapter.TRAINABLE)).mkdir()
    with pytest.raises(ConfigError, match="written in shares by several processes") as caught:
        adapter.read_adapter(tmp_path)
    assert f"`finetune export {tmp_path} --output FOLDER`" in caught.value.fix


def test_what_is_no_adapter_is_refused(tmp_path):
    cases: list[tuple[Path, str]] = [(tmp_path / "absent", "no such file or folder"), (tmp_path, "the folder holds")]
    (tmp_path / "text.safetensors").write_text("not tensors")
    cases.append((tmp_path / "text.safetensors", "cannot be read"))
    atomic_save_tensors(tmp_path / "model.safetensors", {"proj_out.weight": torch.zeros(2)})
    cases.append((tmp_path / "model.safetensors", "no LoRA tensors"))
    atomic_save_tensors(tmp_path / "empty.safetensors", {"transformer.a.lora_A.weight": torch.zeros(0, 8)})
    cases.append((tmp_path / "empty.safetensors", "a layer has rank 0"))
    for path, message in cases:
        with pytest.raises(ConfigError, match=message):
            read_adapter(path)


def test_the_checkpoints_file_is_called_the_same_on_both_sides():
    assert folders.CONFIG == "config.json"


def test_every_field_is_described(tmp_path):
    method = LoraMethod(rank=4, alpha=8, use_rslora=True, use_dora=True, targets=("attention", "proj_out"))
    source = exported(tmp_path, method, applied(method))
    continued: Any = method.model_copy(update={"init_from": source})
    lines = dict(continued.describe(applied(continued, dtype=torch.bfloat16)))
    assert lines["method"] == "LoRA + rsLoRA + DoRA" and lines["rank, alpha"] == "4, 8 (scale 4)"
    assert lines["adapted layers"] == "9 (attention, proj_out)" and lines["continued from"] == str(source)
    assert lines["trainable parameters"].endswith("in float32") and lines["frozen parameters"].endswith("in bfloat16")
