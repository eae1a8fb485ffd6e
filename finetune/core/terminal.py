"""How far long work is: a bar on a terminal, a line now and then anywhere else, always on standard error."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 10.0
"""Between two lines where the output is no terminal; what takes less time leaves none."""


class Bar(tqdm):  # type: ignore[misc]  # it has no types
    """``tqdm`` in this package's style; also as the ``tqdm_class`` of a library. Takes tqdm's arguments.

    A file or a pipe never gets a carriage return: a log is read by people, line by line.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Said in any case, because the command line silences every bar that does not (TQDM_DISABLE).
        super().__init__(*arguments, **{**_style(), **options, "disable": bool(options.get("disable"))})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draw the bar, or write a line; True where something is to be wiped away in the end."""
        if self.fp.isatty():
            return bool(super().display(msg, pos))
        if msg is None:
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False


def _style() -> dict[str, Any]:
    if sys.stderr.isatty():
        return {"leave": False, **({"dynamic_ncols": True} if _has_size(sys.stderr) else {"ncols": 80, "nrows": 20})}
    line = "{desc}: {n_fmt} of {total_fmt}{postfix}, {elapsed} gone, {remaining} to go"
    return {"leave": False, "delay": LINE_INTERVAL_S, "mininterval": LINE_INTERVAL_S, "bar_format": line}


def _has_size(terminal: TextIO) -> bool:
    """Whether a terminal says how wide it is: a container's or a recorder's may say 0, and tqdm would draw nothing."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except OSError:
        return False


# -------- Standard streams as the command line uses them: what goes wrong with them ends no work, and libraries are
# quiet.


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
        return self._lasting(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        """As ``write``."""
        self._lasting(self._stream.flush)

    def _lasting(self, action: Callable[[], int | None]) -> int | None:
        try:
            return action()
        except OSError as error:
            # What is still in the buffer goes the same way; otherwise it would fail again at every flush.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._warn(f"{self._stream.name} cannot be written to any more ({error.strerror}); the work goes on\n")
            return None


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, an output that fails ends nothing."""
    before = sys.stdout, sys.stderr
    sys.stderr = _Lasting(sys.stderr, lambda _: None)
    sys.stdout = _Lasting(sys.stdout, sys.stderr.write)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def quiet_libraries() -> None:
    """Errors only from the libraries below us, and no bars of theirs beside ours (``progress.Bar``).

    What of their advice matters to a run, this package checks itself.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Formatter(logging.Formatter):
    """Warnings in the style of all others, and the rest as it is."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def own_log() -> Iterator[None]:
    """Inside, this package's log goes to standard error: warnings, and the planner's steps, which may take a minute."""
    log, handler = logging.getLogger("finetune"), logging.StreamHandler(sys.stderr)
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
