"""Optimizers: every member of the union by one body each, against torch's own arithmetic where there is one."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file
from torch import nn

from finetune.core.errors import CheckpointError, ConfigError
from finetune.core.tensor_files import atomic_save_tensors
from finetune.optim import optimizers as sections
from finetune.optim.low_precision import LowPrecisionOptimizer
from finetune.optim.optimizers import AdamW, AdamW8bit, CustomOptimizer, OptimizerConfig, PagedAdamW8bit, set_lr
from finetune.optim.state import load_optimizer_state, optimizer_state, owner_of, precise_weights, require_same_state

UNION = get_args(get_args(OptimizerConfig)[0])
CUSTOM = [
    {"name": "torch.optim.Adafactor"},
    {"name": "torch.optim.NAdam", "kwargs": {"betas": [0.9, 0.95], "decoupled_weight_decay": True}},
    {"name": "torch.optim.SGD", "kwargs": {"momentum": 0.9}},
    {"name": "torch.optim.Adagrad"},  # has state before its first step
    {"name": "torch.optim.Rprop"},  # knows no weight decay
    {"name": "pytorch_optimizer.Prodigy", "lr": 1.0},  # notes numbers of its groups
    {"name": "pytorch_optimizer.CAME"},
    {"name": "pytorch_optimizer.Lion"},
    {"name": "pytorch_optimizer.AdEMAMix"},
]
EVERY = [pytest.param({"kind": kind.model_fields["kind"].default}, id=kind.__name__) for kind in UNION]
EVERY = [member for member in EVERY if member.values[0]["kind"] != "custom"]
EVERY += [pytest.param({"kind": "custom", **values}, id=values["name"]) for values in CUSTOM]
DTYPES = [torch.float32, torch.bfloat16]


def config_of(values: dict[str, Any]) -> Any:
    return TypeAdapter(OptimizerConfig).validate_python({"lr": 1e-2, **values})


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch):
    """Build any member; a paged one as if there were a GPU (on the CPU bitsandbytes then keeps plain buffers)."""

    def made(values: dict[str, Any], parameters: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        if values.get("name", "").startswith("pytorch_optimizer."):
            pytest.importorskip("pytorch_optimizer", reason="the extra 'optimizers' is not installed")
        if values["kind"] == "torchao_adamw8bit":
            pytest.importorskip("torchao", reason="the extra 'torchao' is not installed")
        if values["kind"] == "paged_adamw8bit":
            monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        optimizer = config_of(values).build(parameters.items())
        monkeypatch.undo()
        return optimizer

    return made


def make_parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, nn.Parameter]:
    """A matrix large enough for 8-bit state, one too small for it, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"block.0.weight": (64, 128), "block.0.bias": (64,), "out.weight": (8, 16)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in parameters.values())


def on_disk(folder: Path, saved: tuple[dict, dict]) -> tuple[dict, dict]:
    """Through real files: what survives neither safetensors nor JSON must not pass."""
    atomic_save_tensors(folder / "optimizer.safetensors", saved[0])
    (folder / "optimizer.json").write_text(json.dumps(saved[1], allow_nan=False))
    return load_file(folder / "optimizer.safetensors"), json.loads((folder / "optimizer.json").read_text())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", EVERY)
def test_save_load_two_more_steps(values, dtype, build, tmp_path):
    straight = make_parameters(dtype)
    optimizer = build(values, straight)
    train(optimizer, straight, range(3))
    saved = on_disk(tmp_path, optimizer_state(optimizer, straight))
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    assert saved[0], "an empty state would prove nothing"
    train(optimizer, straight, range(3, 5))

    other = build(values, resumed)
    load_optimizer_state(other, saved, resumed)
    train(other, resumed, range(3, 5))
    for name in straight:
        assert torch.equal(straight[name], resumed[name]), name
    ours, theirs = optimizer_state(other, resumed), optimizer_state(optimizer, straight)
    assert ours[0].keys() == theirs[0].keys() and ours[1] == theirs[1]
    for key, tensor in theirs[0].items():
        assert tensor.dtype == ours[0][key].dtype and torch.equal(tensor, ours[0][key]), key


