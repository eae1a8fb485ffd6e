"""Prior preservation: clips whose target is what the base model predicts, and what that is in every memory state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_blocks import forward
from torch import nn
from worlds import assert_same_run, merged, run_values, stop_after

from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.control import widen
from finetune.cogvideox.load import load_transformer
from finetune.cogvideox.objective import alpha_bar, noise_batch, predicted_velocity, v_mse, velocity_losses
from finetune.cogvideox.spec import read_spec
from finetune.config.rules import check_against
from finetune.config.schema import RunConfig
from finetune.core.errors import ConfigError
from finetune.core.types import Batch
from finetune.memory.config import MemoryConfig
from finetune.memory.quantized_linear import placement
from finetune.methods.lora import LoraMethod
from finetune.methods.prior import base_prediction, without_adapter
from finetune.planner.cost_model import rates_of
from finetune.planner.step_time import step_cost
from finetune.testing.tiny import tiny_transformer
from finetune.trainers.loop import train
from finetune.trainers.tracking import StepRecord

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------ the base's prediction


def of_folder(folder: Path, memory: MemoryConfig, dtype: torch.dtype, method: LoraMethod | None = None) -> nn.Module:
    """A transformer in a memory state, with an adapter that changes it, or none."""
    model = ModelConfig(pretrained=str(folder))
    transformer = load_transformer(model, dtype=dtype, placement=placement(memory.base)).requires_grad_(False)
    if method is not None:
        method.apply(transformer, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in method.trainable(transformer).values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    memory.apply(transformer, CPU)
    return transformer.train()


def batch_of(folder: Path, *prior: bool) -> Batch:
    spec, generator = read_spec(str(folder)), torch.Generator().manual_seed(3)
    shape = (2, spec.latent_channels, 3, 8, 8)
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    text = torch.randn(2, spec.max_text_seq_length, spec.text_embed_dim, generator=generator)
    steps, marks = (200, 800), {"slots": (0, 1), "clips": ("a", "b"), "prior": prior or None}
    return Batch(latents, noise, torch.tensor(steps), text, None, timesteps_on_host=steps, **marks)


STATES: list[tuple[dict[str, Any], dict[str, Any], torch.dtype]] = [
    ({}, {"dropout": 0.2}, torch.float32),
    ({}, {"use_dora": True}, torch.float32),
    ({"block": "lean", "streamed_blocks": "all", "modulation": "host"}, {}, torch.bfloat16),
    ({"block": "lean", "activations": "host", "base": "nf4"}, {}, torch.bfloat16),
]


@pytest.mark.parametrize(("memory", "method", "dtype"), STATES, ids=str)
def test_the_target_of_prior_preservation_is_the_base_model_to_the_bit(tiny_model, memory, method, dtype):
    folder, state = tiny_model("5b"), MemoryConfig(**memory)
    spec, lora = read_spec(str(folder)), LoraMethod(rank=4, **method)
    levels, batch = alpha_bar(spec).float(), batch_of(folder, True, False)
    with torch.no_grad():
        expected = predicted_velocity(of_folder(folder, state, dtype), spec, levels, batch)
    model = of_folder(folder, state, dtype, lora)
    base = base_prediction(model, model, spec, levels, batch, collective=False)
    assert base is not None and torch.equal(base, expected) and not base.requires_grad

    torch.manual_seed(9)
    losses = velocity_losses(model, spec, levels, batch, base)
    torch.manual_seed(9)
    prediction = predicted_velocity(model, spec, levels, batch)
    assert not torch.equal(prediction, expected), "the adapter is on again"
    target = torch.stack([expected[0], noise_batch(batch, levels).velocity[1]])
    torch.testing.assert_close(losses, v_mse(prediction, target), rtol=0, atol=0)
    losses.sum().backward()
    assert all(parameter.grad is not None for parameter in lora.trainable(model).values())


def test_what_trains_beside_a_lora_is_not_in_the_base_either():
    def model(method: LoraMethod | None = None) -> nn.Module:
        transformer = tiny_transformer(num_layers=1)
        widen(transformer)
        if method is not None:
            method.apply(transformer, seed=0)
            with torch.no_grad():
                for parameter in method.trainable(transformer).values():
                    parameter.add_(0.1)
        return transformer

    adapted, expected = model(LoraMethod(rank=2)), forward(model())
    with without_adapter(adapted):
        assert torch.equal(forward(adapted), expected)
    assert not torch.equal(forward(adapted), expected)


def test_a_pass_of_the_base_is_made_where_it_is_asked_for(tiny_model):
    folder = tiny_model("5b")
    spec, model = read_spec(str(folder)), of_folder(folder, MemoryConfig(), torch.float32, LoraMethod(rank=4))
    levels = alpha_bar(spec).float()

    def made(*prior: bool, collective: bool) -> bool:
        return base_prediction(model, model, spec, levels, batch_of(folder, *prior), collective=collective) is not None

    assert not made(collective=True), "a run without such clips"
    assert not made(False, False, collective=False)
    assert made(False, False, collective=True), "another process may have such a clip, and waits for this one's pass"


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def values(tmp_path, tiny_model, demo_clips, wide_clips) -> Callable[..., dict[str, Any]]:
    """A run on the demo clips with the wide ones for prior preservation."""

    def make(name: str, own: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
        prior = {"path": str(wide_clips), "prior_preservation": True, **(own or {})}
        data = {"sources": [{"path": str(demo_clips)}, prior], "buckets": ["9x64x64", "9x32x64"]}
        return merged(run_values(tiny_model("5b"), demo_clips, tmp_path / name, data=data), changes)

    return make


def test_a_run_keeps_what_the_base_predicts_and_resumes_to_the_bit(values, capsys):
    steps: list[StepRecord] = []
    changes = {"train": {"steps": 6, "batch_size": 2, "accumulation": 2}, "method": {"dropout": 0.1}}
    changes["validation"] = {"every": 6, "at_start": False}
    whole = train(RunConfig.from_dict(values("whole", **changes)), on_step=steps.append)
    assert "for prior preservation: 3 of them" in capsys.readouterr().out
    first = next(step for step in steps if any(step.prior))
    kept = [[loss for loss, prior in zip(one.losses, one.prior, strict=True) if prior] for one in steps]
    assert first.step == 1 and set(kept[0]) == {0.0}, "an adapter that changes nothing is at no distance from its base"
    assert all(loss > 0 for losses in kept[1:] for loss in losses) and sum(map(len, kept)) >= 6
    lines = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    for step, losses in zip(steps, kept, strict=True):
        others = [loss for loss, prior in zip(step.losses, step.prior, strict=True) if not prior]
        shown = {name: value for line in lines if line["step"] == step.step for name, value in line.items()}
        for name, group in (("train/loss", others), ("train/prior_loss", losses)):
            assert (name in shown) == bool(group)
            assert not group or shown[name] == pytest.approx(sum(group) / len(group))

    part = RunConfig.from_dict(values("part", **changes))
    stop_after(3, part)
    assert_same_run(train(part), whole)


def test_its_weight_is_how_much_it_holds_back(values):
    def distance(weight: float) -> float:
        steps: list[StepRecord] = []
        changes = {"train": {"steps": 8, "batch_size": 2, "accumulation": 2}, "optimizer": {"lr": 3e-3}}
        train(RunConfig.from_dict(values(f"at-{weight}", {"weight": weight}, **changes)), on_step=steps.append)
        return sum(step.prior_loss for step in steps if any(step.prior))

    assert 0 < 2 * distance(100.0) < distance(0.01)


def test_where_it_cannot_be_is_said_before_anything_is_loaded(values):
    def faults(**changes: Any) -> list[str]:
        config = RunConfig.from_dict(values("run", **changes))
        found = check_against(config, read_spec(config.model.pretrained))
        return [*map(str, found.errors), *found.warnings]

    assert not any("prior" in fault or "base" in fault for fault in faults())
    assert any("has nothing left to ask" in fault for fault in faults(method={"kind": "full"}))
    assert any("the trigger word is held to" in fault for fault in faults(data={"trigger": "zkx"}))
    (source,) = values("run")["data"]["sources"][1:]
    assert any("can only stay what it is" in fault for fault in faults(data={"sources": [source]}))
    held_out = merged(values("run"), {"data": {"sources": [{**source, "split": "holdout"}]}})
    with pytest.raises(ConfigError, match="prior_preservation would have no effect: what is held out"):
        RunConfig.from_dict(held_out)


def test_the_plan_counts_the_pass_of_the_base(values):
    def planned(own: dict[str, Any]) -> tuple[float, bool]:
        config = RunConfig.from_dict(values("run", own))
        step = step_cost(config, read_spec(config.model.pretrained), config.memory, rates_of("NVIDIA H100 80GB HBM3"))
        assert step.base is None or step.base.seconds == step.forward.seconds
        return step.step_s, step.base is not None

    (plain_s, plain), (prior_s, prior) = planned({"prior_preservation": False}), planned({})
    assert prior and not plain and prior_s > plain_s
