"""The commands that users type, each in an interpreter of its own, killed from outside; nothing inside them is wrapped.

Where such a process is can only be told from what it has written, so kills are planned by the clock, or for the moment
at which a file appears.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import finetune
from soak import nursery
from soak.job import BOUND_S, ORPHANS_S, UNHEALTHY, Failed, Killed
from soak.probe import Plan, Profile

ROOT = Path(finetune.__file__).parent.parent
RUN_S = 300.0
"""A start alone imports for ten seconds of one core."""
SIGHTS: Mapping[str, tuple[str, ...]] = {
    "precompute": ("cache/manifests/*.json", "cache/latents/*/*", "cache/prompts/*/*", "cache/*/*/*.partial"),
    "train": ("run/checkpoints/*.partial", "run/checkpoints/step-*", "run/heldout.jsonl*", "run/config.yaml*"),
}
"""What a kill may wait for: something matching that was not there when the command began."""
_TRAIN = (str(ROOT / "train.py"),)
_OTHER = ("-m", "finetune")


class Command:
    """``python train.py`` or ``python -m finetune``, or two of them under ``torchrun``. Like ``Job``."""

    def __init__(
        self,
        command: list[str],
        root: Path,
        *,
        processes: int = 1,
        env: Mapping[str, str] | None = None,
        plan: Plan | None = None,
        victim: int = 0,
    ) -> None:
        self._root, self._plan, self._victim, self._processes = root, plan, victim, processes
        self._verb = command[0]
        self._log = root.parent / "command.log"
        program = [*_TRAIN, *command[1:]] if self._verb == "train" else [*_OTHER, *command]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--max-restarts=0"]
        # torchrun runs a script, or a module that it is told to with its own -m: the words are the same.
        words = [sys.executable, *(torchrun if processes > 1 else []), *program]
        self._seen, self._leftovers = self._matches(), set(root.rglob("*.partial"))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words,
                cwd=root,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "ACCELERATE_USE_CPU": "true",
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> list[Profile]:
        """Wait for a command that nobody disturbs. Raises Failed if it fails, hangs or speaks of damage."""
        try:
            code = self._process.wait(RUN_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise self._failed(f"still running after {RUN_S:g} s") from None
        if code:
            raise self._failed(f"exit code {code}")
        self._healthy()
        return [Profile()] * self._processes

    def kill(self, complete: Callable[[], bool]) -> Killed | None:
        """Kill the process, or one rank of the launch, at the planned moment; see ``Job.kill``."""
        if self._plan is None:
            raise ValueError("this command has no plan")
        plan, begun = self._plan, time.monotonic()
        while not self._is_time(plan, time.monotonic() - begun):
            if self._process.poll() is not None:
                self.finish()
                return None
            if time.monotonic() - begun > RUN_S:
                self._end()
                raise self._failed(f"still running after {RUN_S:g} s, started to be killed {plan}")
            time.sleep(0.001)
        if plan.at != "time":
            time.sleep(plan.seconds)
        victim = self._process.pid if self._processes == 1 else self._rank()
        if victim is None:
            self.finish()
            return None
        family = nursery.descendants(victim)
        phase = self._phase()
        os.kill(victim, 9)
        others_s = self._await_launcher(plan, complete)
        orphans_s = nursery.wait_gone(family, ORPHANS_S)
        if orphans_s is None:
            raise self._failed(f"killed {plan}, it left processes that still run after {ORPHANS_S:g} s: {family}")
        self._healthy()
        return Killed(phase, "", len(family), orphans_s, others_s)

    def _is_time(self, plan: Plan, passed_s: float) -> bool:
        if self._processes > 1 and self._rank() is None:
            return False
        return passed_s >= plan.seconds if plan.at == "time" else bool(self._matches() - self._seen)

    def _matches(self) -> set[Path]:
        return set() if self._plan is None or self._plan.at == "time" else set(self._root.glob(self._plan.at))

    def _rank(self) -> int | None:
        """Pid of the rank that is to be killed, once the launcher has started it."""
        for pid, _ in nursery.descendants(self._process.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"RANK={self._victim}".encode() in variables:
                return pid
        return None

    def _await_launcher(self, plan: Plan, complete: Callable[[], bool]) -> float | None:
        begun = time.monotonic()
        family = nursery.descendants(self._process.pid)
        try:
            code = self._process.wait(BOUND_S)
        except subprocess.TimeoutExpired:
            self._end()
            raise self._failed(f"killed {plan}, and the launch hung for {BOUND_S:g} s") from None
        if self._processes == 1:
            return None
        if code == 0 and not complete():
            raise self._failed(f"killed {plan}, and the launch ended as if all were done")
        if nursery.wait_gone(family, ORPHANS_S) is None:
            raise self._failed(f"killed {plan}, the launch ended and left processes: {family}")
        return time.monotonic() - begun

    def _phase(self) -> str:
        """Where the command is, as far as its files tell."""
        if not self._log.stat().st_size:
            return "starting"
        if set(self._root.rglob("*.partial")) - self._leftovers:
            return "writing"
        if self._verb == "precompute":
            return "encoding" if any(self._root.glob("cache/manifests/*")) else "planning"
        return "training" if any(self._root.glob("run/checkpoints/step-*")) else "before the first checkpoint"

    def _end(self) -> None:
        for pid, _ in nursery.descendants(self._process.pid):
            os.kill(pid, 9)
        self._process.kill()
        self._process.wait()

    def _healthy(self) -> None:
        said = self._log.read_text(errors="replace")
        # torchrun reports the death of a rank with a traceback of its own.
        words = UNHEALTHY if self._processes == 1 else UNHEALTHY[1:]
        if bad := [word for word in words if word in said]:
            raise self._failed(f"the log speaks of {bad}")

    def _failed(self, what: str) -> Failed:
        return Failed(f"{what}\n{self._log.read_text(errors='replace')[-3000:]}")
