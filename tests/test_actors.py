"""Memory techniques, every two of them together, watched as three kinds of actors: nothing is touched before its time.

What is right by numbers is shown elsewhere (``test_memory.py`` and the files of the techniques). Here a number that is
not there yet is NaN, and whoever does not wait is named, however fast the copy would have been.
"""

from __future__ import annotations

import ctypes
import gc
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from actors import Actors, RaceError, holding_nothing
from pydantic import TypeAdapter
from tiny_blocks import State, covering
from torch import Tensor, nn

from finetune.cli.init import RECIPES, Recipe
from finetune.core.types import Batch, Bucket
from finetune.datasets.dataloader import Loader
from finetune.datasets.schedule import Item, StepPlan
from finetune.memory.adaln_offload import announced, prepare
from finetune.memory.config import MemoryConfig, Traits
from finetune.memory.gradient_offload import DoubleBuffer, HostWeights
from finetune.memory.host_buffers import CudaCopyStream, host_buffer, host_work
from finetune.memory.quantized_linear import QuantisedLinear, placement
from finetune.memory.runner import block_runner, rewriting_weights, undo
from finetune.methods.full import FullMethod
from finetune.methods.lora import LoraMethod
from finetune.optim.ema import Ema
from finetune.optim.optimizers import OptimizerConfig, begin
from finetune.parallel.gradient_release import GradientRelease, single_process_strategy
from finetune.planner.fake_run import OneProcess
from finetune.testing.tiny import tiny_transformer
from finetune.trainers.tracking import StepMetrics

CPU = torch.device("cpu")
HOST: State = {"optimizer_states": "host"}
MOMENTUM: State = {"kind": "custom", "name": "torch.optim.SGD", "lr": 1e-3, "kwargs": {"momentum": 0.9}}
OF_BOTH: list[list[State]] = [
    [{}, {"streamed_blocks": "all"}, {"streamed_blocks": 2, "ring": 1}],
    [{}, {"activations": "host"}],
    [{}, {"block": "lean"}],
    [{}, {"checkpointing": "selective"}],
]
OF_ADAPTERS: list[list[State]] = [[{}, {"modulation": "host"}], [{}, {"base": "fp8"}, {"base": "nf4"}]]
OF_FULL: list[list[State]] = [[{}, {"gradient_release": "exact"}, {"gradient_release": "per_parameter"}], [{}, HOST]]
MOVES = {"streamed_blocks", "activations", "modulation", "gradient_release"}
NO_COPIES = {"kind", "budget", "ram", "quantize", "keep_attention", "text_encoder", "clips_at_once", "compile"}
"""Of ``MemoryConfig``: what decides about nothing that moves while training."""


def moving(choices: list[list[State]], traits: Traits) -> list[State]:
    """Where nothing moves, nothing can come too early."""
    return [state for state in covering(choices, traits) if MOVES & state.keys()]


LORA_STATES = moving([*OF_BOTH, *OF_ADAPTERS], Traits(accumulation=2))
FULL_STATES = moving([*OF_FULL, *OF_BOTH], Traits(full=True))
EVERYTHING = {"streamed_blocks": 2, "activations": "host", "block": "lean"}


def test_every_option_that_moves_something_is_among_them():
    """A new technique joins the table the day it joins ``MemoryConfig``."""
    varied = {key for choices in (*OF_BOTH, *OF_ADAPTERS, *OF_FULL) for state in choices for key in state}
    assert varied | NO_COPIES == set(MemoryConfig.model_fields) and not varied & NO_COPIES
    for states in (LORA_STATES, FULL_STATES):  # the selection leaves none out
        assert len({frozenset(pair) for state in states for pair in combinations(state.items(), 2)}) >= 33


# ---------------------------------------------------------------------------------------------------------- a training


