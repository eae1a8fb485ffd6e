"""``memory: {kind: auto}``: a run that has the planner choose, and records what it chose."""

from __future__ import annotations

import pytest
from worlds import assert_same_run, run_config, stop_after

from finetune.config.schema import load_config
from finetune.core.errors import ConfigError
from finetune.core.types import GIB
from finetune.memory.config import MemoryConfig, Traits
from finetune.planner.estimate import Estimate
from finetune.planner.memory_tracker import Phase, Point
from finetune.planner.plan import choose_memory
from finetune.trainers.loop import train


@pytest.fixture(autouse=True)
def one_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the memory section says, the run is predicted to take 1 GiB; searches on estimates: test_plan_cli.py."""
    peak = Estimate((Phase("training", Point(0.0, {"frozen weights": GIB}), "forward"),), "9x64x64", 1)
    monkeypatch.setattr("finetune.planner.search.predict", lambda *_, phases, **__: peak if "train" in phases else NONE)


NONE = Estimate((), "9x64x64", 1)


def test_a_run_chooses_says_and_records_what_it_chose(tiny_model, demo_clips, tmp_path, capsys):
    auto = {"kind": "auto", "budget": "8GiB"}
    report = train(run_config(tiny_model(), demo_clips, tmp_path / "run", memory=auto))
    said = capsys.readouterr().out
    assert "the fastest memory section that fits" in said and "<- chosen" in said
    recorded = load_config(tmp_path / "run" / "config.yaml").memory
    assert recorded.kind == "manual" and recorded.budget is None
    # Of a tiny model everything fits, and nothing is faster than doing nothing.
    assert recorded.checkpointing == "none" and recorded.base == "native"
    same = run_config(tiny_model(), demo_clips, tmp_path / "again", memory=recorded.model_dump(mode="json"))
    assert_same_run(train(same), report)


def test_it_goes_on_where_it_stopped(tiny_model, demo_clips, tmp_path):
    config = run_config(
        tiny_model(), demo_clips, tmp_path / "run", memory={"kind": "auto", "budget": "8GiB"}, checkpoint={"every": 2}
    )
    stop_after(2, config)
    whole = train(run_config(tiny_model(), demo_clips, tmp_path / "whole", memory={"checkpointing": "none"}))
    assert_same_run(train(config), whole)


def test_where_nothing_fits_it_says_by_how_much(tiny_model, demo_clips, tmp_path):
    config = run_config(tiny_model(), demo_clips, tmp_path / "run", memory={"kind": "auto", "budget": "1.2GiB"})
    with pytest.raises(ConfigError, match=r"no memory plan fits 1\.20 GiB: the smallest needs 1\.00 GiB more"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_without_a_card_it_asks_for_a_budget(tiny_model, demo_clips, tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.planner.plan.card_here", lambda: None)
    config = run_config(tiny_model(), demo_clips, tmp_path / "run", memory={"kind": "auto"})
    with pytest.raises(ConfigError, match="no GPU here to plan for") as caught:
        choose_memory(config)
    assert "memory.budget" in caught.value.fix


def test_what_is_written_stays_as_it_is(tiny_model, demo_clips, tmp_path):
    config = run_config(tiny_model(), demo_clips, tmp_path / "run", memory={"block": "lean"})
    assert choose_memory(config) == (config, ())


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        ({"budget": "12GiB"}, "budget only means something with kind: auto"),
        ({"kind": "auto", "block": "lean"}, "kind: auto chooses block itself"),
        ({"kind": "auto", "budget": "a lot"}, "no amount of memory"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_line(tmp_path, tiny_model, demo_clips, memory, words):
    with pytest.raises(ConfigError, match=words):
        run_config(tiny_model(), demo_clips, tmp_path / "run", memory=memory)


def test_several_processes_are_not_planned_for():
    (fault,) = MemoryConfig(kind="auto", budget="8GiB").faults(Traits(processes=2))
    assert fault.option == "kind"
