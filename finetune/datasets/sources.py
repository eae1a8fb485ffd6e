"""The layouts that a dataset may have on disk.

A layout only says which video, caption and image belong together, and where that is written (``RawRow``); what makes a
row usable is checked in one place for all of them (``samples``). A new layout is a new ``_Source`` here, joined to
``SourceConfig`` and to ``AutoSource.recognise``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from finetune.core.errors import DataError, raise_all
from finetune.core.gpu import parse_bytes
from finetune.core.text import text_fault
from finetune.core.types import CompanionName, Strict
from finetune.datasets.hub import fetch_dataset
from finetune.datasets.musubi import read_musubi
from finetune.datasets.packed import packed_files, read_packed, remove_leftovers
from finetune.datasets.paired_files import only_file, read_paired_lines, read_paired_tables
from finetune.datasets.rows import (
    MAX_CAPTION_BYTES,
    MEDIA,
    PICTURES,
    VIDEO,
    RawRow,
    RowReport,
    Sidecars,
    has_ending,
    is_still,
    list_folder,
    or_error,
    require_inside,
    without_companions,
)
from finetune.datasets.spans import PANDA_COLUMNS, rows_of
from finetune.datasets.streams import Stream, recorded_rows
from finetune.datasets.tables import (
    CAPTION_COLUMNS,
    COMPANION_COLUMNS,
    IMAGE_COLUMNS,
    SUFFIXES,
    VARIANTS,
    VIDEO_COLUMNS,
    column_of,
    read_lines,
    read_table,
    read_text,
)

# --- layouts ----------------------------------------------------------------------------------------------------------

Split = Literal["train", "holdout"]

TYPE_COLUMN = "type"
"""VideoX-Fun's lists say in it whether a row is a ``video`` or an ``image``."""


def _one_line(text: str) -> str:
    if fault := text_fault(text, one_line=True):
        raise ValueError(f"must be one line of text: {fault}")
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""One line of text, without what a terminal obeys."""


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
    trigger: Line | None = None
    """In place of ``data.trigger`` for this source; ``""`` for none, as regularisation clips want it."""
    caption_prefix: Line | None = None
    """In place of ``data.caption_prefix``; ``""`` for none."""
    caption_suffix: Line | None = None
    """In place of ``data.caption_suffix``; ``""`` for none."""
    caption_dropout: float | None = Field(default=None, ge=0, le=1)
    """In place of ``data.caption_dropout``."""
    weight: float = Field(default=1.0, ge=0.001, le=1_000)
    """What the loss of each of its clips is multiplied by in training, before the mean over the step's clips. What is
    logged, and the held-out loss, is not weighted."""
    prior_preservation: bool = False
    """Keep what the base model makes of these captions (LoRA only): the loss of its clips is the distance to what the
    model predicts without the adapter, for the same noised clip and caption. For clips and captions of what must not
    change, beside those that teach something; ``weight`` says how much it counts. Each of its micro-batches takes one
    more forward pass."""
    images: bool = False
    """Train on its still images too, each as a clip of one frame (text-to-video only): a file that is an image, in a
    folder one that lies beside no video."""
    random_flip: bool = False
    """Show each clip mirrored left to right half of the time, chosen by seed, step and place in the step. Its mirrored
    form is encoded too. Clips with a caption that says left or right are never mirrored, nor are held-out ones."""

    @model_validator(mode="after")
    def _held_out_is_not_trained_on(self) -> _Source:
        training = ("caption_dropout", "weight", "random_flip", "prior_preservation")
        idle = [name for name in training if getattr(self, name) != SOURCE_SINCE[name]]
        if self.split == "holdout" and idle:
            raise ValueError(f"{' and '.join(idle)} would have no effect: what is held out is never trained on")
        return self

    def read(self, base: Path, report: RowReport) -> None:
        """Add this source's rows; raises DataError for what concerns the whole file or folder."""
        raise NotImplementedError

    def files(self, base: Path) -> list[Path]:
        """What decides which rows are read: a file by its content, a folder by its listing."""
        raise NotImplementedError

    def stream(self, base: Path) -> Stream | None:
        """What is read row by row, its media on the disk only until they are encoded; None for what lies there."""
        return None

    def _located(self, base: Path, path: Path | None = None) -> Path:
        # Takes out "..", follows no links.
        return Path(os.path.abspath(base / (path or self.path).expanduser()))  # noqa: PTH100


