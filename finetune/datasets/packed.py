"""Datasets whose media lie inside them: folders of ``datasets.save_to_disk``, Parquet with bytes, WebDataset tars.

They are read in a worker, for over a damaged table the process ends. It writes each video and image once, to a file
that is named by its content, so that the decoder's workers have a path; nothing in a dataset names what is written.
Here all media are written before any is encoded; for datasets larger than the disk there are ``streams``.

Tars are read with ``tarfile``, and not with ``datasets``, whose reader takes a sample into memory as a whole, refuses
tars whose first five samples differ in kind, and passes over links and devices without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from finetune.core.errors import DataError, first_line
from finetune.core.files import atomic_write_bytes
from finetune.datasets.rows import IMAGE, MAX_CAPTION_BYTES, VIDEO, FileKind, RawRow
from finetune.datasets.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, MAX_FILE_BYTES, MAX_ROWS, VIDEO_COLUMNS
from finetune.datasets.worker import Worker

SUFFIXES = (".parquet", ".arrow", ".tar")

MAX_MEDIA_BYTES = 4 << 30
"""Of one video or image inside a dataset."""

TIMEOUT_S = 3600.0
"""To unpack one file."""

WORKER = (
    "import os; os.environ.update(HF_DATASETS_OFFLINE='1', HF_HUB_OFFLINE='1'); from finetune.datasets import packed,"
    " worker; worker.serve(packed.handle_packed, file_bytes=packed.MAX_MEDIA_BYTES)"
)

_BATCH = 8
"""Rows of a table in memory at once: each may hold a video."""

_CHUNK = 1 << 20

_UNFINISHED = ".unpacked-"
"""How the name of a file begins that is being written."""

_LEFTOVER_AGE_S = 3600.0
"""An unfinished file that nobody has written to for so long belongs to a process that died."""


def packed_files(path: Path) -> list[Path]:
    """The files that a dataset of this kind is made of, in order; none if the path is none.

    Raises:
        DataError: if a folder holds several splits and none of them is called ``train``.
    """
    if path.is_file():
        return [path] if path.suffix.lower() in SUFFIXES else []
    if (path / "dataset_dict.json").is_file():
        if not (path / "train").is_dir():
            splits = ", ".join(sorted(part.name for part in path.iterdir() if part.is_dir()))
            raise DataError(f"the folder holds the splits {splits}", where=str(path), fix="name the folder of one")
        path = path / "train"
    for suffix in SUFFIXES:
        for folder in (path, path / "data"):  # the latter as datasets on the hub have them
            files = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file())
            train = [file for file in files if file.name.startswith("train-")]
            if files:
                return train or files
    return []


def remove_leftovers(media: Path) -> None:
    """Delete what killed readers left unfinished in a folder for media."""
    for path in media.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                path.unlink()


def read_packed(
    file: Path, media: Path, root: Path, columns: Sequence[str | None], *, images: bool = False
) -> list[RawRow]:
    """The rows of one file; their media are written to ``media`` unless they are there.

    Args:
        file: of ``packed_files``.
        media: the folder for them.
        root: the folder that names of files in rows start at, where a row holds a name and no bytes.
        columns: of video, caption and image; None: one with a usual name.
        images: a row without a video is its image; a column of videos may then be missing.

    Raises:
        DataError: if the file is damaged or has no such columns, or the media cannot be written.
    """
    status = file.stat()
    asked = [*columns, *(["images"] if images else [])]
    identity = json.dumps([1, str(file), status.st_size, status.st_mtime_ns, asked])
    index = media / "index" / f"{hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()}.jsonl"
    rows = _rows(index.read_bytes()) if index.is_file() else []
    if not rows or not all((media / name).is_file() for row in rows for name in (row[0], row[2]) if is_ours(name)):
        media.mkdir(parents=True, exist_ok=True)
        with closing(Worker("dataset reader", WORKER)) as worker:
            request = {"media": str(media.absolute()), "columns": list(columns), "images": images}
            _, body = worker.ask(file.absolute(), request, most_bytes=MAX_FILE_BYTES, timeout_s=TIMEOUT_S)
        rows = _rows(bytes(body))
        index.parent.mkdir(exist_ok=True)
        atomic_write_bytes(index, bytes(body))
    raw = []
    for number, (video, caption, image) in enumerate(rows, start=1):
        if images and video is None:
            video, image = image, None
        ours = is_ours(video)
        picture: object = image
        if image is not None and is_ours(image) != ours:
            where, fix = f"{file}, row {number}", "hold both as bytes, or both as names"
            picture = DataError("of video and image one is bytes and one is a name", where=where, fix=fix)
        where = f"{file}, row {number}"
        raw.append(RawRow(video, value_of(caption, where), picture, media if ours else root, where))
    return raw


def value_of(written: object, where: str) -> object:
    """A value of a row, or the DataError that stands for one that could not be read (``fault``)."""
    if not isinstance(written, dict):
        return written
    what, fix = written["fault"]
    return DataError(what, where=where, fix=fix)


def fault(what: str, fix: str) -> dict[str, Any]:
    """What stands in a row, which is JSON, in the place of a value that cannot be used."""
    return {"fault": [what, fix]}


def _rows(body: bytes) -> list[list[Any]]:
    return [json.loads(line) for line in body.splitlines()]


_MARK = "content-"


def is_ours(name: object) -> bool:
    """Whether a name is one that was made of a file's content."""
    return isinstance(name, str) and name.startswith(_MARK)


