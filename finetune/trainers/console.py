"""What a person sees of a run while it trains: a panel on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TextIO

from finetune.trainers.tracking import StepRecord

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_BARS = "▁▂▃▄▅▆▇█"

_REDRAWN_S = 0.1
"""At most so often: a tiny model takes hundreds of steps a second."""


class Console:
    """How far a run is: a panel that is redrawn on a terminal, lines at intervals elsewhere and where ``TERM`` is dumb.

    While the panel stands, what is printed to the standard streams appears above it. ``NO_COLOR`` is honoured.

    Args:
        total_steps: optimizer steps of the whole run.
        interval_s: least seconds between two lines where there is no panel.
        stream: where to print; None is standard output.
        enabled: False on every process but the main one.
        memory_gib: of the GPU, to show how much of it is used; None where there is none.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        interval_s: float = 10.0,
        stream: TextIO | None = None,
        enabled: bool = True,
        memory_gib: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._interval_s = interval_s
        self._stream = stream or sys.stdout
        self._enabled = enabled
        self._clock = clock
        self._memory_gib = memory_gib
        self._terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._origin: tuple[int, float] | None = None
        self._shown_s = -math.inf
        self._live: Live | None = None
        self._last: StepRecord | None = None
        self._losses: deque[float] = deque(maxlen=240)
        self._facts: dict[str, str] = {}

    def step(self, record: StepRecord) -> None:
        """Show a step that is complete."""
        step, now = record.step, self._clock()
        if self._origin is None:
            self._origin = step, now  # the first step is slow (allocator, kernel selection): the estimate begins after
        if not math.isnan(record.loss):  # as where all samples are for prior preservation
            self._losses.append(record.loss)
        due = step >= self._total or now - self._shown_s >= (_REDRAWN_S if self._terminal else self._interval_s)
        if not (self._enabled and due):
            return
        self._shown_s = now
        first, first_s = self._origin
        left = duration((now - first_s) / (step - first) * (self._total - step)) if first < step < self._total else ""
        if self._terminal:
            self._last = record
            self._redraw(self._panel(record, left))
        else:
            self._stream.write(self._line(record, left) + "\n")
            self._stream.flush()

    def _line(self, record: StepRecord, left: str) -> str:
        parts = [
            f"step {record.step:>{len(str(self._total))}}/{self._total}",
            _loss(record),
            f"lr {record.lr:.2e}",
            f"{record.s_per_step:.2f} s/step",
            f"peak {record.peak_gib:.2f} GiB",
        ]
        return "  ".join([*parts, f"ETA {left}"] if left else parts)

    def _panel(self, record: StepRecord, left: str) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        head = Table.grid(padding=(0, 2))
        for width in (None, 40, None):
            head.add_column(width=width, no_wrap=True)
        share = f"{record.step / self._total:.0%}"
        head.add_row(
            f"step {record.step}/{self._total}",
            ProgressBar(self._total, record.step, width=40),
            f"{share}  ETA {left}" if left else share,
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column(no_wrap=True, overflow="ellipsis")
        body.add_row("loss", f"{_loss(record).removeprefix('loss ')}  {sparkline([*self._losses], 40)}")
        body.add_row("step", f"{record.s_per_step:.2f} s, {record.data_wait_s:.2f} s of it waiting for data")
        body.add_row("lr, gradient", f"{record.lr:.2e}, {record.grad_norm:.3g}")
        memory = Table.grid(padding=(0, 1))
        memory.add_row(f"{record.peak_gib:.2f} GiB at most")
        if self._memory_gib is not None:
            bar = ProgressBar(self._memory_gib, min(record.peak_gib, self._memory_gib), width=24)
            memory = Table.grid(padding=(0, 1))
            memory.add_row(f"{record.peak_gib:.2f} of {self._memory_gib:.1f} GiB", bar)
        body.add_row("memory", memory)
        for name, value in self._facts.items():
            body.add_row(name, _plain(value))
        panel = Table.grid()
        panel.add_row(head)
        panel.add_row(body)
        return panel

    def _redraw(self, panel: Table) -> None:
        from rich.console import Console as Terminal
        from rich.live import Live

        if self._live is None:
            terminal = Terminal(file=self._stream, highlight=False, soft_wrap=False)
            self._live = Live(console=terminal, auto_refresh=False)
            self._live.start()
        self._live.update(panel, refresh=True)

    def fact(self, name: str, value: str) -> None:
        """Keep something in the panel, such as the last held-out loss; ``note`` says it where there is none."""
        self._facts[name] = value

    def note(self, text: str) -> None:
        """Print whole lines, above the panel."""
        if not self._enabled:
            return
        if self._live is not None:
            self._live.console.print(_plain(text), soft_wrap=True)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the panel as it stands, with the facts that came after the last step."""
        if self._live is not None:
            if self._last is not None:
                self._redraw(self._panel(self._last, ""))
            self._live.stop()
            self._live = None


def _loss(record: StepRecord) -> str:
    losses = {"loss": record.loss, "prior loss": record.prior_loss}
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if not math.isnan(loss))


def _plain(text: str) -> Any:
    """Text that is no markup."""
    from rich.text import Text

    return Text(text)


def sparkline(values: list[float], width: int) -> str:
    """The means of ``width`` equal stretches as bars of eight heights; what is not finite counts as the highest."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * column // width for column in range(width + 1)]
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    means = []
    for begin, end in pairwise(edges):
        part = [value if math.isfinite(value) else max(finite) for value in values[begin:end]]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    return "".join(_BARS[round((mean - low) / (high - low or 1) * (len(_BARS) - 1))] for mean in means)


def duration(seconds: float) -> str:
    """``45s``, ``7m 38s`` or ``3h 02m``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
