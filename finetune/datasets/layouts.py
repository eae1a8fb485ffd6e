"""The layouts that a dataset may have on disk: which video, caption and image belong together, and where it is written.

What makes a row usable is checked in one place for all of them (``rows``).

A new layout is a new ``_Source`` here, joined to ``SourceConfig`` and to ``AutoSource.recognise``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from finetune.datasets.rows import IMAGE_SUFFIXES, VIDEO_SUFFIXES, RawRow, Reading
from finetune.datasets.tables import SUFFIXES, Row, read_lines, read_table, read_text
from finetune.errors import DataError
from finetune.section import Strict

Split = Literal["train", "holdout"]

VIDEO_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "file")
CAPTION_COLUMNS = ("prompt", "caption", "text")
IMAGE_COLUMNS = ("image", "image_path", "image_file")


class _Source(Strict):
    path: Path
    """File or folder; a relative path starts at the configuration file's folder, and ``~`` is the home folder."""
    repeats: float = Field(default=1.0, gt=0, le=10_000)
    """How often each clip is seen per epoch: 3 = three times, 0.5 = in every other epoch on average."""
    split: Split = "train"
    """``train``, or ``holdout`` for clips that are never trained on and measure the held-out loss."""


class MetadataSource(_Source):
    """A ``.jsonl``, ``.csv`` or ``.parquet`` file with one row per clip."""

    kind: Literal["metadata"] = "metadata"
    root: Path | None = None
    """Folder that the file names in the rows start at, and that none may lead out of; the metadata file's own folder if
    left out."""
    video_column: str | None = None
    """Column of video file names; left out, the one column called ``file_name``, ``video``, ``video_path``, ``path``,
    ``file_path`` or ``file``."""
    caption_column: str | None = None
    """Column of captions; left out, the one column called ``prompt``, ``caption`` or ``text``."""
    image_column: str | None = None
    """Column of first-frame images, for image-to-video only; left out, the one column called ``image``, ``image_path``
    or ``image_file``, if there is one. An empty cell means the video's own first frame."""

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole file."""
        file = _located(base, self.path)
        rows = read_table(file)
        video = _column(rows, self.video_column, VIDEO_COLUMNS, "video_column", file)
        caption = _column(rows, self.caption_column, CAPTION_COLUMNS, "caption_column", file)
        image = _column(rows, self.image_column, IMAGE_COLUMNS, "image_column", file)
        root = file.parent if self.root is None else _located(base, self.root)
        for row in rows:
            values = row.values
            picture = (values[image] or None) if image else None
            reading.rows.append(RawRow(values[video], values[caption], picture, root, row.where))

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        return [_located(base, self.path)]


class PromptsSource(_Source):
    """CogVideo's layout: a folder with ``prompts.txt`` and ``videos.txt``, which pair line by line (blank lines do not
    count), and for image-to-video optionally ``images.txt``.
    """

    kind: Literal["prompts"] = "prompts"

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole folder."""
        folder = _located(base, self.path)
        columns = [read_lines(file) for file in self.files(base)]
        counts = [len(column) for column in columns]
        if len(set(counts)) > 1 or not counts[0]:
            told = ", ".join(f"{file.name} {count}" for file, count in zip(self.files(base), counts, strict=True))
            what = f"the files pair line by line, but their counts of lines with text are: {told}"
            raise DataError(what, where=str(folder), fix="write one line per clip in each file")
        images = columns[2] if len(columns) == 3 else [(0, None)] * counts[0]
        for (line, caption), (_, video), (_, image) in zip(columns[0], columns[1], images, strict=True):
            reading.rows.append(RawRow(video, caption, image, folder, f"{folder / 'prompts.txt'}:{line}"))

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        folder = _located(base, self.path)
        optional = [folder / "images.txt"] if (folder / "images.txt").is_file() else []
        return [folder / "prompts.txt", folder / "videos.txt", *optional]


