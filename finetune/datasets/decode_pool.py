"""Media files in, pixels out, decoded in worker processes."""

from __future__ import annotations

import queue
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.types import CORRECTIONS, Bucket, Clip, ClipPlan, VideoProbe
from finetune.datasets import decode
from finetune.datasets.media_files import MAX_FPS, MAX_FRAMES, check_frame_size, check_times
from finetune.datasets.worker import Worker, too_much_memory

if TYPE_CHECKING:
    from torch import Tensor

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

Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class DecodeJob:
    """One clip to decode; ``key`` is the caller's own and is handed back with the result."""

    key: int
    path: Path
    probe: VideoProbe
    plan: ClipPlan
    image: Path | None = None
    """The file that stands for the first frame, cut to the plan's bucket."""


@dataclass(frozen=True)
class ProbeRequest:
    """Read a video's header and the times of its frames."""

    path: Path


@dataclass(frozen=True)
class ClipRequest:
    """Decode one planned clip, and the image that stands for its first frame where there is one."""

    path: Path
    probe: VideoProbe
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
    """What was decoded, uint8 RGB: a clip [3, F, H, W], an image [3, H, W]."""

    clip: Frame | None
    image: Frame | None


Answer = VideoProbe | Pixels


def perform(request: Request) -> Answer:
    """Do what is asked, in this process. Raises DataError if a file cannot be used."""
    if isinstance(request, ProbeRequest):
        return decode.probe_file(request.path)
    if isinstance(request, ImageRequest):
        return Pixels(None, decode.read_fitted_image(request.path, request.bucket))
    clip = decode.read_clip(request.path, request.probe, request.plan)
    image = None if request.image is None else decode.read_fitted_image(request.image, request.plan.bucket)
    return Pixels(clip, image)


# --- a request and its answer as a worker's messages ------------------------------------------------------------------


