"""What is in a folder of clips: every file, each folder once, what belongs to which clip, and what nobody reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from finetune.core.errors import DataError, raise_all
from finetune.core.rng import seed_for
from finetune.core.text import holds_word, text_fault, without_invisible
from finetune.core.types import Sample, Strict
from finetune.datasets.rows import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_CHARS,
    OTHER_IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    PathPolicy,
    RawRow,
    RowReport,
    alike,
    check_caption,
    is_inside,
    joined,
    paired_lines,
    read_text,
    require_inside,
)
from finetune.datasets.tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MAX_FAULTS,
    MAX_ROWS,
    SUFFIXES,
    VIDEO_COLUMNS,
    Row,
    column_of,
    read_table,
)

PICTURES = (*IMAGE_SUFFIXES, *OTHER_IMAGE_SUFFIXES)

_MOST_FILES = 4_000_000

_OF_USE = (*VIDEO_SUFFIXES, *PICTURES, ".txt")


@dataclass
class Listing:
    """What is in a folder and its sub-folders, each folder once however many links lead to it."""

    files: list[Path] = field(default_factory=list)
    """Sorted."""
    faults: list[DataError] = field(default_factory=list)
    """Folders that are not read, and names that are no text: what is in them may be part of the dataset."""
    hidden: list[Path] = field(default_factory=list)
    """Videos that are left out because a name begins with a dot."""
    again: list[Path] = field(default_factory=list)
    """Links to folders that are read under another name."""


def list_folder(folder: Path, *, allow_outside: bool) -> Listing:
    """List every file in a folder and its sub-folders.

    Args:
        folder: the dataset's folder.
        allow_outside: follow links to folders outside of it; those to folders inside are followed in any case.

    Raises:
        DataError: if there is no such folder, or it holds too many files.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), fix="check data.sources")
    listing = Listing()
    root = os.path.realpath(folder)
    seen: set[str] = set()
    places = [(folder, False)]
    links: list[Path] = []
    count = 0
    while places or links:
        # Links come last, so that a folder is read under its own name and not again under a link's.
        place, hidden = places.pop() if places else (links.pop(), False)
        real = os.path.realpath(place)
        if not hidden:
            if not allow_outside and not is_inside(real, root):
                told = f"{place.name} is a link to a folder outside of {folder}, which is not read"
                fix = "set allow_outside: true for a folder that you trust, or name it as a source of its own"
                listing.faults.append(DataError(told, where=str(place), fix=fix))
                continue
            if real in seen:
                if place.is_symlink():
                    listing.again.append(place)
                continue
            seen.add(real)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if not hidden:
                told = f"the folder cannot be read: {error.strerror}"
                listing.faults.append(DataError(told, where=str(place), fix="make it readable, or take it out"))
            continue
        count += len(entries)
        if count > _MOST_FILES:
            fix = "name the folder of the clips, or list them in a metadata file"
            raise DataError(f"more than {_MOST_FILES:,} files are in the folder", where=str(folder), fix=fix)
        for entry in entries:
            path, suffix = place / entry.name, os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            is_link = entry.is_symlink()
            is_folder = entry.is_dir(follow_symlinks=False) or (is_link and path.is_dir())
            if hidden or entry.name.startswith("."):
                if is_folder and not is_link:
                    places.append((path, True))
                elif suffix in VIDEO_SUFFIXES and not entry.name.startswith("._"):  # which macOS puts beside every file
                    listing.hidden.append(path)
            elif (is_folder or suffix in _OF_USE) and (fault := text_fault(entry.name, one_line=True)):
                # No record of the run could name it, and no terminal should.
                told = f"a {'folder' if is_folder else 'file'}'s name is damaged: {fault}"
                listing.faults.append(DataError(told, where=str(path), fix="rename it, in UTF-8"))
            elif is_folder and is_link:
                links.append(path)
            elif is_folder:
                places.append((path, False))
            elif is_link and suffix not in _OF_USE and not path.exists():
                told = f"{entry.name} is a link that leads nowhere"
                listing.faults.append(DataError(told, where=str(path), fix="mend it, or take it out"))
            else:
                listing.files.append(path)
    listing.files.sort()
    # A folder may be hidden by its own name and read under that of a link.
    listing.hidden = sorted(path for path in listing.hidden if os.path.realpath(path.parent) not in seen)
    return listing