def test_a_fresh_optimizer_does_not_continue_the_same_way():
    """Canary of the test above: forgetting the state shows."""
    straight = make_parameters()
    optimizer = config_of({"kind": "adamw8bit"}).build(straight.items())
    train(optimizer, straight, range(3))
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    train(optimizer, straight, range(3, 5))
    train(config_of({"kind": "adamw8bit"}).build(resumed.items()), resumed, range(3, 5))
    assert not torch.equal(straight["block.0.weight"], resumed["block.0.weight"])


def test_loading_does_not_tie_two_optimizers_together():
    first, second = make_parameters(), make_parameters()
    one, two = (config_of({"kind": "adamw"}).build(parameters.items()) for parameters in (first, second))
    train(one, first, range(1))
    load_optimizer_state(two, optimizer_state(one, first), second)
    before = {key: tensor.clone() for key, tensor in optimizer_state(one, first)[0].items()}
    train(two, second, range(1, 2))
    after = optimizer_state(one, first)[0]
    assert before and all(torch.equal(before[key], after[key]) for key in before)


def test_the_8bit_state_is_8bit_and_its_tables_stand_once():
    parameters = make_parameters()
    optimizer = config_of({"kind": "adamw8bit"}).build(parameters.items())
    train(optimizer, parameters, range(1))
    tensors, meta = optimizer_state(optimizer, parameters)
    assert tensors["state.block.0.weight.state1"].dtype == torch.uint8
    assert tensors["state.out.weight.state1"].dtype == torch.float32, "bitsandbytes keeps small tensors in 32 bits"
    larger = {"a": nn.Parameter(torch.randn(64, 64)), "b": nn.Parameter(torch.randn(64, 64))}
    optimizer = config_of({"kind": "adamw8bit"}).build(larger.items())
    train(optimizer, larger, range(1))
    tensors, meta = optimizer_state(optimizer, larger)
    assert meta["shared"] == {"state.b.qmap1": "state.a.qmap1", "state.b.qmap2": "state.a.qmap2"}
    assert "state.b.qmap1" not in tensors and meta["scalars"] == {"a": {"step": 1}, "b": {"step": 1}}


def test_adamw_matches_torch_in_float64():
    ours_p, theirs_p = make_parameters(torch.float64), make_parameters(torch.float64)
    ours = AdamW(lr=1e-2, weight_decay=0.1).build(ours_p.items())
    matrices = [theirs_p["block.0.weight"], theirs_p["out.weight"]]
    theirs = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": [theirs_p["block.0.bias"]], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
    )
    train(ours, ours_p, range(5))
    train(theirs, theirs_p, range(5))
    for name in ours_p:
        torch.testing.assert_close(ours_p[name], theirs_p[name], rtol=1e-12, atol=1e-14)


def test_8bit_adam_is_the_librarys_without_its_waiting(monkeypatch):
    import bitsandbytes

    def trained(make: Any) -> list[torch.Tensor]:
        parameters = make_parameters()
        train(make(parameters), parameters, range(3))
        return list(parameters.values())

    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
    theirs = trained(lambda named: bitsandbytes.optim.AdamW8bit(list(named.items()), **settings))
    monkeypatch.delattr(bitsandbytes.optim.optimizer, "sync_gpu")
    ours = trained(lambda named: config_of({"kind": "adamw8bit", **settings}).build(named.items()))
    assert all(map(torch.equal, ours, theirs))


def test_8bit_adam_stays_near_32bit_adam():
    eight, thirty_two = make_parameters(), make_parameters()
    train(AdamW8bit(lr=1e-3).build(eight.items()), eight, range(20))
    train(AdamW(lr=1e-3).build(thirty_two.items()), thirty_two, range(20))
    start = make_parameters()["block.0.weight"]
    moved = thirty_two["block.0.weight"] - start
    error = (eight["block.0.weight"] - thirty_two["block.0.weight"]).norm() / moved.norm()
    assert 0 < error < 0.05


def test_weight_decay_leaves_vectors_alone():
    parameters = make_parameters()
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(parameters.items())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(parameters["block.0.bias"], start["block.0.bias"])
    torch.testing.assert_close(parameters["block.0.weight"], start["block.0.weight"] * (1 - 0.1 * 0.5))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", EVERY)
