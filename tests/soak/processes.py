"""Processes that begin with everything imported: forked from one that has, so that a start costs milliseconds.

A forked child runs one function, usually ``finetune.cli.main.main``, and ends as a program would. The process that
forks must have a single thread and must not have computed anything.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo",
    "finetune.cli.main",
    "finetune.caching.precompute",
    "finetune.trainers.loop",
    "finetune.datasets.cache_admin",
    "finetune.conversion.export",
    "finetune.testing.tiny",
    "finetune.testing.demo",
    "safetensors.torch",
    "av",
    "accelerate",
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox",
    "diffusers.models.transformers.cogvideox_transformer_3d",
    "diffusers.pipelines.cogvideo.pipeline_cogvideox",
    "transformers.models.t5.modeling_t5",
    "transformers.models.t5.tokenization_t5",
    "peft",
    "bitsandbytes",
)


def preload() -> None:
    """Import all that a run imports, and check that a fork is safe."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    threads = len(list(Path("/proc/self/task").iterdir()))
    if threads != 1:
        raise RuntimeError(f"{threads} threads: a fork would copy one of them and the locks of all")
    gc.collect()
    gc.freeze()  # a child's first collection would otherwise copy every page


def fork(work: Callable[[], int | None], log: Path, env: Mapping[str, str] | None = None) -> int:
    """Run ``work`` in a child whose output goes to ``log``; its result is the exit code. Returns the child's pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env or {})
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = work() or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """A child's exit code (negative for a signal), or None while it runs; it must not be asked for again after that."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait(pid: int, timeout_s: float) -> int:
    """A child's exit code.

    Raises:
        TimeoutError: if it does not end in time; it is killed then.
    """
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if (code := ended(pid)) is not None:
            return code
        time.sleep(0.002)
    kill(pid)
    raise TimeoutError(f"process {pid} did not end within {timeout_s:g} s")


def kill(pid: int) -> None:
    """SIGKILL, and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


Process = tuple[int, str]
"""A pid and the start time of that process: pids are used again."""


def descendants(pid: int) -> list[Process]:
    """Every process below ``pid``."""
    parents: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents.setdefault(int(fields[1]), []).append((int(entry.name), fields[19]))
    found, queue = [], [pid]
    while queue:
        below = parents.get(queue.pop(), [])
        found += below
        queue += [child for child, _ in below]
    return found


def wait_gone(processes: list[Process], timeout_s: float) -> float | None:
    """Seconds until none of ``processes`` runs any more; None if one still does after ``timeout_s``."""
    begun = time.monotonic()
    while any(_runs(process) for process in processes):
        if time.monotonic() - begun > timeout_s:
            return None
        time.sleep(0.01)
    return time.monotonic() - begun


def _runs(process: Process) -> bool:
    fields = _stat(process[0])
    return bool(fields) and fields[19] == process[1] and fields[0] not in "ZX"


def _stat(pid: int) -> list[str]:
    """``/proc/PID/stat`` after the name, which may hold anything: state, parent, ..., start time at 19."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
