"""Python's search for reference cycles, put off where objects are made that stay: rows of a table, libraries."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, nothing is searched for cycles. To be used around reading lists of a hundred thousand rows.

    The search goes through every object there is, those of all libraries included, each time a quarter more have been
    made: a third of the time in which a large cache is opened.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect_seldom() -> None:
    """For a program of its own: search less often, and not at its end.

    Importing torch and diffusers makes half a million objects, none of which goes. Python walks them several times on
    the way, and once more to take them apart before it ends (docs/performance.md has the seconds).
    """
    gc.set_threshold(10_000, 10, 10)
    atexit.register(gc.freeze)
