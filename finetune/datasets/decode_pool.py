"""What a decode worker and its parent say to each other: JSON and raw bytes, each announced and of limited length.

Not pickle: a worker reads strangers' files with libraries in C, and a pickle from a process that such a file has taken
over is a program that the parent would run. Here the parent knows beforehand how many pixels it asked for, and
whatever is not exactly an answer to its question is ``GarbageError``.

A message is a head of two lengths, then a JSON object, then a body of bytes: frame times (float64) or pixels (uint8).
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finetune.core.errors import DataError, raise_if_killed
from finetune.core.text import shown
from finetune.core.types import CORRECTIONS, Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets.decode import fit_to_bucket, probe_file, read_clip, read_fitted_image, read_image
from finetune.datasets.decode_limits import (
    DECODE_TIMEOUT_S,
    MAX_DURATION_S,
    MAX_FPS,
    MAX_FRAMES,
    MAX_MESSAGE,
    MAX_PIXELS,
    MAX_REQUEST,
    START_TIMEOUT_S,
    ascending,
    probe_timeout_s,
    too_much_memory,
)

Frame = NDArray[np.uint8]

_HEAD = struct.Struct("<4sIQ")

_MAGIC = b"ftm1"


class GarbageError(Exception):
    """Bytes that are no message, or a message that is no answer to what was asked."""


@dataclass(frozen=True)
class ProbeRequest:
    """Read a video's header and the times of its frames."""

    path: Path


@dataclass(frozen=True)
class ClipRequest:
    """Decode one planned clip, and the image that stands for its first frame where there is one."""

    path: Path
    header: VideoProbe
    """Without its frame times: a worker does not need them, and an hour of video has 100 000."""
    plan: ClipPlan
    image: Path | None = None


@dataclass(frozen=True)
class ImageRequest:
    """Load a still image, cut to a bucket."""

    path: Path
    bucket: Bucket


Request = ProbeRequest | ClipRequest | ImageRequest


@dataclass(frozen=True)
class Pixels:
    """What was decoded, uint8 RGB."""

    clip: Frame | None
    """[3, F, H, W]"""
    image: Frame | None
    """[3, H, W]"""


DecodeAnswer = VideoProbe | Pixels | DataError


class BugError(Exception):
    """An error of ours in the worker: its traceback."""


# --- messages ---------------------------------------------------------------------------------------------------------


def send(stream: BinaryIO, message: Mapping[str, Any], *bodies: Any) -> None:
    """Write one message; ``bodies`` are buffers of bytes, written one after another without being copied."""
    header = json.dumps(message).encode("ascii")  # escapes: a file name need not be valid Unicode
    views = [memoryview(body).cast("B") for body in bodies]
    stream.write(_HEAD.pack(_MAGIC, len(header), sum(len(view) for view in views)))
    stream.write(header)
    for view in views:
        stream.write(view)
    stream.flush()


def receive(stream: BinaryIO, most: int) -> tuple[dict[str, Any], int]:
    """Read a message's JSON object of at most ``most`` bytes; its body, so many bytes, is left to be read.

    Raises:
        EOFError: if the stream ends, at once or in the midst of the message.
        GarbageError: if it is no message.
    """
    magic, length, body = _HEAD.unpack(_exactly(stream, _HEAD.size))
    if magic != _MAGIC or length > most:
        raise GarbageError(f"no message: {magic!r}, {length:,} bytes")
    try:
        message = json.loads(_exactly(stream, length))
    except (ValueError, RecursionError) as error:
        raise GarbageError(f"no JSON: {error}") from None
    if not isinstance(message, dict):
        raise GarbageError("no JSON object")
    return message, body


def fill(stream: BinaryIO, buffer: Any) -> None:
    """Read exactly as many bytes as ``buffer`` holds, into it. Raises EOFError if there are fewer."""
    view = memoryview(buffer).cast("B")
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"{done:,} of {len(view):,} bytes")
        done += count


def _exactly(stream: BinaryIO, length: int) -> bytes:
    buffer = bytearray(length)
    fill(stream, buffer)
    return bytes(buffer)


# --- questions --------------------------------------------------------------------------------------------------------


