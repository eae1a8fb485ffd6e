"""Media files in, pixels out: headers, frames and images as the package's types, decoded here or in worker processes.

A damaged or hostile file can crash a decoding library, and with it the process. ``DecodePool`` therefore decodes in
processes of its own: a worker that dies is that file's ``DataError``, and the run goes on with a new worker.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from finetune.datasets.media import tasks
from finetune.datasets.media.child import Child
from finetune.datasets.media.frames import fit_to_bucket, probe_file
from finetune.datasets.media.limits import DECODE_TIMEOUT_S
from finetune.datasets.media.pictures import read_image
from finetune.datasets.media.wire import Answer, ClipRequest, ImageRequest, Pixels, ProbeRequest, Request
from finetune.errors import DataError
from finetune.types import Bucket, Clip, ClipPlan, VideoProbe

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
    return _clip(_raised(tasks.answer(_clip_request(DecodeJob(0, path, probe, plan)))))


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

    def _ordered(self, requests: Iterable[tuple[_Item, Request]]) -> Iterator[tuple[_Item, Answer]]:
        if self._threads is None:
            for item, request in requests:
                yield item, tasks.answer(request)
            return
        pending: deque[tuple[_Item, Future[Answer]]] = deque()
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

    def _answer(self, request: Request) -> Answer:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


def _clip_request(job: DecodeJob) -> ClipRequest:
    return ClipRequest(job.path, replace(job.probe, frame_times_s=()), job.plan, job.image)


def _raised(answer: Answer) -> Answer:
    if isinstance(answer, DataError):
        raise answer
    return answer


def _clip(answer: Answer) -> Clip:
    if not isinstance(answer, Pixels) or answer.clip is None:
        raise TypeError("a clip was asked for")
    return Clip(torch.from_numpy(answer.clip), None if answer.image is None else torch.from_numpy(answer.image))


def _image(answer: Answer) -> Tensor:
    if not isinstance(answer, Pixels) or answer.image is None:
        raise TypeError("an image was asked for")
    return torch.from_numpy(answer.image)
