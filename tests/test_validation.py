"""Held-out loss: what it measures, and that measuring leaves training as it was, bit for bit."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from finetune.checkpoint.folders import HISTORY, Measurement, best_of, read_history, verdict
from finetune.core.rng import training_state_untouched
from finetune.core.types import RunState
from finetune.trainers.tracking import loss_by_timestep_bucket, mean, timestep_bucket
from finetune.trainers.validation import fixed_timesteps

# ------------------------------------------------------------------------------------------------- timesteps and means


@pytest.mark.parametrize("length", [1000, 10, 7, 50])
def test_buckets_tile_the_schedule_in_order(length):
    labels = [timestep_bucket(t, length) for t in range(length)]
    assert len(set(labels)) == 4 and labels == sorted(labels)
    for t, label in enumerate(labels):
        first, last = (int(edge) for edge in label[1:].split("-"))
        assert first <= t <= last
    if length == 1000:
        assert sorted(set(labels)) == ["t000-249", "t250-499", "t500-749", "t750-999"]
    for outside in (-1, length):
        with pytest.raises(ValueError, match=rf"not in 0\.\.{length - 1}"):
            timestep_bucket(outside, length)


def test_loss_by_bucket_is_the_mean_of_each_group():
    assert loss_by_timestep_bucket([1.0, 3.0, 10.0], [0, 249, 900], 1000) == {"t000-249": 2.0, "t750-999": 10.0}


def test_fixed_timesteps_are_midpoints_of_equal_parts():
    assert fixed_timesteps(4, 1000) == (125, 375, 625, 875)
    assert fixed_timesteps(1, 1000) == (500,)
    assert fixed_timesteps(1000, 1000) == tuple(range(1000))
    with pytest.raises(ValueError, match="11 of 10"):
        fixed_timesteps(11, 10)


def test_midpoints_estimate_the_mean_over_the_whole_schedule():
    """Of a smooth loss curve, which is why they are midpoints: left edges are 40 times further off."""

    def curve(t):
        return np.exp(-np.asarray(t) / 300.0)

    whole = curve(np.arange(1000)).mean()
    ours = curve(fixed_timesteps(8, 1000)).mean()
    left_edges = curve(np.arange(8) * 125).mean()
    assert abs(ours - whole) < 0.01 * whole < abs(left_edges - whole)


def test_a_mean_is_the_same_in_every_order():
    losses = torch.rand(101, generator=torch.Generator().manual_seed(0)).tolist()
    assert mean(losses) == mean(losses[::-1]) == mean(sorted(losses)) == math.fsum(losses) / 101


# ------------------------------------------------------------------------------------------- training state untouched


class Model(nn.Module):
    """A module with what validation could disturb: dropout, a frozen part kept in eval mode, a trainable part."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(2, 2)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).requires_grad_(False)
        self.train()
        self.frozen.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.trained(self.frozen(x)))


