"""How long a test waits for what must come: so long that a slow or busy machine fails none.

No test asserts how long something took. What must not hang either ends, or meets these limits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HANG_S = 500.0
"""Seconds after which a test calls something hung. Below the ten minutes of a collective of training, so that who waits
for a dead process until then counts as hung; and below pytest's own limit, which names no culprit."""


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for ``condition``.

    Raises:
        AssertionError: it never came true; with ``what`` should have.
    """
    end = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < end, f"never: {what}"
        time.sleep(0.01)