SOURCE_SINCE: Mapping[str, float | str | None] = {
    **dict.fromkeys(("trigger", "caption_prefix", "caption_suffix", "caption_dropout")),
    "weight": 1.0,
    "prior_preservation": False,
    "random_flip": False,
    "images": False,
    "stream_room": None,
    "control_column": None,
    "mask_column": None,
}
"""Options that sources did not always have, with what was done before: what was recorded without them is the same."""


def source_since(kind: object) -> Mapping[str, float | str | None]:
    """``SOURCE_SINCE`` for sources of one kind."""
    columns = ("video_column", "caption_column", "image_column") if kind == "hub" else ()
    return {**SOURCE_SINCE, **dict.fromkeys(columns)}


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
    """Column of captions; left out, the one column called ``prompt``, ``caption`` or ``text``. A list in a column
    ``captions`` is further captions of the clip."""
    image_column: str | None = None
    """Column of first-frame images, for image-to-video only; left out, the one column called ``image``, ``image_path``
    or ``image_file``, if there is one. An empty cell means the video's own first frame."""
    control_column: str | None = None
    """Column of control videos, for ``model.control`` only; left out, the one column called ``control``,
    ``control_path``, ``control_file`` or ``control_video``."""
    mask_column: str | None = None
    """Column of mask videos or images, for ``objective.masked`` only; left out, the one column called ``mask``,
    ``mask_path``, ``mask_file`` or ``mask_video``, if there is one. An empty cell means that all of it is learnt."""

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows of the file."""
        file = self._located(base)
        beside: dict[CompanionName, str | None] = {"control": self.control_column, "mask": self.mask_column}
        named = {self.video_column, self.caption_column, self.image_column, *beside.values()} - {None}
        usual = {*VIDEO_COLUMNS, *CAPTION_COLUMNS, VARIANTS, *IMAGE_COLUMNS, TYPE_COLUMN}
        usual |= {name for names in COMPANION_COLUMNS.values() for name in names}
        table = read_table(file, usual | {str(name) for name in named})
        report.unusable += table.faults
        if not table.columns:
            return
        image = column_of(table, self.image_column, IMAGE_COLUMNS, "image_column", file)
        only_images = self.images and image and not self.video_column and not table.columns.keys() & set(VIDEO_COLUMNS)
        video = "" if only_images else column_of(table, self.video_column, VIDEO_COLUMNS, "video_column", file)
        listed = VARIANTS in table.columns and not table.columns.keys() & set(CAPTION_COLUMNS)
        one_of = (VARIANTS,) if listed else CAPTION_COLUMNS
        caption = column_of(table, self.caption_column, one_of, "caption_column", file)
        if only_images and table.columns[image]:
            fix = "name a column of text with image_column (kind: metadata); for images inside the file, kind: packed"
            raise DataError(f"the column {image} holds {table.columns[image]}, not text", where=str(file), fix=fix)
        if image and table.columns[image]:
            # No fault of a text-to-video run; for image-to-video its own first frame stands in, and it is said.
            report.notes.append(f"the column {image} of {file} holds {table.columns[image]}, no names: it is not read")
            image = ""
        columns = {
            name: column_of(table, column, COMPANION_COLUMNS[name], f"{name}_column", file)
            for name, column in beside.items()
        }
        root = file.parent if self.root is None else self._located(base, self.root)
        stills, reworded = [], []
        for row in table.rows:
            name, picture = row.values.get(video), (row.values.get(image) or None) if image else None
            if self.images and not name:  # a row with an image and no video
                name, picture = picture, None
            if not self.images and row.values.get(TYPE_COLUMN) == "image" and str(name).lower().endswith(PICTURES):
                stills.append(row.where)
                continue
            text, more = row.values.get(caption), row.values.get(VARIANTS)
            if isinstance(more, list) and more:  # what is no list is another column
                if text and caption != VARIANTS and _words(text) not in map(_words, more):
                    reworded.append(row.where)
                text = (*([text] if text and caption != VARIANTS else []), *more)
            companions = {name: row.values[column] for name, column in columns.items() if row.values.get(column)}
            report.rows.append(RawRow(name, text, picture, root, row.where, companions=companions))
        if reworded:
            what = f"{len(reworded)} rows of {file} have a {caption} that is none of their {VARIANTS}, such as"
            report.notes.append(f"{what} {reworded[0]}: all are trained on, also what was reworded in one place only")
        if stills:
            what = f"{len(stills)} rows of {file} are of type image and not read, such as {stills[0]}"
            report.notes.append(f"{what} (images: true trains on them)")

    def files(self, base: Path) -> list[Path]:
        """The file."""
        return [self._located(base)]


def _words(text: object) -> list[str]:
    return str(text).split()


class SpansSource(_Source):
    """A table whose rows are parts of longer videos: a ``timestamp`` column as Panda-70M has it, or begin and end."""

    kind: Literal["spans"] = "spans"
    root: Path | None = None
    """Folder that the videos' names start at, and that none may lead out of; the table's own folder if left out."""
    video_column: str = "videoID"
    """Column of video file names; one without an ending is looked for with each that is known."""
    caption_column: str = "caption"
    """Column of captions: a list of them where the row has a list of spans."""
    span_columns: tuple[str] | tuple[str, str] = ("timestamp",)
    """One column with a span or a list of spans, or two columns with begin and end; each time in seconds or as
    ``0:01:02.345``."""

    def read(self, base: Path, report: RowReport) -> None:
        """Add a row for every span."""
        file = self._located(base)
        table = read_table(file, {self.video_column, self.caption_column, *self.span_columns})
        report.unusable += table.faults
        for option, column in (
            ("video_column", self.video_column),
            ("caption_column", self.caption_column),
            *(("span_columns", column) for column in self.span_columns),
        ):
            column_of(table, column, (), option, file)
        root = file.parent if self.root is None else self._located(base, self.root)
        for row in table.rows:
            rows = or_error(rows_of, row, (self.video_column, self.caption_column), self.span_columns, root)
            if isinstance(rows, DataError):
                report.unusable.append(rows)
            else:
                report.rows += rows

    def files(self, base: Path) -> list[Path]:
        """The file."""
        return [self._located(base)]


class MusubiSource(_Source):
    """musubi-tuner's dataset TOML: the videos of its ``video_directory`` and ``video_jsonl_file`` entries, and with
    ``images: true`` the images of ``image_directory`` and ``image_jsonl_file``.

    Relative paths in it start at its own folder. What it says of frames and sizes is not read: that is ``data``'s.
    """

    kind: Literal["musubi"] = "musubi"

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows of every dataset that it names."""
        datasets, notes = read_musubi(self._located(base), images=self.images)
        report.notes += notes
        for dataset, source in zip(datasets, self._sources(base), strict=True):
            first = len(report.rows)
            source.read(base, report)
            report.rows[first:] = [replace(row, repeats=dataset.repeats) for row in report.rows[first:]]

    def files(self, base: Path) -> list[Path]:
        """The file, and those of what it names."""
        return [self._located(base), *(file for source in self._sources(base) for file in source.files(base))]

    def _sources(self, base: Path) -> list[MetadataSource | FolderSource]:
        sources: list[MetadataSource | FolderSource] = []
        folder = self._located(base).parent
        for dataset in read_musubi(self._located(base), images=self.images)[0]:
            require_inside(dataset.path, folder, allow_outside=self.allow_outside)
            kind = MetadataSource if dataset.is_list else FolderSource
            sources.append(kind(path=dataset.path, allow_outside=self.allow_outside, images=dataset.has_images))
        return sources


