"""A pytest plugin (``-p soak.cases``): how many generated cases a property-based test passed, as a recorded figure."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, None, None]:
    """Before the last report of a test is made: it carries the properties into the JUnit file."""
    if call.when == "teardown" and (statistics := getattr(item, "hypothesis_statistics", "")):
        item.user_properties.append(("cases", passed(statistics)))
    yield


def passed(statistics: str) -> int:
    """Passing cases in what hypothesis says of a test."""
    return sum(int(number) for number in re.findall(r"(\d+) passing", statistics))
