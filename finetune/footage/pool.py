"""Worker processes that measure footage and cut clips: files of strangers, under the limits of ``datasets.worker``."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from finetune.core.errors import DataError
from finetune.core.types import VideoProbe
from finetune.datasets.containers import MAX_FRAMES
from finetune.datasets.worker import Worker, too_much_memory
from finetune.footage.cutting import CutPlan, cut
from finetune.footage.measure import Footage, footage_of, measure, parts_of
from finetune.footage.scenes import DetectorName

PROGRAM = "from finetune.footage import pool; from finetune.datasets import worker; worker.serve(pool.handle)"

_LEAST_S, _PER_SECOND = 600.0, 60.0
"""A worker gets so long, and so much more for each second of video: HDR in 4K is tone-mapped at a frame a second."""

_FRAME_BYTES = 64
"""That measurements take, at most, of a frame."""

_MP4_BYTES = 2**20
"""That an MP4 file has beside its frames."""


@dataclass(frozen=True)
class MeasureRequest:
    """Decode a video once and measure it."""

    path: Path
    detector: DetectorName
    threshold: float | None
    seconds: float
    """How long the video is, which says how long this may take."""


@dataclass(frozen=True)
class CutRequest:
    """Make one clip."""

    path: Path
    header: VideoProbe
    """Without its frame times."""
    plan: CutPlan


@dataclass(frozen=True)
class MadeClip:
    """An MP4 file's bytes."""

    content: bytes | bytearray
    copied: bool
    """Whether packets were copied and nothing was encoded."""


Request = MeasureRequest | CutRequest

Answer = Footage | MadeClip


def perform(request: Request) -> Answer:
    """Do what is asked, in this process. Raises DataError if the file cannot be used."""
    if isinstance(request, MeasureRequest):
        return measure(request.path, request.detector, request.threshold)
    copied, content = cut(request.path, request.header, request.plan)
    return MadeClip(content, copied)


# --- a request and its answer as a worker's messages ------------------------------------------------------------------


def handle(fields: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
    """Perform a request in a worker."""
    answer = perform(request_of(fields))
    return parts_of(answer) if isinstance(answer, Footage) else ({"copied": answer.copied}, [answer.content])


def request_of(fields: dict[str, Any]) -> Request:
    """A request from its fields, as JSON had them. A worker trusts the process that started it."""
    path = Path(fields["path"])
    if "plan" not in fields:
        return MeasureRequest(path, fields["detector"], fields["threshold"], fields["seconds"])
    header = VideoProbe(**{**fields["header"], "corrections": tuple(fields["header"]["corrections"])})
    return CutRequest(path, header, CutPlan(**{name: tuple(value) for name, value in fields["plan"].items()}))


def most_bytes(request: Request) -> int:
    """The most that a request's answer may be."""
    if isinstance(request, MeasureRequest):
        return _FRAME_BYTES * MAX_FRAMES
    height, width = request.plan.resize_hw
    return _MP4_BYTES + 3 * height * width * len(request.plan.indices)


def answer_of(request: Request, fields: dict[str, Any], body: bytearray) -> Answer:
    """A worker's answer. Raises DataError if it is none to this request."""
    try:
        if isinstance(request, MeasureRequest):
            return footage_of(fields, body)
        if body[4:8] != b"ftyp":
            raise ValueError("no MP4 file")
        return MadeClip(body, bool(fields["copied"]))
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the worker answered with nonsense ({error})", where=str(request.path)) from None


# --- the pool ---------------------------------------------------------------------------------------------------------

_Item = TypeVar("_Item")


class PreparePool(Generic[_Item]):
    """Worker processes; a context manager.

    Args:
        workers: processes; 0 works in this one, without limits on memory and time: for files that are trusted.
    """

    def __init__(self, workers: int) -> None:
        self._workers = [Worker("worker", PROGRAM) for _ in range(workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="prepare")

    def run(self, requests: Iterable[tuple[_Item, Request]]) -> Iterator[tuple[_Item, Answer | DataError]]:
        """Perform every request, and give each answer as soon as it is there: not in the order of the requests.

        A request is taken when a worker is about to be free, so ``requests`` may be long.
        """
        pending: dict[Future[Answer | DataError], _Item] = {}
        try:
            for item, request in requests:
                pending[self._threads.submit(self._answer, request)] = item
                if len(pending) > len(self._workers):
                    yield from self._done(pending)
            while pending:
                yield from self._done(pending)
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Stop the workers and wait for them; may be called again."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown(wait=True)

    def __enter__(self) -> PreparePool[_Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _done(pending: dict[Future[Answer | DataError], _Item]) -> Iterator[tuple[_Item, Answer | DataError]]:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            yield pending.pop(future), future.result()

    def _answer(self, request: Request) -> Answer | DataError:
        try:
            return self._ask_worker(request) if self._workers else perform(request)
        except DataError as error:
            return error
        except MemoryError:
            return too_much_memory(str(request.path))

    def _ask_worker(self, request: Request) -> Answer:
        seconds = request.seconds if isinstance(request, MeasureRequest) else len(request.plan.indices)
        worker = self._idle.get()
        try:
            fields, body = worker.ask(
                request.path,
                asdict(request),
                most_bytes=most_bytes(request),
                timeout_s=_LEAST_S + _PER_SECOND * seconds,
            )
        finally:
            self._idle.put(worker)
        return answer_of(request, fields, body)
