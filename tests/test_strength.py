"""An adapter at other strengths than its own: what the run itself measured at 0 and 1, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import finetune
from finetune.checkpoint.folders import HISTORY, read_history
from finetune.cli.app import OK, USER_ERROR
from finetune.cli.main import main
from finetune.trainers.strength import StrengthReport

RUN = {
    "optimizer": {"lr": 1e-2},
    "data": {"holdout": 2},
    "validation": {"every": 2, "at_start": True, "clips": 2, "timesteps": 4, "samples": []},
    "train": {"steps": 2},
}


def test_strengths_0_and_1_are_what_the_run_measured(calm_run, capsys):
    run = calm_run(**RUN).run_dir
    report = finetune.strength(run, strengths=[0.5, 2.0])
    before, after = read_history(run / HISTORY)
    assert list(report.losses) == [0.0, 0.5, 1.0, 2.0] and report.heldout and report.clips == 2
    assert report.losses[0.0] == pytest.approx(before.heldout, rel=1e-5)
    assert report.losses[1.0] == pytest.approx(after.heldout, rel=1e-5)
    assert report.by_band[1.0] == pytest.approx(after.by_band, rel=1e-5)
    assert len(set(report.losses.values())) == 4

    blocks = list(report.changes)
    assert blocks == [str(number) for number in range(len(blocks))] and len(blocks) >= 2
    assert all(0 < change < 10 for block in report.changes.values() for change in block.values())
    capsys.readouterr()
    assert main(["strength", str(run), "--strengths", "0.5,2", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["losses"]["0.5"] == pytest.approx(report.losses[0.5], rel=1e-5)
    assert report.verdict in str(report)


def test_strength_0_of_a_dora_is_the_base(calm_run):
    """Its magnitudes would act at any scale of the update."""
    run = calm_run(**RUN, method={"kind": "lora", "rank": 4, "alpha": 4, "use_dora": True}).run_dir
    report = finetune.strength(run, strengths=[0.5])
    assert report.losses[0.0] == pytest.approx(read_history(run / HISTORY)[0].heldout, rel=1e-5)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((1.0, 0.9, 0.8, 0.85), "strength 1 is right"),
        ((1.0, 0.9, 0.8, 0.7), "better at strength 1.5 than at 1: it has not learnt enough yet"),
        ((1.0, 0.7, 0.8, 0.9), "better at strength 0.5 than at 1: trained too long"),
        ((1.0, 1.1, 1.2, 1.3), "the base model alone is better"),
        ((1.0, 1.0001, 0.9999, 1.0), "changes next to nothing yet"),
    ],
)
def test_the_verdict_names_what_to_do(losses, words):
    by_strength = dict(zip((0.0, 0.5, 1.0, 1.5), losses, strict=True))
    report = StrengthReport(Path("x"), 1, 2, True, by_strength, {0.0: {}}, {})
    assert words in report.verdict


def test_what_cannot_be_measured_is_refused(calm_run, tmp_path, capsys):
    run = calm_run(**RUN).run_dir
    for words, message in (
        (["--strengths=-1,2"], "give numbers from 0 to 10"),
        (["--clips", "0"], "0 clips are wanted"),
        (["--strengths", "half"], "is no list of numbers"),
        (["--cache", str(tmp_path / "none")], "the cache"),
        (["--checkpoint", "worst"], "worst"),
    ):
        assert main(["strength", str(run), *words]) == USER_ERROR
        assert message in capsys.readouterr().err