def test_set_lr_is_what_the_next_step_uses(values, dtype, build):
    parameters = make_parameters(dtype)
    optimizer = build(values, parameters)
    train(optimizer, parameters, range(1))
    set_lr(optimizer, 0.0)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    train(optimizer, parameters, range(1, 2))
    adapts_by_itself = values.get("name") == "torch.optim.Rprop"  # its lr is only the first step's size
    assert adapts_by_itself or all(torch.equal(parameters[name], start[name]) for name in start)
    assert all(float(group["lr"]) == 0.0 for group in optimizer.param_groups)


# ------------------------------------------------------------------------------------------------- master weights


def test_masters_match_an_fp32_model_fed_with_the_same_gradients():
    narrow = make_parameters(torch.bfloat16)
    wide = {name: nn.Parameter(parameter.detach().float()) for name, parameter in narrow.items()}
    optimizer = AdamW(lr=1e-4).build(narrow.items())
    theirs = AdamW(lr=1e-4).build(wide.items())
    assert isinstance(optimizer, LowPrecisionOptimizer) and not isinstance(theirs, LowPrecisionOptimizer)
    for step in range(50):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in narrow.items():
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16() + 0.5
            wide[name].grad = parameter.grad.float()
        optimizer.step()
        theirs.step()
    for name, master in precise_weights(optimizer, narrow).items():
        assert torch.equal(master, wide[name])
        assert torch.equal(narrow[name], wide[name].bfloat16()), "rounded to nearest"


def test_without_masters_small_updates_are_lost():
    """Why they exist; and the canary of the test above."""
    parameter = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    bare = torch.optim.AdamW([parameter], lr=1e-3)
    with_master = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    ours = AdamW(lr=1e-3).build([("w", with_master)])
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        with_master.grad = torch.ones_like(with_master)
        bare.step()
        ours.step()
    assert torch.equal(parameter, torch.ones_like(parameter)), "1 - 1e-3 rounds back to 1 in bfloat16"
    assert float(with_master.detach().float().mean()) == pytest.approx(0.98, abs=2e-3)


def test_chunks_change_memory_and_nothing_else():
    results, widened = [], []
    for chunk_elements in (1 << 28, 100):
        parameters = make_parameters(torch.bfloat16)
        parameters["wide.weight"] = nn.Parameter(torch.ones(4, 4))
        optimizer = LowPrecisionOptimizer(
            list(parameters.items()), lambda masters: torch.optim.AdamW(masters, lr=1e-2), "master", chunk_elements
        )
        inner_step, seen = optimizer.inner.step, []

        def counting_step(inner=optimizer.inner, step=inner_step, seen=seen):
            seen.append(sum(p.grad is not None for group in inner.param_groups for p in group["params"]))
            return step()

        optimizer.inner.step = counting_step
        train(optimizer, parameters, range(3))
        results.append(parameters)
        widened.append(seen)
    assert widened == [[4] * 3, [1] * 12]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_parameter_without_gradient_is_left_alone():
    parameters = make_parameters(torch.bfloat16)
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build(parameters.items())
    start = parameters["out.weight"].detach().clone()
    parameters["block.0.weight"].grad = torch.ones_like(parameters["block.0.weight"])
    optimizer.step()
    assert torch.equal(parameters["out.weight"], start)
    assert parameters["block.0.weight"].grad is not None, "the gradient is zero_grad's to free"


# ----------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "torch.optim.AdaFactor"}, "did you mean 'torch.optim.Adafactor'"),
        ({"name": "os.system"}, "unknown optimizer 'os.system'"),
        ({"name": "torch.optim.LBFGS"}, "unknown optimizer"),
        ({"name": "torch.optim.SGD", "kwargs": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"name": "torch.optim.SGD", "kwargs": {"lr": 0.9}}, "as optimizer.lr"),
    ],
)
def test_custom_is_checked_when_the_configuration_is_read(values, message):
    with pytest.raises(ValidationError, match=message):
        config_of({"kind": "custom", **values})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Prodgy", "did you mean 'pytorch_optimizer.Prodigy'"),
        ("ScheduleFreeAdamW", "train.ema_decay averages weights"),
        ("SOAP", "no form to save it in"),
        ("Muon", "use_muon"),
        ("AliG", "cannot be used here"),
    ],
)
def test_what_cannot_be_continued_bit_for_bit_is_refused_with_the_reason(name, message):
    pytest.importorskip("pytorch_optimizer", reason="the extra 'optimizers' is not installed")
    with pytest.raises(ValidationError, match=message):
        config_of({"kind": "custom", "name": f"pytorch_optimizer.{name}"})


