"""Rehearsals on a second core: ``python -m finetune.planning.ahead`` makes them, and leaves them in the user's cache.

Whoever needs it later finds it there, or, where the cache cannot be written or the process came to grief, makes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from finetune.config import RunConfig, load_config
from finetune.planning.names import PhaseName
from finetune.planning.store import is_stored, rehearsed

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT_S = 300.0
_DONE = "done\n"


def child_environment() -> dict[str, str]:
    """Of a process that is no part of the launch, sees no GPU and asks nobody."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH}
    return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class Job(NamedTuple):
    """What ``rehearsed`` is asked for."""

    config: RunConfig
    layers: int | None = None
    phases: Collection[PhaseName] = ()
    """Empty for nothing to do."""
    card_bytes: int | None = None


class _Helper:
    """The other process, from its first job on: takes jobs line by line, and answers each when it is done with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._told = self._answered = 0
        self._child: subprocess.Popen[str] | None = None

    def begin(self, job: Job) -> None:
        """Tell it; where that cannot be done the job is not done either."""
        file = Path(self._folder.name) / f"{self._told}.yaml"
        told = {**job._asdict(), "config": str(file), "phases": list(job.phases)}
        with contextlib.suppress(OSError):
            file.write_text(job.config.to_yaml(), encoding="utf-8")
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
                self._answered += line == _DONE
        finally:
            overdue.cancel()

    def close(self) -> None:
        """End it, and forget its files."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
        self._folder.cleanup()


def _start() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "finetune.planning.ahead"],
        env=child_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


_helpers: list[_Helper] = []
"""The one of the ``second_core`` that is entered, if any."""


@contextmanager
def second_core() -> Iterator[None]:
    """Inside, every ``beside`` shares one process, which needs seconds to start."""
    if _helpers or (os.cpu_count() or 1) < 2:
        yield
        return
    helper = _Helper()
    _helpers.append(helper)
    try:
        yield
    finally:
        _helpers.remove(helper)
        helper.close()


@contextmanager
def beside(*jobs: Job) -> Iterator[None]:
    """Have ``rehearsed`` made in another process while what is inside runs; at the end it is there, if all went well.

    Args:
        jobs: one after the other; those that are kept already are left out.
    """
    asked = [job for job in jobs if job.phases and not is_stored(*job)]
    if not asked:
        yield
        return
    with second_core():
        for job in asked:
            for helper in _helpers:
                helper.begin(job)
        yield
        for helper in _helpers:
            helper.wait()


def _serve() -> None:
    for line in sys.stdin:
        told = json.loads(line)
        with contextlib.suppress(Exception):  # whoever asked makes it then, and meets the error where it can be told
            rehearsed(load_config(Path(told.pop("config"))), **told)
        print(_DONE, end="", flush=True)


if __name__ == "__main__":
    _serve()
