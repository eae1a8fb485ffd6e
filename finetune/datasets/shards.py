"""Packed entries: shards of about a gigabyte, for caches whose files are too many to be kept one by one.

A shard is entry files laid end to end, as they were, and never changes once it has its name. Its index, in parquet,
says what in it counts. Where that is gone or damaged, the entries' own headers say it: a shard alone loses nothing.
``docs/cache.md`` describes the files for other tools.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from finetune.core.checksums import checksum_bytes
from finetune.core.files import atomic_write, atomic_write_bytes
from finetune.datasets.entries import entry_at, fault_of
from finetune.datasets.manifests import KINDS, Kind

SHARD_BYTES = 1 << 30
"""About how large a shard becomes."""

ENDING = ".shard"

INDEX_ENDING = ".parquet"

_CHECKSUM = b"checksum"
"""In an index's metadata: of its rows, as ``_checksum`` takes it."""


class Packed(NamedTuple):
    """Where an entry lies."""

    shard: Path
    offset: int
    """Of its first byte in the shard."""
    size: int
    """Bytes."""

    def read(self) -> bytes:
        """Its bytes, which are not verified; fewer where the shard is cut off."""
        with self.shard.open("rb") as shard:
            shard.seek(self.offset)
            return shard.read(self.size)


class Row(NamedTuple):
    """Of an index."""

    kind: Kind
    key: str
    offset: int
    size: int


Entries = Mapping[Kind, Mapping[str, Packed]]
"""Packed entries by kind and key."""


_Stamp = tuple[int, int]
"""Of a file: its inode and time of change."""


class Shards:
    """The shards of one cache. Any number of processes and threads may read them at the same time.

    Args:
        folder: where they are; made by the first write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: tuple[dict[Path, _Stamp | None], Entries] | None = None
        """What tells whether an index was written anew, and what all of them say."""

    def entries(self, *, refresh: bool = True) -> Entries:
        """What is packed. An entry that is in several shards counts in the last of them, by name.

        Args:
            refresh: look whether other processes changed something since it was last asked.
        """
        if self._read is not None and not refresh:
            return self._read[1]
        stamps = {shard: _stamp(index_of(shard)) for shard in self.paths()}
        if self._read is not None and self._read[0] == stamps:
            return self._read[1]
        entries: dict[Kind, dict[str, Packed]] = {kind: {} for kind in KINDS}
        for shard in stamps:
            for kind, key, offset, size in read_rows(shard):
                entries[kind][key] = Packed._make((shard, offset, size))
        self._read = (stamps, entries)
        return entries

    def paths(self) -> list[Path]:
        """Every shard, sorted."""
        return sorted(self.folder.glob(f"*{ENDING}"))

    def by_shard(self) -> dict[Path, list[Row]]:
        """Every shard and what counts of it, in its order."""
        rows: dict[Path, list[Row]] = {shard: [] for shard in self.paths()}
        for kind, entries in self.entries().items():
            for key, (shard, offset, size) in entries.items():
                rows.setdefault(shard, []).append(Row(kind, key, offset, size))  # or it was written meanwhile
        return {shard: sorted(its, key=lambda row: row.offset) for shard, its in rows.items()}

    def write(self, contents: Iterable[tuple[Kind, str, bytes]]) -> list[Row]:
        """Lay entries into a new shard: when this returns, it and its index are on the disk.

        Raises:
            OSError: nothing is left of the new shard then.
        """
        shard = self.folder / f"{uuid.uuid4().hex}{ENDING}"
        rows: list[Row] = []

        def parts() -> Iterator[memoryview]:
            offset = 0
            for kind, key, content in contents:
                rows.append(Row(kind, key, offset, len(content)))
                offset += len(content)
                yield memoryview(content)

        try:
            atomic_write(shard, parts())
            if rows:
                write_rows(shard, rows)
        except OSError:  # a disk that is full of a shard has no room for its index
            shard.unlink(missing_ok=True)
            raise
        if not rows:
            shard.unlink()
        return rows

    def mend_indexes(self) -> None:
        """Write every index that is missing or damaged anew, from what its shard says itself.

        Raises:
            OSError: if one cannot be written.
        """
        for shard in self.paths():
            if index_fault(shard):
                write_rows(shard, read_rows(shard))

    def drop(self, kind: Kind, key: str) -> None:
        """Let a damaged entry count no more; its bytes stay until the shard is written anew. A whole one stays.

        Raises:
            OSError: if the index cannot be written.
        """
        for shard in self.paths():  # all of them, or an older copy would come to light
            rows = read_rows(shard)
            kept = [
                row
                for row in rows
                if row.key != key or not fault_of(Packed(shard, row.offset, row.size).read(), kind, key)
            ]
            if len(kept) < len(rows):
                write_rows(shard, kept)


def index_of(shard: Path) -> Path:
    """The file of a shard's index."""
    return shard.with_suffix(INDEX_ENDING)