def test_numbers_of_a_group_belong_to_the_state():
    """Prodigy's estimate of the distance stands in its group: without it a run would begin from nothing."""
    pytest.importorskip("pytorch_optimizer", reason="the extra 'optimizers' is not installed")
    values = {"kind": "custom", "name": "pytorch_optimizer.Prodigy", "lr": 1.0}
    straight = make_parameters()
    optimizer = config_of(values).build(straight.items())
    train(optimizer, straight, range(3))
    tensors, meta = optimizer_state(optimizer, straight)
    assert meta["groups"][0]["d_numerator"]["values"][0] != 0 and meta["groups"][0]["step"] == 4
    other = config_of(values).build(straight.items())
    for wrong, message in (("lr", "lr is a number of a group that no"), ("betas", "betas is a number of a group")):
        groups = [{**group, wrong: 0.5} for group in meta["groups"]]
        with pytest.raises(CheckpointError, match=message):
            load_optimizer_state(
                config_of(values).build(straight.items()), (tensors, {**meta, "groups": groups}), straight
            )
    with pytest.raises(CheckpointError, match="of 1 groups of parameters, not of 2"):
        few = {**meta, "groups": meta["groups"][:1]}
        load_optimizer_state(other, (tensors, few), straight)


def test_tensors_of_a_group_are_restored_beside_its_parameters():
    """Most optimizers that note some leave them where they are, and add to them on the parameters' device."""
    pytest.importorskip("pytorch_optimizer", reason="the extra 'optimizers' is not installed")
    config = config_of({"kind": "custom", "name": "pytorch_optimizer.DAdaptAdam", "lr": 1.0})
    straight = make_parameters()
    optimizer = config.build(straight.items())
    train(optimizer, straight, range(2))
    elsewhere = {name: nn.Parameter(parameter.detach().to("meta")) for name, parameter in straight.items()}
    other = config.build(elsewhere.items())
    load_optimizer_state(other, optimizer_state(optimizer, straight), elsewhere)
    assert {group["numerator_weighted"].device.type for group in other.param_groups} == {"meta"}


def test_learning_rates_are_scaled_by_name():
    """LoRA+: B's step is so many times as long."""
    parameters = {f"block.{name}.weight": nn.Parameter(torch.zeros(4, 4)) for name in ("lora_A", "lora_B")}
    optimizer = config_of({"kind": "adamw", "lr_scales": {"lora_B": 16}}).build(parameters.items())
    set_lr(optimizer, 1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.ones(4, 4)
    optimizer.step()
    steps = [float(parameter.detach()[0, 0]) for parameter in parameters.values()]
    assert steps == pytest.approx([-1e-3, -16e-3], rel=1e-5)
    with pytest.raises(ConfigError, match=r"'lora_C' in its name; one is block\.lora_A\.weight"):
        config_of({"kind": "adamw", "lr_scales": {"lora_C": 16}}).build(parameters.items())


def test_every_usable_torch_optimizer_can_be_named():
    names = set(sections._classes("torch.optim.Adam"))
    assert {"torch.optim.Adam", "torch.optim.Adafactor", "torch.optim.Muon"} <= names and len(names) >= 12
    assert not {"torch.optim.LBFGS", "torch.optim.SparseAdam", "torch.optim.Optimizer"} & names


def test_what_the_optimizer_refuses_is_a_config_error():
    with pytest.raises(ConfigError, match="Muon"):
        CustomOptimizer(name="torch.optim.Muon").build(make_parameters().items())  # takes matrices only
    with pytest.raises(ConfigError, match="momentum"):
        CustomOptimizer(name="torch.optim.SGD", kwargs={"momentum": -1.0}).build(make_parameters().items())


def test_paging_needs_cuda():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="CUDA unified memory") as caught:
        PagedAdamW8bit().build(make_parameters().items())
    assert "adamw8bit" in caught.value.fix and "paged_adamw8bit" in caught.value.where


