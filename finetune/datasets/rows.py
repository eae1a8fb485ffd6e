"""What a row of a dataset may name and say, whichever layout it comes from; and what a folder of clips holds."""

from __future__ import annotations

import functools
import ntpath
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from finetune.core.errors import DataError
from finetune.core.text import text_fault
from finetune.core.types import CompanionName, VideoProbe
from finetune.datasets.manifests import FileStamp
from finetune.datasets.parts import Part
from finetune.datasets.tables import COMPANION_COLUMNS, kind_of

MAX_CAPTION_CHARS = 10_000
"""About ten times what 226 tokens hold: a longer caption is a wrong column or a wrong file."""

MAX_NAME_CHARS = 4_096
"""Of a file name with its folders: what operating systems allow."""

MAX_CAPTION_BYTES = 4 * MAX_CAPTION_CHARS + 1024
"""Of a caption's own file: the longest caption in the widest letters, and blank lines after it."""

_MAX_FILES = 4_000_000
"""In a folder of clips."""


@dataclass(frozen=True)
class FileKind:
    """What a row may name: for messages, and the endings in lower case."""

    name: str
    suffixes: tuple[str, ...]


VIDEO = FileKind(
    "video",
    (
        *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".ogv", ".ogm"),
        *(".mpg", ".mpeg", ".mpe", ".vob", ".ts", ".mts", ".m2t", ".m2ts", ".flv", ".wmv", ".asf"),
    ),
)