class Training:
    """Steps of a tiny transformer in a memory state, with an average that is measured after every step."""

    def __init__(self, state: State, *, full: bool) -> None:
        self.full = full
        memory = MemoryConfig(**state)
        self.module: Any = tiny_transformer("5b", num_layers=3, num_attention_heads=2).to(torch.bfloat16)
        quantise(self.module, memory.base)
        method = FullMethod() if full else LoraMethod(rank=4)
        method.apply(self.module, seed=0)
        memory.apply(self.module, CPU)
        self.module.train()
        parameters = method.trainable(self.module)
        more: State = {"memory": memory, "device": CPU, "max_norm": 1.0}
        if memory.gradient_release == "none":
            self.strategy: Any = single_process_strategy(OneProcess, self.module, parameters, **more)
        else:  # as on a GPU: updates on the host have a thread of their own
            kind = type("Threaded", (GradientRelease,), {"threaded": True})
            self.strategy = kind(OneProcess, self.module, parameters, **more)
        self.strategy.start(TypeAdapter(OptimizerConfig).validate_python(MOMENTUM), None)
        self.average = Ema(self.strategy.parameters, self.strategy.precise(), 0.9)

    def look(self, seed: int) -> Tensor:
        config, generator = self.module.config, torch.Generator().manual_seed(seed)
        latents = torch.randn(2, 2, config.in_channels, 4, 4, generator=generator)
        text = torch.randn(2, 8, config.text_embed_dim, generator=generator)
        steps = torch.randint(1000, (2,), generator=generator)
        given = (latents.to(self.module.dtype), text.to(self.module.dtype), steps)
        loss: Tensor = self.module(*given, return_dict=False)[0].float().square().mean()
        return loss

    def step_with_metrics(self, number: int, metrics: StepMetrics) -> None:
        """As ``trainers.loop`` takes it, of a single pass whose timesteps the host knows."""
        timesteps = (10 * number, 500)
        prepare(self.module, timesteps, None)
        begin(self.strategy.optimizer, seed=3, step=number)
        with self.strategy.micro_batch(last=True), announced(self.module, timesteps, None):
            loss = self.look(number)
            self.strategy.backward(loss)
        metrics.add(loss[None], torch.tensor(timesteps[:1]))
        gathered = metrics.exchange(self.strategy.clip(1.0))
        assert math.isfinite(gathered.grad_norm)
        self.strategy.step()
        self.average.step()
        metrics.reset()

    def step(self, number: int) -> list[float]:
        begin(self.strategy.optimizer, seed=3, step=number)
        micros = 1 if self.full else 2
        for micro in range(micros):
            with self.strategy.micro_batch(last=micro == micros - 1):
                self.strategy.backward(self.look(10 * number + micro))
        norm = self.strategy.clip(1.0)
        self.strategy.step()
        self.average.step()
        return [float(norm), self.measure(number)]

    def measure(self, number: int) -> float:
        with self.average.applied(partial(rewriting_weights, self.module)), torch.no_grad():
            return float(self.look(100 + number))


def quantise(module: nn.Module, base: str) -> None:
    if (chosen := placement(base)) is None:  # type: ignore[arg-type]
        return
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and re.fullmatch(chosen.pattern, name):
            held = QuantisedLinear.like(layer, chosen.kind)
            held.quantise(layer.weight.data)
            held.bias = layer.bias
            module.set_submodule(name, held)


def trained(state: State, *, full: bool) -> list[list[float]]:
    training = Training(state, full=full)
    numbers = [training.step(number) for number in range(2)]
    weights = [float(tensor.double().sum()) for tensor in training.strategy.weights().values()]
    undo(training.module)
    return [*numbers, weights]


def watched(state: State, *, full: bool) -> tuple[Actors, list[list[float]]]:
    with Actors() as actors:
        numbers = trained(state, full=full)
    assert all(math.isfinite(number) for row in numbers for number in row)
    assert actors.compute.clock["compute"] > 1000
    return actors, numbers


@pytest.mark.parametrize("state", LORA_STATES, ids=str)
def test_states_of_a_lora(state):
    actors, _ = watched(state, full=False)
    assert bool(actors.copies) == bool(state.keys() & {"streamed_blocks", "activations"})


