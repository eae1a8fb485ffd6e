"""Commands that the page starts: child processes, each a folder with its words, its log and how it ended.

The folder is all there is. A job's process (``job_process``) holds the lock in it for as long as it lives, so that any
server, one that was started again too, knows what runs. Jobs in line wait for the locks of those before them: there is
no queue but the locks, and it goes on when the server is gone.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from finetune.core.errors import ConfigError
from finetune.core.files import atomic_write_text, remove_dir
from finetune.core.locks import HeldError, hold

JOB, LOG, LOCK, PROCESS, ENDED = "job.json", "log.txt", "lock", "process.json", "ended.json"

State = Literal["waiting", "running", "done", "warned", "stopped", "failed", "lost"]
"""``stopped``: by a signal, and saved where the command saves; ``lost``: killed, and nothing says why."""

_CODES: Mapping[int, State] = {0: "done", 3: "warned", 75: "stopped", 130: "stopped", -signal.SIGTERM: "stopped"}

_START_S = 60.0
"""How long a job's process may take to hold its lock."""

_TAIL_BYTES = 64 << 10


@dataclass(frozen=True)
class Job:
    """A command that was started."""

    folder: Path
    words: tuple[str, ...]
    """What follows ``finetune``."""
    label: str
    """What it works on, such as a run's folder."""
    in_line: bool
    """Whether it waits for others, and others for it."""

    @property
    def name(self) -> str:
        """Its number."""
        return self.folder.name

    @property
    def command(self) -> str:
        """As it would be typed."""
        return shlex.join(["finetune", *self.words])

    @property
    def state(self) -> State:
        """What has become of it."""
        if not is_held(self.folder / LOCK):
            code = _read(self.folder / ENDED).get("code")
            if code is not None:
                return _CODES.get(code, "failed")
            process = _process(self.folder)  # the process of its job may have been killed, and the command not
            if process is None or not _read(self.folder / PROCESS).get("began"):
                return "lost"
        return "running" if _read(self.folder / PROCESS).get("began") else "waiting"

    @property
    def is_alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ("waiting", "running")

    @property
    def log(self) -> str:
        """The end of what it printed."""
        return tail(self.folder / LOG)

    def stop(self) -> None:
        """Ask it to end: training finishes its step and saves; what waits never begins."""
        state, process = self.state, _process(self.folder)
        if process is None or state not in ("waiting", "running"):
            return
        process.send_signal(signal.SIGTERM)
        if state == "waiting":  # its process ends without a word
            ends_of(self.folder)
            if not (self.folder / ENDED).exists():
                atomic_write_text(self.folder / ENDED, json.dumps({"code": -signal.SIGTERM}))


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock alone."""
    try:
        with hold(lock, "the page", shared=True):
            return False
    except HeldError:
        return True


def ends_of(folder: Path) -> None:
    """Return when the job of a folder has ended."""
    if folder.is_dir():
        with hold(folder / LOCK, "a job in line", shared=True, waiting=lambda _: None):
            pass


def identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number."""
    try:
        return {"pid": pid, "created": psutil.Process(pid).create_time()}
    except psutil.Error:  # it has ended already
        return {"pid": pid, "created": 0.0}


def _process(folder: Path) -> psutil.Process | None:
    known = _read(folder / PROCESS)
    try:
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known["created"]) < 0.01 and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.Error):
        return None
    return process if same else None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def tail(path: Path) -> str:
    """The end of a text file; of lines that a bar drew over each other, the last."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n"))


class Jobs:
    """The jobs of a folder.

    Args:
        folder: of all jobs, each in a folder named by its number.
        cwd: where commands run.
        program: what runs them; ``finetune`` where it is left out.
    """

    def __init__(self, folder: Path, cwd: Path, program: Sequence[str] = (sys.executable, "-m", "finetune")) -> None:
        self.folder, self._cwd, self._program = folder, cwd, program
        self._children: list[subprocess.Popen[bytes]] = []

    def all(self) -> list[Job]:
        """Every job, newest first."""
        names = sorted((path.name for path in self.folder.glob("[0-9]*") if path.name.isdecimal()), reverse=True)
        return [job for name in names if (job := self._open(name)) is not None]

    def get(self, name: str) -> Job:
        """One job. Raises ConfigError if there is none of that name."""
        job = self._open(name) if name.isdecimal() and len(name) < 20 else None
        if job is None:
            raise ConfigError("there is no such job", where=f"job {name:.20}")
        return job

    def _open(self, name: str) -> Job | None:
        values = _read(self.folder / name / JOB)
        try:
            return Job(self.folder / name, tuple(values["words"]), values["label"], values["in_line"])
        except (KeyError, TypeError):  # begun, and not written yet
            return None

    def start(self, words: Sequence[str], *, label: str = "", in_line: bool = True) -> Job:
        """Start a command; returns when its process is there.

        Args:
            words: what follows ``finetune``.
            label: what it works on, for the list.
            in_line: wait for the jobs in line, and be waited for.

        Raises:
            ConfigError: if its process does not come up.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold(self.folder / "start.lock", "the page", waiting=lambda _: None):
            jobs = self.all()
            after = [job.name for job in jobs if in_line and job.in_line and job.is_alive]
            taken = [int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal()]
            folder = self.folder / f"{max(taken, default=0) + 1:06d}"
            folder.mkdir()
            values = {
                "words": [*words],
                "label": label,
                "in_line": in_line,
                "after": after,
                "program": [*self._program],
            }
            atomic_write_text(folder / JOB, json.dumps(values, indent=1))
            self._spawn(folder)
        return self.get(folder.name)

    def _spawn(self, folder: Path) -> None:
        self._children = [child for child in self._children if child.poll() is None]  # so that none stays a zombie
        with (folder / LOG).open("wb") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "finetune.web.job_process", str(folder)],
                cwd=self._cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._children.append(child)
        end_s = time.monotonic() + _START_S
        while not (folder / PROCESS).exists():
            if child.poll() is not None or time.monotonic() > end_s:
                raise ConfigError("the command's process did not start", where=str(folder / LOG))
            time.sleep(0.02)

    def run(self, words: Sequence[str], *, label: str = "") -> Job:
        """Start a command of seconds out of line, and wait for its end."""
        job = self.start(words, label=label, in_line=False)
        ends_of(job.folder)
        return job

    def prune(self, keep: int) -> None:
        """Remove all but the newest jobs that have ended."""
        for job in self.all()[keep:]:
            if not job.is_alive:
                remove_dir(job.folder)
