"""``docs/reliability.md``: every promise has its test and its canary, both exist, and the figures are the last soak's.

Every check is a function of its input, so that a canary can feed it something wrong and watch it fail.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
SOAK = ROOT / "benchmarks" / "results" / "soak.json"

PROMISES = frozenset(
    re.findall(
        r"\S+",
        """
    kill-precompute kill-train kill-rank kill-real-clips export-kill disk-full log disk-space signals corruption-cache
    corruption-checkpoint corruption-in-training checksum-cost concurrent gc one-writer non-finite replay oom
    narrow-sums cudnn card
    forward golden determinism world-size replicas statistics export launchers resharding refused cluster yaml
    base checkpoint-content non-finite-heldout samples pickle paths captions pairs left-out unknown-text held-out
    parquet videos shown kept killed-reader models escaped revision fuzz
    """,
    )
)
ROW = re.compile(r"^\| ([a-z-]+) \| (.+?) \| (.+?) \| (.+?) \|$", re.M)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(page: str) -> Iterator[tuple[str, list[tuple[str, str]], list[tuple[str, str]]]]:
    """(id, tests, canaries) of every row of the table of promises."""
    table = page.partition("## Promises")[2].partition("\n## ")[0]
    for promise, _, shown, canary in ROW.findall(table):
        if promise != "id":
            yield promise, TEST.findall(shown), TEST.findall(canary)


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the test functions of a file; none where there is no file."""
    path = ROOT / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_")


def faults(page: str) -> list[str]:
    """What is wrong with the table of promises."""
    found = list(rows(page))
    names = [name for name, _, _ in found]
    lines = [f"{name}: no row" for name in sorted(PROMISES - set(names))]
    lines += [f"{name}: not a promise" for name in sorted(set(names) - PROMISES)]
    lines += [f"{name}: twice" for name in sorted(set(names)) if names.count(name) > 1]
    for name, shown, canaries in found:
        lines += [f"{name}: no {what}" for what, tests in (("test", shown), ("canary", canaries)) if not tests]
        lines += [
            f"{name}: there is no {file}::{test}" for file, test in (*shown, *canaries) if test not in names_in(file)
        ]
    return lines


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("make_reliability", ROOT / "scripts" / "make_reliability.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_promise_has_a_test_and_a_canary_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    assert len(PROMISES) >= 30
    assert sum(len(shown) + len(canaries) for _, shown, canaries in rows(page)) >= 60
    assert not faults(page), "\n".join(faults(page))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("| kill-train |", "| kill-tram |", "kill-train: no row"),
        ("| kill-train |", "| kill-rank |", "kill-rank: twice"),
        ("::test_a_few_kills_change_nothing`", "::test_a_few_kills_change_a_bit`", "there is no tests/test_soak.py::"),
        ("`tests/test_soak.py::test_the_soak_notices_what_it_is_there_for` |", "none |", "no canary"),
    ],
)
def test_the_table_check_can_fail(old, new, said):
    page = PAGE.read_text(encoding="utf-8")
    assert old in page
    assert any(said in fault for fault in faults(page.replace(old, new)))


@pytest.fixture
def soak() -> dict[str, Any]:
    """The committed figures."""
    if not SOAK.exists():
        pytest.skip("no whole `make soak` has been run on this version yet")
    figures: dict[str, Any] = json.loads(SOAK.read_text(encoding="utf-8"))
    return figures


def test_the_figures_are_those_of_the_last_soak(soak):
    module, page = generator(), PAGE.read_text(encoding="utf-8")
    assert module.page(page, soak) == page, "run `make docs`"
    assert not soak["failed"]
    # What the issue asks for was reached in the run whose figures are shown.
    kills = {name: one["kills"]["kills"] for name, one in soak["tests"].items() if "kills" in one}
    for verb in ("precompute", "train"):
        assert kills[f"tests/test_soak.py::test_a_hundred_kills_change_nothing[{verb}]"] >= 100
    assert sum(one["seconds"] for one in soak["fuzz"]) >= 590
    assert all(one["cases"] > 0 and not one["crashes"] for one in soak["fuzz"])


def test_another_figure_makes_the_page_stale(soak):
    module, page = generator(), PAGE.read_text(encoding="utf-8")
    soak["fuzz"][0]["cases"] += 1
    assert module.page(page, soak) != page
    with pytest.raises(ValueError, match="markers"):
        module.page(page.replace("end of figures", ""), soak)


def test_no_slow_test_is_missing_from_the_figures(soak):
    """A slow test that was added since has not been run for as long as the figures claim."""
    ran = {name.partition("[")[0] for name in soak["tests"]}
    missing = sorted(slow_tests() - ran)
    assert len(ran) >= 10
    assert not missing, f"run `make soak`: {missing}"


def slow_tests() -> set[str]:
    """``file::test`` of every test function that is marked slow."""
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", ())]
            if isinstance(node, ast.FunctionDef) and "pytest.mark.slow" in marks:
                found.add(f"tests/{path.name}::{node.name}")
    return found