def handle(fields: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
    """Perform a request in a worker."""
    answer = perform(request_of(fields))
    if isinstance(answer, VideoProbe):
        return asdict(replace(answer, frame_times_s=())), [array("d", answer.frame_times_s)]
    return {}, [np.ascontiguousarray(part) for part in (answer.clip, answer.image) if part is not None]


def request_of(fields: dict[str, Any]) -> Request:
    """A request from its fields, as JSON had them. A worker trusts the process that started it."""
    path = Path(fields["path"])
    if "plan" in fields:
        plan = {name: tuple(value) for name, value in fields["plan"].items() if name != "bucket"}
        image = None if fields["image"] is None else Path(fields["image"])
        bucket = Bucket(**fields["plan"]["bucket"])
        return ClipRequest(path, _probe_of(fields["probe"]), ClipPlan(**plan, bucket=bucket), image)
    return ImageRequest(path, Bucket(**fields["bucket"])) if "bucket" in fields else ProbeRequest(path)


def _probe_of(fields: dict[str, Any], frame_times_s: Sequence[float] = ()) -> VideoProbe:
    return VideoProbe(**{**fields, "frame_times_s": frame_times_s, "corrections": tuple(fields["corrections"])})


def most_bytes(request: Request) -> int:
    """The length of a request's answer, or the most it may be."""
    if isinstance(request, ProbeRequest):
        return 8 * MAX_FRAMES
    if isinstance(request, ImageRequest):
        return 3 * request.bucket.height * request.bucket.width
    bucket = request.plan.bucket
    return 3 * bucket.height * bucket.width * (len(request.plan.frame_indices) + (request.image is not None))


def answer_of(request: Request, fields: dict[str, Any], body: bytearray) -> Answer:
    """A worker's answer. Raises DataError if it is none to this request."""
    try:
        if isinstance(request, ProbeRequest):
            return _checked_probe(_probe_of(fields, array("d", body)))
        bucket = request.bucket if isinstance(request, ImageRequest) else request.plan.bucket
        if len(body) != most_bytes(request):
            raise ValueError(f"{len(body):,} bytes of pixels")
        pixels = np.frombuffer(body, np.uint8).reshape(-1, bucket.height, bucket.width)
        if isinstance(request, ImageRequest):
            return Pixels(None, pixels)
        frames = 3 * len(request.plan.frame_indices)
        clip = pixels[:frames].reshape(3, -1, bucket.height, bucket.width)
        return Pixels(clip, None if request.image is None else pixels[frames:])
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the decoder answered with nonsense ({error})", where=str(request.path)) from None


def _checked_probe(probe: VideoProbe) -> VideoProbe:
    known = probe.decoder in ("decord", "pyav") and set(probe.corrections) <= set(CORRECTIONS)
    counted = len(probe.frame_times_s) == probe.frames > 0
    whole = all(type(n) is int for n in (probe.frames, probe.height, probe.width, probe.orientation))
    if not counted or not known or not whole or not 0 < probe.fps <= 2 * MAX_FPS or not 1 <= probe.orientation <= 8:
        raise ValueError(f"{replace(probe, frame_times_s=())}")
    check_frame_size(probe.height, probe.width, "")
    check_times(probe.frame_times_s, "")
    return probe


# --- the pool ---------------------------------------------------------------------------------------------------------

_Item = TypeVar("_Item")


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

    def probe_many(self, paths: Iterable[Path]) -> Iterator[tuple[Path, VideoProbe | DataError]]:
        """Probe every path, in the order given; an unusable file gives its error and the next ones go on."""
        for path, answer in self._ordered((path, ProbeRequest(path)) for path in paths):
            assert not isinstance(answer, Pixels)
            yield path, answer

    def decode_many(self, jobs: Iterable[DecodeJob]) -> Iterator[tuple[DecodeJob, Clip | DataError]]:
        """Decode every job, in the order given, at most ``in_flight`` clips ahead of the consumer."""
        import torch

        for job, answer in self._ordered(
            (job, ClipRequest(job.path, replace(job.probe, frame_times_s=()), job.plan, job.image)) for job in jobs
        ):
            if isinstance(answer, DataError):
                yield job, answer
            elif isinstance(answer, Pixels):
                image = None if answer.image is None else torch.from_numpy(answer.image)
                yield job, Clip(torch.from_numpy(answer.clip), image)

    def load_images(self, images: Iterable[tuple[Path, Bucket]]) -> Iterator[Tensor | DataError]:
        """Load every still image and fit it to its bucket, in the order given: uint8 RGB [3, height, width]."""
        import torch

        for _, answer in self._ordered((path, ImageRequest(path, bucket)) for path, bucket in images):
            if isinstance(answer, DataError):
                yield answer
            elif isinstance(answer, Pixels):
                yield torch.from_numpy(answer.image)

    def close(self) -> None:
        """Stop the workers and wait for them; may be called again."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.close()
            self._threads.shutdown(wait=True)

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ordered(self, requests: Iterable[tuple[_Item, Request]]) -> Iterator[tuple[_Item, Answer | DataError]]:
        if self._threads is None:
            yield from ((item, self._answer(request)) for item, request in requests)
            return
        pending: deque[tuple[_Item, Future[Answer | DataError]]] = deque()
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

    def _answer(self, request: Request) -> Answer | DataError:
        try:
            return self._ask_worker(request) if self._workers else perform(request)
        except DataError as error:
            return error
        except MemoryError:
            return too_much_memory(str(request.path))

    def _ask_worker(self, request: Request) -> Answer:
        worker = self._idle.get()
        try:
            fields, body = worker.ask(
                request.path, asdict(request), most_bytes=most_bytes(request), timeout_s=self._limit_s(request)
            )
        finally:
            self._idle.put(worker)
        return answer_of(request, fields, body)

    def _limit_s(self, request: Request) -> float:
        if not isinstance(request, ProbeRequest):
            return self._timeout_s
        size = 0
        with suppress(OSError, ValueError):
            size = request.path.stat().st_size
        return min(self._timeout_s, PROBE_TIMEOUT_S + size / PROBE_BYTES_PER_S)


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

    fitted = decode.fit_to_bucket(image.permute(1, 2, 0).numpy(), bucket, "")
    return torch.from_numpy(np.ascontiguousarray(fitted.transpose(2, 0, 1)))