class Beside:
    """Files that lie beside videos under their names; where a name is no video's, case and Unicode form do not matter.

    Args:
        files: of the whole dataset.
        videos: those of them that are videos.
        suffixes: in lower case, of those that are looked for.
    """

    def __init__(self, files: Iterable[Path], videos: Iterable[Path], suffixes: tuple[str, ...]) -> None:
        stems = {video.with_suffix("") for video in videos}
        self._groups: dict[object, list[Path]] = {}
        for file in files:
            if file.suffix.lower() in suffixes:
                stem = file.with_suffix("")
                self._groups.setdefault(stem if stem in stems else self._key(stem), []).append(file)

    @staticmethod
    def _key(stem: Path) -> tuple[Path, str]:
        return stem.parent, alike(stem.name)

    def _group(self, video: Path) -> list[Path]:
        stem = video.with_suffix("")
        return self._groups.get(stem) or self._groups.get(self._key(stem), [])

    def of(self, video: Path) -> Path | None:
        """The file beside a video, if there is one. Raises DataError if there are several."""
        found = self._group(video)
        if len(found) > 1:
            names = " and ".join(file.name for file in found)
            raise DataError(f"{names} could both belong to it", where=str(video), fix="leave one of them there")
        return found[0] if found else None

    def of_any(self, videos: Iterable[Path]) -> bool:
        """Whether a file lies beside any of the videos."""
        return any(self._group(video) for video in videos)

    def of_none(self, videos: Iterable[Path]) -> list[Path]:
        """The files that lie beside none of the videos."""
        taken = {file for video in videos for file in self._group(video)}
        return [file for files in self._groups.values() for file in files if file not in taken]


def left_out(folder: Path, listing: Listing) -> list[str]:
    """Notes on what a folder of clips holds and nobody reads."""
    others = [file for file in listing.files if file.suffix.lower() not in _OF_USE]
    notes = []
    if others:
        kinds = Counter(file.suffix.lower() or "without ending" for file in others)
        told = ", ".join(f"{count} {kind:.20}" for kind, count in kinds.most_common(8))
        notes.append(f"{len(others)} files in {folder} are of no kind that is read: {told}; such as {others[0].name}")
    if listing.hidden:
        name = listing.hidden[0].relative_to(folder).as_posix()
        notes.append(
            f"{len(listing.hidden)} videos in {folder} have a name or folder that begins with a dot, such as {name}"
        )
    if listing.again:
        name = listing.again[0].relative_to(folder).as_posix()
        notes.append(f"{len(listing.again)} links in {folder} lead to a folder that is read already, such as {name}")
    return notes


# -------- The layouts that a dataset may have on disk: which video, caption and image belong together, and where it
# is written.
#
# What makes a row usable is checked in one place for all of them (``rows``).
#
# A new layout is a new ``_Source`` here, joined to ``SourceConfig`` and to ``AutoSource.recognise``.

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

    def read(self, base: Path, reading: RowReport) -> None:
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

    def read(self, base: Path, reading: RowReport) -> None:
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

    def read(self, base: Path, reading: RowReport) -> None:
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

    def read(self, base: Path, reading: RowReport) -> None:
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

    def read(self, base: Path, reading: RowReport) -> None:
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


def _rows(file: Path, reading: RowReport) -> list[Row]:
    """The rows of one of CogKit's files; those that cannot be read are handed on."""
    table = read_table(file, ("id", "file_name", "prompt"))
    reading.unusable += table.faults
    return table.rows


def _by_id(folder: Path, reading: RowReport) -> dict[str, tuple[object, str]]:
    """A CogKit sub-folder's ``metadata.jsonl``: id -> (file name seen from the folder above, where it is written)."""
    seen: set[str] = set()
    files: dict[str, tuple[object, str]] = {}
    for row in _rows(folder / "metadata.jsonl", reading):
        key = _id_of(row, seen, reading)
        if key is not None:
            files[key] = joined(folder.name, row.values.get("file_name")), row.where
    return files


