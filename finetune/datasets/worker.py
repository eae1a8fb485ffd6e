"""A child process that reads files of strangers, under limits on memory and time.

A damaged or hostile file can crash a library in C, and with it the process; a few of its bytes can unfold to more than
a machine has. In a worker that ends the worker: its file gets an error, and the next file a new process.

A worker is a plain child with pipes: ``multiprocessing`` would import the user's main script again in every worker, and
read pickles. A request is one line of JSON; an answer is one line of JSON, then bytes, at most as many as the request
allows.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from finetune.core.errors import DataError, raise_if_killed

MEMORY_BYTES = 4 * 2**30
"""That a worker may allocate, beside twice the answer it was asked for. Ten 8K frames of 10 bits, as many as a decoder
keeps for reference, are 1 GiB, and at 4:4:4 two; and a limit on memory has to hold for four workers on one machine."""

LOG_BYTES = 2**20
"""That a worker may write to a file. It writes none; libraries complain on its standard error, which is one."""

OPEN_FILES = 64
"""Of a worker: its pipes, one video, and what importing a library takes."""

START_TIMEOUT_S = 120.0
"""For a worker to start. It imports NumPy and Pillow, which takes a minute from a slow network disk."""

LINE_BYTES = 2**20
"""Of a line of JSON: 4096 frame numbers and file names, or a traceback."""

Handler = Callable[[dict[str, Any]], tuple[Mapping[str, Any], Sequence[Any]]]
"""Answers a request: fields, and buffers that are sent one after another as the body."""


def too_much_memory(where: str) -> DataError:
    """The error of a file for which an allocation failed."""
    return DataError(
        f"reading the file takes more memory than a worker is given ({MEMORY_BYTES / 2**30:g} GiB)",
        where=where,
        fix="scale it down or re-encode it, or leave it out",
    )


# --- the child --------------------------------------------------------------------------------------------------------


def serve(handler: Handler, file_bytes: int = LOG_BYTES) -> None:
    """Answer requests from standard input until it ends, so that a worker does not outlive its parent.

    Args:
        handler: may raise DataError, which is an answer too. Other errors are bugs, which the parent raises.
        file_bytes: that it may write to one file.
    """
    limit_process(file_bytes)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C libraries print; a stray line must not land between two answers
    _write(answers, _READY)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _limit_memory(2 * request["most_bytes"])
        body: Sequence[memoryview] = ()
        try:
            fields, buffers = handler(request["fields"])
            body = [memoryview(buffer).cast("B") for buffer in buffers]
            answer = {"fields": fields, "length": sum(map(len, body))}
        except DataError as error:
            answer = {"error": _texts(error)}
        except MemoryError:
            answer = {"error": _texts(too_much_memory(request["fields"]["path"]))}
        except Exception:
            answer = {"bug": traceback.format_exc()[-4000:]}
        try:
            _write(answers, answer, body)
        except BrokenPipeError:  # the main process is gone
            return


def _texts(error: DataError) -> list[str]:
    return [text[:1000] for text in (error.what, error.where, error.fix)]


def limit_process(file_bytes: int = LOG_BYTES) -> None:
    """Put this process under a worker's limits. On Linux in full; on other systems what there is."""
    import resource

    with suppress(OSError):  # Linux only. If the machine runs out of memory, a worker goes and not the training
        Path("/proc/self/oom_score_adj").write_text("1000")
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, file_bytes)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit_memory(0)


def _limit_memory(more: int) -> None:
    import resource

    # Not RLIMIT_AS: libraries map files and reserve addresses that they never touch. On Linux RLIMIT_DATA counts
    # what is private and writable, however it was allocated.
    _limit(resource.RLIMIT_DATA, MEMORY_BYTES + more)


def _limit(kind: int, most: int) -> None:
    import resource

    hard = resource.getrlimit(kind)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


# --- messages ---------------------------------------------------------------------------------------------------------


_READY = {"fields": {}, "length": 0}
"""The first answer of a worker, to no request."""


class MalformedAnswerError(Exception):
    """What a worker sent is no answer to what it was asked."""


def _write(stream: IO[bytes], message: Mapping[str, Any], body: Sequence[memoryview] = ()) -> None:
    # In ASCII, with escapes: a file name need not be valid Unicode.
    stream.write(json.dumps(message, default=os.fspath).encode("ascii") + b"\n")
    for buffer in body:
        stream.write(buffer)
    stream.flush()


def _read_answer(stream: IO[bytes], most_bytes: int) -> tuple[dict[str, Any], bytearray]:
    """Fields and body. Raises the DataError that a worker answers, and RuntimeError for a bug in it."""
    line = stream.readline(LINE_BYTES)
    if not line.endswith(b"\n") and len(line) < LINE_BYTES:
        raise EOFError
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswerError(f"no JSON: {error}") from None
    if not isinstance(message, dict):
        raise MalformedAnswerError("no JSON object")
    if "bug" in message:
        raise RuntimeError(message["bug"])
    if "error" in message:
        try:
            what, where, fix = map(str, message["error"])
        except (TypeError, ValueError):
            raise MalformedAnswerError("an error is three texts") from None
        raise DataError(what, where=where, fix=fix)
    fields, length = message.get("fields"), message.get("length")
    if not isinstance(fields, dict) or not isinstance(length, int) or not 0 <= length <= most_bytes:
        raise MalformedAnswerError(f"{message!r:.60}")
    body = bytearray(length)
    if stream.readinto(body) != length:  # type: ignore[attr-defined]  # of a BufferedReader: all of it, or the end
        raise EOFError
    return fields, body