def write_request(stream: BinaryIO, request: Request, number: int) -> None:
    """Ask a worker. The answer repeats ``number``, so that one that nobody waits for is not taken for the next."""
    message: dict[str, Any] = {"number": number, "task": type(request).__name__, "path": os.fspath(request.path)}
    if isinstance(request, ClipRequest):
        header, plan = request.header, request.plan
        message |= {
            "header": _header(header),
            "indices": plan.frame_indices,
            "cut": [*plan.resize_hw, *plan.crop_yx],
            "bucket": _listed(plan.bucket),
            "image": None if request.image is None else os.fspath(request.image),
        }
    elif isinstance(request, ImageRequest):
        message["bucket"] = _listed(request.bucket)
    send(stream, message)


def read_request(stream: BinaryIO) -> tuple[Request, int]:
    """What the parent asks, and its number. Its word is taken: a worker trusts the process that started it."""
    message, _ = receive(stream, MAX_REQUEST)
    return _request(message), message["number"]


def _request(message: Mapping[str, Any]) -> Request:
    path = Path(message["path"])
    if message["task"] == "ProbeRequest":
        return ProbeRequest(path)
    bucket = Bucket(*message["bucket"])
    if message["task"] == "ImageRequest":
        return ImageRequest(path, bucket)
    frames, fps, height, width, orientation, decoder, corrections = message["header"]
    header = VideoProbe(frames, fps, height, width, (), orientation, decoder, tuple(corrections))
    resize_height, resize_width, top, left = message["cut"]
    plan = ClipPlan(tuple(message["indices"]), (resize_height, resize_width), (top, left), bucket)
    return ClipRequest(path, header, plan, None if message["image"] is None else Path(message["image"]))


def answer_bytes(request: Request) -> int:
    """The pixels that answer a request; 0 where it is no pixels that are asked for."""
    if isinstance(request, ProbeRequest):
        return 0
    if isinstance(request, ImageRequest):
        return 3 * request.bucket.height * request.bucket.width
    bucket = request.plan.bucket
    return 3 * bucket.height * bucket.width * (len(request.plan.frame_indices) + (request.image is not None))


# --- answers ----------------------------------------------------------------------------------------------------------


