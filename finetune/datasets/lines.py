"""Text files of a dataset, line by line: bounded, in UTF-8, and each fault with the number of its line."""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import DataError, raise_all
from finetune.text import stripped

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
