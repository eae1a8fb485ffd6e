"""What makes one row of a dataset usable, whatever format it was written in."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

from finetune.errors import DataError

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".ogv"),
    *(".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

MAX_CAPTION_CHARS = 10_000
"""About ten times what 226 tokens hold: a longer caption is a wrong column or a wrong file."""

_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
"""Control characters except tab and line ends, halves of surrogate pairs, and the mark that a decoder leaves behind."""


@dataclass(frozen=True)
class RawRow:
    """Values that belong together, as a format gives them: nothing is checked yet."""

    video: object
    caption: object
    image: object
    root: Path
    """The folder that ``video`` and ``image`` start at and may not lead out of."""
    where: str
    """File and line."""


@dataclass
class Reading:
    """What reading a source collects."""

    rows: list[RawRow] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def text_fault(text: str) -> str | None:
    """What is wrong with a text, or None."""
    if found := _NOT_TEXT.search(text):
        return f"it holds U+{ord(found.group()):04X} at character {found.start() + 1}, which is no text"
    return None


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


def check_file(value: object, root: Path, suffixes: tuple[str, ...], what: str, where: str) -> Path:
    """The path of a usable file inside ``root``.

    Args:
        value: a relative path with forward slashes.
        root: the dataset's folder.
        suffixes: file name endings that are read, in lower case.
        what: ``video`` or ``image``, for messages.
        where: file and line, for messages.

    Raises:
        DataError: if it is no text, leads out of ``root`` (absolute, ``..`` or a symbolic link), has another ending,
            does not exist, or is empty.
    """
    if not isinstance(value, str) or not value.strip():
        told = "is missing" if value is None or value == "" else f"is {value!r:.60}, not a path"
        raise DataError(f"the {what}'s file name {told}", where=where, fix=f"name a file inside {root}")
    if fault := text_fault(value):
        raise DataError(f"the {what}'s file name is damaged: {fault}", where=where, fix="save the file as UTF-8")
    inside = f"write it relative to {root}, or name a folder above both as `root` of a metadata source"
    if PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive or value.startswith(("\\", "~")):
        raise DataError(f"the {what} {value} is an absolute path", where=where, fix=inside)
    if ".." in PurePosixPath(value).parts or ".." in PureWindowsPath(value).parts:
        raise DataError(f"the {what} {value} leads out of the dataset's folder", where=where, fix=inside)
    path = root / value
    if path.suffix.lower() not in suffixes:
        raise DataError(
            f"{value} is not a known kind of {what} file",
            where=where,
            fix=f"convert it to one of: {' '.join(suffixes)}",
        )
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"the {what} {value} is a link that leads out of {root}", where=where, fix=inside)
        if not path.is_file():
            slashes = " with forward slashes" if "\\" in value else ", upper and lower case too"
            raise DataError(
                f"there is no file {path}", where=where, fix=f"check its name{slashes}, or take the row out"
            )
        if path.stat().st_size == 0:
            raise DataError(
                f"the file {path} is empty (0 bytes)", where=where, fix="copy it again, or take the row out"
            )
    except (OSError, RuntimeError) as error:  # a name too long for the file system; links in a circle
        raise DataError(f"the {what} {value:.200} cannot be read: {error}", where=where, fix="check its name") from None
    return path
