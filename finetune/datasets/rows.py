"""What makes one row of a dataset usable, whatever format it was written in."""

from __future__ import annotations

import ntpath
import os
import stat
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from finetune.datasets.lines import kind_of
from finetune.errors import DataError
from finetune.text import text_fault

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v", ".mkv", ".webm", ".avi", ".divx", ".ogv", ".ogm"),
    *(".mpg", ".mpeg", ".mpe", ".vob", ".ts", ".mts", ".m2t", ".m2ts", ".flv", ".wmv", ".asf"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")
OTHER_IMAGE_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".tga", ".psd", ".exr", ".dng")
"""Images that are not read: one beside a clip is an error, so that the clip's own first frame never stands in for it
unnoticed."""

MAX_CAPTION_CHARS = 10_000
"""About ten times what 226 tokens hold: a longer caption is a wrong column or a wrong file."""
MAX_NAME_CHARS = 4_096
"""Of a file name with its folders: what operating systems allow."""


@dataclass(frozen=True)
class RawRow:
    """Values that belong together, as a format gives them: nothing is checked yet."""

    video: object
    caption: object
    image: object
    """Or the DataError that says why it cannot be told which image it is: one for image-to-video only."""
    root: Path
    """The folder that ``video`` and ``image`` start at and may not lead out of."""
    where: str
    """File and line."""


@dataclass
class Reading:
    """What reading a source collects."""

    rows: list[RawRow] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    """What has to be mended before anything is trained."""
    unusable: list[DataError] = field(default_factory=list)
    """Rows whose text cannot be read: errors too, unless such rows are to be left out."""
    notes: list[str] = field(default_factory=list)