def content_digest(name: str) -> str:
    """The digest of a file's bytes (``checksums.digest_file``), from the name that was made of them."""
    return name.removeprefix(_MARK).partition(".")[0]


# --- in the worker ----------------------------------------------------------------------------------------------------


def handle_packed(fields: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Unpack a file; in a worker.

    Returns:
        Nothing, and a line of JSON for each row: the video's name, the caption, the image's name or None.

    Raises:
        DataError: if the file cannot be used.
    """
    path, media = Path(fields["path"]), Path(fields["media"])
    lines: list[bytes] = []
    try:
        if path.suffix.lower() == ".tar":
            rows = _tar_samples(path, media, fields["columns"])
        else:
            rows = _table_samples(path, media, fields["columns"], images=fields["images"])
        for row in rows:
            lines.append(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if len(lines) > MAX_ROWS:
                raise DataError(f"the file has more than {MAX_ROWS:,} rows", where=str(path), fix="split it")
    except (DataError, MemoryError):
        raise
    except Exception as error:  # of pyarrow and tarfile, and of the disk
        fix = f"write the file again, or make room in {media}"
        raise DataError(f"the file cannot be unpacked: {first_line(error):.300}", where=str(path), fix=fix) from None
    if not lines:
        raise DataError("the file has no rows", where=str(path))
    return {}, lines


def store(chunks: Iterable[bytes], name: str, media: Path, kind: FileKind) -> str:
    """Write media to the file that its content names, and return its name; ``name`` gives the ending."""
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.NamedTemporaryFile(dir=media, prefix=_UNFINISHED, delete=False) as file:
        try:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())  # the rows that name it will be on the disk, also after a power cut
            target = name_of(digest.hexdigest(), name, kind)
            os.replace(file.name, media / target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return target


def name_of(digest: str, name: str, kind: FileKind) -> str:
    """The name of a file with this content; its ending is that of ``name``, where that is one of its kind."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - of any text
    return f"{_MARK}{digest}{suffix if suffix in kind.suffixes else kind.suffixes[0]}"  # decoders go by the content


def _table_samples(path: Path, media: Path, named: Sequence[str | None], *, images: bool) -> Iterator[list[Any]]:
    import pyarrow
    from pyarrow import ipc, parquet

    pyarrow.set_cpu_count(1)
    with pyarrow.memory_map(str(path)) as file:
        if path.suffix.lower() == ".parquet":
            table = parquet.ParquetFile(file, pre_buffer=False)
            columns = columns_of(table.schema_arrow.names, named, path, images=images)
            batches = table.iter_batches(batch_size=_BATCH, columns=[name for name in columns if name])
        else:
            batches = ipc.open_stream(file)
            columns = columns_of(batches.schema.names, named, path, images=images)
        for batch in batches:
            for number in range(batch.num_rows):
                video, caption, image = (name and batch.column(name)[number].as_py() for name in columns)
                yield [_named(video, media, VIDEO), caption, _named(image, media, IMAGE)]


def _named(cell: Any, media: Path, kind: FileKind) -> str | None:
    """The name of what a cell holds: bytes are written, a name stays."""
    content, name = content_of(cell)
    if content:
        return store([content], name, media, kind)
    return name if name and not is_ours(name) else None


def content_of(cell: Any) -> tuple[bytes, str]:
    """What a cell holds, and its name; each empty where there is none. ``datasets`` has ``{bytes, path}``."""
    content, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
    return content if isinstance(content, bytes) else b"", name if isinstance(name, str) else ""


def columns_of(
    names: Sequence[str], named: Sequence[str | None], path: Path | str, *, images: bool
) -> list[str | None]:
    """The columns of video, caption and image: those that are named, or the one with a usual name.

    Args:
        names: all there are.
        named: of the three; None for one with a usual name.
        path: the file, for messages.
        images: whether a row may have an image in place of a video. Of video and image, either may then be None; else
            the latter alone.

    Raises:
        DataError: if one that is needed is not there, or several could be meant.
    """
    found: list[str | None] = []
    for column, usual in zip(named, (VIDEO_COLUMNS, CAPTION_COLUMNS, IMAGE_COLUMNS), strict=True):
        matches = [name for name in names if name == column or (column is None and name in usual)]
        is_optional = images if usual is VIDEO_COLUMNS else usual is IMAGE_COLUMNS and not (images and not found[0])
        is_needed = not is_optional
        if len(matches) > 1 or (not matches and (is_needed or column)):
            what = f"the columns {' and '.join(matches)} could both be meant" if matches else "a column is missing"
            fix = f"name video_column, caption_column and image_column; there are: {', '.join(names)[:400]}"
            raise DataError(f"{what} ({column or ', '.join(usual)})", where=str(path), fix=fix)
        found.append(matches[0] if matches else None)
    return found


def _tar_samples(path: Path, media: Path, named: Sequence[str | None]) -> Iterator[list[Any]]:
    with tarfile.open(path) as tar:

        def members() -> Iterator[tuple[str, IO[bytes]]]:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isfile():
                    raise _refused(member.name, path)
                stream = tar.extractfile(member)
                assert stream is not None
                limit = MAX_MEDIA_BYTES if kind_of_member(member.name) else MAX_CAPTION_BYTES
                if member.size > limit and member.name.lower().endswith((*VIDEO.suffixes, *IMAGE.suffixes, *_TEXTS)):
                    what = f"the member {member.name!r:.100} has {member.size:,} bytes; at most {limit:,} are read"
                    raise DataError(what, where=str(path), fix="leave it out")
                yield member.name, stream

        def keep(stream: IO[bytes], name: str, kind: FileKind) -> str:
            return store(iter(partial(stream.read, _CHUNK), b""), name, media, kind)

        yield from tar_rows(members(), named, keep, str(path))


_TEXTS = (".txt", ".caption", ".json")
"""Members of a tar that may hold a caption."""


def kind_of_member(name: str) -> FileKind | None:
    """What a tar's member is, by its ending."""
    return next((kind for kind in (VIDEO, IMAGE) if name.lower().endswith(kind.suffixes)), None)


def tar_rows(
    members: Iterable[tuple[str, IO[bytes]]],
    named: Sequence[str | None],
    keep: Callable[[IO[bytes], str, FileKind], Any],
    where: str,
) -> Iterator[list[Any]]:
    """Members that follow each other under one name are a sample, as WebDataset has it: ``a.mp4``, ``a.txt``.

    Args:
        members: names and contents, in the tar's order.
        named: as ``read_packed`` has its columns; the second one is a key of ``.json`` members.
        keep: takes a video or image in hand: what it returns stands in the row.
        where: the tar, for messages.

    Raises:
        DataError: if a member's name leads out of the tar.
    """
    key = ""
    parts: dict[str, Any] = {}
    for name, stream in members:
        folder, _, base = name.rpartition("/")
        if name.startswith(("/", "~")) or ".." in folder.split("/"):
            raise _refused(name, where)
        sample = f"{folder}/{base.partition('.')[0]}"
        if sample != key and parts:
            yield _sample(parts, named)
            parts = {}
        key = sample
        if kind := kind_of_member(base):
            parts["video" if kind is VIDEO else "image"] = keep(stream, base, kind)
        elif base.lower().endswith(_TEXTS):
            parts["json" if base.lower().endswith(".json") else "text"] = stream.read(MAX_CAPTION_BYTES + 1)
    if parts:
        yield _sample(parts, named)


def _refused(name: str, where: object) -> DataError:
    fix = "pack plain files under relative names"
    return DataError(f"the member {name!r:.100} is refused", where=str(where), fix=fix)


def _sample(parts: dict[str, Any], named: Sequence[str | None]) -> list[Any]:
    return [parts.get("video"), _caption(parts, named[1]), parts.get("image")]


def _caption(parts: dict[str, Any], named: str | None) -> Any:
    """Of a sample: ``named`` of its ``.json``, or its text, or what has a usual name; a fault if that is damaged."""
    try:
        content = json.loads(parts.get("json", b"{}"))
        values = content if isinstance(content, dict) else {}
        names = [named] if named else [name for name in CAPTION_COLUMNS if name in values][:1]
        if names and (named or "text" not in parts):
            return values.get(names[0])
        return parts["text"].decode() if "text" in parts else None
    except (ValueError, RecursionError) as error:
        return fault(f"the caption's member cannot be read: {first_line(error):.100}", "write it again, in UTF-8")
