"""Estimates on a second core: ``python -m finetune.planner.helper_process`` makes them, and leaves them in the cache.

Whoever needs it later finds it there, or, where the cache cannot be written or the process came to grief, makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from queue import SimpleQueue
from typing import NamedTuple

from finetune.config.schema import RunConfig
from finetune.planner.phases import PhaseName
from finetune.planner.store import is_stored, rehearsed

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_TIMEOUT_S = 300.0

_DONE = "done\n"


def child_environment() -> dict[str, str]:
    """Of a process that is no part of the launch, sees no GPU and asks nobody."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class HelperJob(NamedTuple):
    """What ``rehearsed`` is asked for."""

    config: RunConfig
    layers: int | None = None
    phases: Collection[PhaseName] = ()
    """Empty for nothing to do."""
    card_bytes: int | None = None


class _Helper:
    """The other process, from its first job on: takes jobs line by line, and answers each when it is done with it."""

    def __init__(self) -> None:
        self._told = self._answered = 0
        self._child: subprocess.Popen[str] | None = None

    def begin(self, job: HelperJob) -> None:
        """Tell it; where that cannot be done the job is not done either."""
        told = {**job._asdict(), "config": job.config.to_dict(), "phases": list(job.phases)}
        with contextlib.suppress(OSError):
            if self._child is None:
                self._child = _start()
            assert self._child.stdin is not None
            self._child.stdin.write(json.dumps(told) + "\n")
            self._child.stdin.flush()
            self._told += 1

    def wait(self) -> None:
        """Until it has done, or given up, what it was told; a process that takes too long is ended."""
        if self._child is None:
            return
        assert self._child.stdout is not None
        overdue = threading.Timer(_TIMEOUT_S, self._child.kill)
        overdue.start()
        try:
            while self._answered < self._told and (line := self._child.stdout.readline()):
                self._answered += line.endswith(_DONE)  # whatever a library may have printed before it
        finally:
            overdue.cancel()

    def close(self) -> None:
        """End it."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune.planner.helper_process"],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


_shared: ContextVar[_Helper | None] = ContextVar("shared", default=None)
"""The one of the ``second_core`` that is entered."""


@contextmanager
def second_core() -> Iterator[None]:
    """Inside, every ``beside`` shares one process, which needs seconds to start."""
    if _shared.get() is not None or _cores() < 2:
        yield
        return
    helper = _Helper()
    before = _shared.set(helper)
    try:
        yield
    finally:
        _shared.reset(before)
        helper.close()


def _cores() -> int:
    """That this process may use: a job may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def beside(*jobs: HelperJob) -> Iterator[None]:
    """Have ``rehearsed`` made in another process while what is inside runs; at the end it is there, if all went well.

    Args:
        jobs: one after the other; those that are kept already are left out.
    """
    asked = [job for job in jobs if job.phases and not is_stored(*job)]
    if not asked:
        yield
        return
    with second_core():
        helper = _shared.get()
        if helper is None:
            yield
            return
        for job in asked:
            helper.begin(job)
        yield
        helper.wait()


def _serve() -> None:
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while True:
        told = json.loads(lines.get())
        with contextlib.suppress(Exception):  # whoever asked makes it then, and meets the error where it can be told
            rehearsed(RunConfig.from_dict(told.pop("config")), **told)
        print(_DONE, end="", flush=True)


def _listen(lines: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)  # nobody is there any more who could want what is being made


if __name__ == "__main__":
    _serve()
