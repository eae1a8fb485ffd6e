"""The layouts that a dataset may have on disk: which video, caption and image belong together, and where it is written.

What makes a row usable is checked in one place for all of them (``rows``).

A new layout is a new ``_Source`` here, joined to ``SourceConfig`` and to ``AutoSource.recognise``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from finetune.datasets.columns import CAPTION_COLUMNS, IMAGE_COLUMNS, VIDEO_COLUMNS, column_of
from finetune.datasets.folders import PICTURES, Beside, left_out, list_folder
from finetune.datasets.lines import paired_lines, read_text
from finetune.datasets.rows import MAX_CAPTION_CHARS, VIDEO_SUFFIXES, RawRow, Reading, joined, require_inside
from finetune.datasets.tables import MAX_FAULTS, MAX_ROWS, SUFFIXES, Row, read_table
from finetune.errors import DataError, raise_all
from finetune.section import Strict

Split = Literal["train", "holdout"]

_MOST_CAPTION_BYTES = 4 * MAX_CAPTION_CHARS + 1024
"""Of a caption's own file: the longest caption in the widest letters, and blank lines after it."""


class _Source(Strict):
    path: Path
    """File or folder; a relative path starts at the configuration file's folder, ``~`` is the home folder,
    ``$NAME`` an environment variable."""
    repeats: float = Field(default=1.0, ge=0.001, le=10_000)
    """How often each clip is seen per epoch: 3 = three times, 0.5 = in every other epoch on average."""
    split: Split = "train"
    """``train``, or ``holdout`` for clips that are never trained on and measure the held-out loss."""
    allow_outside: bool = False
    """Let file names be absolute, hold ``..`` and be links out of the dataset's folder, as in lists of files on a
    network drive. Whoever writes the list can then have any video or image read that this account can read, and a
    linked caption file show any text: only for lists that you trust."""


class MetadataSource(_Source):
    """A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file with one row per clip."""

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
        named = {self.video_column, self.caption_column, self.image_column} - {None}
        table = read_table(file, {*VIDEO_COLUMNS, *CAPTION_COLUMNS, *IMAGE_COLUMNS, *map(str, named)})
        reading.unusable += table.faults
        if not table.columns:
            return
        video = column_of(table, self.video_column, VIDEO_COLUMNS, "video_column", file)
        caption = column_of(table, self.caption_column, CAPTION_COLUMNS, "caption_column", file)
        image = column_of(table, self.image_column, IMAGE_COLUMNS, "image_column", file)
        if image and table.columns[image]:
            # No fault of a text-to-video run; for image-to-video its own first frame stands in, and it is said.
            reading.notes.append(f"the column {image} of {file} holds {table.columns[image]}, no names: it is not read")
            image = ""
        root = file.parent if self.root is None else _located(base, self.root)
        for row in table.rows:
            picture = (row.values.get(image) or None) if image else None
            reading.rows.append(RawRow(row.values.get(video), row.values.get(caption), picture, root, row.where))

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        return [_located(base, self.path)]


