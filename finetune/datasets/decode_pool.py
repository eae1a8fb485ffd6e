"""Media files in, pixels out, decoded in worker processes."""

from __future__ import annotations

import json
import math
import queue
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from finetune.core.errors import ConfigError, DataError
from finetune.core.types import CORRECTIONS, Bucket, Clip, ClipPlan, Companion, Decoder, VideoProbe
from finetune.datasets import decode, decord_reader, pictures
from finetune.datasets.containers import MAX_FPS, MAX_FRAMES, check_times
from finetune.datasets.pictures import Frame, check_frame_size
from finetune.datasets.rows import is_still
from finetune.datasets.worker import Worker, too_much_memory

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.datasets.file_memory import FileMemory

PIXEL_RULE = "pillow-bicubic-1"
"""Names the arithmetic from a decoded frame to pixels. Part of a cache address: another rule re-encodes."""

WORKER = "from finetune.datasets import decode_pool, worker; worker.serve(decode_pool.handle)"
"""What a worker runs. It does not import torch, so it starts in a fraction of a second."""

PROBE_TIMEOUT_S = 60.0
"""To read the header and list the frames of a small file, and then one second more for every ``PROBE_BYTES_PER_S``."""

PROBE_BYTES_PER_S = 2 * 2**20
"""Slow, because a file without time stamps (AVI) has to be decoded to be listed."""

DECODE_TIMEOUT_S = 600.0
"""To decode one clip, and the most for anything."""


@dataclass(frozen=True)
class DecodeJob:
    """One planned clip to decode, and the image that stands for its first frame where there is one."""

    path: Path
    probe: VideoProbe
    plan: ClipPlan
    image: Path | None = None
    decoder: Decoder = "pyav"
    companions: tuple[Companion, ...] = ()
    """What goes with the clip frame for frame."""

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the arrays that are the answer, uint8 RGB: the clip [3, F, H, W], the image [3, H, W], and each companion
        as the clip.
        """
        size_hw = (self.plan.bucket.height, self.plan.bucket.width)
        clip = (3, len(self.plan.frame_indices), *size_hw)
        return [clip, *([(3, *size_hw)] if self.image else []), *(clip for _ in self.companions)]


@dataclass(frozen=True)
class FileJob:
    """A video or still image whose header is read; with ``bucket``, a still image that is cut to it."""

    path: Path
    bucket: Bucket | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the image, uint8 RGB [3, H, W]; none for a header."""
        return [] if self.bucket is None else [(3, self.bucket.height, self.bucket.width)]


Job = DecodeJob | FileJob

Answer = VideoProbe | list[Frame]


def perform(job: Job) -> Answer:
    """Do a job in this process. Raises DataError if a file cannot be used."""
    if isinstance(job, DecodeJob):
        frames = [_read_clip(job.decoder, job.path, job.probe, job.plan)]
        if job.image is not None:
            image = pictures.read_fitted_image(job.image, job.plan.bucket)
            frames.append(np.ascontiguousarray(image[..., ::-1]) if job.plan.flip else image)
        return frames + [_read_clip(job.decoder, one.path, one.probe, one.plan) for one in job.companions]
    if job.bucket is not None:
        return [pictures.read_fitted_image(job.path, job.bucket)]
    return pictures.probe_image(job.path) if is_still(job.path) else decode.probe_file(job.path)


def _read_clip(decoder: Decoder, path: Path, probe: VideoProbe, plan: ClipPlan) -> Frame:
    if decoder == "decord" and not probe.still:
        return decord_reader.read_clip(path, probe, plan)
    return decode.read_clip(path, probe, plan)


def require_decoder(decoder: Decoder) -> None:
    """Raise ConfigError if a decoder is not installed; nothing is imported."""
    if decoder == "decord" and find_spec("decord") is None:
        raise ConfigError(
            "decord is not installed",
            where="cache.decoder",
            fix="leave cache.decoder out (PyAV gives the same pixels), or pip install decord (on Arm: decord2)",
        )


# --- a job and its answer as a worker's messages ----------------------------------------------------------------------