def test_a_missing_library_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(ConfigError, match="torchao") as caught:
        config_of({"kind": "torchao_adamw8bit"}).build(make_parameters().items())
    assert "cogvideox-finetune[torchao]" in caught.value.fix


def test_betas_below_one():
    with pytest.raises(ValidationError, match="less than 1"):
        AdamW(betas=(0.9, 1.0))


def test_state_of_another_optimizer_or_model_is_refused():
    parameters = make_parameters()
    optimizer = AdamW().build(parameters.items())
    train(optimizer, parameters, range(1))
    saved = optimizer_state(optimizer, parameters)
    with pytest.raises(CheckpointError, match="AdamW8bit, the checkpoint's is AdamW"):
        load_optimizer_state(AdamW8bit().build(parameters.items()), saved, parameters)
    renamed = {name.replace("out", "head"): parameter for name, parameter in parameters.items()}
    with pytest.raises(CheckpointError, match=r"head\.weight, out\.weight"):
        load_optimizer_state(AdamW().build(renamed.items()), saved, renamed)
    narrow = make_parameters(torch.bfloat16)
    with pytest.raises(CheckpointError, match="0 fp32 master weights, this run has 3"):
        load_optimizer_state(AdamW().build(narrow.items()), saved, narrow)


def test_a_file_cannot_choose_what_is_imported():
    parameters = make_parameters()
    optimizer = AdamW().build(parameters.items())
    train(optimizer, parameters, range(1))
    tensors, meta = optimizer_state(optimizer, parameters)
    meta["composed"] = {"state.out.weight.exp_avg": {"class": "os.system", "parts": [], "context": []}}
    with pytest.raises(CheckpointError, match=r"exp_avg is .*os\.system"):
        load_optimizer_state(AdamW().build(parameters.items()), (tensors, meta), parameters)


def one_element(tensors: dict, meta: dict, key: str) -> None:
    tensors[key] = tensors[key].flatten()[:1].clone()


def other_dtype(tensors: dict, meta: dict, key: str) -> None:
    tensors[key] = tensors[key].to(torch.float16)


def missing(tensors: dict, meta: dict, key: str) -> None:
    del tensors[key]


def none_of_a_parameter(tensors: dict, meta: dict, key: str) -> None:
    name = owner_of(key)
    for part in (tensors, meta["composed"], meta["shared"]):
        for mine in [other for other in part if other.startswith("state.") and owner_of(other) == name]:
            del part[mine]
    meta["scalars"].pop(name, None)


def added(tensors: dict, meta: dict, key: str) -> None:
    tensors["state.out.weight.more"] = torch.zeros(8, 16)


def no_count(tensors: dict, meta: dict, key: str) -> None:
    for step in [other for other in tensors if other.endswith(".step")]:
        tensors[step] = torch.full_like(tensors[step], math.nan)
    for values in meta["scalars"].values():
        values["step"] = math.nan


HARMS = [one_element, other_dtype, missing, none_of_a_parameter, added, no_count]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", EVERY)
def test_a_state_of_another_form_is_refused_and_nothing_is_loaded(values, dtype, build):
    """Fused AdamW crashes on a state of one element, and others spread it over all; whatever is saved is compared."""
    parameters = make_parameters(dtype)
    optimizer = build(values, parameters)
    train(optimizer, parameters, range(2))
    tensors, meta = optimizer_state(optimizer, parameters)
    other = build(values, parameters)
    before = {key: tensor.clone() for key, tensor in optimizer_state(other, parameters)[0].items()}
    keys = [key for key in tensors if key.startswith("state.block.0.weight") and tensors[key].numel() > 1]
    keys += [key for key in tensors if key.startswith(("master.", "compensation."))][:1]
    counted = any(key.endswith(".step") for key in tensors) or any("step" in v for v in meta["scalars"].values())
    for key in keys:
        for harm in HARMS:
            if (harm is no_count and not counted) or (harm is none_of_a_parameter and not key.startswith("state.")):
                continue
            wrong, told = dict(tensors), copy.deepcopy(meta)
            harm(wrong, told, key)
            with pytest.raises(CheckpointError) as caught:
                load_optimizer_state(other, (wrong, told), parameters)
            said = str(caught.value)
            assert harm is no_count or owner_of(key) in said or "out.weight.more" in said or "master weights" in said
    after = optimizer_state(other, parameters)[0]
    assert keys and all(torch.equal(before[key], after[key]) for key in before) and after.keys() == before.keys()
    load_optimizer_state(other, (tensors, meta), parameters)  # canary: what is whole is taken


