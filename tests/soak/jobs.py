"""One command, run by one process or by several, of which one may be killed at a planned moment.

``ForkedJob`` forks them, as ``torchrun`` would start them but without an agent that watches over them, with a probe
inside. ``CommandJob`` is what users type, in interpreters of its own; where such a process is can only be told from
what it has written, so its kills are planned by the clock, or for the moment at which a file appears.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import finetune
from soak import processes
from soak.probe import Plan, Probe, Profile, SharedState

ROOT = Path(finetune.__file__).parent.parent
RUN_S = 300.0
"""No undisturbed command takes nearly as long; a start in an interpreter of its own imports for ten seconds."""
BOUND_S = 60.0
"""Within this, the other processes of a job have to end when one was killed."""
ORPHANS_S = 10.0
"""Within this, the decode workers of a killed process have to end."""
UNHEALTHY = ("Traceback", "is damaged", ".damaged", "This is a bug")
"""Words that no log of a command may hold, killed or not: a kill damages nothing, and a peer's death is not a bug."""
APPEARING: Mapping[str, tuple[str, ...]] = {
    "precompute": ("cache/manifests/*.json", "cache/latents/*/*", "cache/prompts/*/*", "cache/*/*/*.partial"),
    "train": ("run/checkpoints/*.partial", "run/checkpoints/step-*", "run/heldout.jsonl*", "run/config.yaml*"),
}
"""What a kill of a command may wait for: something matching that was not there when it began."""


class Failed(Exception):  # noqa: N818 - a verdict, not a fault of the program
    """Something was not as it must be."""


@dataclass(frozen=True)
class Killed:
    """One process, killed."""

    phase: str
    note: str
    """Of a planned call: which, and on what file."""
    orphans: int
    """Processes below it that were left alone."""
    orphans_s: float
    """Until the last of them had ended."""
    others_s: float | None
    """Until the last of the job's other processes had ended; None for a job of one."""


@dataclass(frozen=True)
class JobSpec:
    """What runs, and when one of its processes is killed."""

    words: list[str]
    """Of the command line."""
    root: Path
    """Folder that the command works in; logs are written beside it."""
    processes: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    plan: Plan | None = None
    """When one of them is to be killed; None for never."""
    rank: int = 0
    """Of the one that is killed."""


class Job(ABC):
    """A started command."""

    def __init__(self, spec: JobSpec, logs: list[Path]) -> None:
        self._spec, self._logs = spec, logs

    @abstractmethod
    def finish(self) -> list[Profile]:
        """Wait for a job that nobody disturbs: every process must succeed and say nothing of damage.

        Raises:
            Failed: if not.
        """

    def kill(self, lacking: Callable[[], list[str]]) -> Killed | None:
        """Kill one process at the planned moment; None if it had ended well before.

        Args:
            lacking: what the command has left undone; where it is nothing, other processes may end well.

        Raises:
            Failed: if a process fails by itself, the others do not end in time or end well without being done, or
                something is left running.
        """
        plan = self._spec.plan
        assert plan is not None
        begun = time.monotonic()
        while not self._is_time(plan, time.monotonic() - begun):
            if self._has_ended():
                self.finish()
                return None
            if time.monotonic() - begun > RUN_S:
                self._end()
                raise self._failed(f"still running after {RUN_S:g} s, started to be killed {plan}")
            time.sleep(0.0005)
        if plan.at != "time":
            time.sleep(plan.seconds)
        if (pid := self._pid()) is None:
            self.finish()
            return None
        below = processes.descendants(pid)
        phase, note = self._where()
        self._kill(pid)
        others_s = self._await_others(plan, lacking)
        orphans_s = processes.wait_gone(below, ORPHANS_S)
        if orphans_s is None:
            raise self._failed(f"killed {plan}, it left processes that still run after {ORPHANS_S:g} s: {below}")
        self._require_healthy()
        return Killed(phase, note, len(below), orphans_s, others_s)

    @abstractmethod
    def _is_time(self, plan: Plan, passed_s: float) -> bool: ...

    @abstractmethod
    def _has_ended(self) -> bool: ...

    @abstractmethod
    def _pid(self) -> int | None:
        """Of the process to kill; None if there is none any more."""

    @abstractmethod
    def _where(self) -> tuple[str, str]:
        """Phase, and what more is known."""

    @abstractmethod
    def _kill(self, pid: int) -> None: ...

    @abstractmethod
    def _await_others(self, plan: Plan, lacking: Callable[[], list[str]]) -> float | None: ...

    @abstractmethod
    def _end(self) -> None:
        """Kill everything."""

    def _require_healthy(self, words: tuple[str, ...] = UNHEALTHY) -> None:
        log = self._log()
        if bad := [word for word in words if word in log]:
            raise self._failed(f"the log speaks of {bad}")

    def _failed(self, what: str) -> Failed:
        return Failed(f"{what}\n{self._log()[-3000:]}")

    def _log(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self._logs if log.exists())


