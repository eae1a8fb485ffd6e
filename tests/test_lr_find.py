"""A search for a learning rate: a real one on the tiny model, and what is said of every kind of curve."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from finetune import lr_find
from finetune.core.errors import ConfigError, TrainingError
from finetune.datasets.schedule import Exponential, lr_at
from finetune.trainers.lr_find import LrReport
from finetune.trainers.stopping import StopRequest
from finetune.trainers.tracking import GatheredStep

RUN = {"data": {"holdout": 2}, "validation": {"clips": 2, "timesteps": 2}}


def test_the_rate_grows_by_the_same_factor_each_step():
    rates = [lr_at(step, 1e-2, Exponential(first=1e-4), 5) for step in range(5)]
    assert rates == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])


def test_a_search_suggests_a_rate_and_leaves_the_run_alone(tiny_run, capsys):
    config = tiny_run("run", **RUN)
    report = lr_find(config, lowest=1e-5, highest=1.0, steps=12, every=2)
    assert [rate for rate, _ in report.points] == pytest.approx(
        [0.0, *(lr_at(step, 1.0, Exponential(first=1e-5), 12) for step in range(1, 12, 2))]
    )
    assert report.suggested is not None and 1e-4 < report.suggested < 1.0
    assert f"begin with optimizer.lr: {report.suggested:.1e}" in str(report)
    assert report.run_dir == config.output_dir / "lr-find"
    assert [path.name for path in config.output_dir.iterdir()] == ["lr-find"]
    with pytest.raises(ConfigError, match="an earlier search stands there"):
        lr_find(config, steps=2, every=1)


def test_a_rate_that_breaks_the_model_ends_the_search(tiny_run, monkeypatch):
    inner = GatheredStep.is_finite
    checks: list[float] = []
    monkeypatch.setattr(
        GatheredStep, "is_finite", lambda self, norm: checks.append(norm) or (inner(self, norm) and len(checks) < 8)
    )
    report = lr_find(tiny_run("run", **RUN), lowest=1e-5, highest=1e-1, steps=12, every=2)
    assert len(report.points) == 4 and report.points[-1][0] < report.broke_at < 1e-1
    assert f"and breaks at {report.broke_at:.1e}" in report.verdict or report.suggested is None


def test_a_search_that_was_stopped_says_so(tiny_run, monkeypatch):
    """By a signal that comes before the first step."""
    inner = StopRequest.begin
    monkeypatch.setattr(StopRequest, "begin", lambda self: inner(self) or os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(TrainingError, match="stopped before it had measured twice"):
        lr_find(tiny_run("run", **RUN), lowest=1e-5, highest=1e-1, steps=12, every=2)


def test_what_cannot_be_searched_is_refused(tiny_run):
    with pytest.raises(ConfigError, match="no clip is held out"):
        lr_find(tiny_run("none"))
    with pytest.raises(ConfigError, match="is to grow from 1 to"):
        lr_find(tiny_run("other", **RUN), lowest=1.0, highest=0.1)


@pytest.mark.parametrize(
    ("losses", "broke_at", "words"),
    [
        ((1.0, 1.0, 0.9, 0.5, 0.7), None, "falls from 1.0000 to 0.5000 at 1.0e-03, and rises from there"),
        ((1.0, 1.0, 0.9, 0.8, 0.5), None, "still falls at the end: try --highest 1e-01 as well"),
        ((1.0, 1.0, 0.9, 0.8, 0.5), 2e-2, "and breaks at 2.0e-02"),
        ((1.0, 1.0, 1.0, 1.0, 1.1), None, "no learning rate up to 1.0e-02 moved the held-out loss"),
    ],
)
def test_the_verdict_says_what_to_write(losses, broke_at, words):
    rates = (0.0, 1e-5, 1e-4, 1e-3, 1e-2)
    report = LrReport(list(zip(rates, losses, strict=True)), Path("x"), broke_at)
    assert words in report.verdict
    if report.suggested is not None:
        assert 1e-5 <= report.suggested <= report.lowest[0]