def _id_of(row: Row, seen: set[str], reading: RowReport) -> str | None:
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


# -------- From the sources of a dataset to its samples, with every bad row reported at once, before anything is
# decoded.

_Value = TypeVar("_Value")


class CaptionConfig(Strict):
    """What is added to every caption when it is read."""

    trigger: str = ""
    """Trigger word, such as ``zkx``: put before everything else with a space after it, unless prefix, caption and
    suffix together hold it already as a word of its own, in the same case."""
    caption_prefix: str = ""
    """Put before every caption exactly as written: end it with a space where one is wanted (and quote it in YAML)."""
    caption_suffix: str = ""
    """Put after every caption exactly as written."""
    unreadable_captions: Literal["warn", "error"] = "warn"
    """What happens where the model's text encoder does not know a caption's characters (T5 knows English and a few more
    languages; Chinese, emoji and ``{`` become one unknown mark): say so, or stop where most of a caption is unknown and
    where two captions differ in unknown characters only."""

    @field_validator("trigger", "caption_prefix", "caption_suffix")
    @classmethod
    def _plain_text(cls, text: str) -> str:
        if fault := text_fault(text, one_line=True):
            raise ValueError(f"must be one line of text: {fault}")
        return text

    def apply(self, caption: str) -> str:
        """The caption that is trained on: white space joined to single spaces, then prefix, suffix and trigger.

        Characters that are invisible and mean nothing (zero-width spaces, byte order marks, soft hyphens) are left out.
        """
        # T5's tokenizer joins white space too, so this changes no token; it makes equal captions share a cache entry.
        text = f"{self.caption_prefix}{' '.join(without_invisible(caption).split())}{self.caption_suffix}"
        trigger = self.trigger.strip()
        return text if holds_word(text, trigger) else f"{trigger} {text}"