class _MediaSource(_Source):
    """What sources have in common whose rows may hold media."""

    stream_room: str | None = None
    """Read it as a stream, for media that the disk does not hold: at most so much of them (``20GB``) lies on it at one
    time, and each is deleted when it is encoded. Left out, all are written to the disk first."""
    video_column: str | None = None
    """Column of videos, bytes or names; left out, the one with a usual name (``kind: metadata``). Tars have none."""
    caption_column: str | None = None
    """Column of captions, in a tar a key of the ``.json`` members; left out, the one with a usual name, in a tar the
    ``.txt`` member before that."""
    image_column: str | None = None
    """Column of first-frame images; left out, the one with a usual name, if there is one."""

    @field_validator("stream_room")
    @classmethod
    def _is_amount(cls, text: str | None) -> str | None:
        if text is not None:
            parse_bytes(text)
        return text

    @property
    def _columns(self) -> tuple[str | None, str | None, str | None]:
        return self.video_column, self.caption_column, self.image_column

    def _streamed(self, path: str, *, is_hub: bool = False, revision: str | None = None) -> Stream | None:
        if self.stream_room is None:
            return None
        return Stream(path, revision, is_hub, self._columns, self.images, parse_bytes(self.stream_room))

    def _read_stream(self, stream: Stream, base: Path, report: RowReport) -> None:
        if report.media is None:
            raise _no_place(stream.path)
        recorded_rows(stream, report.media, base, report)


