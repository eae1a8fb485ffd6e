"""One command, run by one or several forked processes, of which one may be killed at a planned moment."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from soak import nursery
from soak.probe import Board, Plan, Probe, Profile
from soak.sabotage import SABOTAGE

RUN_S = 120.0
"""No undisturbed command takes nearly as long."""
BOUND_S = 60.0
"""Within this, the other processes of a job have to end when one was killed."""
ORPHANS_S = 10.0
"""Within this, the decode workers of a killed process have to end."""
UNHEALTHY = ("Traceback", "is damaged", ".damaged", "This is a bug")
"""Words that no log of a command may hold, killed or not: a kill damages nothing, and a peer's death is not a bug."""


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


class Job:
    """Processes of one launch, as ``torchrun`` would start them, but without an agent that watches over them.

    Args:
        command: words of the command line.
        root: folder that the command works in.
        processes: how many.
        env: further environment.
        sabotage: a name of ``SABOTAGE`` to install in every process; None for none.
        plan: when one of them stops to be killed; None for never.
        victim: the rank of that one.
    """

    def __init__(
        self,
        command: list[str],
        root: Path,
        *,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        sabotage: str | None = None,
        plan: Plan | None = None,
        victim: int = 0,
    ) -> None:
        self._folder = root.parent
        self._plan, self._victim = plan, victim
        self._boards = [Board() for _ in range(processes)]
        self._logs = [self._folder / f"process-{rank}.log" for rank in range(processes)]
        self._pids: list[int] = []
        port = _free_port() if processes > 1 else 0
        for rank, board in enumerate(self._boards):
            self._logs[rank].unlink(missing_ok=True)
            probe = Probe(board, root, plan if rank == victim else None)
            places = _launch_environment(rank, processes, port) if processes > 1 else {}
            work = _working(command, probe, sabotage, self._folder / f"profile-{rank}")
            self._pids.append(nursery.fork(work, self._logs[rank], {**places, **(env or {})}))

    def finish(self) -> list[Profile]:
        """Wait for a job that nobody disturbs: every process must succeed and say nothing of damage.

        Raises:
            Failed: if not.
        """
        for rank, pid in enumerate(self._pids):
            try:
                code = nursery.wait(pid, RUN_S)
            except TimeoutError as error:
                raise self._failed(f"process {rank}: {error}") from None
            if code:
                raise self._failed(f"process {rank} ended with exit code {code}")
        self._healthy()
        return [pickle.loads((self._folder / f"profile-{rank}").read_bytes()) for rank in range(len(self._pids))]

    def kill(self, complete: Callable[[], bool]) -> Killed | None:
        """Kill the victim at the planned moment; None if it had ended well before.

        Args:
            complete: whether the command has done all it had to; other processes may then end well.

        Raises:
            Failed: if a process fails by itself, the others do not end in time or end well without being done, or
                something is left running.
        """
        plan = self._plan
        if plan is None:
            raise ValueError("this job has no plan")
        pid, board = self._pids[self._victim], self._boards[self._victim]
        begun = time.monotonic()
        while not board.reached and not (plan.at == "time" and time.monotonic() - begun >= plan.seconds):
            if (code := nursery.ended(pid)) is not None:
                if code:
                    raise self._failed(f"started to be killed {plan}, it failed by itself with exit code {code}")
                for other in self._others():
                    if code := nursery.wait(other, BOUND_S):
                        raise self._failed(f"another process failed by itself with exit code {code}")
                self._healthy()
                return None
            if time.monotonic() - begun > RUN_S:
                nursery.kill(pid)
                raise self._failed(f"still running after {RUN_S:g} s, started to be killed {plan}")
            time.sleep(0.0005)
        if plan.at != "time":
            time.sleep(plan.seconds)
        family = nursery.descendants(pid)
        phase = board.phase
        nursery.kill(pid)
        others_s = self._await_others(plan, complete)
        orphans_s = nursery.wait_gone(family, ORPHANS_S)
        if orphans_s is None:
            raise self._failed(f"killed {plan}, it left processes that still run after {ORPHANS_S:g} s: {family}")
        self._healthy()
        note = board.note.replace(str(self._folder / "work"), "") if plan.side else ""
        return Killed(phase, note, len(family), orphans_s, others_s)

    def _others(self) -> list[int]:
        return [pid for rank, pid in enumerate(self._pids) if rank != self._victim]

    def _await_others(self, plan: Plan, complete: Callable[[], bool]) -> float | None:
        begun = time.monotonic()
        for other in self._others():
            try:
                code = nursery.wait(other, BOUND_S)
            except TimeoutError:
                raise self._failed(f"killed {plan}, and another process hung for {BOUND_S:g} s") from None
            if code == 0 and not complete():
                raise self._failed(f"killed {plan}, and another process ended as if all were done")
        return time.monotonic() - begun if self._others() else None

    def _healthy(self) -> None:
        said = self._said()
        if bad := [word for word in UNHEALTHY if word in said]:
            raise self._failed(f"the log speaks of {bad}")

    def _failed(self, what: str) -> Failed:
        return Failed(f"{what}\n{self._said()[-3000:]}")

    def _said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self._logs if log.exists())


def _working(command: list[str], probe: Probe, sabotage: str | None, profile: Path) -> Callable[[], int]:
    def work() -> int:
        from finetune.cli import main as cli

        probe.install()
        if sabotage is not None:
            SABOTAGE[sabotage]()
        code = cli.main(command)
        profile.write_bytes(pickle.dumps(probe.profile))
        return code

    return work


def _launch_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def _free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        port: int = asked.getsockname()[1]
        return port