@pytest.mark.parametrize("state", FULL_STATES, ids=str)
def test_states_of_full_fine_tuning(state):
    actors, _ = watched(state, full=True)
    assert bool(actors.threads) == (HOST.items() <= state.items() and state["gradient_release"] == "per_parameter")


@pytest.mark.parametrize(
    ("state", "full"),
    [
        ({**EVERYTHING, "modulation": "host", "base": "nf4"}, False),
        ({**EVERYTHING, "gradient_release": "per_parameter", "optimizer_states": "host"}, True),
    ],
)
def test_all_of_them_at_once_give_the_same_numbers(state, full):
    assert watched(state, full=full)[1] == trained(state, full=full)


# ---------------------------------------------------------------------------------------- every rule has its canary


def lora(**state: Any) -> Callable[[], object]:
    return lambda: trained(state, full=False)


def full(release: str = "exact", **state: Any) -> Callable[[], object]:
    return lambda: trained({"gradient_release": release, **state}, full=True)


def measured_before_the_update() -> None:
    """Between a backward pass and its update somebody looks, and the next look's first weights are on their way."""
    training = Training({"gradient_release": "exact", "optimizer_states": "host", "streamed_blocks": "all"}, full=True)
    with training.strategy.micro_batch(last=True):
        training.strategy.backward(training.look(1))
    with torch.no_grad():
        training.look(2)
    training.strategy.clip(1.0)
    training.strategy.step()


def gradients_compared() -> None:
    """What ``train.check_ranks`` does before the gradients are clipped."""
    training = Training({"gradient_release": "exact", **HOST}, full=True)
    with training.strategy.micro_batch(last=True):
        training.strategy.backward(training.look(1))
    for tensor in training.strategy.replicas().values():
        tensor.double().sum().tolist()


def state_of(recipe: Recipe) -> State:
    state = {option: value for option, value in recipe.memory.items() if option != "text_encoder"}
    return state | ({"streamed_blocks": 2} if isinstance(state.get("streamed_blocks"), int) else {})


RECIPE_STATES = {f"{recipe.method} {state_of(recipe)}": recipe for recipe in RECIPES}


@pytest.mark.parametrize("name", RECIPE_STATES)
def test_a_step_of_a_recipe_waits_for_the_device_once(name):
    """Where losses and the norm are read."""
    recipe = RECIPE_STATES[name]
    state, method = state_of(recipe), recipe.method
    with Actors() as actors:
        training = Training(state, full=method == "full")
        metrics = StepMetrics(1, gather=lambda table: table)
        waits = []
        for number in range(3):
            before = actors.waits
            training.step_with_metrics(number, metrics)
            waits.append(actors.waits - before)
        undo(training.module)
    assert waits[1:] == [1, 1]


