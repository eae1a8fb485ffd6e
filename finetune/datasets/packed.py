"""Datasets whose media lie inside them: folders of ``datasets.save_to_disk``, Parquet with bytes, WebDataset tars.

They are read in a worker, for over a damaged table the process ends. It writes each video and image once, to a file
that is named by its content, so that the decoder's workers have a path; nothing in a dataset names what is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.core.files import atomic_write_bytes
from finetune.datasets.rows import IMAGE, MAX_CAPTION_BYTES, VIDEO, RawRow
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


def media_folder(cache_dir: Path) -> Path:
    """Where a run's datasets are unpacked: beside its cache."""
    return cache_dir.with_name(f"{cache_dir.name}-media")


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
    if not rows or not all((media / name).is_file() for row in rows for name in (row[0], row[2]) if _is_ours(name)):
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
        ours = _is_ours(video)
        picture: object = image
        if image is not None and _is_ours(image) != ours:
            where, fix = f"{file}, row {number}", "hold both as bytes, or both as names"
            picture = DataError("of video and image one is bytes and one is a name", where=where, fix=fix)
        raw.append(RawRow(video, caption, picture, media if ours else root, f"{file}, row {number}"))
    return raw


def _rows(body: bytes) -> list[list[Any]]:
    return [json.loads(line) for line in body.splitlines()]


_MARK = "content-"


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.startswith(_MARK)


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
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = f"write the file again, or make room in {media}"
        raise DataError(f"the file cannot be unpacked: {reason:.300}", where=str(path), fix=fix) from None
    if not lines:
        raise DataError("the file has no rows", where=str(path))
    return {}, lines


def _store(chunks: Iterator[bytes], name: str, media: Path, kinds: tuple[str, ...]) -> str:
    """Write media to the file that its content names; ``name`` gives the ending."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - of any text
    suffix = suffix if suffix in kinds else kinds[0]  # what it is, the decoder tells by its content
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.NamedTemporaryFile(dir=media, prefix=".unpacked-", delete=False) as file:
        try:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            target = f"{_MARK}{digest.hexdigest()}{suffix}"
            os.replace(file.name, media / target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return target


def _table_samples(path: Path, media: Path, named: Sequence[str | None], *, images: bool) -> Iterator[list[Any]]:
    import pyarrow
    from pyarrow import ipc, parquet

    pyarrow.set_cpu_count(1)
    with pyarrow.memory_map(str(path)) as file:
        if path.suffix.lower() == ".parquet":
            table = parquet.ParquetFile(file, pre_buffer=False)
            columns = _columns(table.schema_arrow.names, named, path, images=images)
            batches = table.iter_batches(batch_size=_BATCH, columns=[name for name in columns if name])
        else:
            batches = ipc.open_stream(file)
            columns = _columns(batches.schema.names, named, path, images=images)
        for batch in batches:
            for number in range(batch.num_rows):
                video, caption, image = (name and batch.column(name)[number].as_py() for name in columns)
                yield [_named(video, media, VIDEO.suffixes), caption, _named(image, media, IMAGE.suffixes)]


def _named(value: Any, media: Path, kinds: tuple[str, ...]) -> Any:
    """The name of what a cell holds: bytes are written, a name stays; ``datasets`` has ``{bytes, path}``."""
    content, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
    if isinstance(content, bytes) and content:
        return _store(iter([content]), str(name or ""), media, kinds)
    text = name if isinstance(value, dict) else value
    return text if isinstance(text, str) and text and not text.startswith(_MARK) else None


def _columns(names: Sequence[str], named: Sequence[str | None], path: Path, *, images: bool) -> list[str | None]:
    """The columns of video, caption and image; the first or the last may be None, with ``images`` not both."""
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
    """Members that follow each other under one name are a sample, as WebDataset has it: ``a.mp4``, ``a.txt``."""
    key = ""
    parts: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isdir():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, field = base.partition(".")
            if member.name.startswith(("/", "~")) or ".." in folder.split("/") or not member.isfile():
                fix = "pack plain files under relative names"
                raise DataError(f"the member {member.name!r:.100} is refused", where=str(path), fix=fix)
            if f"{folder}/{stem}" != key and parts:
                yield _sample(parts, named)
                parts = {}
            key, suffix = f"{folder}/{stem}", f".{field.rpartition('.')[2].lower()}"
            kinds = next((kind.suffixes for kind in (VIDEO, IMAGE) if suffix in kind.suffixes), ())
            limit = MAX_MEDIA_BYTES if kinds else MAX_CAPTION_BYTES
            if (kinds or suffix in (".txt", ".json", ".caption")) and member.size > limit:
                what = f"the member {member.name!r:.100} has {member.size:,} bytes; at most {limit:,} are read"
                raise DataError(what, where=str(path), fix="leave it out")
            stream = tar.extractfile(member)
            assert stream is not None
            if kinds:
                chunks = iter(partial(stream.read, _CHUNK), b"")
                parts["video" if kinds is VIDEO.suffixes else "image"] = _store(chunks, base, media, kinds)
            elif suffix == ".json":
                content = json.loads(stream.read())
                parts["json"] = content if isinstance(content, dict) else {}
            elif suffix in (".txt", ".caption"):
                parts["text"] = stream.read().decode()
    if parts:
        yield _sample(parts, named)


def _sample(parts: dict[str, Any], named: Sequence[str | None]) -> list[Any]:
    values = parts.get("json", {})
    names = [named[1]] if named[1] else [name for name in CAPTION_COLUMNS if name in values][:1]
    caption = values.get(names[0]) if names and (named[1] or "text" not in parts) else parts.get("text")
    return [parts.get("video"), caption, parts.get("image")]
