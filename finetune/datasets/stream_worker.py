"""The rows of a stream one at a time, read by HF ``datasets`` from this machine or from the hub; in a worker.

A request names a row by its file, its row group and its number in there, so it can be asked again of a worker that was
started anew, or years later; rows that follow each other are read on from one open file. Of Parquet each row group is
opened alone (``IterableDataset.reshard``), so what lies before it is not read again. A tar has no such places: of one
that was read in part, what was read goes over the network once more, and nothing of it is kept or encoded again.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from finetune.core.errors import DataError, first_line
from finetune.datasets.hub import hub_fault
from finetune.datasets.packed import columns_of, content_of, fault, name_of, store, tar_rows
from finetune.datasets.rows import IMAGE, VIDEO, FileKind

LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
"""Of ``datasets``, by a file's ending."""

_CHUNK = 1 << 20


def handle_stream(fields: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Answer what a dataset on the hub is made of (``revision`` is asked for), or what stands in a row."""
    return _listed(str(fields["path"]), fields["revision"]) if "revision" in fields else (_row(fields), [])


# --- what a dataset on the hub is made of -----------------------------------------------------------------------------


def _listed(repo: str, revision: str | None) -> tuple[dict[str, Any], list[bytes]]:
    """The loader and the commit; and a line for each file of the split ``train``, or of the only one."""
    import datasets
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(repo, revision=revision).sha
        builder = datasets.load_dataset_builder(repo, revision=commit)
    except Exception as error:  # as in `fetch_dataset`
        raise hub_fault(error, repo, revision) from None
    where, loader = f"{repo} on the Hugging Face hub", type(builder).__module__.rpartition(".")[2]
    if loader not in LOADERS.values():
        fix = "leave stream_room out, which downloads it whole, or download a part and name its folder (docs/data.md)"
        raise DataError(
            f"only Parquet, Arrow and WebDataset are read as streams; this is {loader}", where=where, fix=fix
        )
    splits = builder.config.data_files or {}
    files = splits.get("train", next(iter(splits.values())) if len(splits) == 1 else None)
    if files is None:
        raise DataError(f"of its splits none is called train: {', '.join(map(str, splits))}", where=where)
    return {"loader": loader, "commit": commit}, [f"{file}\n".encode() for file in files]


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(fields: dict[str, Any]) -> dict[str, Any]:
    """What stands at ``group`` and ``index`` of ``file``; its media are written to ``media`` if there is ``room``.

    Returns:
        ``row`` (video, caption, image: of media, name and bytes) and whether media were written; or ``full``: the bytes
        that there is no room for; or ``end``, the rows of the group, with the number of ``groups``; or ``broken`` for a
        damaged file, with the ``rows`` before that; or ``lost`` for one that could not be reached or read.
    """
    global _reader
    if _reader is None or _reader.place != (fields["file"], fields["group"]) or _reader.index > fields["index"]:
        _reader = _Reader(fields)
    try:
        row = _reader.at(fields["index"])
        if row is None:
            return {"end": _reader.index + 1, "groups": _reader.groups}
        return _stored(row, fields)
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow, tarfile, datasets, the hub's client, and of the disk
        before = {"rows": _reader.index + 1, "groups": _reader.groups}
        _reader = None
        _open_table.cache_clear()
        if isinstance(error, DataError):
            return {"broken": [error.what, error.fix], **before}
        return {"broken" if _is_damage(error) else "lost": [f"{first_line(error):.300}", ""], **before}


def _is_damage(error: Exception) -> bool:
    """Whether an error says that the file is not what it should be; otherwise it may be read another time."""
    import pyarrow

    return isinstance(error, pyarrow.ArrowInvalid | tarfile.TarError | EOFError | ValueError) and not isinstance(
        error, OSError
    )


@dataclass(frozen=True)
class _Media:
    """A video or image in hand."""

    content: bytes
    name: str
    kind: FileKind

    @property
    def file_name(self) -> str:
        return name_of(hashlib.blake2b(self.content, digest_size=16).hexdigest(), self.name, self.kind)


def _stored(row: Sequence[Any], fields: dict[str, Any]) -> dict[str, Any]:
    wanted = [cell for cell, is_wanted in zip(row, (True, False, fields["images"]), strict=True) if is_wanted]
    media = [cell for cell in wanted if isinstance(cell, _Media)]
    size = sum(len(one.content) for one in media)
    if size > fields["room"]:
        return {"full": size}
    for one in media:
        store([one.content], one.name, Path(fields["media"]), one.kind)
    values = [[cell.file_name, len(cell.content)] if isinstance(cell, _Media) else cell for cell in row]
    return {"row": values, "size": size}


class _Reader:
    """The rows of one row group, of which the one that was asked for last is in hand."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.place = (fields["file"], fields["group"])
        self.index = -1
        self.groups: int = fields["group"] + 1
        self._most: int = fields["most"]
        self._row: list[Any] | None = None
        self._wanted = 0
        tar = fields["loader"] == "webdataset"
        self._stills: bool = fields["stills"]
        self._rows = self._of_tar(fields["columns"]) if tar else self._of_table(fields["loader"], fields["columns"])

    def at(self, index: int) -> list[Any] | None:
        """The row of a number; None, and ``self.index`` is the last one's, if there is none."""
        self._wanted = index
        while self.index < index:
            row = next(self._rows, None)
            if row is None:
                return None
            video, caption, image = row
            self._row = [image, caption, None] if self._stills and video is None else row
            self.index += 1
        return self._row

    def _of_table(self, loader: str, named: Sequence[str | None]) -> Iterator[list[Any]]:
        path, group = self.place
        columns, table = _open_table(path, loader, tuple(named), self._stills)
        self.groups = table.num_shards
        for row in table.shard(table.num_shards, group):
            video, caption, image = (name and row[name] for name in columns)
            yield [self._cell(video, VIDEO), caption, self._cell(image, IMAGE)]

    def _cell(self, cell: Any, kind: FileKind) -> Any:
        content, name = content_of(cell)
        if len(content) > self._most:
            return _too_large(len(content), self._most, kind)
        if not content and name:
            what = f"the row names the {kind.name} {name:.100} and does not hold it"
            return fault(what, "a stream reads datasets that hold their media: leave stream_room out")
        return _Media(content, name, kind) if content else None

    def _of_tar(self, named: Sequence[str | None]) -> Iterator[list[Any]]:
        import datasets

        def keep(stream: IO[bytes], name: str, kind: FileKind) -> Any:
            if self.index + 1 < self._wanted:  # passed over
                return None
            chunks, size = [], 0
            while chunk := stream.read(_CHUNK):
                chunks.append(chunk)
                size += len(chunk)
                if size > self._most:
                    return _too_large(size, self._most, kind)
            return _Media(b"".join(chunks), name, kind) if size else None

        members = datasets.StreamingDownloadManager().iter_archive(self.place[0])
        yield from tar_rows(members, named, keep, self.place[0])


@functools.lru_cache(maxsize=1)
def _open_table(path: str, loader: str, named: Sequence[str | None], stills: bool) -> tuple[list[str | None], Any]:
    """The columns of video, caption and image, and the file as a stream whose shards are its row groups."""
    import datasets

    files = {"train": [path if "://" in path else glob.escape(path)]}
    names = datasets.load_dataset(loader, data_files=files, split="train", streaming=True).column_names
    columns = columns_of(names, named, path, images=stills)
    # Without it each batch is as large as the first row group, whose videos would all be in memory.
    options = {"columns": [name for name in columns if name], "batch_size": 1} if loader == "parquet" else {}
    table = datasets.load_dataset(loader, data_files=files, split="train", streaming=True, **options)
    return columns, table.decode(False).reshard()


def _too_large(size: int, most: int, kind: FileKind) -> dict[str, Any]:
    what = f"the {kind.name} has {size:,} bytes or more; at a time half of stream_room is read, {most:,} here"
    return {**fault(what, "raise stream_room, or leave the row out"), "size": size}


_reader: _Reader | None = None
