"""The parent's end of a decode worker: start it, ask it, and end it when it crashes, hangs or talks nonsense."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import BinaryIO

import finetune
from finetune.datasets.media.limits import DECODE_TIMEOUT_S, MAX_MESSAGE, START_TIMEOUT_S, probe_timeout_s
from finetune.datasets.media.wire import (
    Answer,
    BugError,
    GarbageError,
    ProbeRequest,
    Request,
    read_answer,
    receive,
    write_request,
)
from finetune.errors import DataError, raise_if_killed

WORKER_MODULE = "finetune.datasets.media.worker"

_PIPE_BYTES = 2**20
"""Of the pipe that pixels come through: sixteen times the usual, and as many fewer turns between two processes."""

_FAILURES = (EOFError, OSError, ValueError, GarbageError)  # ValueError: the pipe was closed by `stop`


class Child:
    """One worker process, started at its first request and again after a death. Used by one thread at a time.

    Args:
        timeout_s: for one clip or image, and the most for a header.
    """

    def __init__(self, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._numbers = count(1)
        self._stopped = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process that runs, if one does."""
        return None if self._process is None else self._process.pid

    def ask(self, request: Request) -> Answer:
        """Send a request and wait: the result, or a DataError that names the file.

        A worker that a signal ends is replaced and asked once more, which shows whether it was the file.

        Raises:
            KilledError: if both were ended from outside: that says nothing about the file, which must not be left out.
            RuntimeError: for a bug in the worker, or a worker that cannot be started.
        """
        for last in (False, True):
            if (answer := self._attempt(request, last=last)) is not None:
                break
        assert answer is not None  # the last attempt has one
        return answer

    def _attempt(self, request: Request, *, last: bool) -> Answer | None:
        """The answer; None if a signal ended the worker and this is not the last attempt."""
        process = self._process
        if process is None or process.poll() is not None:  # one that died while idle is no file's fault
            process = self._start()
        number = next(self._numbers)
        limit_s = self._limit_s(request)
        with _killed_after(limit_s, process) as timed_out:
            try:
                reader, writer = _pipes(process)
                write_request(writer, request, number)
                return read_answer(reader, request, number)
            except BugError as bug:
                raise RuntimeError(f"a decode worker failed at {request.path}:\n{bug}") from None
            except _FAILURES as error:
                code = self._end(process, error)
                signalled = not timed_out.is_set() and code is not None and code < 0
                if signalled and not last:
                    return None
                if signalled:
                    raise_if_killed(code, "a decode worker", where=str(request.path))
                how = f"took longer than {limit_s:g} s" if timed_out.is_set() else _how(error, code)
        return DataError(
            f"the decoder {how} on this file",
            where=str(request.path),
            fix="the file is probably damaged, or memory ran out: re-encode it, or leave it out",
        )

    def stop(self) -> None:
        """End the process; a thread that waits for its answer gets an error."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._complaints.close()

    def _limit_s(self, request: Request) -> float:
        if not isinstance(request, ProbeRequest):
            return self._timeout_s
        with suppress(OSError, ValueError):
            return min(self._timeout_s, probe_timeout_s(request.path.stat().st_size))
        return min(self._timeout_s, probe_timeout_s(0))

    def _end(self, process: subprocess.Popen[bytes], error: Exception) -> int | None:
        """Kill a process that failed; the code it ended with by itself, None if it was still running."""
        self._process = None
        if not isinstance(error, GarbageError):
            with suppress(subprocess.TimeoutExpired):
                return process.wait(0.5)  # the pipe breaks a moment before the process is gone
        process.kill()
        process.wait()
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        # A plain child with pipes, not `multiprocessing`: that would import the main script again in every worker (with
        # it torch and diffusers), need a main guard in scripts, and leave shared memory behind after a crash.
        root = str(Path(finetune.__path__[0]).parent)
        inherited = os.environ.get("PYTHONPATH")
        with self._lock:
            if self._stopped:
                raise RuntimeError("the decode pool is closed")
            self._complaints.seek(0)
            self._complaints.truncate()
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", WORKER_MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={
                    **os.environ,
                    "PYTHONPATH": root + (os.pathsep + inherited if inherited else ""),
                    "OPENBLAS_NUM_THREADS": "1",  # nothing here multiplies matrices, and a thread of it takes 40 MB
                },
                start_new_session=True,  # Ctrl-C in a terminal is for the main process, which finishes its step
            )
        with _killed_after(START_TIMEOUT_S, process) as timed_out:
            try:
                reader, _ = _pipes(process)
                _widen(reader.fileno())
                message, body = receive(reader, MAX_MESSAGE)
                if message != {"kind": "ready"} or body:
                    raise GarbageError("it did not say that it is ready")
            except _FAILURES as error:
                code = self._end(process, error)
                if not timed_out.is_set() and not self._stopped:
                    raise_if_killed(code, "a decode worker", when="when it started")
                how = f"took longer than {START_TIMEOUT_S:g} s" if timed_out.is_set() else _how(error, code)
                self._complaints.seek(0)
                tail = self._complaints.read()[-2000:].decode(errors="replace")
                raise RuntimeError(f"a decode worker {how} when it started:\n{tail}") from None
        return process


@contextmanager
def _killed_after(seconds: float, process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Kill the process unless the block ends in time; the event says whether it was."""
    timed_out = threading.Event()

    def give_up() -> None:
        timed_out.set()
        process.kill()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield timed_out
    finally:
        timer.cancel()
        timer.join()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    if process.stdin is None or process.stdout is None:
        raise OSError("a decode worker has no pipes")
    return process.stdout, process.stdin  # type: ignore[return-value]


def _widen(pipe: int) -> None:
    with suppress(ImportError, AttributeError, OSError):  # Linux only, and up to the system's limit
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _how(error: Exception, code: int | None) -> str:
    """What became of a worker, in words that follow "the decoder"."""
    if isinstance(error, GarbageError):
        return f"answered with nonsense ({error})"
    if code is None:
        return "stopped answering"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return "ended without an answer" if code == 0 else f"crashed (exit code {code})"