def _no_place(path: object) -> DataError:
    fix = "name it in data.sources of a configuration"
    return DataError("there is no folder for the media that it holds", where=str(path), fix=fix)


class PackedSource(_MediaSource):
    """A dataset that holds its media: a folder of ``datasets.save_to_disk``, Parquet files with bytes, or WebDataset
    tars; one such file, or a folder of them. The media are written once, to a folder beside the cache.
    """

    kind: Literal["packed"] = "packed"

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows of all its files."""
        if (stream := self.stream(base)) is not None:
            return self._read_stream(stream, base, report)
        if report.media is None:
            raise _no_place(self.path)
        path = self._located(base)
        root = path if path.is_dir() else path.parent
        remove_leftovers(report.media.folder)
        for file in self.files(base):
            require_inside(file, root, allow_outside=self.allow_outside)
            report.rows += read_packed(file, report.media.folder, root, self._columns, images=self.images)

    def stream(self, base: Path) -> Stream | None:
        """Its files, where ``stream_room`` is given."""
        return self._streamed(str(self._located(base)))

    def files(self, base: Path) -> list[Path]:
        """Its files; none of a stream, which is told by their sizes and times (``Stream.current``)."""
        if self.stream_room is not None:
            return []
        path = self._located(base)
        if files := packed_files(path):
            return files
        fix = "name a folder of datasets.save_to_disk, or .parquet, .arrow or .tar files"
        raise DataError("there is no packed dataset", where=str(path), fix=fix)


class HubSource(_MediaSource):
    """A dataset on the Hugging Face hub: downloaded whole into the hub's cache, and recognised there; or, with
    ``stream_room``, Parquet files or WebDataset tars of which never more than that is on the disk.
    """

    kind: Literal["hub"] = "hub"
    path: str  # type: ignore[assignment]  # no folder, so that it is not made absolute
    """Its id, ``owner/name``."""
    revision: str | None = None
    """Branch, tag or commit; left out, the main branch as it is."""

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows of what was downloaded."""
        if (stream := self.stream(base)) is not None:
            return self._read_stream(stream, base, report)
        snapshot = fetch_dataset(self.path, self.revision)
        first = len(report.rows)
        self._recognised(snapshot).read(base, report)
        # Its files are links into a folder beside it, to which rows may lead, and no further.
        store = snapshot.parents[1]
        for place, row in enumerate(report.rows[first:], start=first):
            if isinstance(row.video, str) and row.root.is_relative_to(store):
                folder = row.root.relative_to(store)
                image = str(folder / row.image) if isinstance(row.image, str) else row.image
                report.rows[place] = replace(row, root=store, video=str(folder / row.video), image=image)

    def stream(self, base: Path) -> Stream | None:
        """It, where ``stream_room`` is given."""
        return self._streamed(self.path, is_hub=True, revision=self.revision)

    def files(self, base: Path) -> list[Path]:
        """Those of what was downloaded; none of a stream, so that training needs no network."""
        if self.stream_room is not None:
            return []
        return self._recognised(fetch_dataset(self.path, self.revision)).files(base)

    def _recognised(self, snapshot: Path) -> _Recognised:
        source = AutoSource(path=snapshot, allow_outside=True, images=self.images).recognise(snapshot)
        names = ("video_column", "caption_column", "image_column")
        given = {name: column for name, column in zip(names, self._columns, strict=True) if column is not None}
        if given and not isinstance(source, MetadataSource | PackedSource):
            what = f"{', '.join(given)}: what was downloaded is of kind {source.kind}, which has no columns"
            raise DataError(what, where=self.path, fix="leave them out")
        return source.model_copy(update=given)


