"""Media files in, pixels out: headers, frames and images as the package's types, decoded here or in worker processes.

A damaged or hostile file can crash a decoding library, and with it the process. ``DecodePool`` therefore decodes in
processes of its own: a worker that dies is that file's ``DataError``, and the run goes on with a new worker.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import finetune
from finetune.datasets.media.frames import fit, probe_file, read_clip, read_image
from finetune.errors import DataError
from finetune.geometry import resize_and_crop
from finetune.types import Bucket, Clip, ClipPlan, VideoProbe

PIXEL_RULE = "pillow-bicubic-1"
"""Names the arithmetic from a decoded frame to pixels. Part of a cache address: another rule re-encodes."""

_Item = TypeVar("_Item")
_WORKER_MODULE = "finetune.datasets.media.worker"


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode; ``key`` is the caller's own and is handed back with the result."""

    key: int
    path: Path
    probe: VideoProbe
    plan: ClipPlan


def probe(path: Path) -> VideoProbe:
    """Read a video's header, the time of every frame, and its first frame, in this process.

    Raises:
        DataError: if the file is missing, empty, cut off, without video, larger than is read, or not decodable.
    """
    return probe_file(path)


def decode(path: Path, probe: VideoProbe, plan: ClipPlan) -> Clip:
    """Decode, turn, resize and crop one planned clip, in this process.

    Raises:
        DataError: if a planned frame cannot be decoded, or the file is not the one that was probed.
    """
    return _clip(read_clip(*_decode_arguments(path, probe, plan)))


def load_image(path: Path) -> Tensor:
    """Load a still image: uint8 RGB [3, H, W], upright (EXIF), transparency on black, 16-bit grey scaled to 8.

    Raises:
        DataError: if the file is not an image, is damaged or too large.
    """
    return torch.from_numpy(np.ascontiguousarray(read_image(path).transpose(2, 0, 1)))


def fit_image(image: Tensor, bucket: Bucket) -> Tensor:
    """Resize an image to cover a bucket and crop its centre, by the rule and filter that frames get.

    Args:
        image: uint8 RGB [3, H, W].
        bucket: its height and width are filled.

    Returns:
        uint8 RGB [3, bucket.height, bucket.width].
    """
    resize_hw, crop_yx = resize_and_crop((image.shape[1], image.shape[2]), bucket)
    fitted = fit(image.permute(1, 2, 0).numpy(), resize_hw, crop_yx, (bucket.height, bucket.width))
    return torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))


