"""Twenty steps of every variant and method give the numbers that are kept under ``tests/golden``."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from goldens import (
    FOLDER,
    METHODS,
    STEPS,
    Record,
    deviations,
    faults,
    golden_config,
    golden_model,
    golden_run,
    read_golden,
    stream_numbers,
)
from waiting import HANG_S

from finetune.cogvideox import objective
from finetune.core.rng import generator
from finetune.datasets import schedule
from finetune.datasets.dataloader import BatchMaker
from finetune.testing.tiny import VARIANTS

ROOT = FOLDER.parent.parent
SLOW = pytest.mark.slow
BF16_LOSS = 0.02
"""How far a bfloat16 run's losses may be from the float32 ones, relatively: 0.006 is what it shows."""


@pytest.fixture(scope="module")
def golden_models(tmp_path_factory) -> Callable[[str], Path]:
    root, built = tmp_path_factory.mktemp("golden"), {}

    def build(variant: str) -> Path:
        if variant not in built:
            built[variant] = golden_model(variant, root / variant)
        return built[variant]

    return build


def check(variant: str, method: str, record: Record) -> list[str]:
    golden = read_golden(variant)
    return faults(golden["runs"][method], record, golden["tolerance"])


@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_are_the_golden_ones(golden_models, tmp_path, variant, method):
    record = golden_run(golden_config(golden_models(variant), tmp_path, method))
    assert len(record["loss"]) == STEPS
    assert check(variant, method, record) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "4"},
        {"ATEN_CPU_CAPABILITY": "default"},
        {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
        {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    ],
    ids=["2 threads", "4 threads", "scalar", "AVX2", "SSE4"],
)
def test_other_thread_counts_and_processors_give_the_golden_numbers(settings):
    """An older processor's instructions are asked for by the libraries' own switches; they add up in other orders."""
    threads = settings.get("OMP_NUM_THREADS", "1")
    finished = subprocess.run(
        [sys.executable, str(ROOT / "scripts/make_golden.py"), "--check", "--threads", threads],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        env={**os.environ, "OMP_NUM_THREADS": threads, **settings},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = [line for line in finished.stdout.splitlines() if line.startswith(VARIANTS) and "loss" in line]
    print("\n".join(rows))
    assert len(rows) == len(VARIANTS) * len(METHODS)
    for row in rows:
        figures = {kind: float(figure) for kind, figure in (part.split() for part in row.split(": ")[1].split(", "))}
        tolerance = read_golden(row.split()[0])["tolerance"]
        assert figures.keys() == tolerance.keys(), row
        assert all(figures[kind] <= tolerance[kind] for kind in figures), row


@pytest.mark.arithmetic
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_follows_the_golden_curve(golden_models, tmp_path, method):
    """No golden numbers of its own: how bfloat16 adds up differs from one processor to the next."""
    config = golden_config(golden_models("5b"), tmp_path, method, dtype="bf16")
    record, golden = golden_run(config), read_golden("5b")["runs"][method]
    off = deviations(golden, record)
    print({kind: f"{figure:.1e}" for kind, figure in off.items()})
    assert 1e-5 < off["loss"] <= BF16_LOSS


@pytest.mark.slow
def test_two_hundred_steps_do_not_tell_in_what_an_update_was_computed(golden_models, tmp_path):
    """LoRA's products in bfloat16 and in float32, on a bfloat16 model; ``docs/numerics.md`` has the figures."""
    records = []
    for compute in ("model", "float32"):
        train = {"steps": 200, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.5}
        config = golden_config(
            golden_models("5b"), tmp_path / compute, "lora", dtype="bf16", train=train, optimizer={"lr": 1e-3}
        )
        method = config.method.model_copy(update={"compute": compute})
        records.append(golden_run(config.model_copy(update={"method": method})))
    ours, theirs = records
    assert sum(ours["loss"][-20:]) < 0.5 * sum(ours["loss"][:20]), "the run learns nothing"
    assert 0 < deviations(theirs, ours)["loss"] < 0.005


# ------------------------------------------------------------------------------------------------------------- canaries


def heavier_loss(patch: pytest.MonkeyPatch) -> None:
    v_mse = objective.v_mse
    patch.setattr(objective, "v_mse", lambda prediction, target: v_mse(prediction, target) * 1.001)


def another_order(patch: pytest.MonkeyPatch) -> None:
    items = schedule.epoch_items
    patch.setattr(
        schedule, "epoch_items", lambda *args: {bucket: order[::-1] for bucket, order in items(*args).items()}
    )


def larger_latents(patch: pytest.MonkeyPatch) -> None:
    training = BatchMaker.training

    def scaled(maker, step, micro):
        batch = training(maker, step, micro)
        return replace(batch, latents=batch.latents * 1.001)

    patch.setattr(BatchMaker, "training", scaled)


# What a golden run is blind to changes with its file, seldom with the package: one of each kind every time.
@pytest.mark.parametrize(
    "damage", [heavier_loss, pytest.param(another_order, marks=SLOW), pytest.param(larger_latents, marks=SLOW)]
)
def test_a_changed_program_is_noticed(golden_models, tmp_path, monkeypatch, damage):
    damage(monkeypatch)
    assert check("5b", "lora", golden_run(golden_config(golden_models("5b"), tmp_path, "lora")))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optimizer": {"lr": 1e-2 * 1.01}}, id="lr + 1 %", marks=SLOW),
        pytest.param({"optimizer": {"weight_decay": 0.011}}, id="decay + 10 %"),
        pytest.param(
            {"train": {"steps": STEPS, "batch_size": 2, "accumulation": 2, "max_grad_norm": 0.505}},
            id="clipping + 1 %",
            marks=SLOW,
        ),
    ],
)
def test_a_changed_constant_is_noticed(golden_models, tmp_path, changes):
    found = check("5b", "lora", golden_run(golden_config(golden_models("5b"), tmp_path, "lora", **changes)))
    assert found, "the golden run is blind"


def test_a_change_of_a_ten_thousandth_is_noticed():
    """Of every kind of number, and a NaN."""
    golden = read_golden("5b")
    run = golden["runs"]["full"]
    for kind in ("loss", "grad_norm", "lr"):
        for wrong in (run[kind][7] * 1.0001, float("nan")):
            changed = copy.deepcopy(run)
            changed[kind][7] = wrong
            assert [fault.split()[0] for fault in faults(run, changed, golden["tolerance"])] == [kind]
    changed = copy.deepcopy(run)
    most = max(run["moved"], key=run["moved"].get)
    changed["moved"][most] *= 1.0001
    assert [fault.split()[0] for fault in faults(run, changed, golden["tolerance"])] == ["moved"]
    assert faults(run, run, golden["tolerance"]) == []


# ------------------------------------------------------------------------------------------------------- random numbers


def test_a_seed_means_what_it_meant():
    """Where this fails and the golden runs with it, torch draws other numbers, and the arithmetic may be sound."""
    golden = json.loads((FOLDER / "streams.json").read_text())
    numbers = stream_numbers()
    assert numbers.keys() == golden.keys()
    for kind, expected in golden.items():
        if kind.endswith("noise"):
            assert numbers[kind] == pytest.approx(expected, abs=2e-6)
        else:
            assert numbers[kind] == expected, kind


def test_another_way_to_make_addresses_is_noticed(monkeypatch):
    monkeypatch.setattr(objective, "generator", lambda seed, *path: generator(seed + 1, *path))
    golden, numbers = json.loads((FOLDER / "streams.json").read_text()), stream_numbers()
    assert {kind for kind in golden if golden[kind] != numbers[kind]} >= {"timestep", "noise", "posterior_noise"}
