"""Kill -9 at any moment: started again with the same command, a run ends as if nothing had happened, bit for bit.

A handful of kills belongs to every test run; the hundreds are slow tests, which ``make soak`` runs. ``tests/soak``
holds the machinery.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from soak.__main__ import read_report
from soak.kills import MOMENTS
from soak.probe import CALLS, PHASES
from soak.world import COMMANDS, LAUNCHES, PAIRS, PRECOMPUTE, TRAIN, compared, differences

TESTS = Path(__file__).parent
KILLS = int(os.environ.get("SOAK_KILLS", "100"))
"""Of precompute, and of train; other soaks take a share of it."""
SEED = os.environ.get("SOAK_SEED", "1")

Record = Callable[[str, Any], None]


def kill(out: Path, *words: str, timeout_s: float = 1500) -> dict[str, Any]:
    """The figures of ``soak.kills``, in an interpreter of its own: it forks, and must have one thread."""
    done = subprocess.run(
        [sys.executable, "-m", "soak.kills", *words, "--seed", SEED, "--seconds", "1400", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))), "OMP_NUM_THREADS": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert out.exists(), done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(out.read_text())
    assert (done.returncode != 0) == bool(figures["failures"])
    return figures


def survive(scenarios: tuple[str, ...], kills: int, out: Path, *words: str, record: Record | None = None) -> Any:
    """Kill the scenarios ``kills`` times: nothing may fail. The figures."""
    figures = kill(out, "--scenario", *scenarios, "--kills", str(kills), *words)
    if record is not None:
        record("kills", json.dumps({name: value for name, value in figures.items() if name not in ("log", "failures")}))
    assert not figures["failures"], figures["failures"][0]
    assert figures["kills"] == kills and figures["rounds"] >= 1
    return figures


def test_a_few_kills_change_nothing(tmp_path, launcher):
    """In a process that has imported everything already; the others begin with an interpreter of their own."""
    figures = tmp_path / "kills.json"
    words = ["--scenario", "precompute-5b", "train-lora", "--kills", "6", "--per-round", "3"]
    (end,) = launcher.run("soak.kills:main", [*words, "--seed", SEED, "--out", str(figures)], ranks=1)
    assert end.code == 0, end.log[-3000:]
    found = json.loads(figures.read_text())
    assert not found["failures"] and found["kills"] == 6 and found["rounds"] >= 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scenarios", [PRECOMPUTE, TRAIN], ids=["precompute", "train"])
def test_a_hundred_kills_change_nothing(tmp_path, record_property, scenarios):
    figures = survive(scenarios, KILLS, tmp_path / "kills.json", record=record_property)
    if KILLS >= 100:
        assert len(figures["by_phase"]) >= 6 and len(figures["by_call"]) >= 8
    # Decode workers notice by themselves that the process they worked for is gone.
    assert figures["orphans"] >= KILLS // 50 and figures["orphans_s"] < 10


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scenario", PAIRS)
def test_one_of_two_processes_killed_ends_both_and_the_same_command_continues(tmp_path, record_property, scenario):
    figures = survive((scenario,), max(3, KILLS // 5), tmp_path / "kills.json", record=record_property)
    assert figures["others_s"]["most"] < 60


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("scenarios", [COMMANDS, LAUNCHES], ids=["commands", "torchrun"])
def test_real_commands_killed(tmp_path, record_property, scenarios):
    kills = max(2, KILLS // 10)
    words = ("--per-round", str(-(-kills // 2)))
    figures = survive(scenarios, kills, tmp_path / "kills.json", *words, record=record_property)
    assert scenarios is COMMANDS or figures["others_s"]["most"] < 60


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("broken", "scenario", "message"),
    [
        ("plain-writes", "precompute-5b", ""),
        ("forgotten-optimizer", "train-lora", "optimizer.safetensors differs"),
        ("old-one-first", "train-lora", "it lost what stood before|no checkpoint of this run is whole"),
        ("immortal-workers", "precompute-i2v-workers", "left processes that still run"),
        ("endless-patience", "train-pair", "hung"),
    ],
)
def test_the_soak_notices_what_it_is_there_for(tmp_path, broken, scenario, message):
    figures = kill(tmp_path / "kills.json", "--scenario", scenario, "--kills", "60", "--broken", broken)
    assert figures["failures"] and re.search(message, figures["failures"][0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_on_real_clips_killed_at_ten_named_moments(real_clips, tmp_path, record_property):
    figures = kill(tmp_path / "kills.json", "--clips", str(real_clips), timeout_s=850)
    killed = {one["moment"]: one["phase"] for one in figures["log"]}
    record_property("moments", json.dumps(killed))
    assert not figures["failures"], figures["failures"]
    assert list(killed) == list(MOMENTS) and len(MOMENTS) == 10


def test_every_byte_counts_and_so_does_every_file():
    run = {"run/checkpoints/step-00000001/ema.safetensors": b"abc", "run/heldout.jsonl": b"1\n", "cache/a": b""}
    assert differences(run, dict(run)) == []
    assert differences(run, {**run, "run/heldout.jsonl": b"2\n"}) == ["run/heldout.jsonl differs: b'1\\n' -> b'2\\n'"]
    assert differences(run, {name: run[name] for name in list(run)[:2]}) == ["cache/a is missing"]
    assert differences(run, {**run, "run/b": b""}) == ["run/b is too much"]
    times = {"run/.lock": b"", "run/tensorboard/events.1": b"", "run/heldout.jsonl.1-2.partial": b""}
    assert compared({**run, **times}).keys() == run.keys()
    assert len(PHASES) >= 15 and {plan.at for plan in MOMENTS.values()} <= {*PHASES, *CALLS}


def test_the_figures_of_a_report(tmp_path):
    (tmp_path / "slow.xml").write_text(
        '<testsuites><testsuite><testcase file="tests/test_a.py" name="test_x[1]" time="1.26"><properties>'
        '<property name="kills" value="{&quot;kills&quot;: 3}"/></properties></testcase>'
        '<testcase file="tests/test_a.py" name="test_y" time="0"><failure message="no"/></testcase>'
        '<testcase file="tests/test_a.py" name="test_z" time="0"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_report(tmp_path / "slow.xml") == {
        "tests/test_a.py::test_x[1]": {"outcome": "passed", "seconds": 1.3, "kills": {"kills": 3}},
        "tests/test_a.py::test_y": {"outcome": "failed", "seconds": 0.0},
        "tests/test_a.py::test_z": {"outcome": "skipped", "seconds": 0.0},
    }
    assert read_report(tmp_path / "none.xml") == {}