def train(validate, steps: int = 6) -> tuple[list[float], list[torch.Tensor], torch.Tensor]:
    """A run whose every step draws from the global generator, validated before each step by ``validate(model)``."""
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.AdamW(model.trained.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        validate(model)
        loss = model(torch.randn(4, 2)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return losses, [*model.parameters(), *state], torch.get_rng_state()


def measure(model: Model) -> None:
    torch.randn(7)
    model(torch.randn(1, 2))


def guarded(model: Model) -> None:
    with training_state_untouched(model):
        assert not model.dropout.training and not torch.is_grad_enabled()
        measure(model)


def failing(model: Model) -> None:
    with pytest.raises(RuntimeError, match="half-way"), training_state_untouched(model):
        measure(model)
        raise RuntimeError("half-way")


@pytest.mark.parametrize("validate", [guarded, failing])
def test_validation_changes_no_bit_of_training(validate):
    with_losses, with_tensors, with_rng = train(validate)
    without_losses, without_tensors, without_rng = train(lambda model: None)
    assert with_losses == without_losses
    assert len(with_tensors) == len(without_tensors) > 4
    assert all(torch.equal(a, b) for a, b in zip(with_tensors, without_tensors, strict=True))
    assert torch.equal(with_rng, without_rng)


def test_unguarded_validation_would_be_noticed():
    """The canary of the test above."""
    assert train(measure)[0] != train(lambda model: None)[0]


def test_flags_are_restored_one_by_one():
    model = Model()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    with training_state_untouched(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------------------------------------- history

ROWS = [Measurement(step, 0.5 / (step + 1), 0.25, {"t000-249": 0.125}) for step in (0, 200, 400)]
LINES = [json.dumps(asdict(row)) for row in ROWS]


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            {0: (0.5, 0.4), 2: (0.2, 0.19), 4: (0.3, 0.1)},
            "best by held-out loss: step 2 with 0.2000; step 4 has 0.3000\nsince then the gap (held-out minus training"
            " clips) went from +0.0100 to +0.2000: training clips went on improving, which is memorising",
        ),
        ({2: (0.2, 0.19), 4: (0.3, 0.28)}, "from +0.0100 to +0.0200: training clips got worse as well"),
        (
            {0: (0.5, 0.5), 2: (0.3, 0.3), 4: (0.2, 0.2)},
            "best by held-out loss: the last step measured, 4, with 0.2000",
        ),
        ({2: (0.2, 0.2), 4: (0.2, 0.2)}, "best by held-out loss: the last step measured, 4, with 0.2000"),
        ({0: (0.1, 0.1), 2: (0.2, 0.09)}, "no step was better than the base model, with 0.1000"),
        ({0: (0.1, 0.1), 2: (0.9, 0.8), 4: (0.5, 0.4)}, "diverged: the held-out loss was 0.1000 at step 0"),
        ({2: (0.2, 0.2), 4: (float("nan"), 0.2), 6: (0.3, 0.1)}, "step 2 with 0.2000; step 6 has 0.3000"),
    ],
    ids=["memorising", "rate", "last", "tie", "base", "diverged", "no number"],
)
def test_the_verdict_names_the_best_step_and_what_the_gap_did(losses, said):
    history = [Measurement(step, *pair, {}) for step, pair in losses.items()]
    assert said in verdict(history, best_of(history, RunState(6, "")))


def test_a_lost_history_does_not_make_the_last_step_the_best():
    state = RunState(4, "", best_step=2, best_heldout_loss=0.2)
    history = [Measurement(4, 0.3, 0.1, {})]
    assert best_of(history, state) == (2, 0.2)
    assert verdict(history, (2, 0.2)) == "best by held-out loss: step 2 with 0.2000; step 4 has 0.3000"
    assert best_of([Measurement(0, 0.1, 0.1, {})], RunState(0, "")) is None


def test_the_history_comes_back(tmp_path):
    assert read_history(tmp_path / HISTORY) == []
    (tmp_path / HISTORY).write_text("\n".join(LINES) + "\n")
    assert read_history(tmp_path / HISTORY) == ROWS


@pytest.mark.parametrize(
    "line",
    [
        LINES[1][:-9],
        "null",
        "[]",
        "3",
        "{}",
        LINES[1].replace("200", '"200"'),
        LINES[1].replace("0.25", "[]"),
        "\x00" * 40,
        "\udc80",
        "[" * 100_000,
    ],
    ids=lambda line: line[:12],
)
def test_a_damaged_line_is_passed_over_with_a_warning(tmp_path, caplog, line):
    content = "\n".join([LINES[0], line, LINES[2], ""]).encode("utf-8", "surrogateescape")
    (tmp_path / HISTORY).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_history(tmp_path / HISTORY) == [ROWS[0], ROWS[2]]
    (record,) = caplog.records
    assert "1 damaged lines are passed over (line 2)" in record.getMessage() and str(tmp_path) in record.getMessage()


@given(first=st.integers(0, 400), last=st.integers(0, 400), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_to_the_history_is_a_traceback(tmp_path, first, last, value):
    content = bytearray(("\n".join(LINES) + "\n").encode())
    content[first:last] = bytes([value]) * len(content[first:last])
    (tmp_path / HISTORY).write_bytes(content)
    for row in read_history(tmp_path / HISTORY):
        assert isinstance(row, Measurement)


def test_a_history_that_cannot_be_read_is_a_warning(tmp_path, caplog):
    (tmp_path / HISTORY).mkdir()
    assert read_history(tmp_path / HISTORY) == [] and "cannot be read" in caplog.text