# --- the parent -------------------------------------------------------------------------------------------------------


class _WorkerFailure(Exception):  # noqa: N818 - an outcome, of which ``Worker.ask`` makes an error
    """A worker did not answer: how, in words, and the code that it ended with by itself."""

    def __init__(self, how: str, code: int | None) -> None:
        super().__init__(how)
        self.code = code


class Worker:
    """One worker process, started at its first request and again after a death. Used by one thread at a time.

    Args:
        name: what it is, for messages, such as ``decoder``.
        program: what it runs: Python that calls ``serve``.
    """

    def __init__(self, name: str, program: str) -> None:
        self._name = name
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._closed = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process that runs, if one does."""
        return None if self._process is None else self._process.pid

    def ask(
        self, path: Path, fields: Mapping[str, Any], *, most_bytes: int, timeout_s: float
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request about a file and wait for the answer: its fields and its body.

        A worker that a signal ends is replaced and asked once more, which shows whether it was the file.

        Args:
            path: the file; a field of the request as well.
            fields: the rest of the request, as JSON has it.
            most_bytes: of the body.
            timeout_s: after which the worker is killed.

        Raises:
            DataError: the worker's own; and if it crashes, takes too long or answers nonsense.
            KilledError: if it was ended from outside, twice: that says nothing about the file, which must not be left
                out.
            RuntimeError: for a bug in the worker, or a worker that cannot be started.
        """
        request = {"fields": {**fields, "path": path}, "most_bytes": most_bytes}
        try:
            try:
                return self._answer(request, timeout_s)
            except _WorkerFailure as failure:
                if failure.code is None or failure.code >= 0:
                    raise
            return self._answer(request, timeout_s)
        except _WorkerFailure as failure:
            raise_if_killed(failure.code, f"a {self._name}", where=str(path))
            raise DataError(
                f"the {self._name} {failure} on this file",
                where=str(path),
                fix="the file is probably damaged, or memory ran out: re-encode it, or leave it out",
            ) from None

    def close(self) -> None:
        """End the process; a thread that waits for its answer gets an error."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._log.close()

    def _answer(self, request: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], bytearray]:
        if self._process is None or self._process.poll() is not None:  # one that died while idle is no file's fault
            self._start()
        try:
            return self._exchange(request, timeout_s)
        except RuntimeError as bug:
            raise RuntimeError(f"a {self._name} failed at {request['fields']['path']}:\n{bug}") from None

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the {self._name} is closed")
            self._log.seek(0)
            self._log.truncate()
            self._process = subprocess.Popen(
                # -P: the working folder may be a dataset's, and must not be where modules are looked for.
                [sys.executable, "-P", "-c", self._program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
                    "OPENBLAS_NUM_THREADS": "1",  # nothing here multiplies matrices, and a thread of it takes 40 MB
                },
                start_new_session=True,  # Ctrl-C in a terminal is for the main process, which finishes its step
            )

        try:
            self._exchange(None, START_TIMEOUT_S)
        except _WorkerFailure as failure:
            if self._closed:
                raise RuntimeError(f"the {self._name} is closed") from None
            raise_if_killed(failure.code, f"a {self._name}", when="when it started")
            self._log.seek(0)
            log = self._log.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"a {self._name} {failure} when it started:\n{log}") from None

    def _exchange(self, request: Mapping[str, Any] | None, timeout_s: float) -> tuple[dict[str, Any], bytearray]:
        """Send a request, if the process is ready for one, and read the answer; a process that gives none is killed."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout_s
        timer = threading.Timer(timeout_s, process.kill)
        timer.daemon = True
        timer.start()
        try:
            if request is not None:
                _write(process.stdin, request)
            return _read_answer(process.stdout, request["most_bytes"] if request else 0)
        except (MalformedAnswerError, EOFError, OSError, ValueError) as error:  # ValueError: `close` closed the pipe
            timed_out = time.monotonic() >= deadline
            if not isinstance(error, MalformedAnswerError):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)  # the pipe breaks a moment before the process is gone
            code = None if timed_out else process.poll()
            process.kill()
            process.wait()
            self._process = None
            how = f"took longer than {timeout_s:g} s" if timed_out else _how(error, code)
            raise _WorkerFailure(how, code) from None
        except MemoryError:  # of this process; what is left of the answer must not be taken for the next one
            process.kill()
            process.wait()
            self._process = None
            raise
        finally:
            timer.cancel()
            timer.join()


def _how(error: Exception, code: int | None) -> str:
    """What became of a worker, in words that follow its name."""
    if isinstance(error, MalformedAnswerError):
        return f"answered with nonsense ({error})"
    if code is None:
        return "stopped answering"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return "ended without an answer" if code == 0 else f"crashed (exit code {code})"
