"""Two processes with accumulation 1 train like one process with accumulation 2; real gloo processes, no mocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from worlds import run_values

from finetune.config import RunConfig
from finetune.trainers.loop import train

ROOT = Path(__file__).parents[1]


def launch(processes: int, run_yaml: Path) -> subprocess.CompletedProcess[str]:
    """Run train.py on CPU processes. torchrun, because ``accelerate launch --cpu`` starts a single process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, str(ROOT / "train.py"), "--config", str(run_yaml)],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("method,variant", [("lora", "2b"), ("full", "5b")])
def test_two_processes_equal_accumulation_two(tiny_model, demo_clips, tmp_path, method, variant):
    # 2B has a buffer, which DDP would broadcast, and its one held-out clip is measured by one process alone. Three
    # training clips in batches of two: micro-batches of two and of one meet in one step, on different ranks.
    shared = {
        "method": {"lora": {"kind": "lora", "rank": 4, "alpha": 4, "dropout": 0.1}, "full": {"kind": "full"}}[method],
        "data": {"holdout": 1},
        "validation": {"every": 3, "at_start": True, "timesteps": 2},
    }
    results = {}
    for name, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        values = run_values(
            tiny_model(variant),
            demo_clips,
            tmp_path / name,
            **shared,
            train={"steps": 3, "batch_size": 2, "accumulation": accumulation},
            tracking={"kind": "tensorboard"},
        )
        if processes == 1:
            train(RunConfig.from_dict(values))
        else:
            run_yaml = tmp_path / f"{name}.yaml"
            run_yaml.write_text(yaml.safe_dump(values))
            finished = launch(processes, run_yaml)
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
        results[name] = load_file(tmp_path / name / "checkpoints" / "step-00000003" / "trainable.safetensors")
    assert results["one"].keys() == results["two"].keys()
    for parameter, ours in results["two"].items():
        torch.testing.assert_close(ours, results["one"][parameter], rtol=1e-6, atol=1e-6)
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and "train/loss" in one
    for tag in ("train/loss", "train/grad_norm", "heldout/loss", "trainsubset/loss", "train/samples_seen"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-5), tag


def metrics(run: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "perf" not in tag
    }


def test_a_user_error_on_one_of_two_processes_ends_both(tiny_model, demo_clips, tmp_path):
    values = run_values(tiny_model(), demo_clips, tmp_path / "run", cache={"mode": "require"})
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(yaml.safe_dump(values))
    finished = launch(2, run_yaml)
    assert finished.returncode != 0
    assert "fix:" in finished.stdout + finished.stderr
