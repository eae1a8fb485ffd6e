"""What was once read of files, so that they need not be read again: one SQLite file beside a cache's entries.

Nothing depends on it: a database that is damaged, locked or cannot be written is as good as none.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from finetune.core.types import GIB
from finetune.datasets.cache import YOUNG_S

_MOST_BYTES = 2 * GIB
"""Of the database. What is read when it is larger is not remembered."""

_FLUSH_S = 1.0
"""What is remembered is written so often: a transaction per file would wait for the disk each time."""

_TABLE = """
    CREATE TABLE IF NOT EXISTS files (
        name BLOB, question TEXT, rule TEXT, size INTEGER, mtime_ns INTEGER, content BLOB, PRIMARY KEY (name, question)
    )
"""


class _Stamp(NamedTuple):
    size: int
    mtime_ns: int


class FileMemory:
    """Bytes by file and question, for as long as the file's path, size and time of change stay; a context manager.

    Args:
        path: of the database; its folder is made.
        rule: names how the bytes were made; those of another rule are not given.
    """

    def __init__(self, path: Path, rule: str) -> None:
        self._rule = rule
        self._stamps: dict[tuple[Path, str], _Stamp] = {}
        self._pending: list[tuple[bytes, str, str, int, int, bytes]] = []
        self._flushed_s = time.monotonic()
        self._database: sqlite3.Connection | None = None
        with suppress(OSError, sqlite3.Error):
            path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(path, timeout=0.5, isolation_level=None)
            self._database = _usable(database) or _usable(_new(database, path))

    def recall(self, file: Path, question: str = "") -> bytes | None:
        """What was remembered of a file as it is now; None if there is nothing.

        To be asked before a file is read: ``remember`` takes the size and time that were seen here.
        """
        with suppress(OSError):
            status = file.stat()
            stamp = _Stamp(status.st_size, status.st_mtime_ns)
            self._stamps[file, question] = stamp
            if self._database is not None:
                query = "SELECT size, mtime_ns, rule, content FROM files WHERE name = ? AND question = ?"
                with suppress(sqlite3.Error):
                    row = self._database.execute(query, (_name(file), question)).fetchone()
                    if row is not None and row[:3] == (*stamp, self._rule):
                        return bytes(row[3])
        return None

    def remember(self, file: Path, content: bytes, question: str = "") -> None:
        """Keep what was read of a file since ``recall``; not of one so young that it may change without a trace."""
        stamp = self._stamps.pop((file, question), None)
        if self._database is None or stamp is None or time.time_ns() - stamp.mtime_ns < YOUNG_S * 1e9:
            return
        self._pending.append((_name(file), question, self._rule, *stamp, content))
        if time.monotonic() - self._flushed_s > _FLUSH_S:
            self._flush()

    def _flush(self) -> None:
        pending, self._pending, self._flushed_s = self._pending, [], time.monotonic()
        if self._database is None or not pending:
            return
        with suppress(sqlite3.Error):
            (pages,), (page_bytes,) = (self._database.execute(f"PRAGMA page_{name}").fetchone() for name in _SIZE)
            if pages * page_bytes > _MOST_BYTES:
                return
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._database.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", pending)
                self._database.execute("COMMIT")
            except sqlite3.Error:
                self._database.execute("ROLLBACK")

    def __enter__(self) -> FileMemory:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        if self._database is not None:
            self._database.close()
            self._database = None


_SIZE = ("count", "size")


def _name(file: Path) -> bytes:
    return os.fsencode(file.absolute())


def _usable(database: sqlite3.Connection) -> sqlite3.Connection | None:
    """A database with its table; None if it is damaged."""
    try:
        database.execute("PRAGMA synchronous = OFF")  # what a power cut takes is read again
        database.execute(_TABLE)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, or not to be written to
            raise
        return None
    return database


def _new(database: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    database.close()
    path.unlink()
    return sqlite3.connect(path, timeout=0.5, isolation_level=None)
