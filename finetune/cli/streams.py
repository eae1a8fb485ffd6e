"""Standard streams as the command line uses them: what goes wrong with them ends no work, and libraries are quiet."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO


def open_streams() -> None:
    """Make standard streams that no text and no closed descriptor can make fail.

    What an encoding lacks is written as an escape. A descriptor that was closed (``>&-``) would be given to the next
    file that is opened, and what libraries print would end up in there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class _Lasting:
    """A stream that falls silent, with one warning, when it cannot be written to: a full disk, a closed pipe."""

    def __init__(self, stream: TextIO, warn: Callable[[str], object]) -> None:
        self._stream = stream
        self._warn = warn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream, but for the errors of the system."""
        self._do(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As ``write``."""
        self._do(self._stream.flush)

    def _do(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            # What is still in the buffer goes the same way; otherwise it would fail again at every flush.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._warn(f"{self._stream.name} cannot be written to any more ({error.strerror}); the work goes on\n")


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, an output that fails ends nothing."""
    err = _Lasting(sys.stderr, lambda _: None)
    with redirect_stderr(err), redirect_stdout(_Lasting(sys.stdout, err.write)):
        yield


def quiet_libraries() -> None:
    """Errors only from the libraries below us, and no bars of theirs beside ours (``progress.Bar``).

    What of their advice matters to a run, this package checks itself.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _ToStandardError(logging.StreamHandler[TextIO]):
    """Writes to what standard error is at that moment: a panel on the terminal takes its place while it stands."""

    def emit(self, record: logging.LogRecord) -> None:
        """As any ``StreamHandler``."""
        self.stream = sys.stderr
        super().emit(record)


class _Formatter(logging.Formatter):
    """Warnings in the style of all others, and the rest as it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def own_log() -> Iterator[None]:
    """Inside, this package's log goes to standard error: warnings, and the planner's steps, which may take a minute."""
    log, handler = logging.getLogger("finetune"), _ToStandardError()
    level, propagates = log.level, log.propagate
    handler.setFormatter(_Formatter())
    log.addHandler(handler)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagates
