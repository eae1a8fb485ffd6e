"""Several processes of one launch, started as ``srun`` does it: RANK, WORLD_SIZE and MASTER_ADDR, and no agent above.

They are forked from a process that has imported everything, so that a launch costs a second instead of ten. The same
file is that process: it reads one job per line and answers with one line.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from waiting import HANG_S

HERE = Path(__file__).parent
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OFFLOAD = FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}


def written(values: Mapping[str, Any]) -> Path:
    """A run's configuration as a file beside its folder."""
    path = Path(values["output_dir"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values)))
    return path


def changed(values: Mapping[str, Any], **train: Any) -> dict[str, Any]:
    """The same run with another ``train`` section."""
    return {**values, "train": {**values["train"], **train}}


def checkpoint(values: Mapping[str, Any], step: int = 4) -> Path:
    """Where a run's checkpoint of ``step`` stands."""
    return Path(values["output_dir"]) / "checkpoints" / f"step-{step:08d}"


def state(values: Mapping[str, Any], step: int = 4) -> dict[str, Tensor]:
    """All tensors of a run's checkpoint."""
    from finetune.checkpoint.load import load_checkpoint

    loaded = load_checkpoint(checkpoint(values, step))
    parts = {"trainable": loaded.trainable, "optimizer": loaded.optimizer[0], "ema": loaded.ema or {}}
    return {f"{part} {name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], rtol: float = 1e-6) -> None:
    """The same names, and numbers that differ by rounding."""
    assert ours.keys() == theirs.keys() and ours
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=1e-6, msg=name)


@dataclass(frozen=True)
class Ended:
    """How one process of a job ended."""

    code: int
    """Negative for a signal; 124 if it had to be killed for taking too long."""
    log: str


class Launcher:
    """Runs jobs, one at a time.

    Args:
        folder: for logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._jobs = 0
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self,
        work: str,
        *arguments: Any,
        ranks: int = 2,
        env: Mapping[str, str] | None = None,
        timeout_s: float = HANG_S,
    ) -> list[Ended]:
        """Call ``work`` (``module:function``) with JSON ``arguments`` in ``ranks`` processes; how each ended."""
        self._jobs += 1
        logs = [str(self._folder / f"job{self._jobs}-rank{rank}.log") for rank in range(ranks)]
        job = {"work": work, "arguments": arguments, "env": dict(env or {}), "logs": logs, "timeout_s": timeout_s}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        ends = json.loads(self._process.stdout.readline())
        return [Ended(code, Path(log).read_text(errors="replace")) for code, log in zip(ends, logs, strict=True)]

    def train(self, run_yaml: Path, **options: Any) -> list[Ended]:
        """``finetune train`` in every process; all must succeed.

        A thread of gloo (``pt_gloo_runloop``) was once seen to crash in libc. As after any crash the same command
        continues, and it has to.
        """
        ends = self.run("launcher_cases:command", "train", "--config", str(run_yaml), **options)
        if -signal.SIGSEGV in [end.code for end in ends]:
            logs = "\n".join(f"{end.code}: {end.log[-3000:]}" for end in ends)
            warnings.warn(f"a process crashed; once more.\n{logs}", stacklevel=2)
            ends = self.run("launcher_cases:command", "train", "--config", str(run_yaml), **options)
        logs = "\n".join(f"{end.code}: {end.log[-3000:]}" for end in ends)
        assert [end.code for end in ends] == [0] * len(ends), logs
        return ends

    def close(self) -> None:
        """End the process that forks."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(HANG_S)


def _serve() -> None:
    from soak import processes

    processes.preload()
    for name in ("torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.checkpoint.hf_storage"):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_do(json.loads(line), processes)) + "\n")
        answers.flush()


def _do(job: dict[str, Any], processes: Any) -> list[int]:
    module, _, function = job["work"].partition(":")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def work() -> int | None:
        code: int | None = getattr(importlib.import_module(module), function)(*job["arguments"])
        return code

    world = len(job["logs"])
    running = {}
    for rank, log in enumerate(job["logs"]):
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        place = {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in launch.items()}
        running[processes.fork(work, Path(log), job["env"] | (place if world > 1 else {}))] = rank
    ends, end = [124] * world, time.monotonic() + job["timeout_s"]
    while running and time.monotonic() < end:
        for pid, rank in list(running.items()):
            if (code := processes.ended(pid)) is not None:
                ends[rank] = code
                del running[pid]
        time.sleep(0.01)
    for pid in running:
        processes.kill(pid)
    return ends


if __name__ == "__main__":
    _serve()
