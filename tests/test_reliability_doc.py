"""``docs/reliability.md``: every promise names a test and a canary, and both exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
ROW = re.compile(r"^\| ([a-z-]+) \| (.+?) \| (.+?) \| (.+?) \|$", re.M)
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@cache
def names_in(file: str) -> frozenset[str]:
    """Names of the functions of a test file; none where there is no file."""
    path = ROOT / file
    body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
    return frozenset(node.name for node in body if isinstance(node, ast.FunctionDef))


def faults(page: str) -> list[str]:
    """What is wrong with the table of promises."""
    rows = [row for row in ROW.findall(page.partition("## Promises")[2].partition("\n## ")[0]) if row[0] != "id"]
    lines = [] if len(rows) >= 64 else [f"{len(rows)} promises"]
    for promise, _, *columns in rows:
        for column, what in zip(columns, ("test", "canary"), strict=True):
            named = TEST.findall(column)
            lines += [] if named else [f"{promise}: no {what}"]
            lines += [f"{promise}: there is no {file}::{test}" for file, test in named if test not in names_in(file)]
    return lines


def test_every_promise_has_a_test_and_a_canary_that_exist():
    assert not faults(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("::test_a_few_kills_change_nothing`", "::test_a_few_kills_change_a_bit`", "there is no tests/test_soak.py::"),
        ("`tests/test_soak.py::test_the_soak_notices_what_it_is_there_for` |", "none |", "no canary"),
        ("| kill-", "| Kill-", "promises"),
    ],
)
def test_the_table_check_can_fail(old, new, message):
    page = PAGE.read_text(encoding="utf-8")
    assert old in page and any(message in fault for fault in faults(page.replace(old, new)))