def write_answer(stream: BinaryIO, answer: DecodeAnswer | BugError, number: int) -> None:
    """Answer the request of that number."""
    if isinstance(answer, VideoProbe):
        message = {"number": number, "kind": "probe", "header": _header(answer)}
        send(stream, message, array("d", answer.frame_times_s))
    elif isinstance(answer, Pixels):
        bodies = [np.ascontiguousarray(part) for part in (answer.clip, answer.image) if part is not None]
        send(stream, {"number": number, "kind": "pixels"}, *bodies)
    elif isinstance(answer, DataError):
        parts = [part[: MAX_MESSAGE // 64] for part in (answer.what, answer.where, answer.fix)]
        send(stream, {"number": number, "kind": "unusable", "error": parts})
    else:
        send(stream, {"number": number, "kind": "bug", "traceback": str(answer)[-MAX_MESSAGE // 16 :]})


def read_answer(stream: BinaryIO, request: Request, number: int) -> DecodeAnswer:
    """What the worker answers to request ``number``, checked as if a stranger had sent it.

    Raises:
        EOFError: if the stream ends before the answer does.
        GarbageError: if it is no answer to this request.
        BugError: if the worker met an error of ours.
    """
    message, length = receive(stream, MAX_MESSAGE)
    kind = message.get("kind")
    if message.get("number") != number:
        raise GarbageError("an answer to another request")
    if kind in ("unusable", "bug"):
        if length:
            raise GarbageError(f"{length:,} bytes after an error")
        if kind == "bug":
            raise BugError(_text(message.get("traceback")))
        return _error(message.get("error"), request)
    if kind == "probe" and isinstance(request, ProbeRequest):
        return _probe(stream, message.get("header"), length)
    if kind == "pixels" and not isinstance(request, ProbeRequest):
        return _pixels(stream, request, length)
    raise GarbageError(f"{str(kind)[:50]!r} is no answer to {type(request).__name__}")


def _error(parts: Any, request: Request) -> DataError:
    if not isinstance(parts, list) or len(parts) != 3:
        raise GarbageError("an error is three texts")
    what, where, fix = map(_text, parts)
    if not what:
        raise GarbageError("an error without words")
    image = request.image if isinstance(request, ClipRequest) else None
    about = {shown(str(path)) for path in (request.path, image) if path}
    return DataError(what, where=where if where in about else str(request.path), fix=fix)


def _probe(stream: BinaryIO, header: Any, length: int) -> VideoProbe:
    if length % 8 or not 8 <= length <= 8 * MAX_FRAMES:
        raise GarbageError(f"{length:,} bytes of frame times")
    if not isinstance(header, list) or len(header) != 7:
        raise GarbageError("a header is seven values")
    frames, fps, height, width, orientation, decoder, corrections = header
    whole = all(type(number) is int for number in (frames, height, width, orientation))
    if not whole or not isinstance(fps, int | float) or isinstance(fps, bool):
        raise GarbageError(f"a header of {[type(value).__name__ for value in header]}")
    sizes = 1 <= height <= MAX_PIXELS and 1 <= width <= MAX_PIXELS and height * width <= MAX_PIXELS
    if frames != length // 8 or not sizes or not 0 < fps <= 2 * MAX_FPS or not 1 <= orientation <= 8:
        raise GarbageError(f"no header of a video: {frames}, {fps}, {height}x{width}, {orientation}")
    if decoder not in ("decord", "pyav"):
        raise GarbageError("no decoder of ours")
    if not isinstance(corrections, list) or not all(name in list(CORRECTIONS) for name in corrections):
        raise GarbageError("no corrections of ours")
    times = array("d", bytes(length))
    fill(stream, times)
    if not math.isfinite(times[-1]) or times[-1] > MAX_DURATION_S or not ascending(times):
        raise GarbageError("frame times that do not ascend")
    return VideoProbe(frames, float(fps), height, width, times, orientation, decoder, tuple(corrections))


def _pixels(stream: BinaryIO, request: ClipRequest | ImageRequest, length: int) -> Pixels:
    expected = answer_bytes(request)
    if length != expected:
        raise GarbageError(f"{length:,} bytes of pixels, not {expected:,}")
    clip: Frame | None = None
    bucket = request.bucket if isinstance(request, ImageRequest) else request.plan.bucket
    size_hw = bucket.height, bucket.width
    if isinstance(request, ClipRequest):
        clip = np.empty((3, len(request.plan.frame_indices), *size_hw), np.uint8)
        fill(stream, clip)
    image: Frame | None = None
    if isinstance(request, ImageRequest) or request.image is not None:
        image = np.empty((3, *size_hw), np.uint8)
        fill(stream, image)
    return Pixels(clip, image)


def _header(header: VideoProbe) -> list[Any]:
    """Everything of it but its times."""
    size = header.height, header.width
    return [header.frames, header.fps, *size, header.orientation, header.decoder, list(header.corrections)]


def _listed(bucket: Bucket) -> list[int]:
    return [bucket.frames, bucket.height, bucket.width]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise GarbageError(f"{type(value).__name__} where a text belongs")
    return value


# -------- Requests to answers, in whichever process: a worker's work, and what ``DecodePool`` does itself without
# workers.


def answer(request: Request) -> DecodeAnswer:
    """Do what is asked; a file that cannot be used gives its ``DataError``, which is an answer like another."""
    try:
        if isinstance(request, ProbeRequest):
            return probe_file(request.path)
        if isinstance(request, ClipRequest):
            clip = read_clip(request.path, request.header, request.plan)
            if request.image is None:
                return Pixels(clip, None)
            return Pixels(clip, read_fitted_image(request.image, request.plan.bucket))
        return Pixels(None, read_fitted_image(request.path, request.bucket))
    except DataError as error:
        return error
    except MemoryError:
        return too_much_memory(str(request.path))


# -------- The parent's end of a decode worker: start it, ask it, and end it when it crashes, hangs or talks nonsense.

WORKER_MODULE = "finetune.datasets.decode_worker"

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

    def ask(self, request: Request) -> DecodeAnswer:
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

    def _attempt(self, request: Request, *, last: bool) -> DecodeAnswer | None:
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
        root = str(Path(__file__).parents[2])
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


# -------- Media files in, pixels out: headers, frames and images as the package's types, decoded here or in worker
# processes.
#
# A damaged or hostile file can crash a decoding library, and with it the process. ``DecodePool`` therefore decodes in
# processes of its own: a worker that dies is that file's ``DataError``, and the run goes on with a new worker.

PIXEL_RULE = "pillow-bicubic-1"
"""Names the arithmetic from a decoded frame to pixels. Part of a cache address: another rule re-encodes."""

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode; ``key`` is the caller's own and is handed back with the result."""

    key: int
    path: Path
    probe: VideoProbe
    plan: ClipPlan
    image: Path | None = None
    """The file that stands for the first frame, cut to the plan's bucket."""


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
    return _clip(_raised(answer(_clip_request(DecodeJob(0, path, probe, plan)))))


def load_image(path: Path) -> Tensor:
    """Load a still image in this process: uint8 RGB [3, H, W], upright (EXIF), transparency on black, 16-bit grey
    scaled to 8.

    Raises:
        DataError: if the file is not an image, is damaged or too large.
    """
    return torch.from_numpy(np.ascontiguousarray(read_image(path).transpose(2, 0, 1)))


def fit_image(image: Tensor, bucket: Bucket, where: str = "") -> Tensor:
    """Resize an image to cover a bucket and crop its centre, by the rule and filter that frames get.

    Args:
        image: uint8 RGB [3, H, W].
        bucket: its height and width are filled.
        where: what the image is, for messages.

    Returns:
        uint8 RGB [3, bucket.height, bucket.width].

    Raises:
        DataError: if less than 1/``geometry.MAX_ASPECT_MISMATCH`` of it would remain.
    """
    fitted = fit_to_bucket(image.permute(1, 2, 0).numpy(), bucket, where)
    return torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))


def load_fitted_image(path: Path, bucket: Bucket) -> Tensor:
    """Load one still image in a worker process of its own and fit it to a bucket, uint8 RGB [3, height, width].

    Raises:
        DataError: as ``load_image`` and ``fit_image``.
    """
    with DecodePool(workers=1) as pool:
        (image,) = pool.load_images([(path, bucket)])
    if isinstance(image, DataError):
        raise image
    return image


class DecodePool:
    """Decode worker processes; a context manager.

    Args:
        workers: processes; 0 decodes in this one, without limits on memory and time, and a decoder that crashes takes
            it along: for files that are trusted.
        in_flight: clips that are decoded ahead of the consumer or being decoded; twice ``workers`` if left out. One
            clip of 49x480x720 is 51 MB.
        timeout_s: a clip or image that takes longer is given up; a header sooner (``limits.probe_timeout_s``).
    """

    def __init__(self, workers: int = 2, *, in_flight: int | None = None, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        if workers < 0 or (in_flight is not None and in_flight < 1) or not timeout_s > 0:
            raise ValueError(f"workers >= 0, in_flight >= 1, timeout_s > 0; got {workers}, {in_flight}, {timeout_s}")
        self._in_flight = in_flight or max(1, 2 * workers)
        self._workers = [Child(timeout_s) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def probe_many(self, paths: Iterable[Path]) -> Iterator[tuple[Path, VideoProbe | DataError]]:
        """Probe every path, in the order given; an unusable file gives its error and the next ones go on."""
        for path, answer in self._ordered((path, ProbeRequest(path)) for path in paths):
            if isinstance(answer, Pixels):
                raise TypeError("a header was asked for")
            yield path, answer

    def decode_many(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Clip | DataError]]:
        """Decode every job, in the order given, at most ``in_flight`` clips ahead of the consumer."""
        for job, answer in self._ordered((job, _clip_request(job)) for job in jobs):
            yield job, answer if isinstance(answer, DataError) else _clip(answer)

    def load_images(self, images: Iterable[tuple[Path, Bucket]]) -> Iterator[Tensor | DataError]:
        """Load every still image and fit it to its bucket, in the order given: uint8 RGB [3, height, width]."""
        for _, answer in self._ordered((path, ImageRequest(path, bucket)) for path, bucket in images):
            yield answer if isinstance(answer, DataError) else _image(answer)

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

    def _ordered(self, requests: Iterable[tuple[_Item, Request]]) -> Iterator[tuple[_Item, DecodeAnswer]]:
        if self._threads is None:
            for item, request in requests:
                yield item, answer(request)
            return
        pending: deque[tuple[_Item, Future[DecodeAnswer]]] = deque()
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

    def _answer(self, request: Request) -> DecodeAnswer:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


def _clip_request(job: DecodeJob) -> ClipRequest:
    return ClipRequest(job.path, replace(job.probe, frame_times_s=()), job.plan, job.image)


def _raised(answer: DecodeAnswer) -> DecodeAnswer:
    if isinstance(answer, DataError):
        raise answer
    return answer


def _clip(answer: DecodeAnswer) -> Clip:
    if not isinstance(answer, Pixels) or answer.clip is None:
        raise TypeError("a clip was asked for")
    return Clip(torch.from_numpy(answer.clip), None if answer.image is None else torch.from_numpy(answer.image))


def _image(answer: DecodeAnswer) -> Tensor:
    if not isinstance(answer, Pixels) or answer.image is None:
        raise TypeError("an image was asked for")
    return torch.from_numpy(answer.image)