def handle(fields: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
    """Do a job in a worker."""
    answer = perform(job_of(fields))
    if isinstance(answer, VideoProbe):
        fields, times = _parts_of(answer)
        return fields, [times]
    return {}, [np.ascontiguousarray(pixels) for pixels in answer]


def fields_of(job: Job) -> dict[str, Any]:
    """A job as JSON has it, without the frame times: a worker needs none, and an hour of video has 100 000."""
    if isinstance(job, DecodeJob):
        companions = tuple(replace(one, probe=replace(one.probe, frame_times_s=())) for one in job.companions)
        return asdict(replace(job, probe=replace(job.probe, frame_times_s=()), companions=companions))
    return asdict(job)


def job_of(fields: dict[str, Any]) -> Job:
    """A job from its fields. A worker trusts the process that started it."""
    path = Path(fields["path"])
    if "plan" not in fields:
        return FileJob(path, fields["bucket"] and Bucket(**fields["bucket"]))
    image = None if fields["image"] is None else Path(fields["image"])
    companions = tuple(
        Companion(one["name"], Path(one["path"]), _probe_of(one["probe"]), _plan_of(one["plan"]))
        for one in fields["companions"]
    )
    return DecodeJob(path, _probe_of(fields["probe"]), _plan_of(fields["plan"]), image, fields["decoder"], companions)


def _plan_of(fields: dict[str, Any]) -> ClipPlan:
    plan: dict[str, Any] = {name: tuple(fields[name]) for name in ("frame_indices", "resize_hw", "crop_yx")}
    return ClipPlan(**plan, bucket=Bucket(**fields["bucket"]), flip=fields["flip"])


def most_bytes(job: Job) -> int:
    """The length of a job's answer, or the most it may be."""
    return sum(map(math.prod, job.shapes)) or 8 * MAX_FRAMES


def _parts_of(probe: VideoProbe) -> tuple[dict[str, Any], array[float]]:
    """A header's fields for JSON, and its frame times."""
    return {**vars(probe), "frame_times_s": ()}, array("d", probe.frame_times_s)


def _probe_of(fields: dict[str, Any], frame_times_s: Sequence[float] = ()) -> VideoProbe:
    return VideoProbe(**{**fields, "frame_times_s": frame_times_s, "corrections": tuple(fields["corrections"])})


def answer_of(job: Job, fields: dict[str, Any], body: bytearray) -> Answer:
    """A worker's answer. Raises DataError if it is none to this job."""
    try:
        if not job.shapes:
            return _checked_probe(_probe_of(fields, array("d", body)))
        if len(body) != most_bytes(job):
            raise ValueError(f"{len(body):,} bytes of pixels")
        ends = np.cumsum([math.prod(shape) for shape in job.shapes])[:-1]
        parts = np.split(np.frombuffer(body, np.uint8), ends)
        return [part.reshape(shape) for part, shape in zip(parts, job.shapes, strict=True)]
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the decoder answered with nonsense ({error})", where=str(job.path)) from None


def _checked_probe(probe: VideoProbe) -> VideoProbe:
    known = set(probe.corrections) <= set(CORRECTIONS)
    counted = len(probe.frame_times_s) == probe.frames > 0
    whole = all(type(n) is int for n in (probe.frames, probe.height, probe.width, probe.orientation))
    whole &= type(probe.still) is bool
    if not counted or not known or not whole or not 0 < probe.fps <= 2 * MAX_FPS or not 1 <= probe.orientation <= 8:
        raise ValueError(f"{replace(probe, frame_times_s=())}")
    check_frame_size(probe.height, probe.width, "")
    check_times(probe.frame_times_s, "")
    return probe


def _clip_of(job: DecodeJob, frames: Sequence[Tensor]) -> Clip:
    """The answer to a job, whose arrays are those of ``job.shapes``."""
    first = len(frames) - len(job.companions)
    companions = {one.name: pixels for one, pixels in zip(job.companions, frames[first:], strict=True)}
    return Clip(frames[0], frames[1] if job.image is not None else None, companions)


# --- headers that were read before ------------------------------------------------------------------------------------


def probe_memory(cache_dir: Path) -> FileMemory:
    """Where the headers of videos that were read before are remembered, beside a cache's entries."""
    from finetune.datasets.file_memory import FileMemory

    return FileMemory(cache_dir / "headers.sqlite", read_rule())


def read_rule() -> str:
    """Names what reads videos: what was remembered of another version's reading is read again."""
    return f"{PIXEL_RULE}, header-1, av {version('av')}"


def _recalled(memory: FileMemory, path: Path) -> VideoProbe | None:
    fields, _, times = (memory.recall(path) or b"").partition(b"\n")
    try:
        return _checked_probe(_probe_of(json.loads(fields), array("d", times)))
    except (DataError, KeyError, TypeError, ValueError):  # there is none, or a damaged one
        return None


# --- the pool ---------------------------------------------------------------------------------------------------------


_Job = TypeVar("_Job", DecodeJob, FileJob)


class DecodePool:
    """Decode worker processes; a context manager.

    Args:
        workers: processes; 0 decodes in this one, without limits on memory and time, and a decoder that crashes takes
            it along: for files that are trusted.
        in_flight: clips that are decoded ahead of the consumer or being decoded; twice ``workers`` if left out. One
            clip of 49x480x720 is 51 MB.
        timeout_s: a clip or image that takes longer is given up; a header sooner (``PROBE_TIMEOUT_S``).
    """

    def __init__(self, workers: int = 2, *, in_flight: int | None = None, timeout_s: float = DECODE_TIMEOUT_S) -> None:
        if workers < 0 or (in_flight is not None and in_flight < 1) or not timeout_s > 0:
            raise ValueError(f"workers >= 0, in_flight >= 1, timeout_s > 0; got {workers}, {in_flight}, {timeout_s}")
        self._in_flight = in_flight or max(1, 2 * workers)
        self._timeout_s = timeout_s
        self._workers = [Worker("decoder", WORKER) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    @property
    def pids(self) -> list[int]:
        """Of the worker processes that run."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def probe_many(
        self, paths: Iterable[Path], memory: FileMemory | None = None
    ) -> Iterator[tuple[Path, VideoProbe | DataError]]:
        """Probe every path, in the order given; an unusable file gives its error and the next ones go on.

        Args:
            paths: of videos.
            memory: of earlier probes (``probe_memory``).
        """
        paths, known = list(paths), dict[Path, VideoProbe]()
        if memory is not None:
            known = {path: probe for path in paths if (probe := _recalled(memory, path)) is not None}
        fresh = self._ordered(FileJob(path) for path in paths if path not in known)
        for path in paths:
            if path in known:
                yield path, known[path]
                continue
            _, answer = next(fresh)
            assert not isinstance(answer, list)
            if memory is not None and isinstance(answer, VideoProbe):
                fields, times = _parts_of(answer)
                memory.remember(path, b"\n".join([json.dumps(fields).encode(), bytes(times)]))
            yield path, answer

    def decode_many(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Clip | DataError]]:
        """Decode the clip of every job, in the order given, at most ``in_flight`` clips ahead of the consumer."""
        import torch

        for job, answer in self._ordered(jobs):
            assert not isinstance(answer, VideoProbe)
            yield job, answer if isinstance(answer, DataError) else _clip_of(job, list(map(torch.from_numpy, answer)))

    def load_images(self, images: Iterable[tuple[Path, Bucket]]) -> Iterator[Tensor | DataError]:
        """Load every still image and fit it to its bucket, in the order given: uint8 RGB [3, height, width]."""
        import torch

        for _, answer in self._ordered(FileJob(path, bucket) for path, bucket in images):
            assert not isinstance(answer, VideoProbe)
            yield answer if isinstance(answer, DataError) else torch.from_numpy(answer[0])

    def close(self) -> None:
        """Stop the workers and wait for them; may be called again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.close()
            self._threads.shutdown(wait=True)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _ordered(self, jobs: Iterable[_Job]) -> Iterator[tuple[_Job, Answer | DataError]]:
        if self._threads is None:
            yield from ((job, self._answer(job)) for job in jobs)
            return
        pending: deque[tuple[_Job, Future[Answer | DataError]]] = deque()
        try:
            for job in jobs:
                pending.append((job, self._threads.submit(self._answer, job)))
                if len(pending) >= self._in_flight:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:
            for _, future in pending:
                future.cancel()

    def _answer(self, job: Job) -> Answer | DataError:
        try:
            return self._ask_worker(job) if self._workers else perform(job)
        except DataError as error:
            if isinstance(job, DecodeJob) and job.decoder == "decord" and self._workers:
                return self._answer(replace(job, decoder="pyav"))  # decord may have ended the worker
            return error
        except MemoryError:
            return too_much_memory(str(job.path))

    def _ask_worker(self, job: Job) -> Answer:
        limit_s = self._timeout_s
        if not job.shapes:
            with suppress(OSError, ValueError):
                limit_s = min(limit_s, PROBE_TIMEOUT_S + job.path.stat().st_size / PROBE_BYTES_PER_S)
        worker = self._idle.get()
        try:
            fields, body = worker.ask(job.path, fields_of(job), most_bytes=most_bytes(job), timeout_s=limit_s)
        finally:
            self._idle.put(worker)
        return answer_of(job, fields, body)


def load_fitted_image(path: Path, bucket: Bucket) -> Tensor:
    """Load one still image in a worker process of its own and fit it to a bucket, uint8 RGB [3, height, width].

    Raises:
        DataError: if it is not an image that is read, or of another shape altogether.
    """
    with DecodePool(workers=1) as pool:
        (image,) = pool.load_images([(path, bucket)])
    if isinstance(image, DataError):
        raise image
    return image


def fit_image(image: Tensor, bucket: Bucket) -> Tensor:
    """Resize an image, uint8 RGB [3, H, W], to cover a bucket and crop its centre, by the rule and filter of frames.

    Raises:
        DataError: if less than 1/``geometry.MAX_ASPECT_MISMATCH`` of it would remain.
    """
    import torch

    fitted = pictures.fit_to_bucket(image.permute(1, 2, 0).numpy(), bucket, "")
    return torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))