class PromptsSource(_Source):
    """CogVideo's layout: a folder with ``prompts.txt`` and ``videos.txt``, which pair line by line (a blank line that
    others follow is an error), and for image-to-video optionally ``images.txt``.
    """

    kind: Literal["prompts"] = "prompts"

    def read(self, base: Path, reading: Reading) -> None:
        """Add this source's rows; raises DataError for what concerns the whole folder."""
        folder = _located(base, self.path)
        columns: list[list[str | DataError]] = []
        faults: list[DataError] = []
        for file in self.files(base):
            try:
                require_inside(file, folder, allow_outside=self.allow_outside)
                columns.append(paired_lines(file, most=MAX_ROWS, most_faults=MAX_FAULTS))
            except DataError as error:
                faults.append(error)
        raise_all(DataError, faults, what="{n} of the files that pair line by line cannot be used")
        reading.unusable += [line for column in columns for line in column if isinstance(line, DataError)]
        counts = [len(column) for column in columns]
        if len(set(counts)) > 1 or not counts[0]:
            told = ", ".join(f"{file.name} {count}" for file, count in zip(self.files(base), counts, strict=True))
            what = f"the files pair line by line, but their counts of lines are: {told}"
            raise DataError(what, where=str(folder), fix="write one line per clip in each file")
        for number, (caption, video, *image) in enumerate(zip(*columns, strict=True), start=1):
            if not any(isinstance(value, DataError) for value in (caption, video, *image)):
                where = f"{folder / 'prompts.txt'}:{number}"
                reading.rows.append(RawRow(video, caption, image[0] if image else None, folder, where))

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
            require_inside(folder / "metadata.jsonl", folder, allow_outside=self.allow_outside)
            MetadataSource(path=folder / "metadata.jsonl", allow_outside=self.allow_outside).read(base, reading)
            return
        for file in self.files(base):
            require_inside(file, folder, allow_outside=self.allow_outside)
        videos = _by_id(folder / "videos", reading)
        images = _by_id(folder / "images", reading) if (folder / "images" / "metadata.jsonl").is_file() else {}
        prompts: set[str] = set()
        for row in _rows(folder / "metadata.jsonl", reading):
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
        listing = list_folder(folder, allow_outside=self.allow_outside)
        reading.errors += listing.faults
        videos = [file for file in listing.files if file.suffix.lower() in VIDEO_SUFFIXES]
        captions, images = (Beside(listing.files, videos, suffixes) for suffixes in ((".txt",), PICTURES))
        reading.notes += left_out(folder, listing)
        if not videos and not listing.faults:
            known = f"known are {' '.join(VIDEO_SUFFIXES)}"
            raise DataError("; ".join(["the folder holds no videos", *reading.notes]), where=str(folder), fix=known)
        for video in videos:
            try:
                caption = captions.of(video)
                if caption is None:
                    name = f"{video.stem}.txt"
                    fix = f"write its caption into {name}, or take it out"
                    raise DataError(f"there is no {name} beside it", where=str(video), fix=fix)
                require_inside(caption, folder, allow_outside=self.allow_outside)
            except DataError as error:
                reading.errors.append(error)
                continue
            try:
                text = read_text(caption, most_bytes=_MOST_CAPTION_BYTES)
            except DataError as error:
                reading.unusable.append(error)
                continue
            image: object
            try:
                found = images.of(video)
                image = None if found is None else found.relative_to(folder).as_posix()
            except DataError as error:
                image = error
            reading.rows.append(RawRow(video.relative_to(folder).as_posix(), text, image, folder, str(caption)))
        for what, beside in (("text files", captions), ("images", images)):
            if strays := beside.of_none(videos):
                reading.notes.append(f"{len(strays)} {what} in {folder} belong to no clip, such as {strays[0].name}")

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        folder = _located(base, self.path)
        below = list_folder(folder, allow_outside=self.allow_outside).files
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
                return MetadataSource(path=path, allow_outside=self.allow_outside)
            raise DataError(
                "the file is no dataset",
                where=str(path),
                fix=f"name a {', '.join(SUFFIXES)} file, or the clips' folder",
            )
        if not path.is_dir():
            raise DataError("there is no such file or folder", where=str(path), fix="check data.sources")
        found: list[MetadataSource | PromptsSource | CogKitSource | FolderSource] = []
        if (path / "prompts.txt").is_file() and (path / "videos.txt").is_file():
            found.append(PromptsSource(path=path, allow_outside=self.allow_outside))
        if any((path / name).is_file() for name in ("videos/metadata.jsonl", "train/metadata.jsonl")):
            found.append(CogKitSource(path=path, allow_outside=self.allow_outside))
        else:
            for table in (path / f"metadata{suffix}" for suffix in SUFFIXES):
                # A .json beside one of the others describes the dataset, more likely than not.
                if table.is_file() and (table.suffix != ".json" or not found):
                    require_inside(table, path, allow_outside=self.allow_outside)
                    found.append(MetadataSource(path=table, allow_outside=self.allow_outside))
        listing = list_folder(path, allow_outside=self.allow_outside)
        videos = [file for file in listing.files if file.suffix.lower() in VIDEO_SUFFIXES]
        captions = Beside(listing.files, videos, (".txt",))
        if captions.of_any(videos):
            found.append(FolderSource(path=path, allow_outside=self.allow_outside))
        if not found:
            raise_all(DataError, listing.faults, what="{n} things are wrong with the folder")
        if len(found) != 1:
            kinds = " or ".join(f"{source.kind} ({source.path.name})" for source in found)
            what = f"the folder could be read as {kinds}" if found else "the folder is no dataset that is known"
            layouts = (
                "prompts.txt and videos.txt; metadata.jsonl, .csv, .parquet or .json; or clips with a .txt beside each"
            )
            what = "; ".join([what, *([] if found else left_out(path, listing))])
            fix = "write the source's kind and path" if found else f"a dataset's folder holds {layouts}"
            raise DataError(what, where=str(path), fix=fix)
        return found[0]


def _kind_of(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "auto"))
    return str(getattr(value, "kind", "auto"))  # what is no section at all is explained as a bad `auto`


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


def _rows(file: Path, reading: Reading) -> list[Row]:
    """The rows of one of CogKit's files; those that cannot be read are handed on."""
    table = read_table(file, ("id", "file_name", "prompt"))
    reading.unusable += table.faults
    return table.rows


def _by_id(folder: Path, reading: Reading) -> dict[str, tuple[object, str]]:
    """A CogKit sub-folder's ``metadata.jsonl``: id -> (file name seen from the folder above, where it is written)."""
    seen: set[str] = set()
    files: dict[str, tuple[object, str]] = {}
    for row in _rows(folder / "metadata.jsonl", reading):
        key = _id_of(row, seen, reading)
        if key is not None:
            files[key] = joined(folder.name, row.values.get("file_name")), row.where
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