class PromptsSource(_Source):
    """CogVideo's layout: a folder with ``prompts.txt`` and ``videos.txt``, which pair line by line (a blank line that
    others follow is an error), and for image-to-video optionally ``images.txt``. cogvideox-factory's and finetrainers'
    names serve too: ``prompt.txt``, ``captions.txt``, ``caption.txt``; ``video.txt``.
    """

    kind: Literal["prompts"] = "prompts"

    def read(self, base: Path, report: RowReport) -> None:
        """Add a row for every line."""
        read_paired_lines(self.files(base), self._located(base), report, allow_outside=self.allow_outside)

    def files(self, base: Path) -> list[Path]:
        """Its two or three files. Raises DataError if there are two of one sort."""
        folder = self._located(base)
        optional = [folder / "images.txt"] if (folder / "images.txt").is_file() else []
        return [only_file(folder, PROMPT_LISTS), only_file(folder, VIDEO_LISTS), *optional]


PROMPT_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")

VIDEO_LISTS = ("videos.txt", "video.txt")


class CogKitSource(_Source):
    """CogKit's layout: a folder with ``metadata.jsonl`` (``file_name`` and ``prompt``) beside the clips; or, for
    image-to-video, ``metadata.jsonl`` (``id``, ``prompt``), ``videos/`` and optionally ``images/``, each with a
    ``metadata.jsonl`` (``file_name``, ``id``). The folder above ``train/`` serves too.
    """

    kind: Literal["cogkit"] = "cogkit"

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows, paired by their ids where the layout has them."""
        folder = self._folder(base)
        for file in self.files(base):
            require_inside(file, folder, allow_outside=self.allow_outside)
        if not (folder / "videos" / "metadata.jsonl").is_file():
            options = {"allow_outside": self.allow_outside, "images": self.images}
            MetadataSource(path=folder / "metadata.jsonl", **options).read(base, report)
            return
        read_paired_tables(folder, report)

    def files(self, base: Path) -> list[Path]:
        """Its one to three files."""
        folder = self._folder(base)
        parts = [folder / part / "metadata.jsonl" for part in ("videos", "images")]
        return [folder / "metadata.jsonl", *(part for part in parts if part.is_file())]

    def _folder(self, base: Path) -> Path:
        folder = self._located(base)
        nested = not (folder / "metadata.jsonl").is_file() and (folder / "train" / "metadata.jsonl").is_file()
        return folder / "train" if nested else folder


class FolderSource(_Source):
    """A folder of clips, with its sub-folders, and beside each clip its caption: ``walk.mp4`` and ``walk.txt``. For
    image-to-video an image of that name (``walk.png``) is the first frame, for ``model.control``
    ``walk.control.mp4`` is the control video, and for ``objective.masked`` ``walk.mask.mp4`` the mask.
    """

    kind: Literal["folder"] = "folder"

    def read(self, base: Path, report: RowReport) -> None:
        """Add a row for every video, and for every image that is trained on."""
        folder = self._located(base)
        files, companions = without_companions(list_folder(folder, report, allow_outside=self.allow_outside))
        images = Sidecars(files, _videos(files), PICTURES)
        videos = _media(files, images=self.images)
        captions = Sidecars(files, videos, (".txt",))
        if not videos and not report.errors:
            fix = f"known are {' '.join((MEDIA if self.images else VIDEO).suffixes)}"
            what = "the folder holds no videos and no images" if self.images else "the folder holds no videos"
            raise DataError("; ".join([what, *report.notes]), where=str(folder), fix=fix)
        for video in videos:
            try:
                caption = captions.of(video)
                if caption is None:
                    name = f"{video.stem}.txt"
                    fix = f"write its caption into {name}, or take it out"
                    raise DataError(f"there is no {name} beside it", where=str(video), fix=fix)
                require_inside(caption, folder, allow_outside=self.allow_outside)
            except DataError as error:
                report.errors.append(error)
                continue
            text = or_error(read_text, caption, most_bytes=MAX_CAPTION_BYTES)
            image = None if is_still(video) else or_error(images.of, video)
            group = companions.get(video.with_suffix(""), {})
            names = [
                path.relative_to(folder).as_posix() if isinstance(path, Path) else path
                for path in (video, image, *group.values())
            ]
            beside = dict(zip(group, names[2:], strict=True))
            report.rows.append(RawRow(names[0], text, names[1], folder, str(caption), companions=beside))
        for what, sidecars in (("text files", captions), ("images", images)):
            if strays := sidecars.unclaimed(videos):
                report.notes.append(f"{len(strays)} {what} in {folder} belong to no clip, such as {strays[0].name}")

    def files(self, base: Path) -> list[Path]:
        """Its folders and its text files."""
        folder = self._located(base)
        files = list_folder(folder, RowReport(), allow_outside=self.allow_outside)
        folders = dict.fromkeys([folder, *(file.parent for file in files)])
        return [*folders, *(file for file in files if file.suffix.lower() == ".txt")]


def _videos(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if has_ending(file, VIDEO.suffixes)]


def _media(files: Sequence[Path], *, images: bool) -> list[Path]:
    """The videos of a folder, and with ``images`` the images that lie beside none of them."""
    videos = _videos(files)
    stills = set(Sidecars(files, videos, PICTURES).unclaimed(videos)) if images else set()
    return [file for file in files if file in stills or file.suffix.lower() in VIDEO.suffixes]


_Recognised = MetadataSource | SpansSource | MusubiSource | PackedSource | PromptsSource | CogKitSource | FolderSource


def _table_source(own: Mapping[str, Any]) -> MetadataSource | SpansSource:
    """A table as it is usual, or as Panda-70M's: that has no column of file names."""
    spans = own["path"].suffix.lower() == ".csv" and _has_spans(own["path"])
    return (SpansSource if spans else MetadataSource)(**own)


