"""Faults and signals where two processes train: what hits one of them must be everybody's, and soon."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from launcher import FSDP, Ended, Launcher
from safetensors.torch import load_file
from test_faults import LEARNS, clip_of_step, damage
from test_replay import poison
from worlds import SMOOTH_ADAM, differing, run_config, run_values, saved_steps

from finetune.caching.precompute import precompute
from finetune.cli.app import INTERRUPTED, OK, PREEMPTED, USER_ERROR
from finetune.config.schema import RunConfig
from finetune.trainers.fault_report import read_report
from finetune.trainers.replay import replay

BOTH = -1
SHARED = LEARNS | {"cache": {"latents_dtype": "fp32"}, "checkpoint": {"every": 2}}


@pytest.fixture(scope="module")
def root(tiny_model, demo_clips, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    precompute(run_config(tiny_model(), demo_clips, folder / "run", **SHARED), progress=False)
    return folder


@pytest.fixture
def make(tiny_model, demo_clips, root) -> Callable[..., Path]:
    """``make("name", **changes)``: a run's YAML file; all of the module share one cache."""

    def written(name: str, **changes: object) -> Path:
        path = root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run_values(tiny_model(), demo_clips, root / name, **SHARED | changes)))
        return path

    return written


@pytest.fixture(scope="module")
def calm(tiny_model, demo_clips, root, launcher) -> dict[str, torch.Tensor]:
    """Weights of two processes that nothing happened to."""
    path = root / "calm.yaml"
    path.write_text(yaml.safe_dump(run_values(tiny_model(), demo_clips, root / "calm", **SHARED)))
    launcher.train(path)
    return weights(path)


def weights(run_yaml: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run_yaml.with_suffix("") / "checkpoints" / f"step-{step:08d}" / "trainable.safetensors")


def codes(ends: list[Ended]) -> list[int]:
    return [end.code for end in ends]


def hit(launcher: Launcher, run_yaml: Path, how: str, call: int, rank: int, **options: object) -> list[Ended]:
    return launcher.run("fault_cases:hit", how, call, rank, "train", "--config", str(run_yaml), **options)


@pytest.mark.parametrize("how,rank", [("SIGUSR1", 1), ("SIGTERM+SIGTERM", BOTH)])
def test_a_signal_makes_both_save_the_same_step_and_the_same_command_continues(launcher, make, calm, how, rank):
    run_yaml = make(f"{how}{rank}")
    ends = hit(launcher, run_yaml, how, 3, rank)
    assert codes(ends) == [PREEMPTED, PREEMPTED], ends[0].log[-2000:]
    assert saved_steps(run_yaml.with_suffix(""))[-1] == 3
    assert "stopped after 3 of 4 steps" in ends[0].log and "Traceback" not in ends[0].log + ends[1].log
    launcher.train(run_yaml)
    assert not differing(weights(run_yaml), calm)
    if rank == BOTH:
        assert codes(launcher.train(run_yaml)) == [OK, OK]  # done is done


def test_a_second_ctrl_c_on_one_ends_both_unsaved(launcher, make):
    run_yaml = make("twice")
    ends = hit(launcher, run_yaml, "SIGINT+SIGINT", 4, 1)
    assert ends[1].code == INTERRUPTED and ends[0].code not in (OK, PREEMPTED, 124)
    assert saved_steps(run_yaml.with_suffix("")) == [2]


def test_out_of_memory_on_one_ends_both_and_names_the_notch(launcher, make, calm):
    """Replaying is not possible: the other process waits in the middle of the step."""
    run_yaml = make("oom", memory={"checkpointing": "none"})
    ends = hit(launcher, run_yaml, "oom", 4, 1)
    assert ends[1].code == USER_ERROR and ends[0].code not in (OK, PREEMPTED, 124)
    assert "set memory.checkpointing: full: with several processes a step cannot be done again" in ends[1].log
    assert saved_steps(run_yaml.with_suffix("")) == [2]
    launcher.train(make("oom"))  # as it says: with full checkpointing the same command continues
    assert not differing(weights(run_yaml), calm)


def test_split_micro_batches_exchange_gradients_once_at_the_end(launcher, make):
    """``clips_at_once`` on two processes with micro-batches of three clips and of one is the step without it."""
    trains = {"train": {"batch_size": 3}, "method": {"dropout": 0.0}, "optimizer": SMOOTH_ADAM}
    whole, split = make("whole", **trains), make("split", **trains, memory={"clips_at_once": 1})
    launcher.train(whole)
    launcher.train(split)
    theirs = weights(whole)
    for name, ours in weights(split).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_damaged_entry_of_one_is_the_end_of_both_after_saving(launcher, tiny_model, demo_clips, root, calm, tmp_path):
    shutil.copytree(root / "cache", tmp_path / "cache")
    values = run_values(tiny_model(), demo_clips, tmp_path / "run", **SHARED)
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(values))
    one = RunConfig.from_dict(values | {"train": values["train"] | {"accumulation": 2}})
    entry = clip_of_step(one, 1)
    whole = entry.read_bytes()
    damage(entry)
    ends = launcher.run("launcher_cases:command", "train", "--config", str(run_yaml))
    assert codes(ends) == [USER_ERROR, USER_ERROR] and all("damaged" in end.log for end in ends)
    assert saved_steps(tmp_path / "run") == [1]
    launcher.train(run_yaml)
    assert entry.read_bytes() == whole and not differing(weights(run_yaml), calm)


@pytest.mark.parametrize("strategy", [{}, FSDP], ids=["ddp", "fsdp2"])
def test_a_step_that_is_not_finite_is_one_report_for_one_process_to_replay(
    launcher, tiny_model, demo_clips, root, tmp_path, strategy
):
    shutil.copytree(root / "cache", tmp_path / "cache")
    values = run_values(
        tiny_model(), demo_clips, tmp_path / "run", **SHARED | {"train": {"batch_size": 2}, "method": {"dropout": 0.0}}
    )
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(values))
    bad = poison(RunConfig.from_dict(values))
    ends = launcher.run("launcher_cases:command", "train", "--config", str(run_yaml), env=strategy)
    assert codes(ends) == [USER_ERROR, USER_ERROR], ends[0].log[-3000:]
    for rank, end in enumerate(ends):
        assert f"[rank {rank}] error: step 0: non-finite loss" in end.log and bad in end.log
    (path,) = (tmp_path / "run" / "reports").iterdir()
    report, tensors = read_report(path)
    assert [(each.rank, each.slot) for each in report.samples] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert report.gradient_norms.keys() == tensors.keys() and report.non_finite_gradients
    found = replay(path)
    assert found.kind == "clip" and found.reproduced
    assert [each.sample.item.clip for each in found.bad] == [bad]
