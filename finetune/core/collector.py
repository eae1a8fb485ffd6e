"""Python's search for reference cycles, put off where objects are made that stay: rows of a table, libraries."""

from __future__ import annotations

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
