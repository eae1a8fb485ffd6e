"""Text files of a dataset, line by line: bounded, in UTF-8, and each fault with the number of its line."""

from __future__ import annotations

import codecs
import ntpath
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from finetune.core.errors import DataError, raise_all
from finetune.core.text import stripped, text_fault

MAX_FILE_BYTES = 1 << 30
"""Of one metadata file: about a thousand bytes for each of a million rows."""

MAX_LINE_CHARS = 1 << 20
"""Of one line: a hundred times the longest caption."""

_HEAD = 4096

_BYTE = re.compile("[\udc80-\udcff]")
"""What the decoder makes of a byte that is not UTF-8: 0xDC00 plus the byte."""


def require_file(path: Path, *, most_bytes: int = MAX_FILE_BYTES) -> None:
    """Make sure that ``path`` can be opened and read to its end: a pipe would wait, a device would never end.

    Raises:
        DataError: if it is missing, no regular file, or larger than ``most_bytes``.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path), fix="check data.sources") from None
    except (OSError, ValueError) as error:
        raise DataError(f"the file cannot be read: {_reason(error)}", where=str(path)) from None
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"this is {kind_of(found.st_mode)}, not a file", where=str(path), fix="name a regular file")
    if found.st_size > most_bytes:
        raise DataError(
            f"the file has {found.st_size:,} bytes; at most {most_bytes:,} are read",
            where=str(path),
            fix="check that it is the right file, or split it into several sources",
        )


def kind_of(mode: int) -> str:
    """What a file that is no regular one is, in words; ``mode`` as ``os.stat`` gives it."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_lines(path: Path, *, most_chars: int = MAX_LINE_CHARS) -> Iterator[tuple[int, str | DataError]]:
    """Every line with its number from 1, without its end; an error in the place of one that cannot be read.

    A byte order mark is taken out; ``\\n``, ``\\r\\n`` and ``\\r`` end a line, which may have ``most_chars``.

    Raises:
        DataError: as ``require_file`` does; if the file is UTF-16 or UTF-32; if it cannot be read.
    """
    require_file(path)
    try:
        with path.open("rb") as raw:
            _require_utf8(raw.read(_HEAD), path)
        # Bytes that are no UTF-8 come through as marks, so that one of them spoils its own line only.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as source:
            number = 0
            while text := source.readline(most_chars + 1):
                number += 1
                whole = text.endswith("\n") or len(text) <= most_chars
                while not whole:  # the rest of an endless line, a piece at a time
                    piece = source.readline(most_chars)
                    whole = not piece or piece.endswith("\n")
                    text = text[: most_chars + 1]
                line = text.removesuffix("\n")
                yield number, _line_fault(line, f"{path}:{number}", most_chars) or line
    except OSError as error:
        raise DataError(f"the file cannot be read: {_reason(error)}", where=str(path)) from None


def paired_lines(path: Path, *, most: int, most_faults: int) -> list[str | DataError]:
    """The lines of a file that pairs line by line with another: line 1 first, stripped, blank ones at the end left out.

    Returns:
        Text, or an error for a line that cannot be read.

    Raises:
        DataError: as ``read_lines`` does, if there are too many lines or errors, and for the blank lines that others
            follow: nobody can say which line of the other file belongs to what comes after them.
    """
    lines: list[str | DataError] = []
    blank: list[DataError] = []
    waiting: list[int] = []
    faults = 0
    for number, line in read_lines(path):
        faults += isinstance(line, DataError)
        text = line if isinstance(line, DataError) else stripped(line)
        if not text:
            if len(waiting) <= most_faults:
                waiting.append(number)
            continue
        fix = "write what belongs there, or take the line out of every file"
        blank += [DataError("the line is blank, and more follow", where=f"{path}:{at}", fix=fix) for at in waiting]
        waiting = []
        lines.append(text)
        if len(lines) > most or faults + len(blank) > most_faults:
            told = f"{most:,} lines" if len(lines) > most else f"{most_faults:,} lines that cannot be read"
            fix = "check that this is the right file"
            raise DataError(f"the file has more than {told}", where=f"{path}:{number}", fix=fix)
    if blank:
        blank += [line for line in lines if isinstance(line, DataError)]
        raise_all(DataError, blank, what="{n} lines cannot be used, so that it cannot be told what belongs together")
    return lines


def read_text(path: Path, *, most_bytes: int) -> str:
    """A whole UTF-8 file of at most ``most_bytes``, byte order mark taken out and line ends made ``\\n``.

    Raises:
        DataError: as ``read_lines`` does, and for its first line that cannot be read.
    """
    require_file(path, most_bytes=most_bytes)
    lines: list[str] = []
    for _, line in read_lines(path):
        if isinstance(line, DataError):
            raise line
        lines.append(line)
    return "\n".join(lines)


def _line_fault(line: str, where: str, most_chars: int) -> DataError | None:
    if len(line) > most_chars:
        fix = "check that this is the right file"
        return DataError(f"the line has more than {most_chars:,} characters", where=where, fix=fix)
    if found := _BYTE.search(line):
        byte = ord(found.group()) - 0xDC00
        return DataError(f"the text is not UTF-8 (byte 0x{byte:02x})", where=where, fix=_conversion(byte))
    if "\0" in line:
        return DataError("the text holds NUL characters", where=where, fix="save the file as UTF-8")
    return None


def _conversion(byte: int) -> str:
    try:
        letter = bytes([byte]).decode("windows-1252")
    except UnicodeDecodeError:
        return "save the file as UTF-8"
    return (
        f"if {letter!r} is meant, it was written as Windows-1252 (Latin-1): `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`;"
        " else save it as UTF-8 where it was made"
    )


def _require_utf8(head: bytes, path: Path) -> None:
    if encoding := _wide_encoding(head):
        raise DataError(
            f"the file is {encoding} text, and UTF-8 is read",
            where=str(path),
            fix=f"convert it: `iconv -f {encoding} -t UTF-8 OLD > NEW` (PowerShell: `Out-File -Encoding utf8`)",
        )


def _wide_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32, by its mark or by the zeros that it puts beside ASCII; None for anything else."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    pairs = len(head) // 2
    if pairs >= 8:
        for start, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
            zeros, others = head[start : 2 * pairs : 2].count(0), head[1 - start : 2 * pairs : 2].count(0)
            if zeros > 0.4 * pairs and others == 0:
                return name
    return None


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and os.strerror(error.errno or 0)) or str(error)


# -------- What makes one row of a dataset usable, whatever format it was written in.

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
class RowReport:
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


class PathPolicy:
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