class CogKitSource(_Source):
    """CogKit's layout: a folder with ``metadata.jsonl`` (``file_name`` and ``prompt``) beside the clips; or, for
    image-to-video, ``metadata.jsonl`` (``id``, ``prompt``), ``videos/`` and optionally ``images/``, each with a
    ``metadata.jsonl`` (``file_name``, ``id``). The folder above ``train/`` serves too.
    """

    kind: Literal["cogkit"] = "cogkit"

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole folder."""
        folder = self._folder(base)
        if not (folder / "videos" / "metadata.jsonl").is_file():
            MetadataSource(path=folder / "metadata.jsonl").read(base, reading)
            return
        videos = _by_id(folder / "videos", reading)
        images = _by_id(folder / "images", reading) if (folder / "images" / "metadata.jsonl").is_file() else {}
        prompts: set[str] = set()
        for row in read_table(folder / "metadata.jsonl"):
            key = _id_of(row, prompts, reading)
            if key is None:
                continue
            if key not in videos:
                told = f"id {key!r} is not in videos/metadata.jsonl"
                reading.errors.append(DataError(told, where=row.where, fix="add it there, or take the row out"))
                continue
            image = images[key][0] if key in images else None
            reading.rows.append(RawRow(videos[key][0], row.values.get("prompt"), image, folder, row.where))
        for key, (_, where) in videos.items():
            if key not in prompts:
                told = f"id {key!r} has no prompt in {folder / 'metadata.jsonl'}"
                reading.errors.append(DataError(told, where=where, fix="add it there, or take the row out"))

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        folder = self._folder(base)
        parts = [folder / part / "metadata.jsonl" for part in ("videos", "images")]
        return [folder / "metadata.jsonl", *(part for part in parts if part.is_file())]

    def _folder(self, base: Path) -> Path:
        folder = _located(base, self.path)
        nested = not (folder / "metadata.jsonl").is_file() and (folder / "train" / "metadata.jsonl").is_file()
        return folder / "train" if nested else folder


class FolderSource(_Source):
    """A folder of clips, with its sub-folders, and beside each clip its caption: ``walk.mp4`` and ``walk.txt``. For
    image-to-video an image of that name (``walk.png``) is the first frame.
    """

    kind: Literal["folder"] = "folder"

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole folder."""
        folder = _located(base, self.path)
        files = _files_below(folder)
        videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        if not videos:
            raise DataError(
                "the folder holds no videos", where=str(folder), fix=f"known are {' '.join(VIDEO_SUFFIXES)}"
            )
        images = {file.with_suffix(""): file for file in files if file.suffix.lower() in IMAGE_SUFFIXES}
        known = set(files)
        for video in videos:
            caption = video.with_suffix(".txt")
            if caption not in known:
                fix = f"write its caption into {caption.name}, or take it out"
                reading.errors.append(DataError(f"there is no {caption.name} beside it", where=str(video), fix=fix))
                continue
            try:
                text = read_text(caption)
            except DataError as error:
                reading.errors.append(error)
                continue
            image = images.get(video.with_suffix(""))
            names = [None if file is None else file.relative_to(folder).as_posix() for file in (video, image)]
            reading.rows.append(RawRow(names[0], text, names[1], folder, str(caption)))
        stems = {video.with_suffix("") for video in videos}
        if strays := [file for file in files if file.suffix.lower() == ".txt" and file.with_suffix("") not in stems]:
            reading.notes.append(f"{len(strays)} text files in {folder} belong to no clip, such as {strays[0].name}")

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        folder = _located(base, self.path)
        below = _files_below(folder)
        folders = dict.fromkeys([folder, *(file.parent for file in below)])
        return [*folders, *(file for file in below if file.suffix.lower() == ".txt")]


