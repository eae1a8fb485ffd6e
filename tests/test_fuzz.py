"""The fuzz targets, driven by hypothesis for seconds; ``make soak`` drives them for minutes (``tests/fuzz``)."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import child, targets
from fuzz.mutation import HUGE_CASE, MAX_CASE, mutate
from fuzz.targets import TARGETS, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FAST = [name for name in TARGETS if name in ("config", "override", "jsonl", "csv", "layouts", "model_json")]
CASES = 60


@pytest.fixture(autouse=True, scope="module")
def _clean():
    yield
    targets.remove_folder()


def documents(target: Target) -> st.SearchStrategy[bytes]:
    """Seeds as they are, mutated, and bytes that were never a document."""
    pool = target.seeds()
    mutated = st.integers(0, 2**32).map(lambda seed: mutate(random.Random(seed), pool, target.tokens))
    pieces = st.lists(st.sampled_from([*target.tokens, *pool]), max_size=6).map(b"".join)
    return st.one_of(st.sampled_from(pool), mutated, mutated, mutated, pieces, st.binary(max_size=200))


@pytest.mark.parametrize("name", FAST)
def test_no_input_gets_past_the_errors(name):
    target = TARGETS[name]
    ran = 0

    @settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(documents(target))
    def drive(case: bytes) -> None:
        nonlocal ran
        ran += 1
        target.run(case)

    drive()
    assert ran >= CASES


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_every_target_takes_its_seeds_and_accepts_one(name):
    target = TARGETS[name]
    assert any(target.run(seed) is not None for seed in target.seeds()[:4]), "nothing gets through"


def test_mutation_is_bounded_and_repeats():
    target = TARGETS["config"]
    pool = target.seeds()
    cases = [mutate(random.Random(seed), pool, target.tokens) for seed in range(300)]
    assert cases == [mutate(random.Random(seed), pool, target.tokens) for seed in range(300)]
    assert len(set(cases)) > 250 and max(map(len, cases)) <= HUGE_CASE
    assert sum(len(case) > MAX_CASE for case in cases) < 10


# ----------------------------------------------------------------------------------------------- canaries of the runner


def test_a_bug_is_found_and_its_input_kept(tmp_path):
    def buggy(data: bytes) -> None:
        if b"\0" in data:
            raise ZeroDivisionError("a bug")

    target = Target(buggy, lambda: [b"ab", b"cd"], tokens=(b"\0",))
    found = child.run_cases("canary", target, 2.0, 1, tmp_path / "current")
    assert [crash["kind"] for crash in found["crashes"]] == ["ZeroDivisionError"], "one bug is one crash"
    assert b"\0" in Path(found["crashes"][0]["file"]).read_bytes() and found["cases"] > 10


def test_a_slow_case_is_a_crash(tmp_path):
    target = Target(lambda data: sum(range(1_000_000)), lambda: [b"x"], seconds=1e-4)
    found = child.run_cases("canary", target, 0.3, 1, tmp_path / "current")
    assert {crash["kind"] for crash in found["crashes"]} == {"slow"}


def test_an_unprintable_message_is_a_bug(monkeypatch):
    from finetune.core.errors import ConfigError

    def refuse() -> None:
        raise ConfigError("\x1b[2J")

    assert targets._expect(ConfigError, refuse) is None, "errors write such characters out"
    monkeypatch.setattr("finetune.core.errors.shown", lambda text: text)
    with pytest.raises(AssertionError, match="terminal"):
        targets._expect(ConfigError, refuse)


@pytest.mark.slow
def test_the_runner_survives_a_hang_and_a_dead_process(tmp_path, monkeypatch):
    """The runner itself, on a target that hangs and on one that kills its process."""
    script = (
        "import os, sys, time; from tests.fuzz import targets, child; "
        "T = targets.Target; "
        "targets.TARGETS['hang'] = T(lambda d: time.sleep(60) if d == b'b' else 0, lambda: [b'a', b'b'], seconds=1); "
        "targets.TARGETS['die'] = T(lambda d: os.abort() if d == b'b' else 0, lambda: [b'a', b'b']); "
        "sys.exit(child.main())"
    )
    from fuzz import run

    start = subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda words, **more: start([sys.executable, "-c", script, *words[3:]], **more)
    )
    for name, kind in (("hang", "hang"), ("die", "exit")):
        report = run.fuzz(name, 4.0, 0, tmp_path / name, Target(lambda data: 0, lambda: [b"a"], seconds=1))
        assert report["crashes"] and report["crashes"][0]["kind"].startswith(kind)
        assert Path(report["crashes"][0]["file"]).read_bytes() == b"b"
    assert json.dumps(report)