class ForkedJob(Job):
    """Forked processes with a probe inside; ``prepare`` runs in each before the command."""

    def __init__(self, spec: JobSpec, prepare: Callable[[], None] | None = None) -> None:
        folder = spec.root.parent
        super().__init__(spec, [folder / f"process-{rank}.log" for rank in range(spec.processes)])
        self._profiles = [folder / f"profile-{rank}" for rank in range(spec.processes)]
        self._states = [SharedState() for _ in range(spec.processes)]
        self._codes: dict[int, int] = {}
        port = _free_port() if spec.processes > 1 else 0
        self._pids = []
        for rank, state in enumerate(self._states):
            self._logs[rank].unlink(missing_ok=True)
            probe = Probe(state, spec.root, spec.plan if rank == spec.rank else None)
            env = {**(_launch_environment(rank, spec.processes, port) if spec.processes > 1 else {}), **spec.env}
            work = _working(spec.words, probe, prepare, self._profiles[rank])
            self._pids.append(processes.fork(work, self._logs[rank], env))

    def finish(self) -> list[Profile]:
        for rank, pid in enumerate(self._pids):
            code = self._codes.get(pid)
            try:
                code = processes.wait(pid, RUN_S) if code is None else code
            except TimeoutError as error:
                raise self._failed(f"process {rank}: {error}") from None
            if code:
                raise self._failed(f"process {rank} failed by itself with exit code {code}")
        self._require_healthy()
        return [pickle.loads(path.read_bytes()) for path in self._profiles]

    def _is_time(self, plan: Plan, passed_s: float) -> bool:
        return passed_s >= plan.seconds if plan.at == "time" else self._states[self._spec.rank].reached

    def _has_ended(self) -> bool:
        pid = self._pids[self._spec.rank]
        if (code := processes.ended(pid)) is not None:
            self._codes[pid] = code
        return code is not None

    def _pid(self) -> int:
        return self._pids[self._spec.rank]

    def _where(self) -> tuple[str, str]:
        state, plan = self._states[self._spec.rank], self._spec.plan
        return state.phase, state.note.replace(str(self._spec.root), "") if plan is not None and plan.side else ""

    def _kill(self, pid: int) -> None:
        processes.kill(pid)

    def _await_others(self, plan: Plan, lacking: Callable[[], list[str]]) -> float | None:
        begun = time.monotonic()
        others = [pid for rank, pid in enumerate(self._pids) if rank != self._spec.rank]
        for other in others:
            try:
                code = processes.wait(other, BOUND_S)
            except TimeoutError:
                raise self._failed(f"killed {plan}, and another process hung for {BOUND_S:g} s") from None
            if code == 0 and (undone := lacking()):
                raise self._failed(f"killed {plan}, and another process ended as if all were done: {undone[:8]}")
        return time.monotonic() - begun if others else None

    def _end(self) -> None:
        for pid in self._pids:
            processes.kill(pid)


