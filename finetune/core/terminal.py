"""How far long work is: a bar on a terminal, a line now and then anywhere else, always on standard error."""

from __future__ import annotations

import os
import sys
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