class AutoSource(_Source):
    """A path whose format is recognised by what it holds; what is ambiguous is an error that asks for ``kind``."""

    kind: Literal["auto"] = "auto"

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole path."""
        self.recognise(base).read(base, reading)

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        return self.recognise(base).files(base)

    def recognise(self, base: Path) -> MetadataSource | PromptsSource | CogKitSource | FolderSource:
        """The source that this path is. Raises DataError if it is none, or could be several."""
        path = _located(base, self.path)
        if path.is_file():
            if path.suffix.lower() in SUFFIXES:
                return MetadataSource(path=path)
            raise DataError(
                "the file is no dataset",
                where=str(path),
                fix=f"name a {', '.join(SUFFIXES)} file, or the clips' folder",
            )
        if not path.is_dir():
            raise DataError("there is no such file or folder", where=str(path), fix="check data.sources")
        found: list[MetadataSource | PromptsSource | CogKitSource | FolderSource] = []
        if (path / "prompts.txt").is_file() and (path / "videos.txt").is_file():
            found.append(PromptsSource(path=path))
        if any((path / name).is_file() for name in ("videos/metadata.jsonl", "train/metadata.jsonl")):
            found.append(CogKitSource(path=path))
        else:
            tables = [path / f"metadata{suffix}" for suffix in SUFFIXES]
            found.extend(MetadataSource(path=table) for table in tables if table.is_file())
        below = _files_below(path)
        texts = {file.with_suffix("") for file in below if file.suffix.lower() == ".txt"}
        if any(file.with_suffix("") in texts for file in below if file.suffix.lower() in VIDEO_SUFFIXES):
            found.append(FolderSource(path=path))
        if len(found) != 1:
            kinds = " or ".join(f"{source.kind} ({source.path.name})" for source in found)
            what = f"the folder could be read as {kinds}" if found else "the folder is no dataset that is known"
            layouts = "prompts.txt and videos.txt; metadata.jsonl, .csv or .parquet; or clips with a .txt beside each"
            fix = "write the source's kind and path" if found else f"a dataset's folder holds {layouts}"
            raise DataError(what, where=str(path), fix=fix)
        return found[0]


def _kind_of(value: Any) -> str:
    return str(value.get("kind", "auto") if isinstance(value, dict) else value.kind)


SourceConfig = Annotated[
    Annotated[AutoSource, Tag("auto")]
    | Annotated[MetadataSource, Tag("metadata")]
    | Annotated[PromptsSource, Tag("prompts")]
    | Annotated[CogKitSource, Tag("cogkit")]
    | Annotated[FolderSource, Tag("folder")],
    Discriminator(_kind_of),
]
"""One entry of ``data.sources``; without a ``kind`` the format is recognised (``auto``)."""


def _located(base: Path, path: Path) -> Path:
    return Path(os.path.abspath(base / path.expanduser()))  # noqa: PTH100 - takes out "..", follows no links


def _column(rows: list[Row], named: str | None, usual: tuple[str, ...], option: str, file: Path) -> str:
    """The column to read: the named one, or the only one with a usual name; "" where there is no image column."""
    columns = list(rows[0].values)
    held = f"the columns are: {', '.join(columns)}"
    if named is not None:
        if named not in columns:
            raise DataError(f"there is no column '{named}'; {held}", where=str(file), fix=f"correct {option}")
        return named
    found = [name for name in usual if name in columns]
    if len(found) > 1:
        told = f"the columns {' and '.join(found)} could both be meant"
        raise DataError(told, where=str(file), fix=f"name one with {option} (kind: metadata)")
    if not found and option != "image_column":
        told = f"none of the usual columns is there ({', '.join(usual)}); {held}"
        raise DataError(told, where=str(file), fix=f"name the column with {option} (kind: metadata)")
    return found[0] if found else ""


def _by_id(folder: Path, reading: Reading) -> dict[str, tuple[object, str]]:
    """A CogKit sub-folder's ``metadata.jsonl``: id -> (file name seen from the folder above, where it is written)."""
    seen: set[str] = set()
    files: dict[str, tuple[object, str]] = {}
    for row in read_table(folder / "metadata.jsonl"):
        key = _id_of(row, seen, reading)
        if key is not None:
            name = row.values.get("file_name")
            files[key] = f"{folder.name}/{name}" if isinstance(name, str) and name else name, row.where
    return files


def _id_of(row: Row, seen: set[str], reading: Reading) -> str | None:
    """The row's id, as text so that 7 and "7" are the same; None, and an error, if it has none or another has it."""
    value = row.values.get("id")
    if not isinstance(value, int | str) or isinstance(value, bool) or value == "":
        reading.errors.append(DataError("the row has no id", where=row.where, fix='write "id" as a number or text'))
        return None
    if str(value) in seen:
        reading.errors.append(DataError(f"id {value!r} is there twice", where=row.where, fix="give every row its own"))
        return None
    seen.add(str(value))
    return str(value)


def _files_below(folder: Path) -> list[Path]:
    """Every file in a folder and its sub-folders, sorted; dot files are left out, links to folders not followed."""
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), fix="check data.sources")
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place) / name for name in files if not name.startswith(".")]
    return sorted(found)