class DecodePool:
    """Decode worker processes; a context manager.

    Args:
        workers: processes; 0 decodes in this one, where a crashing decoder is not survived.
        in_flight: clips that are decoded ahead of the consumer or being decoded; twice ``workers`` if left out. One
            clip of 49x480x720 is 51 MB.
        timeout_s: a file that takes longer is given up.
    """

    def __init__(self, workers: int = 2, *, in_flight: int | None = None, timeout_s: float = 600.0) -> None:
        if workers < 0 or (in_flight is not None and in_flight < 1) or not timeout_s > 0:
            raise ValueError(f"workers >= 0, in_flight >= 1, timeout_s > 0; got {workers}, {in_flight}, {timeout_s}")
        self._in_flight = in_flight or max(1, 2 * workers)
        self._workers = [_Worker(timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def probe_many(self, paths: Iterable[Path]) -> Iterator[tuple[Path, VideoProbe | DataError]]:
        """Probe every path, in the order given; an unusable file gives its error and the next ones go on."""
        yield from self._ordered((path, ("probe", path)) for path in paths)

    def decode_many(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Clip | DataError]]:
        """Decode every job, in the order given, at most ``in_flight`` clips ahead of the consumer."""
        requests = ((job, ("decode", *_decode_arguments(job.path, job.probe, job.plan))) for job in jobs)
        for job, answer in self._ordered(requests):
            yield job, answer if isinstance(answer, DataError) else _clip(answer)

    def close(self) -> None:
        """Stop the workers and wait for them; may be called again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.stop()
            self._threads.shutdown(wait=True)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ordered(self, requests: Iterable[tuple[_Item, tuple[Any, ...]]]) -> Iterator[tuple[_Item, Any]]:
        if self._threads is None:
            for item, request in requests:
                yield item, _answer_here(request)
            return
        pending: deque[tuple[_Item, Future[Any]]] = deque()
        try:
            for item, request in requests:
                pending.append((item, self._threads.submit(self._answer, request)))
                if len(pending) >= self._in_flight:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def _answer(self, request: tuple[Any, ...]) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


class _Worker:
    """One worker process, started at its first request and again after a death. Used by one thread at a time."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        self._stopped = False
        self._lock = threading.Lock()

    def ask(self, request: tuple[Any, ...]) -> Any:
        """Send a request and wait: the result, or a DataError that names the file."""
        process = self._process
        if process is None or process.poll() is not None:  # one that died while idle is no file's fault
            process = self._start()
        timed_out = threading.Event()

        def give_up() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(self._timeout_s, give_up)
        timer.start()
        try:
            kind, value = _exchange(process, request)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process = None
            process.kill()
            code = process.wait()
            reason = f"took longer than {self._timeout_s:g} s" if timed_out.is_set() else f"crashed ({_cause(code)})"
            return DataError(
                f"the decoder {reason} on this file",
                where=str(request[1]),
                fix="the file is probably damaged, or memory ran out: re-encode it, or leave it out",
            )
        finally:
            timer.cancel()
            timer.join()
        if kind == "bug":
            raise RuntimeError(f"a decode worker failed at {request[1]}:\n{value}")
        return value

    def stop(self) -> None:
        """End the process; a thread that waits for its answer gets an error."""
        with self._lock:
            self._stopped = True
            process = self._process
        if process is not None:
            process.kill()
            process.wait()
        self._complaints.close()

    def _start(self) -> subprocess.Popen[bytes]:
        # A plain child with pipes, not `multiprocessing`: that would import the main script again in every worker (with
        # it torch and diffusers), need a main guard in scripts, and leave shared memory behind after a crash.
        root = str(Path(finetune.__path__[0]).parent)
        inherited = os.environ.get("PYTHONPATH")
        with self._lock:
            if self._stopped:
                raise RuntimeError("the decode pool is closed")
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER_MODULE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env={**os.environ, "PYTHONPATH": root + (os.pathsep + inherited if inherited else "")},
                start_new_session=True,  # Ctrl-C in a terminal is for the main process, which finishes its step
            )
        try:
            _exchange(process, None)
        except (EOFError, OSError, pickle.UnpicklingError):
            self._process = None
            code = process.wait()
            self._complaints.seek(0)
            tail = self._complaints.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"a decode worker did not start ({_cause(code)}):\n{tail}") from None
        return process


def _exchange(process: subprocess.Popen[bytes], request: tuple[Any, ...] | None) -> tuple[str, Any]:
    """Send a request (None: nothing) and read one answer of ``media.worker``."""
    if process.stdin is None or process.stdout is None:
        raise OSError("a decode worker has no pipes")
    if request is not None:
        pickle.dump(request, process.stdin, protocol=5)
        process.stdin.flush()
    kind, value = pickle.load(process.stdout)
    return kind, value


def _cause(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _answer_here(request: tuple[Any, ...]) -> Any:
    task, *arguments = request
    try:
        return probe_file(*arguments) if task == "probe" else read_clip(*arguments)
    except DataError as error:
        return error


def _decode_arguments(path: Path, probe: VideoProbe, plan: ClipPlan) -> tuple[Path, VideoProbe, ClipPlan]:
    # The frame times are left out: a worker does not need them, and an hour of video has 100 000.
    return path, replace(probe, frame_times_s=()), plan


def _clip(pixels: Any) -> Clip:
    return Clip(torch.from_numpy(pixels))
