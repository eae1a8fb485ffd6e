"""The precision of bf16 weights: masters, Kahan's compensation, stochastic rounding."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter
from test_optim import on_disk
from torch import Tensor, nn

from finetune.checkpoint.compare import require_same_run
from finetune.core.errors import CheckpointError, ConfigError
from finetune.optim import low_precision
from finetune.optim.low_precision import LowPrecisionOptimizer, round_stochastically_
from finetune.optim.optimizers import OptimizerConfig, Weights, begin
from finetune.optim.state import load_optimizer_state, optimizer_state, owner_of, precise_weights

WAYS = get_args(Weights)
INNER: dict[str, dict[str, Any]] = {
    "adamw": {"kind": "adamw"},
    "adamw8bit": {"kind": "adamw8bit"},
    "adagrad": {"kind": "custom", "name": "torch.optim.Adagrad"},  # makes its state before its first step
}


def build(parameters: dict[str, nn.Parameter], weights: str, **values: Any) -> Any:
    config = {"kind": "adamw", "lr": 1e-2, "weights": weights, **values}
    return TypeAdapter(OptimizerConfig).validate_python(config).build(parameters.items())


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"block.0.weight": (64, 128), "block.0.bias": (63,), "out.weight": (8, 16)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def train(optimizer: Any, parameters: dict[str, nn.Parameter], steps: range, *, seed: int = 5) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(1000 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        begin(optimizer, seed=seed, step=step)
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ stochastic rounding


def rounded(values: Tensor, seed: int = 0) -> Tensor:
    return round_stochastically_(values.clone(), torch.Generator().manual_seed(seed))


def bias(values: Tensor, results: Tensor) -> Tensor:
    """Mean error over the rows of ``results``, in units of its standard error."""
    errors = results.double() - values.double()
    return errors.mean(0) / (errors.std(0) / math.sqrt(len(errors)))


def test_a_value_becomes_one_of_its_two_neighbours():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 10_000)
    down = (values.view(torch.int32) & -(1 << 16)).view(torch.float32)
    up = ((values.view(torch.int32) & -(1 << 16)) + (1 << 16)).view(torch.float32)
    found = rounded(values)
    assert torch.equal(found, found.bfloat16().float()), "nothing is left to round"
    assert ((found == down) | (found == up)).all() and (found == down).any() and (found == up).any()


def test_what_bfloat16_holds_stays():
    special = torch.tensor([0.0, -0.0, 1.0, -3.5, math.inf, -math.inf, 2**-133])
    for seed in range(50):
        assert torch.equal(rounded(special, seed), special)
    assert rounded(torch.tensor([math.nan])).isnan().all()


@pytest.mark.parametrize("part", [0.001, 0.25, 0.5, 0.9], ids=str)
def test_the_mean_is_the_value_itself(part):
    """Each of four positions in a 64-bit draw by itself, both signs: a bias in one of them would show."""
    value = 1 + part * 2**-7
    values = torch.tensor([value, value, -value, -value, value, -value, value, -value])
    results = torch.stack([rounded(values.repeat(512), seed).reshape(512, 8) for seed in range(40)]).flatten(0, 1)
    assert results.unique().numel() == 4
    assert bias(values, results).abs().max() < 4.5


def test_a_bias_is_noticed(monkeypatch):
    """Canary: noise of 63 bits, as ``random_()`` draws, leaves the top bit of every fourth number empty."""
    value = 1 + 0.5 * 2**-7
    values = torch.full((8,), value)
    real = torch.Tensor.random_
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, *_, generator: real(self, generator=generator))
    results = torch.stack([rounded(values.repeat(512), seed).reshape(512, 8) for seed in range(10)]).flatten(0, 1)
    monkeypatch.undo()
    assert bias(values, results).abs().max() > 10


def test_neighbours_and_steps_draw_independently():
    values = torch.full((4096,), 1 + 0.5 * 2**-7)
    ups = torch.stack([(rounded(values, seed) > values).double() for seed in range(8)])
    signs = ups * 2 - 1
    for lag in (1, 2, 3, 4, 64):
        assert abs(float((signs[:, lag:] * signs[:, :-lag]).mean())) < 4.5 / math.sqrt(signs[:, lag:].numel())
    assert abs(float((signs[0] * signs[1]).mean())) < 4.5 / math.sqrt(4096)


def test_noise_belongs_to_seed_step_and_name():
    def after(name: str = "a", *, seed: int = 1, step: int = 2, beside: bool = False, chunk: int = 1 << 26) -> Tensor:
        parameters = {name: nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))}
        if beside:
            parameters = {"other": nn.Parameter(torch.ones(5, dtype=torch.bfloat16)), **parameters}
        optimizer = LowPrecisionOptimizer(
            list(parameters.items()), lambda shells: torch.optim.SGD(shells, lr=1e-3), "stochastic", chunk
        )
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        begin(optimizer, seed=seed, step=step)
        optimizer.step()
        return parameters[name].detach()

    reference = after()
    assert torch.equal(after(), reference)
    assert torch.equal(after(beside=True), reference) and torch.equal(after(beside=True, chunk=1), reference)
    assert not any(torch.equal(other, reference) for other in (after("b"), after(seed=2), after(step=3)))


def test_without_a_step_nothing_is_drawn():
    parameters = make_parameters()
    optimizer = build(parameters, "stochastic")
    parameters["out.weight"].grad = torch.ones_like(parameters["out.weight"])
    with pytest.raises(RuntimeError, match="begin"):
        optimizer.step()


def test_float16_is_refused_by_stochastic_rounding():
    with pytest.raises(ConfigError, match="is float16; stochastic rounding is for bfloat16") as caught:
        build(make_parameters(torch.float16), "stochastic")
    assert "optimizer.weights: master" in caught.value.fix
    for weights in ("master", "kahan"):
        parameters = make_parameters(torch.float16)
        train(build(parameters, weights), parameters, range(1))


# ---------------------------------------------------------------------------------------------- small updates survive


@pytest.mark.parametrize("weights", WAYS)
def test_updates_below_the_spacing_survive(weights):
    """1 - 1e-3 rounds back to 1 in bfloat16: test_optim shows that nothing moves without one of these."""
    parameters = {"w": nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))}
    optimizer = build(parameters, weights, lr=1e-3, weight_decay=0.0)
    for step in range(20):
        parameters["w"].grad = torch.ones_like(parameters["w"])
        begin(optimizer, seed=0, step=step)
        optimizer.step()
    mean = float(parameters["w"].detach().float().mean())
    assert mean == pytest.approx(0.98, abs={"master": 2e-3, "kahan": 2e-3, "stochastic": 1e-3}[weights])


def trained(weights: str, steps: int = 100, **values: Any) -> tuple[dict[str, nn.Parameter], Any]:
    parameters = make_parameters()
    optimizer = build(parameters, weights, **{"lr": 1e-3, **values})
    train(optimizer, parameters, range(steps))
    return parameters, optimizer


def test_kahan_stays_within_its_bound_of_the_masters():
    """2^-16 of the weight per step, and what weight decay makes of it."""
    (_, masters), (ours, kahan) = trained("master"), trained("kahan")
    for name, master in precise_weights(masters, ours).items():
        value = ours[name].detach().double() + kahan.policy.saved[name].double()
        largest = float(master.detach().abs().max())
        assert (value - master.double()).abs().max() <= 100 * 2**-16 * largest, name
        assert (value - master.double()).abs().mean() <= 10 * 2**-16 * largest, "errors of either sign cancel"


def test_a_lost_compensation_is_noticed(monkeypatch):
    """Canary of the bound."""
    (_, masters), (start, _) = trained("master"), trained("kahan", steps=1)
    monkeypatch.setattr(low_precision.Kahan, "round_back", _without_compensation)
    ours, _ = trained("kahan")
    name = "block.0.weight"
    master = precise_weights(masters, start)[name].detach()
    error = (ours[name].detach().double() - master.double()).abs().max()
    assert error > 100 * 2**-16 * float(master.abs().max())


def _without_compensation(self: Any, name: str, parameter: nn.Parameter, shell: nn.Parameter) -> None:
    parameter.copy_(shell)
    shell.data = low_precision._placeholder(parameter)


def test_stochastic_weights_stay_around_the_masters():
    (theirs, masters), (ours, _) = trained("master"), trained("stochastic")
    name = "block.0.weight"
    master = precise_weights(masters, theirs)[name].detach()
    error = (ours[name].detach() - master).double()
    spacing = 2**-7 * master.abs().double()
    assert abs(float(error.mean())) < 4.5 * float(error.std()) / math.sqrt(error.numel()), "in no direction"
    assert float((error / spacing).square().mean().sqrt()) < 10, "a walk of 100 steps of at most one spacing"


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("weights", ["stochastic", "kahan"])
def test_nothing_wide_is_left_between_steps(weights):
    parameters = make_parameters()
    optimizer = build(parameters, weights)
    for steps in (range(1), range(1, 2)):
        for _, parameter, shell in optimizer.members():
            assert shell.shape == parameter.shape and shell.untyped_storage().nbytes() == 4
        train(optimizer, parameters, steps)
    assert {t.dtype for t in optimizer.policy.saved.values()} == ({torch.bfloat16} if weights == "kahan" else set())
    assert set(precise_weights(optimizer, parameters)) == set(parameters)
    assert all(precise is parameters[name] for name, precise in precise_weights(optimizer, parameters).items())


@pytest.mark.parametrize("weights", WAYS)
def test_float32_weights_need_none_of_it(weights):
    parameters = make_parameters(torch.float32)
    assert isinstance(build(parameters, weights), torch.optim.AdamW)


# --------------------------------------------------------------------------------------------------------- continuing


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("weights", ["kahan", "stochastic"])  # masters: test_optim.py
def test_save_load_two_more_steps(weights, inner, tmp_path):
    straight = make_parameters() | {"norm.weight": nn.Parameter(torch.ones(7))}
    optimizer = build(straight, weights, **INNER[inner])
    train(optimizer, straight, range(3))
    saved = on_disk(tmp_path, optimizer_state(optimizer, straight))
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    train(optimizer, straight, range(3, 5))
    other = build(resumed, weights, **INNER[inner])
    load_optimizer_state(other, saved, resumed)
    train(other, resumed, range(3, 5))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    ours, theirs = optimizer_state(other, resumed), optimizer_state(optimizer, straight)
    assert ours[1] == theirs[1] and ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in theirs[0])
    kept = {key for key in saved[0] if not key.startswith("state.")}
    expected = make_parameters() if weights == "kahan" else {}
    assert kept == {f"compensation.{name}" for name in expected} and {owner_of(key) for key in kept} == set(expected)


@pytest.mark.parametrize(("weights", "forgotten"), [("kahan", "compensation"), ("stochastic", "step")])
def test_a_resume_that_forgets_is_noticed(weights, forgotten):
    """Canary of the test above."""
    straight = make_parameters()
    optimizer = build(straight, weights)
    train(optimizer, straight, range(3))
    tensors, meta = optimizer_state(optimizer, straight)
    saved = {key: torch.zeros_like(t) if key.startswith(forgotten) else t.clone() for key, t in tensors.items()}
    resumed = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in straight.items()}
    train(optimizer, straight, range(3, 5))
    other = build(resumed, weights)
    load_optimizer_state(other, (saved, meta), resumed)
    train(other, resumed, range(3, 5), seed=6 if forgotten == "step" else 5)
    assert not torch.equal(straight["block.0.weight"], resumed["block.0.weight"])


@pytest.mark.parametrize("there", WAYS)
@pytest.mark.parametrize("here", WAYS)
def test_another_way_on_resume_is_refused(here, there):
    parameters = make_parameters()
    optimizer = build(parameters, there)
    train(optimizer, parameters, range(1))
    saved = optimizer_state(optimizer, parameters)
    if here == there:
        load_optimizer_state(build(parameters, here), saved, parameters)
        return
    with pytest.raises(CheckpointError, match=f"narrow weights by {here}, the checkpoint by {there}") as caught:
        load_optimizer_state(build(parameters, here), saved, parameters)
    assert f"optimizer.weights: {there}" in caught.value.fix
    with pytest.raises(CheckpointError, match=r"optimizer\.weights"):
        require_same_run({"optimizer": {"weights": there}}, {"optimizer": {"weights": here}}, where="here")


def test_a_state_from_before_there_was_a_choice_is_one_of_masters():
    parameters = make_parameters()
    optimizer = build(parameters, "master")
    train(optimizer, parameters, range(1))
    tensors, meta = optimizer_state(optimizer, parameters)
    del meta["weights"]
    load_optimizer_state(build(parameters, "master"), (tensors, meta), parameters)
    with pytest.raises(CheckpointError, match="by kahan, the checkpoint by master"):
        load_optimizer_state(build(parameters, "kahan"), (tensors, meta), parameters)
