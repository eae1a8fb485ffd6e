"""DeepSpeed ZeRO: what it is told is what its own parser understands, and two gloo processes train like one.

DeepSpeed is an extra; without it only the checks that need nothing of it run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from launcher import assert_close, changed, state, written
from worlds import SMOOTH_ADAM, differing, run_values

from finetune import export
from finetune.checkpoint.load import load_checkpoint
from finetune.config.schema import RunConfig
from finetune.datasets.schedule import TrainConfig
from finetune.parallel.deepspeed import Zero, deepspeed_config
from finetune.trainers.loop import train

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="the extra 'deepspeed' is not installed"
)
ZERO = {
    "zero2": Zero(2),
    "zero2_offload": Zero(2, offload_optimizer=True),
    "zero3": Zero(3),
    "zero3_offload": Zero(3, offload_optimizer=True, offload_parameters=True),
}
METHODS = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1},
    "dora": {"kind": "lora", "rank": 4, "alpha": 4, "use_dora": True},
    "full": {"kind": "full"},
}


def environment(zero: Zero) -> dict[str, str]:
    """What accelerate sets for such a launch; on a CPU DeepSpeed has to be told that it is one."""
    devices = {True: "cpu", False: "none"}
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero.stage),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": devices[zero.offload_optimizer],
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": devices[zero.offload_parameters],
        "DS_ACCELERATOR": "cpu",
    }


@needs_deepspeed
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("name", ZERO)
def test_deepspeed_understands_what_it_is_told(name, narrow, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    zero, settings = ZERO[name], TrainConfig(steps=1, batch_size=3, accumulation=2, max_grad_norm=0.5)
    told = DeepSpeedConfig(deepspeed_config(zero, settings, narrow=narrow))
    assert told.train_micro_batch_size_per_gpu == 3 and told.gradient_accumulation_steps == 2
    assert told.gradient_clipping == 0.5 and told.zero_optimization_stage == zero.stage
    assert told.bfloat16_config.enabled is narrow and not told.float16_config.enabled
    assert (told.zero_config.offload_optimizer is not None) == zero.offload_optimizer
    assert (told.zero_config.offload_param is not None) == zero.offload_parameters


@needs_deepspeed
def test_deepspeeds_parser_does_refuse(monkeypatch):
    """Canary of the test above."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    told = deepspeed_config(Zero(2), TrainConfig(steps=1), narrow=True)
    told["zero_optimization"]["stage"] = 7
    with pytest.raises(ValueError, match="stage"):
        DeepSpeedConfig(told)


# ------------------------------------------------------------------------------------------------------ the same steps


@pytest.fixture(scope="module")
def world(tiny_model, demo_clips, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")

    def values(name: str, method: str, **train: Any) -> dict[str, Any]:
        validation = {"every": 2, "at_start": True, "timesteps": 3, "samples": [{"prompt": "a ring"}]}
        base = {
            "data": {"holdout": 1},
            "method": METHODS[method],
            "optimizer": SMOOTH_ADAM,
            "train": {"steps": 4, "batch_size": 2, **train},
            "validation": {**validation, "num_inference_steps": 1, "sample_every": 4},
            "tracking": {"kind": "tensorboard"},
        }
        return run_values(tiny_model("5b"), demo_clips, root / name, **base)

    return values


@pytest.fixture(scope="module")
def alone(world):
    made: dict[str, dict[str, Any]] = {}

    def run(method: str) -> dict[str, Any]:
        if method not in made:
            made[method] = world(f"alone-{method}", method, accumulation=2)
            train(RunConfig.from_dict(made[method]))
        return made[method]

    return run


@needs_deepspeed
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ZERO)
def test_two_processes_under_zero_train_like_one(world, alone, launcher, tmp_path, name, method):
    one, env = alone(method), environment(ZERO[name])
    # Stopped after two steps and continued: two starts out of one checkpoint format.
    half = world(f"{name}-{method}", method, steps=2)
    launcher.train(written(half), env=env)
    two = changed(half, steps=4)
    launcher.train(written(two), env=env)
    assert_close(state(two), state(one), rtol=1e-5)
    report = export(Path(two["output_dir"]), tmp_path / "export")
    assert report.max_abs_diff <= report.tolerance


@needs_deepspeed
def test_a_run_goes_on_under_another_stage_with_one_process(world, alone, launcher):
    one = alone("full")
    values = world("moved", "full", steps=2)
    launcher.train(written(values), env=environment(ZERO["zero2"]))
    values = changed(values, steps=4, accumulation=2)
    launcher.train(written(values), env=environment(ZERO["zero3"]), ranks=1)
    assert_close(state(values), state(one), rtol=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_masters_of_a_bf16_model_survive_a_resume(world, launcher, name):
    def narrow(run: str, steps: int) -> dict[str, Any]:
        values = world(f"{name}-bf16-{run}", "full", steps=steps)
        return {**values, "model": {**values["model"], "dtype": "bf16"}}

    straight, half = narrow("straight", 4), narrow("half", 2)
    for values in (straight, half, changed(half, steps=4)):
        launcher.train(written(values), env=environment(ZERO[name]))
    ours, theirs = state(half), state(straight)
    assert any(key.startswith("optimizer master.") for key in theirs) and not differing(ours, theirs)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_bad_step_is_not_taken_under_zero(world, launcher, name):
    quiet = {"every": None, "at_start": False}
    values = {**world(f"{name}-bad", "lora"), "checkpoint": {"every": 1}, "validation": quiet}
    arguments = ("train", "--config", str(written(values)))
    ends = launcher.run("launcher_cases:faulty", "not a number", "step", 1, *arguments, env=environment(ZERO[name]))
    assert [end.code for end in ends] == [2, 2], ends[0].log[-2000:]
    assert "non-finite" in ends[0].log
    last = max((Path(values["output_dir"]) / "checkpoints").glob("step-*"))
    assert last.name == "step-00000001"
    assert all(tensor.isfinite().all() for tensor in load_checkpoint(last).trainable.values())