def test_states_of_shares_are_compared_as_wholes():
    """A form without content is enough, and a state from before ``stateless`` was noted may lack a parameter's."""
    parameters = make_parameters()
    optimizer = AdamW().build(parameters.items())
    parameters["out.weight"].requires_grad_(False)
    for name in ("block.0.weight", "block.0.bias"):
        parameters[name].grad = torch.ones_like(parameters[name])
    optimizer.step()
    tensors, meta = optimizer_state(optimizer, parameters)
    assert meta["stateless"] == ["out.weight"]
    forms = {key: tensor.to("meta") for key, tensor in tensors.items()}
    require_same_state(optimizer, (tensors, meta), parameters, forms=forms)
    require_same_state(optimizer, (tensors, {**meta, "stateless": ["out.weight"]}), parameters, forms=forms)
    del meta["stateless"]
    require_same_state(optimizer, (tensors, meta), parameters, forms=forms)
    forms["state.block.0.bias.exp_avg"] = torch.empty(32, device="meta")
    with pytest.raises(CheckpointError, match=r"exp_avg is float32 \[32\], not float32 \[64\]"):
        require_same_state(optimizer, (tensors, meta), parameters, forms=forms)


# ------------------------------------------------------------------------------------------------ shares of parameters


def whole_and_shares(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix after three steps: updated whole, and as two shares of its rows by two optimizers."""
    whole = {"weight": make_parameters()["block.0.weight"]}
    shares = [{"weight": nn.Parameter(rows.clone())} for rows in whole["weight"].detach().chunk(2)]
    optimizers = [config_of(values).build(each.items()) for each in (whole, *shares)]
    for step in range(3):
        gradient = torch.randn(whole["weight"].shape, generator=torch.Generator().manual_seed(step))
        whole["weight"].grad = gradient
        for share, rows in zip(shares, gradient.chunk(2), strict=True):
            share["weight"].grad = rows.clone()
        for optimizer in optimizers:
            optimizer.step()
    return whole["weight"].detach(), torch.cat([share["weight"].detach() for share in shares])


def test_optimizers_that_are_said_to_work_on_shares_do():
    known = [{"kind": "custom", "name": name} for name in sections._classes("torch.optim.Adam")]
    members = [{"kind": "adamw"}, {"kind": "adamw8bit"}, *known]
    said = [values for values in members if config_of(values).elementwise]
    assert len(said) >= 12
    for values in said:
        whole, shares = whole_and_shares(values)
        torch.testing.assert_close(shares, whole, rtol=1e-6, atol=1e-7, msg=str(values))
    others = [values.get("name", values["kind"]) for values in members if values not in said]
    assert others == ["adamw8bit", "torch.optim.Adafactor", "torch.optim.Muon"], "a new one in torch: look at it"


def test_an_optimizer_of_whole_matrices_shows_on_shares():
    """Canary of the test above."""
    for name in ("torch.optim.Adafactor", "torch.optim.Muon"):
        whole, shares = whole_and_shares({"kind": "custom", "name": name})
        assert not torch.allclose(shares, whole, rtol=1e-6, atol=1e-7), name


def test_the_owner_of_every_tensor_of_a_state():
    parameters = make_parameters(torch.bfloat16)
    optimizer = config_of({"kind": "adamw"}).build(parameters.items())
    train(optimizer, parameters, range(1))
    tensors, _ = optimizer_state(optimizer, parameters)
    owners = {key: owner_of(key) for key in tensors}
    assert len(owners) == 4 * len(parameters) and set(owners.values()) == set(parameters)
    assert all(owner in key for key, owner in owners.items())