IMAGE = FileKind("image", (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"))

MEDIA = FileKind("video or image", (*VIDEO.suffixes, *IMAGE.suffixes))


def is_still(name: str | Path) -> bool:
    """Whether a file is a still image by its ending."""
    return os.path.splitext(name)[1].lower() in IMAGE.suffixes  # noqa: PTH122 - a million of them


PICTURES = (*IMAGE.suffixes, ".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".exr", ".dng")
"""The others are not read: one beside a clip is an error, so that the clip's own first frame never stands in for it
unnoticed."""


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawRow:
    """Values that belong together, as a layout gives them: nothing is checked yet."""

    video: object
    caption: object
    """Text, or a tuple of several; or the DataError that says why its file cannot be read."""
    image: object
    """Or the DataError that says why it cannot be told which image it is: one for image-to-video only."""
    root: Path
    """The folder that ``video`` and ``image`` start at and may not lead out of."""
    where: str
    """File and line."""
    span_s: tuple[float, float] | None = None
    """The part of the video that is meant: begin and end in seconds; None: all of it."""
    repeats: float = 1.0
    """What the source's own ``repeats`` is multiplied by."""
    companions: Mapping[CompanionName, object] = field(default_factory=dict)
    """Names of the files that go with the video frame for frame, as far as the row has any; or, as for ``image``, a
    DataError."""
    is_streamed: bool = False
    """Whether the media may be gone; what was known of them is then in ``RowReport.streamed``."""


@dataclass(frozen=True)
class MediaPlace:
    """Where the media go that lie inside datasets, and what is recorded of those that are read as streams."""

    folder: Path
    records: Path
    part: Part | None = None
    """Of the dataset, whose streams alone are wanted; None for all of it."""

    @classmethod
    def of(cls, cache_dir: Path, part: Part | None = None) -> MediaPlace:
        """Of a run: media lie beside its cache, records in it."""
        return cls(cache_dir.with_name(f"{cache_dir.name}-media"), cache_dir / "streams", part)


@dataclass(frozen=True)
class StreamedMedia:
    """What was known of a video or image when it was on the disk."""

    stamp: FileStamp
    probe: VideoProbe | DataError | None
    """A video's header, or why it has none; None for an image."""


@dataclass
class Streamed:
    """What was known of all media that came as a stream; they are gone, or will be."""

    media: dict[Path, StreamedMedia] = field(default_factory=dict)
    failed: dict[str, DataError] = field(default_factory=dict)
    """Why clips could not be encoded, by the keys of their latents."""


@dataclass
class RowReport:
    """What reading a source, or listing its folder, collects."""

    rows: list[RawRow] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    """What has to be mended before anything is trained."""
    unusable: list[DataError] = field(default_factory=list)
    """Rows whose text cannot be read: errors too, unless such rows are to be left out."""
    notes: list[str] = field(default_factory=list)
    media: MediaPlace | None = None
    """For videos and images that lie inside a dataset's own files."""
    streamed: Streamed = field(default_factory=Streamed)


def check_caption(value: object, where: str) -> str:
    """A caption as written, or a DataError that says why it is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        fix = "write one (`finetune caption` has a model write all that are missing), or take the row out"
        raise DataError("the caption is empty", where=where, fix=fix)
    if not isinstance(value, str):
        raise DataError(f"the caption is {type(value).__name__}, not text", where=where, fix="write it as text")
    if len(value) > MAX_CAPTION_CHARS:
        raise DataError(
            f"the caption has {len(value):,} characters; at most {MAX_CAPTION_CHARS:,} are read, about 1 000 are seen",
            where=where,
            fix="check that the right column is read as the caption",
        )
    if fault := text_fault(value):
        raise DataError(
            f"the caption is damaged: {fault}", where=where, fix="save the file as UTF-8, or take it out of the text"
        )
    return value


class PathPolicy:
    """Lets rows name files inside their dataset's folder and nothing else; remembers which file a path really is.

    One policy serves one reading: where folders really are is looked up once, so a million rows cost a million looks at
    files and no more. Whoever changes links while a dataset is being read is not kept out.
    """

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._folder = functools.cache(os.path.realpath)
        self._names = functools.cache(_names_by_fold)

    def real(self, path: Path) -> str:
        """The file that a checked path is, every link followed: two paths of one file give the same."""
        return self._files[str(path)]

    def streamed(self, path: Path) -> Path:
        """The path of a file that is named by its content, and may be gone."""
        self._files[str(path)] = str(path)
        return path

    def file(self, value: object, root: Path, kind: FileKind, where: str, *, allow_outside: bool = False) -> Path:
        """The path of a usable file; one that differs from the name in case, Unicode form or slashes only is taken too.

        Args:
            value: a relative path with forward slashes.
            root: the dataset's folder.
            kind: of file.
            where: file and line, for messages.
            allow_outside: accept absolute paths, ``..`` and links that lead out of ``root``.

        Raises:
            DataError: if it is no text, leads out of ``root`` (absolute, ``..`` or a symbolic link), has another
                ending, is not there, no regular file, or empty.
        """
        name = _checked_name(value, root, kind.name, where, allow_outside=allow_outside)
        if os.path.splitext(name)[1].lower() not in kind.suffixes:  # noqa: PTH122 - strings, here and below: a million
            raise DataError(
                f"{name:.200} is not a known kind of {kind.name} file",
                where=where,
                fix=f"convert it to one of: {' '.join(kind.suffixes)}",
            )
        path = str(root / name)
        try:
            try:
                real, status = self._status(path)
            except FileNotFoundError:
                path = self._spelled_otherwise(root, name)
                real, status = self._status(path)
        except FileNotFoundError:
            fix = "write the whole name: no variable is filled in here" if "$" in name else "check its name"
            raise DataError(f"there is no file {root / name}", where=where, fix=f"{fix}, or take the row out") from None
        except OSError as error:  # a name too long for the file system; links in a circle; no permission
            what = f"the {kind.name} {name:.200} cannot be read: {error.strerror or error}"
            raise DataError(what, where=where, fix="check its name") from None
        if not allow_outside and not is_inside(real, self._folder(str(root))):
            what = f"the {kind.name} {name:.200} is a link that leads out of {root}"
            raise DataError(what, where=where, fix=_inside(root))
        if not stat.S_ISREG(status.st_mode):
            what = f"{path} is {kind_of(status.st_mode)}, not a file"
            raise DataError(what, where=where, fix="name a regular file, or take the row out")
        if status.st_size == 0:
            raise DataError(
                f"the file {path} is empty (0 bytes)", where=where, fix="copy it again, or take the row out"
            )
        checked = Path(path)
        self._files[str(checked)] = real
        return checked

    def _status(self, path: str) -> tuple[str, os.stat_result]:
        """Where a path really leads, and what is there."""
        folder, name = os.path.split(path)
        real = os.path.join(self._folder(folder), name)  # noqa: PTH118
        status = os.lstat(real)
        if stat.S_ISLNK(status.st_mode):
            real = os.path.realpath(real, strict=True)
            status = os.lstat(real)
        return real, status

    def _spelled_otherwise(self, root: Path, name: str) -> str:
        """The one file that ``name`` can mean where it is not spelled as on the disk. Raises FileNotFoundError."""
        folder = "/" if name.startswith("/") else str(root)
        for part in name.replace("\\", "/").split("/"):
            alike = self._names(folder).get(fold_name(part), [])
            chosen = [part] if part in ("", ".", "..") or part in alike else alike
            if len(chosen) != 1:
                raise FileNotFoundError(name)
            folder = os.path.join(folder, chosen[0])  # noqa: PTH118
        return folder


def _names_by_fold(folder: str) -> dict[str, list[str]]:
    """The names in a folder, grouped by ``fold_name``; none if there is no such folder."""
    names: dict[str, list[str]] = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():  # noqa: PTH112, PTH208
        names.setdefault(fold_name(name), []).append(name)
    return names


def require_inside(path: Path, root: Path, *, allow_outside: bool) -> None:
    """Refuse a text file of a dataset's folder that is a link to somewhere else: its lines would become captions.

    Raises:
        DataError: if ``path`` leads out of ``root`` and that is not allowed.
    """
    if not allow_outside and not is_inside(os.path.realpath(path), os.path.realpath(root)):
        fix = "copy the file into the folder, or set allow_outside for a folder that you trust"
        raise DataError(f"{path.name} is a link that leads out of {root}", where=str(path), fix=fix)


def is_inside(real: str, root: str) -> bool:
    """Whether a path lies in a folder or is it; both with every link followed."""
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def fold_name(name: str) -> str:
    """Equal for names that differ only in case or in how Unicode composes their letters (macOS takes them apart)."""
    if name.isascii():  # nearly all are, and a tenth of the time
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _checked_name(value: object, root: Path, kind: str, where: str, *, allow_outside: bool) -> str:
    if not isinstance(value, str) or not value.strip():
        fault = "is missing" if value is None or value == "" else f"is {value!r:.60}, not a path"
        raise DataError(f"the {kind}'s file name {fault}", where=where, fix=f"name a file inside {root}")
    if len(value) > MAX_NAME_CHARS:
        what = f"the {kind}'s file name has {len(value):,} characters"
        raise DataError(what, where=where, fix="check that the right column is read as the file name")
    if fault := text_fault(value, one_line=True) or "":
        raise DataError(f"the {kind}'s file name is damaged: {fault}", where=where, fix="rename it, in UTF-8")
    if is_foreign_absolute(value):
        fault = "is an absolute path as a shell or Windows writes it"
    elif not allow_outside and value.startswith("/"):
        fault = "is an absolute path"
    elif not allow_outside and ".." in value and ".." in value.replace("\\", "/").split("/"):
        fault = "leads out of the dataset's folder"
    if fault:
        raise DataError(f"the {kind} {value:.200} {fault}", where=where, fix=_inside(root))
    return value


def is_foreign_absolute(name: str) -> bool:
    return name.startswith(("~", "\\")) or bool(ntpath.splitdrive(name)[0])


def _inside(root: Path) -> str:
    return (
        f"write it relative to {root}, or name a folder above both as `root` of a metadata source"
        " (for a list that you trust: allow_outside: true)"
    )


# --- folders of clips -------------------------------------------------------------------------------------------------


def list_folder(folder: Path, report: RowReport, *, allow_outside: bool) -> list[Path]:
    """Every file in a folder and its sub-folders, each folder once however many links lead to it; sorted.

    Args:
        folder: the dataset's folder.
        report: gets an error for every folder that is not read and every name that is no text, for what is in them may
            be part of the dataset; and notes on what nobody reads.
        allow_outside: follow links to folders outside of it; those to folders inside are followed in any case.

    Raises:
        DataError: if there is no such folder, or it holds too many files.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", where=str(folder), fix="check data.sources")
    files: list[Path] = []
    hidden: list[Path] = []
    again: list[Path] = []
    root = os.path.realpath(folder)
    seen: set[str] = set()
    waiting = [(folder, False)]
    links: list[Path] = []
    count = 0
    while waiting or links:
        # Links come last, so that a folder is read under its own name and not again under a link's.
        place, is_hidden = waiting.pop() if waiting else (links.pop(), False)
        real = os.path.realpath(place)
        if not is_hidden:
            if not allow_outside and not is_inside(real, root):
                what = f"{place.name} is a link to a folder outside of {folder}, which is not read"
                fix = "set allow_outside: true for a folder that you trust, or name it as a source of its own"
                report.errors.append(DataError(what, where=str(place), fix=fix))
                continue
            if real in seen:
                if place.is_symlink():
                    again.append(place)
                continue
            seen.add(real)
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            if not is_hidden:
                what = f"the folder cannot be read: {error.strerror}"
                report.errors.append(DataError(what, where=str(place), fix="make it readable, or take it out"))
            continue
        count += len(entries)
        if count > _MAX_FILES:
            fix = "name the folder of the clips, or list them in a metadata file"
            raise DataError(f"more than {_MAX_FILES:,} files are in the folder", where=str(folder), fix=fix)
        for entry in entries:
            path, suffix = place / entry.name, os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
            is_link = entry.is_symlink()
            is_folder = entry.is_dir(follow_symlinks=False) or (is_link and path.is_dir())
            if is_hidden or entry.name.startswith("."):
                if is_folder and not is_link:
                    waiting.append((path, True))
                elif suffix in VIDEO.suffixes and not entry.name.startswith("._"):  # which macOS puts beside every file
                    hidden.append(path)
            elif (is_folder or suffix in _READ) and (fault := text_fault(entry.name, one_line=True)):
                # No record of the run could name it, and no terminal should.
                what = f"a {'folder' if is_folder else 'file'}'s name is damaged: {fault}"
                report.errors.append(DataError(what, where=str(path), fix="rename it, in UTF-8"))
            elif is_folder and is_link:
                links.append(path)
            elif is_folder:
                waiting.append((path, False))
            elif is_link and suffix not in _READ and not path.exists():
                what = f"{entry.name} is a link that leads nowhere"
                report.errors.append(DataError(what, where=str(path), fix="mend it, or take it out"))
            else:
                files.append(path)
    # Of a hundred thousand files: paths are sorted by their parts ten times as fast as text.
    files.sort(key=lambda path: str(path).replace(os.sep, "\0"))
    # A folder may be hidden by its own name and read under that of a link.
    hidden = sorted(path for path in hidden if os.path.realpath(path.parent) not in seen)
    others = [file for file in files if not has_ending(file, _READ)]
    kinds = Counter(file.suffix.lower() or "without ending" for file in others).most_common(8)
    listed = ", ".join(f"{count} {kind:.20}" for kind, count in kinds)
    for paths, what in (
        (others, f"files in {folder} are of no kind that is read: {listed};"),
        (hidden, f"videos in {folder} have a name or folder that begins with a dot,"),
        (again, f"links in {folder} lead to a folder that is read already,"),
    ):
        if paths:
            report.notes.append(f"{len(paths)} {what} such as {paths[0].relative_to(folder).as_posix()}")
    return files


def has_ending(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file's name ends so, in whatever case."""
    return str(path).lower().endswith(suffixes)


_READ = (*VIDEO.suffixes, *PICTURES, ".txt")


class Sidecars:
    """Files that lie beside videos under their names; where a name is no video's, case and Unicode form do not matter.

    Args:
        files: of the whole dataset.
        videos: those of them that are videos.
        suffixes: in lower case, of those that are looked for.
    """

    def __init__(self, files: Iterable[Path], videos: Iterable[Path], suffixes: tuple[str, ...]) -> None:
        beside = [file for file in files if has_ending(file, suffixes)]
        stems = {video.with_suffix("") for video in videos} if beside else set()
        self._groups: dict[object, list[Path]] = {}
        for file in beside:
            stem = file.with_suffix("")
            self._groups.setdefault(stem if stem in stems else self._key(stem), []).append(file)

    @staticmethod
    def _key(stem: Path) -> tuple[Path, str]:
        return stem.parent, fold_name(stem.name)

    def all_of(self, video: Path) -> list[Path]:
        """The files beside a video."""
        if not self._groups:
            return []
        stem = video.with_suffix("")
        return self._groups.get(stem) or self._groups.get(self._key(stem), [])

    def of(self, video: Path) -> Path | None:
        """The file beside a video, if there is one. Raises DataError if there are several."""
        files = self.all_of(video)
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise DataError(f"{names} could both belong to it", where=str(video), fix="leave one of them there")
        return files[0] if files else None

    def unclaimed(self, videos: Iterable[Path]) -> list[Path]:
        """The files that lie beside none of the videos."""
        claimed = {file for video in videos for file in self.all_of(video)}
        return [file for files in self._groups.values() for file in files if file not in claimed]


_COMPANION = re.compile(rf"\.({'|'.join(COMPANION_COLUMNS)})\.[^./]+$", re.IGNORECASE)


def without_companions(files: Sequence[Path]) -> tuple[list[Path], dict[Path, dict[CompanionName, Path | DataError]]]:
    """A folder's files without those that go with another frame for frame, and these by that one's path without ending.

    Such a file lies beside a video or image under its name and what it is, as ``walk.control.mp4`` beside ``walk.mp4``,
    and has no caption of its own. A DataError stands where several could be meant.
    """
    named = [file for file in files if _COMPANION.search(file.name) and has_ending(file, MEDIA.suffixes)]
    if not named:
        return list(files), {}
    media = {file.with_suffix("") for file in files if has_ending(file, MEDIA.suffixes)}
    captioned = {file.with_suffix("") for file in files if has_ending(file, (".txt",))}
    companions: dict[Path, dict[CompanionName, Path | DataError]] = {}
    for file in named:
        stem = file.with_suffix("").with_suffix("")
        if stem in media and file.with_suffix("") not in captioned:
            name = next(name for name in COMPANION_COLUMNS if file.with_suffix("").suffix.lower() == f".{name}")
            several = DataError(f"several files {stem.name}.{name}.* could be meant", where=str(file), fix="leave one")
            companions.setdefault(stem, {})[name] = several if name in companions.get(stem, {}) else file
    beside = {one for group in companions.values() for one in group.values()}
    return [file for file in files if file not in beside], companions


_Value = TypeVar("_Value")


def or_error(check: Callable[..., _Value], *arguments: Any, **options: Any) -> _Value | DataError:
    """What a check gives, or the DataError that it raises: so that one row can have several."""
    try:
        return check(*arguments, **options)
    except DataError as error:
        return error