@dataclass(frozen=True)
class SourceRead:
    """All samples of a dataset, in the order of the sources and of their rows."""

    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Advice that is no error, such as duplicate rows."""
    unusable: tuple[DataError, ...] = ()
    """Rows left out because their text cannot be used; empty unless that was asked for."""


def read_samples(
    sources: Sequence[SourceConfig], captions: CaptionConfig, *, image_to_video: bool, base: Path, skip: bool = False
) -> SourceRead:
    """Read and check every row of every source; no video is opened.

    Args:
        sources: where to read.
        captions: what is added to every caption.
        image_to_video: read first-frame images where a source names them; a row without one gets ``image=None``, which
            means the video's own first frame. False: images are neither read nor checked.
        base: folder that relative paths start at.
        skip: leave out rows that cannot be read or whose caption is unusable, and go on. A row that names a missing
            file or one outside its folder is an error all the same: the dataset is not what it should be.

    Raises:
        DataError: listing all that is wrong, each with file and line: rows that cannot be used, sources that cannot be
            read, a video in both splits, or no training clip at all.
    """
    errors: list[DataError] = []
    unusable: list[DataError] = []
    notes: list[str] = []
    split: dict[Split, list[Sample]] = {"train": [], "holdout": []}
    gate = PathPolicy()
    for source in sources:
        reading = RowReport()
        try:
            source.read(base, reading)
        except DataError as error:
            errors.append(error)
        errors += reading.errors
        unusable += reading.unusable
        notes += reading.notes
        for row in reading.rows:
            sample = _check(row, captions, source, image_to_video, base, gate, (errors, unusable))
            if sample is not None:
                split[source.split].append(sample)
            if len(errors) + len(unusable) > MAX_FAULTS:
                errors.append(DataError("too much is wrong with the dataset to go on reading it", where=row.where))
                break
    if not skip:
        errors += unusable
    errors += _leaks(split["train"], split["holdout"], gate)
    if not errors and not split["train"]:
        fault = DataError("the sources hold no training clip", where="data.sources", fix="add one of split: train")
        errors += [*unusable, fault]
    raise_all(DataError, errors, what="{n} things are wrong with the dataset")
    notes += _duplicates([*split["train"], *split["holdout"]], gate)
    return SourceRead(tuple(split["train"]), tuple(split["holdout"]), tuple(notes), tuple(unusable) if skip else ())


def source_files(sources: Sequence[SourceConfig], base: Path) -> list[Path]:
    """What decides which rows ``read_samples`` finds: files by their content, folders by their listing.

    Whoever keeps the result of reading can tell from these, without reading again, whether it still holds. Videos and
    images are not among them. Raises DataError if a source's layout cannot be told.
    """
    return list(dict.fromkeys(file for source in sources for file in source.files(base)))


def _check(
    row: RawRow,
    captions: CaptionConfig,
    source: SourceConfig,
    image_to_video: bool,
    base: Path,
    gate: PathPolicy,
    faults: tuple[list[DataError], list[DataError]],
) -> Sample | None:
    """The sample that a row gives; None, and all that is wrong with its files and its text in ``faults``, if none."""

    def tried(into: list[DataError], check: Callable[..., _Value], *arguments: Any, **options: Any) -> _Value | None:
        try:
            return check(*arguments, row.where, **options)
        except DataError as error:
            into.append(error)
            return None

    of_files, of_text = faults
    allowed = {"allow_outside": source.allow_outside}
    wrong_before = len(of_files)
    video = tried(of_files, gate.file, row.video, row.root, VIDEO_SUFFIXES, "video", **allowed)
    image = None
    if image_to_video and isinstance(row.image, DataError):
        of_files.append(row.image)
    elif image_to_video and row.image is not None:
        image = tried(of_files, gate.file, row.image, row.root, IMAGE_SUFFIXES, "image", **allowed)
    caption = tried(of_text, check_caption, row.caption)
    if video is None or caption is None or len(of_files) > wrong_before:
        return None
    where = row.where.removeprefix(f"{os.path.abspath(base)}{os.sep}")  # noqa: PTH100 - as layouts writes it
    return Sample(video, captions.apply(caption), image, where, source.repeats)


def _leaks(train: Sequence[Sample], holdout: Sequence[Sample], gate: PathPolicy) -> Iterator[DataError]:
    """Held-out clips that are trained on: the held-out loss would measure memory."""
    trained = {gate.real(sample.video): sample.where for sample in train} if holdout else {}
    for sample in holdout:
        if (where := trained.get(gate.real(sample.video))) is not None:
            what = f"{sample.video} is held out, and also a training clip ({where})"
            yield DataError(what, where=sample.where, fix="take it out of one of the two")


def _duplicates(samples: Iterable[Sample], gate: PathPolicy) -> list[str]:
    first: dict[tuple[str, str], str] = {}
    twice: list[str] = []
    for sample in samples:
        where = first.setdefault((gate.real(sample.video), sample.caption), sample.where)
        if where != sample.where:
            twice.append(f"{sample.where} repeats {where}")
    return [f"{len(twice)} rows have the video and caption of another row, such as: {twice[0]}"] if twice else []


# -------- Which clips are kept out of training, to measure on.


class ValSplitConfig(Strict):
    """Which clips are kept out of training, to measure on."""

    holdout: float = Field(0, ge=0, le=1_000_000)
    """Videos to keep out of training for the held-out loss: a fraction below 1, or a whole number of videos. All
    clips of one video go to the same side. Sources marked ``split: holdout`` are held out in any case."""

    @model_validator(mode="after")
    def _fraction_or_count(self) -> ValSplitConfig:
        if self.holdout >= 1 and not float(self.holdout).is_integer():
            raise ValueError(f"data.holdout is {self.holdout}: give a fraction below 1 or a whole number of videos")
        return self


def choose_val_split(videos: Sequence[str], holdout: float) -> frozenset[str]:
    """Pick the held-out videos by the digest of their identity, so that adding a clip moves as few others as possible.

    Args:
        videos: one identity per video (its content digest); repeats count once.
        holdout: ``HoldoutConfig.holdout``.

    Returns:
        The identities held out; never all of them, because training needs one.
    """
    unique = sorted(set(videos), key=lambda video: seed_for(0, "holdout", video))
    count = round(holdout * len(unique)) if holdout < 1 else int(holdout)
    if 0 < holdout < 1 and len(unique) > 1:
        count = max(1, count)
    return frozenset(unique[: min(count, max(len(unique) - 1, 0))])