def modulated_ahead() -> None:
    """Passes whose timesteps the host knows already: read from the device, they would hold it up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.memory.adaln_offload._on_host", lambda tensor: torch.full(tensor.shape, 500))
        training = Training({"modulation": "host"}, full=False)
        with torch.no_grad():
            for seed in range(2):
                training.look(seed)
                gc.collect()


def read_ahead() -> None:
    """Batches that a thread makes on the host."""

    def make(step: int, _: object) -> Batch:
        with host_work("batches"):
            made = torch.ones(4)
        return Batch(made, made, made, made, None, (step,), ("a",))

    plan = StepPlan(tuple(Item(Bucket(9, 64, 64), 1.0) for _ in range(4)), 0, batch_size=1, micro_batches=2)
    ahead = Loader(plan, make, rank=0, processes=1, total_steps=2, device=CPU)
    for step in range(2):
        for batch in ahead.step(step):
            assert batch.latents.tolist() == [1.0] * 4
    ahead.close()


def on_lanes(method: str, result: Any = None) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(CudaCopyStream, method, lambda *_: result)


def copies_at_once(patch: pytest.MonkeyPatch) -> None:
    copy = CudaCopyStream.copy
    patch.setattr(CudaCopyStream, "copy", lambda lane, target, source, *, after=(): copy(lane, target, source))


def without(owner: Any, method: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, method, lambda *_, **__: None)


def without_waiting_first(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def rewriting(module: nn.Module) -> Iterator[None]:
        yield
        block_runner(module).weights.invalidate()

    patch.setattr("test_actors.rewriting_weights", rewriting)


Rule = tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], object]]
RULES: dict[str, Rule] = {
    "a pass waits for streamed weights": (on_lanes("wait"), lora(streamed_blocks="all")),
    "a slot is filled when its last pass is over": (on_lanes("compute"), lora(streamed_blocks="all")),
    "a copy waits for what it is told to": (copies_at_once, lora(streamed_blocks="all")),
    "what leaves a block is there before it is copied": (copies_at_once, lora(activations="host")),
    "what comes back is waited for": (on_lanes("wait"), lora(activations="host")),
    "gradients are there before they are copied": (copies_at_once, full()),
    "gradients are back before they are used": (on_lanes("wait"), full()),
    "gradients have arrived before the host reads them": (on_lanes("finish"), gradients_compared),
    "a worker waits for its gradients": (on_lanes("finish"), full("per_parameter", **HOST)),
    "a worker's buffer is not filled while it reads": (without(DoubleBuffer, "_wait"), full("per_parameter", **HOST)),
    "new weights replace those that no pass reads": (copies_at_once, full("per_parameter", **HOST)),
    "the next pass waits for new weights": (without(HostWeights, "end_update"), full(**HOST)),
    "an update waits for copies of the weights": (without(HostWeights, "begin_update"), measured_before_the_update),
    "an average waits for copies of the weights": (without_waiting_first, full(**HOST, streamed_blocks="all")),
    "a batch is waited for": (
        lambda patch: patch.setattr("actors.Task.result", lambda task, timeout=None: Future.result(task, timeout)),
        read_ahead,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_is_broken_is_a_race(rule, monkeypatch):
    breaks, work = RULES[rule]
    breaks(monkeypatch)
    with pytest.raises(RaceError), Actors():
        work()


@pytest.mark.parametrize("work", [measured_before_the_update, modulated_ahead, gradients_compared, read_ahead])
def test_as_it_is_the_same_work_is_none(work):
    with Actors():
        work()


def test_what_the_host_has_is_not_for_the_device():
    with Actors(), pytest.raises(RaceError, match="mixes host and device"):
        torch.ones(4).add_(host_buffer(4, pinned=False, what="test").view(torch.float32))


def test_a_copy_is_not_there_before_somebody_waits():
    with Actors():
        lane, source, target = CudaCopyStream(CPU), torch.ones(4), torch.zeros(4)
        mark = lane.copy(target, source, after=[lane.compute()])
        with pytest.raises(RaceError):
            target.sum()
        seen = ctypes.c_float.from_address(target.data_ptr()).value  # by one whom nothing here sees
        lane.wait(mark)
        assert math.isnan(seen) and target.sum() == 4


# ---------------------------------------------------------------------------------------- dropped in the middle of it


def streamed_and_dropped() -> None:
    training = Training({"streamed_blocks": "all"}, full=False)
    with torch.no_grad():
        training.look(1)


def broken_off_on_the_way_back() -> None:
    training = Training({"activations": "host"}, full=False)
    loss = training.look(1)

    def fail(*_: object) -> None:
        raise MemoryError

    training.module.transformer_blocks[1].attn1.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward()


def broken_off_in_an_update() -> None:
    training = Training({"gradient_release": "exact"}, full=True)
    with training.strategy.micro_batch(last=True):
        training.strategy.backward(training.look(1))
    training.strategy.clip(1.0)
    training.strategy._update = None
    with pytest.raises(TypeError):
        training.strategy.step()


DROPPED = [streamed_and_dropped, broken_off_on_the_way_back, broken_off_in_an_update]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("work", DROPPED)
def test_nothing_is_freed_under_a_copy_of_a_model_that_is_dropped(work, held):
    canary = nullcontext() if held else holding_nothing()
    with canary, nullcontext() if held else pytest.raises(RaceError, match="freed"), Actors() as actors:
        work()
        gc.collect()
        actors.require_nothing_freed()