def _working(words: list[str], probe: Probe, prepare: Callable[[], None] | None, profile: Path) -> Callable[[], int]:
    def work() -> int:
        from finetune.cli import main as cli

        probe.install()
        if prepare is not None:
            prepare()
        code = cli.main(words)
        profile.write_bytes(pickle.dumps(probe.profile))
        return code

    return work


def _launch_environment(rank: int, count: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    words = {name: str(number) for name, number in numbers.items()}
    return {**words, "MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class CommandJob(Job):
    """``python train.py`` or ``python -m finetune``, or two of them under ``torchrun``; nothing inside is wrapped."""

    def __init__(self, spec: JobSpec) -> None:
        super().__init__(spec, [spec.root.parent / "command.log"])
        self._before, self._leftovers = self._matches(), set(spec.root.rglob("*.partial"))
        train = spec.words[0] == "train"
        program = [str(ROOT / "train.py"), *spec.words[1:]] if train else ["-m", "finetune", *spec.words]
        # torchrun runs a script, or a module that it is told to with its own -m: the words are the same.
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={spec.processes}"]
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        with self._logs[0].open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, *([*torchrun, "--max-restarts=0"] if spec.processes > 1 else []), *program],
                cwd=spec.root,
                env={**os.environ, **env, **spec.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> list[Profile]:
        try:
            code = self._process.wait(RUN_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise self._failed(f"still running after {RUN_S:g} s") from None
        if code:
            raise self._failed(f"exit code {code}")
        self._require_healthy()
        return [Profile()] * self._spec.processes

    def _is_time(self, plan: Plan, passed_s: float) -> bool:
        if self._spec.processes > 1 and self._pid() is None:
            return False
        return passed_s >= plan.seconds if plan.at == "time" else bool(self._matches() - self._before)

    def _matches(self) -> set[Path]:
        plan = self._spec.plan
        return set() if plan is None or plan.at == "time" else set(self._spec.root.glob(plan.at))

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    def _pid(self) -> int | None:
        if self._spec.processes == 1:
            return self._process.pid
        for pid, _ in processes.descendants(self._process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={self._spec.rank}".encode() in variables:
                return pid
        return None

    def _where(self) -> tuple[str, str]:
        """Where the command is, as far as its files tell."""
        root = self._spec.root
        if not self._logs[0].stat().st_size:
            phase = "starting"
        elif set(root.rglob("*.partial")) - self._leftovers:
            phase = "writing"
        elif self._spec.words[0] == "precompute":
            phase = "encoding" if any(root.glob("cache/manifests/*")) else "planning"
        else:
            phase = "training" if any(root.glob("run/checkpoints/step-*")) else "before the first checkpoint"
        return phase, ""

    def _kill(self, pid: int) -> None:
        os.kill(pid, 9)

    def _await_others(self, plan: Plan, lacking: Callable[[], list[str]]) -> float | None:
        begun = time.monotonic()
        below = processes.descendants(self._process.pid)
        try:
            code = self._process.wait(BOUND_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise self._failed(f"killed {plan}, and the launch hung for {BOUND_S:g} s") from None
        if self._spec.processes == 1:
            return None
        if code == 0 and (undone := lacking()):
            raise self._failed(f"killed {plan}, and the launch ended as if all were done: {undone[:8]}")
        if processes.wait_gone(below, ORPHANS_S) is None:
            raise self._failed(f"killed {plan}, the launch ended and left processes: {below}")
        return time.monotonic() - begun

    def _end(self) -> None:
        for pid, _ in processes.descendants(self._process.pid):
            os.kill(pid, 9)
        self._process.kill()
        self._process.wait()

    def _require_healthy(self, words: tuple[str, ...] = UNHEALTHY) -> None:
        # torchrun reports the death of a rank with a traceback of its own.
        super()._require_healthy(words if self._spec.processes == 1 else words[1:])