def remove(shard: Path) -> None:
    """Delete a shard and its index. An index without its shard says nothing."""
    shard.unlink(missing_ok=True)
    index_of(shard).unlink(missing_ok=True)


def index_fault(shard: Path) -> str:
    """Why the index of a shard is not what was written; empty if it is."""
    try:
        _indexed(shard)
    except FileNotFoundError:
        return "the index is missing"
    except (OSError, ValueError) as error:
        return f"the index is not what was written: {error}"
    return ""


def read_rows(shard: Path) -> list[Row]:
    """What counts of a shard: as its index says; without one, every entry up to the first damaged header."""
    try:
        return _indexed(shard)
    except (OSError, ValueError):
        return list(_walk(shard))


def write_rows(shard: Path, rows: list[Row]) -> None:
    """Write the index of a shard.

    Raises:
        OSError: if it cannot be written; the one before stands then.
    """
    import pyarrow
    from pyarrow import parquet

    columns = {name: [row[number] for row in rows] for number, name in enumerate(Row._fields)}
    kinds = pyarrow.array(columns["kind"], pyarrow.string())
    keys = pyarrow.array(columns["key"], pyarrow.string())
    numbers = [pyarrow.array(columns[name], pyarrow.int64()) for name in ("offset", "size")]
    table = pyarrow.table([kinds, keys, *numbers], names=list(Row._fields))
    content = io.BytesIO()
    parquet.write_table(table.replace_schema_metadata({_CHECKSUM: _checksum(rows)}), content)
    atomic_write_bytes(index_of(shard), content.getvalue())


def _indexed(shard: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    content = index_of(shard).read_bytes()
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(content)).read(use_threads=False)
        columns = [table.column(name).to_pylist() for name in Row._fields]
        checksum = (table.schema.metadata or {}).get(_CHECKSUM)
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"no parquet of ours ({error})") from None
    rows = list(map(Row._make, zip(*columns, strict=True)))  # thrice as fast as by name, of a million
    if checksum != _checksum(rows):
        raise ValueError("its rows do not fit their checksum")
    return rows


def _checksum(rows: Iterable[Row]) -> bytes:
    """Of the rows as lines of ``kind key offset size``."""
    lines = [f"{kind} {key} {offset} {size}\n" for kind, key, offset, size in rows]
    return checksum_bytes("".join(lines).encode()).encode()


def _walk(shard: Path) -> Iterator[Row]:
    offset = 0
    with suppress(OSError, ValueError), shard.open("rb") as file:
        while True:
            file.seek(offset)
            kind, key, size = entry_at(file)
            yield Row(kind, key, offset, size)
            offset += size


def _stamp(index: Path) -> _Stamp | None:
    try:
        status = index.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


R = TypeVar("R", bound="_Sized")


class _Sized(Protocol):
    @property
    def size(self) -> int: ...


def groups(entries: Iterable[R], most: int) -> Iterator[list[R]]:
    """Entries whose sizes add up to at most ``most``, or one that is larger."""
    group: list[R] = []
    total = 0
    for entry in entries:
        if group and total + entry.size > most:
            yield group
            group, total = [], 0
        group.append(entry)
        total += entry.size
    if group:
        yield group
