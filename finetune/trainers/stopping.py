"""A polite end: SIGTERM and SIGINT ask the loop to finish its step and save."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager that turns the first SIGTERM or SIGINT into a request; a second SIGINT interrupts at once.

    Handlers can only be set in the main thread; elsewhere (a notebook's worker, a test) nothing is caught and
    ``requested`` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by = ""
        """Name of the signal, such as ``SIGTERM``."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        self.by = signal.Signals(number).name
        # Not print: a handler that interrupts a print would fail with a reentrant call.
        os.write(2, f"\n{self.by}: finishing the step, then saving. Ctrl-C again stops at once, unsaved.\n".encode())