def _has_spans(path: Path) -> bool:
    """Whether a CSV file has Panda-70M's columns and none that would name files."""
    try:
        _, line = next(read_lines(path), (0, ""))
    except DataError:  # told by who reads the rest
        return False
    columns = set(next(csv.reader([line]), [])) if isinstance(line, str) else set()
    return columns >= set(PANDA_COLUMNS) and not columns & set(VIDEO_COLUMNS)


class AutoSource(_Source):
    """A path whose format is recognised by what it holds; what is ambiguous is an error that asks for ``kind``."""

    kind: Literal["auto"] = "auto"

    def read(self, base: Path, report: RowReport) -> None:
        """Add the rows of what the path is."""
        self.recognise(base).read(base, report)

    def files(self, base: Path) -> list[Path]:
        """Those of what the path is."""
        return self.recognise(base).files(base)

    def recognise(self, base: Path) -> _Recognised:
        """The source that this path is. Raises DataError if it is none, or could be several."""
        path, allow_outside = self._located(base), self.allow_outside
        own: dict[str, Any] = {"path": path, "allow_outside": allow_outside, "images": self.images}
        if path.is_file():
            if path.suffix.lower() in SUFFIXES:
                return _table_source(own)
            if path.suffix.lower() in (".tar", ".arrow"):
                return PackedSource(**own)
            if path.suffix.lower() == ".toml":
                return MusubiSource(**own)
            fix = f"name a {', '.join(SUFFIXES)} file, or the clips' folder"
            raise DataError("the file is no dataset", where=str(path), fix=fix)
        if not path.is_dir():
            raise DataError("there is no such file or folder", where=str(path), fix="check data.sources")
        candidates: list[_Recognised] = []
        if (path / "prompts.txt").is_file() and (path / "videos.txt").is_file():
            candidates.append(PromptsSource(**own))
        if any((path / name).is_file() for name in ("videos/metadata.jsonl", "train/metadata.jsonl")):
            candidates.append(CogKitSource(**own))
        else:
            for table in (path / f"metadata{suffix}" for suffix in SUFFIXES):
                # A .json beside one of the others describes the dataset, more likely than not.
                if table.is_file() and (table.suffix != ".json" or not candidates):
                    require_inside(table, path, allow_outside=allow_outside)
                    candidates.append(_table_source(own | {"path": table}))
        listing = RowReport()
        files = list_folder(path, listing, allow_outside=allow_outside)
        media = _media(files, images=self.images)
        captions = Sidecars(files, media, (".txt",))
        if any(captions.all_of(one) for one in media):
            candidates.append(FolderSource(**own))
        lists = [any((path / name).is_file() for name in names) for names in (PROMPT_LISTS, VIDEO_LISTS)]
        if not candidates and all(lists):
            candidates.append(PromptsSource(**own))
        if not candidates and packed_files(path):
            candidates.append(PackedSource(**own))
        if not candidates:
            raise_all(DataError, listing.errors, what="{n} things are wrong with the folder")
            what = "; ".join(["the folder is no dataset that is known", *listing.notes])
            fix = (
                "a dataset's folder holds prompts.txt and videos.txt; metadata.jsonl, .csv, .parquet or .json;"
                " or clips with a .txt beside each (or with images: true images)"
            )
            raise DataError(what, where=str(path), fix=fix)
        if len(candidates) > 1:
            kinds = " or ".join(f"{source.kind} ({source.path.name})" for source in candidates)
            fix = "write the source's kind and path"
            raise DataError(f"the folder could be read as {kinds}", where=str(path), fix=fix)
        return candidates[0]


def _kind_of(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("kind", "auto"))
    return str(getattr(value, "kind", "auto"))  # what is no section at all is explained as a bad `auto`


SourceConfig = Annotated[
    Annotated[AutoSource, Tag("auto")]
    | Annotated[MetadataSource, Tag("metadata")]
    | Annotated[SpansSource, Tag("spans")]
    | Annotated[MusubiSource, Tag("musubi")]
    | Annotated[PackedSource, Tag("packed")]
    | Annotated[HubSource, Tag("hub")]
    | Annotated[PromptsSource, Tag("prompts")]
    | Annotated[CogKitSource, Tag("cogkit")]
    | Annotated[FolderSource, Tag("folder")],
    Discriminator(_kind_of),
]
"""One entry of ``data.sources``; without a ``kind`` the format is recognised (``auto``)."""
