"""Storing entries in threads of their own, while the encoder makes the next ones.

Casting, checking, hashing and flushing one clip take as long as a sixth of encoding it on a fast GPU, and most of that
is waiting for a disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune.core.errors import CacheError, DataError, first_line

if TYPE_CHECKING:
    from finetune.caching.encode import EncodeJob

_THREADS = 4
"""Flushes of several files go to a disk together: eight captions of one batch do not wait for it one by one."""

_MOST_WAITING = 8
"""Entries that are being stored or wait for it, and so what a kill loses. One clip of 81x768x1360 is 21 MB."""


@dataclass(frozen=True)
class Failure:
    """A clip that could not be encoded."""

    key: str
    error: DataError


@dataclass(frozen=True)
class EncodeResult:
    """What one process did of one kind."""

    encoded: int
    bytes: int
    failures: tuple[Failure, ...] = ()


class EntryWriter:
    """Stores entries in the background; a context manager.

    Leaving it waits until all that was handed over is stored, whatever it is left by: an error in encoding, or Ctrl-C,
    loses nothing that was encoded before. What a disk did not take by then is added to that error as notes; faults of
    clips the next run finds again.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="entries")
        self._waiting: deque[tuple[EncodeJob, Future[int]]] = deque()
        self._encoded, self._bytes = 0, 0
        self._failures: list[Failure] = []

    def __enter__(self) -> EntryWriter:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._threads.shutdown(wait=True)
        if error is None:
            return
        for job, stored in self._waiting:
            fault = stored.exception()
            if fault is not None and not isinstance(fault, DataError):
                error.add_note(f"{job.title} was not stored either: {first_line(fault)}")

    def store(self, job: EncodeJob, write: Callable[[], int]) -> None:
        """Hand an entry over; waits while ``_MOST_WAITING`` of them are not stored.

        Args:
            job: what was encoded.
            write: stores it and returns its bytes. What it raises of kind DataError becomes a failure of the clip.

        Raises:
            CacheError: if an earlier one could not be stored, naming it.
        """
        self._settle(_MOST_WAITING - 1)
        self._waiting.append((job, self._threads.submit(write)))

    def fail(self, job: EncodeJob, error: DataError) -> None:
        """Take down that a clip could not be decoded, in its place among the others. Raises as ``store``."""

        def report() -> int:
            raise error

        self.store(job, report)

    def finish(self) -> EncodeResult:
        """What came of all that was handed over, when it is stored; failures in that order. Raises as ``store``."""
        self._settle(0)
        return EncodeResult(self._encoded, self._bytes, tuple(self._failures))

    def _settle(self, most: int) -> None:
        """Take the oldest entries that are stored off the list, until at most ``most`` are left on it."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0][1].done()):
            job, stored = self._waiting.popleft()
            try:
                self._bytes += stored.result()
                self._encoded += 1
            except DataError as error:
                where = f"{job.title}: {error.where}" if error.where else job.title
                fix = error.fix or "re-encode the file, take it out, or set data.unreadable_clips: skip"
                self._failures.append(Failure(job.key, DataError(error.what, where=where, fix=fix)))
            except CacheError as error:
                raise CacheError(error.what, where=f"{error.where} ({job.title})", fix=error.fix) from error
