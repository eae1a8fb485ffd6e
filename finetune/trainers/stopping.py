"""A polite end: SIGTERM, SIGINT, SIGUSR1 and SIGHUP ask the loop to finish its step and save."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

SIGNALS: tuple[int, ...] = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)  # Windows has neither of the last two
)
"""What asks: SIGTERM comes from schedulers and launchers, SIGINT from a terminal, SIGUSR1 from SLURM's ``--signal``,
SIGHUP from a terminal or a connection that is gone."""


class StopRequest:
    """Context manager that turns the first signal after ``begin`` into a request.

    A second SIGINT interrupts at once: who presses Ctrl-C twice means it. A second one of the others changes nothing:
    launchers repeat them while a checkpoint is being written. Under ``nohup``, SIGHUP stays ignored.

    Handlers can only be set in the main thread; elsewhere (a notebook's worker, a test) nothing is caught and
    ``requested`` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self.by = ""
        """Name of the signal, such as ``SIGTERM``."""
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """From here on there are steps to finish. Before, a signal does what it always does: it ends the process."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                self._before[number] = signal.signal(number, self._note)

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.requested:
            self.requested, self.by = True, name
            say(f"{name}: finishing the step, then saving. Ctrl-C again stops at once, unsaved.")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            say(f"{name}: already stopping because of {self.by}.")


def say(text: str) -> None:
    """Print a line to standard error from a signal handler."""
    # Not print: a handler that interrupts a print would fail with a reentrant call.
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"\n{text}\n".encode())