def check_caption(value: object, where: str) -> str:
    """A caption as written, or a DataError that says why it is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError("the caption is empty", where=where, fix="write one, or take the row out")
    if not isinstance(value, str):
        raise DataError(f"the caption is {type(value).__name__}, not text", where=where, fix="write it as text")
    if len(value) > MAX_CAPTION_CHARS:
        raise DataError(
            f"the caption has {len(value):,} characters; at most {MAX_CAPTION_CHARS:,} are read, about 1 000 are seen",
            where=where,
            fix="check that the right column is read as the caption",
        )
    if fault := text_fault(value):
        raise DataError(f"the caption is damaged: {fault}", where=where, fix="save the file as UTF-8, or take it out")
    return value


class Gate:
    """Lets rows name files inside their dataset's folder and nothing else; remembers which file a path really is.

    One gate serves one reading: where folders really are is looked up once, so a million rows cost a million looks at
    files and no more. Whoever changes links while a dataset is being read is not kept out.
    """

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._files: dict[str, str] = {}
        self._listings: dict[str, dict[str, list[str]]] = {}

    def real(self, path: Path) -> str:
        """The file that a checked path is, every link followed: two paths of one file give the same."""
        return self._files[str(path)]

    def file(
        self,
        value: object,
        root: Path,
        suffixes: tuple[str, ...],
        what: str,
        where: str,
        *,
        allow_outside: bool = False,
    ) -> Path:
        """The path of a usable file; one that differs from the name in case, Unicode form or slashes only is taken too.

        Args:
            value: a relative path with forward slashes.
            root: the dataset's folder.
            suffixes: file name endings that are read, in lower case.
            what: ``video`` or ``image``, for messages.
            where: file and line, for messages.
            allow_outside: accept absolute paths, ``..`` and links that lead out of ``root``.

        Raises:
            DataError: if it is no text, leads out of ``root`` (absolute, ``..`` or a symbolic link), has another
                ending, is not there, no regular file, or empty.
        """
        name = _name(value, root, what, where)
        if not allow_outside:
            _require_relative(name, root, what, where)
        if os.path.splitext(name)[1].lower() not in suffixes:  # noqa: PTH122 - strings, here and below: a million rows
            raise DataError(
                f"{name:.200} is not a known kind of {what} file",
                where=where,
                fix=f"convert it to one of: {' '.join(suffixes)}",
            )
        path = root / name
        spelled = str(path)
        try:
            try:
                real, found = self._look(spelled)
            except FileNotFoundError:
                spelled = self._alike(root, name)
                path = Path(spelled)
                real, found = self._look(spelled)
        except FileNotFoundError:
            fix = "write the whole name: no variable is filled in here" if "$" in name else "check its name"
            raise DataError(f"there is no file {root / name}", where=where, fix=f"{fix}, or take the row out") from None
        except OSError as error:  # a name too long for the file system; links in a circle; no permission
            told = f"the {what} {name:.200} cannot be read: {error.strerror or error}"
            raise DataError(told, where=where, fix="check its name") from None
        if not allow_outside and not is_inside(real, self._folder(str(root))):
            told = f"the {what} {name:.200} is a link that leads out of {root}"
            raise DataError(told, where=where, fix=_inside(root))
        if not stat.S_ISREG(found.st_mode):
            told = f"{path} is {kind_of(found.st_mode)}, not a file"
            raise DataError(told, where=where, fix="name a regular file, or take the row out")
        if found.st_size == 0:
            told = f"the file {path} is empty (0 bytes)"
            raise DataError(told, where=where, fix="copy it again, or take the row out")
        self._files[str(path)] = real
        return path

    def _look(self, path: str) -> tuple[str, os.stat_result]:
        """Where a path really leads, and what is there."""
        folder, name = os.path.split(path)
        real = os.path.join(self._folder(folder), name)  # noqa: PTH118
        found = os.lstat(real)
        if stat.S_ISLNK(found.st_mode):
            real = os.path.realpath(real, strict=True)
            found = os.lstat(real)
        return real, found

    def _alike(self, root: Path, name: str) -> str:
        """The one file that ``name`` can mean where it is not spelled as on the disk. Raises FileNotFoundError."""
        place = "/" if name.startswith("/") else str(root)
        for part in name.replace("\\", "/").split("/"):
            if place not in self._listings:
                listing = self._listings[place] = {}
                for entry in os.listdir(place) if os.path.isdir(place) else ():  # noqa: PTH112, PTH208
                    listing.setdefault(alike(entry), []).append(entry)
            names = self._listings[place].get(alike(part), [])
            chosen = [part] if part in ("", ".", "..") or part in names else names
            if len(chosen) != 1:
                raise FileNotFoundError(name)
            place = os.path.join(place, chosen[0])  # noqa: PTH118
        return place

    def _folder(self, folder: str) -> str:
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return self._folders[folder]


def require_inside(path: Path, root: Path, *, allow_outside: bool) -> None:
    """Refuse a text file of a dataset's folder that is a link to somewhere else: its lines would become captions.

    Raises:
        DataError: if ``path`` leads out of ``root`` and that is not allowed.
    """
    if not allow_outside and not is_inside(os.path.realpath(path), os.path.realpath(root)):
        fix = "copy the file into the folder, or set allow_outside for a folder that you trust"
        raise DataError(f"{path.name} is a link that leads out of {root}", where=str(path), fix=fix)


def _name(value: object, root: Path, what: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        told = "is missing" if value is None or value == "" else f"is {value!r:.60}, not a path"
        raise DataError(f"the {what}'s file name {told}", where=where, fix=f"name a file inside {root}")
    if len(value) > MAX_NAME_CHARS:
        told = f"the {what}'s file name has {len(value):,} characters"
        raise DataError(told, where=where, fix="check that the right column is read as the file name")
    if fault := text_fault(value, one_line=True):
        raise DataError(f"the {what}'s file name is damaged: {fault}", where=where, fix="rename it, in UTF-8")
    if _is_spelled_elsewhere(value):
        told = f"the {what} {value:.200} is an absolute path as a shell or Windows writes it"
        raise DataError(told, where=where, fix=_inside(root))
    return value


def _is_spelled_elsewhere(name: str) -> bool:
    return name.startswith(("~", "\\")) or bool(ntpath.splitdrive(name)[0])


def joined(folder: str, name: object) -> object:
    """``name`` seen from the folder above ``folder``; as it is where it names no file below ``folder`` at all."""
    inner = isinstance(name, str) and name and not name.startswith("/") and not _is_spelled_elsewhere(name)
    return f"{folder}/{name}" if inner else name


def _require_relative(name: str, root: Path, what: str, where: str) -> None:
    if name.startswith("/"):
        raise DataError(f"the {what} {name:.200} is an absolute path", where=where, fix=_inside(root))
    if ".." in name and ".." in name.replace("\\", "/").split("/"):
        raise DataError(f"the {what} {name:.200} leads out of the dataset's folder", where=where, fix=_inside(root))


def _inside(root: Path) -> str:
    return (
        f"write it relative to {root}, or name a folder above both as `root` of a metadata source"
        " (for a list that you trust: allow_outside: true)"
    )


def is_inside(real: str, root: str) -> bool:
    """Whether a path lies in a folder or is it; both with every link followed."""
    return real == root or real.startswith(root.rstrip(os.sep) + os.sep)


def alike(name: str) -> str:
    """Equal for names that differ only in case or in how Unicode composes their letters (macOS takes them apart)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
