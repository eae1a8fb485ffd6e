"""Which column of a metadata file is the video, the caption, the image."""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError, raise_all, raise_if_killed
from finetune.datasets.rows import MAX_FILE_BYTES, read_lines, require_file

VIDEO_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "file")

CAPTION_COLUMNS = ("prompt", "caption", "text")

IMAGE_COLUMNS = ("image", "image_path", "image_file")


def column_of(table: Table, named: str | None, usual: tuple[str, ...], option: str, file: Path) -> str:
    """The column to read: the named one, or the only one with a usual name; "" where there is no image column.

    Raises:
        DataError: if there is no such column, several could be meant, or it holds no text.
    """
    held = f"the columns are: {listed(table.columns)}"
    if named is not None:
        if named not in table.columns:
            raise DataError(f"there is no column '{named}'; {held}", where=str(file), fix=f"correct {option}")
        found = [named]
    else:
        found = [name for name in usual if name in table.columns]
    if len(found) > 1:
        told = f"the columns {' and '.join(found)} could both be meant"
        raise DataError(told, where=str(file), fix=f"name one with {option} (kind: metadata)")
    if not found and option != "image_column":
        told = f"none of the usual columns is there ({', '.join(usual)}); {held}"
        raise DataError(told, where=str(file), fix=f"name the column with {option} (kind: metadata)")
    if found and table.columns[found[0]] and (named is not None or option != "image_column"):
        told = f"the column {found[0]} holds {table.columns[found[0]]}, not text"
        raise DataError(told, where=str(file), fix=f"name a column of text with {option} (kind: metadata)")
    return found[0] if found else ""


# -------- Columns of text out of a Parquet file, read in a process of its own (``parquet_child`` says why).

_MEMORY_BYTES = 4 << 30
"""What reading may take beside the libraries; a file of the greatest size that is read takes half of it."""

_PATIENCE_S = 900.0


def read_columns(
    path: Path, wanted: Collection[str], *, most_rows: int, most_columns: int, most_bytes: int
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Read the wanted columns of a Parquet file, as far as they hold text.

    Returns:
        Every column of the file with what is wrong with it as a column of text (empty: nothing), and the rows.

    Raises:
        DataError: if it is damaged, claims more than the limits allow, or cannot be read in the memory and time given.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Under a plain name: HF datasets takes some names for patterns, addresses or archives.
        link, output = Path(folder) / "table.parquet", Path(folder) / "rows.jsonl"
        link.symlink_to(path.absolute())
        request = {
            "path": str(link),
            "output": str(output),
            "cache": folder,
            "wanted": sorted(wanted),
            "memory_bytes": _MEMORY_BYTES,
            "most_rows": most_rows,
            "most_columns": most_columns,
            "most_bytes": most_bytes,
        }
        ended = _run(json.dumps(request), folder)
        answers = [] if ended else [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    *told, verdict = answers or [{"fault": f"not a readable Parquet file: {ended}"}]
    if verdict["fault"]:
        raise DataError(verdict["fault"], where=str(path), fix="write the file again, or a smaller one")
    return told[0], told[1:]


def _run(request: str, folder: str) -> str:
    """Run the child, twice if a signal ends it; what ended it, if it did not end by itself."""
    package = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": folder,
    }
    # -P: a dataset's folder may be the working one, and must not be where modules are looked for.
    words = [sys.executable, "-P", "-m", "finetune.datasets.parquet_child"]
    for _ in range(2):
        try:
            done = subprocess.run(
                words, input=request.encode(), env=environment, timeout=_PATIENCE_S, check=False, capture_output=True
            )
        except subprocess.TimeoutExpired:
            return f"it was not read within {_PATIENCE_S:g} s"
        if done.returncode >= 0:
            break
    table = Path(folder, "table.parquet").readlink()
    raise_if_killed(done.returncode, "the reader of a Parquet file", where=str(table))
    if done.returncode == 0:
        return ""
    return f"the reader ended with {'signal' if done.returncode < 0 else 'code'} {abs(done.returncode)}"


# -------- Rows of ``jsonl``, ``json``, ``csv`` and ``parquet`` files, each with the line it stands on.
#
# JSON and CSV are read with Python's own parsers: they name the line of a broken row, take ``NA`` in a CSV for a word,
# and never move the columns of a row with an unquoted comma. JSON may be an object per line or one list of objects,
# whatever the file is called. Parquet is read with HF ``datasets``, in a process of its own. Whatever a file claims,
# rows, columns and bytes are bounded.

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")

MAX_ROWS = 2_000_000
"""Of one source: more want sources of their own, or another tool."""

MAX_LIST_BYTES = 1 << 28
"""Of a file that is one JSON list: its text is held in memory as a whole."""

MAX_COLUMNS = 1_000

MAX_FAULTS = 10_000
"""Rows of one source that are told to be unusable; with more of them it is the wrong file."""


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and where it was written, such as ``metadata.jsonl:17``."""

    values: dict[str, Any]
    where: str


@dataclass
class Table:
    """What a metadata file holds."""

    columns: dict[str, str] = field(default_factory=dict)
    """Every column in the file's order, and what is wrong with it as a column of text (empty: nothing)."""
    rows: list[Row] = field(default_factory=list)
    """Rows that could be read, with the wanted columns alone."""
    faults: list[DataError] = field(default_factory=list)
    """Rows that could not."""

    def add(self, values: dict[str, Any], where: str) -> None:
        """Take a row in. Raises DataError if there are too many."""
        if len(self.rows) >= MAX_ROWS:
            fix = "split it into several sources"
            raise DataError(f"the file has more than {MAX_ROWS:,} rows", where=where, fix=fix)
        self.rows.append(Row(values, where))

    def refuse(self, fault: DataError) -> None:
        """Take note of a row that cannot be read. Raises DataError if there are too many."""
        self.faults.append(fault)
        if len(self.faults) > MAX_FAULTS:
            raise DataError(
                f"more than {MAX_FAULTS:,} rows cannot be read; the first: {self.faults[0].what}",
                where=self.faults[0].where,
                fix="check that this is the right file",
            )


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Read a metadata file.

    Args:
        path: with an ending of ``SUFFIXES``.
        wanted: columns whose values are kept, where they are there.

    Raises:
        DataError: if the file as a whole cannot be read: it is missing, empty, of another kind or encoding, too large,
            or its columns cannot be told. Single rows that cannot be read are in the result.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"a metadata file is {', '.join(SUFFIXES)}", where=str(path))
    table = Table()
    reader = {".csv": _read_csv, ".parquet": _read_parquet}.get(suffix, _read_json)
    reader(path, frozenset(wanted), table)
    if not table.rows and not table.faults and not (suffix == ".parquet" and table.columns):
        raise DataError("the file has no rows", where=str(path))
    return table


def listed(columns: Collection[str]) -> str:
    """Names of columns for a message, however many and however long they are."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in list(columns)[:20]]
    return ", ".join([*names, *([f"and {len(columns) - 20} more"] if len(columns) > 20 else [])])


# ---------------------------------------------------------------------------------------------------------------- JSON


def _read_json(path: Path, wanted: frozenset[str], table: Table) -> None:
    for where, value in _list_items(path) if _spans_lines(path) else _line_values(path):
        if isinstance(value, DataError):
            table.refuse(value)
            continue
        for name in value:
            if name not in table.columns:
                table.columns[name] = ""
        if len(table.columns) > MAX_COLUMNS:
            raise DataError(f"the rows have more than {MAX_COLUMNS:,} different keys", where=where)
        table.add({name: value[name] for name in wanted if name in value}, where)


def _line_values(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            yield where, _parse(line, where)


def _spans_lines(path: Path) -> bool:
    """Whether a file begins with a list, or with an object that goes on in the next line."""
    require_file(path)
    head = b""
    with suppress(OSError), path.open("rb") as file:  # what cannot be read is told by who reads the rest
        head = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    return head.startswith(b"[") or head.partition(b"\n")[0].strip() == b"{"


def _list_items(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """The objects of a file that is one JSON list, or of objects one after another, each with its first line.

    Raises:
        DataError: at the first place that is not JSON, for what follows cannot be told from it.
    """
    require_file(path, most_bytes=MAX_LIST_BYTES)
    lines = [line for _, line in read_lines(path, most_chars=MAX_LIST_BYTES)]
    raise_all(DataError, [line for line in lines if isinstance(line, DataError)], what="{n} lines cannot be read")
    text = "\n".join(map(str, lines))

    def fault(what: str) -> DataError:
        where = f"{path}:{1 + text.count(chr(10), 0, at)}"
        return DataError(f"not valid JSON: {what}", where=where, fix="write a list of objects, or one object per line")

    at = _next(text, 0)
    is_list = text[at] == "["
    at = _next(text, at + is_list)
    number, counted = 1, 0
    while at < len(text) and text[at] != "]":
        number, counted = number + text.count("\n", counted, at), at
        where = f"{path}:{number}"
        try:
            value, at = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            at = error.pos
            raise fault(f"{error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise _no_json(error, where) from None
        yield where, value if isinstance(value, dict) else _no_object(where)
        at = _next(text, at)
        if is_list and text[at : at + 1] == ",":
            at = _next(text, at + 1)
        elif is_list and at < len(text) and text[at] != "]":
            raise fault("a comma is missing")
    if is_list != (at < len(text)):
        raise fault("the list is not closed" if is_list else "a list ends that has not begun")
    if is_list and (at := _next(text, at + 1)) < len(text):
        raise fault("something follows the list")


def _next(text: str, at: int) -> int:
    """Where the next character that is no white space stands."""
    found = _TEXT.search(text, at)
    return found.start() if found else len(text)


def _parse(line: str, where: str) -> dict[str, Any] | DataError:
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return _no_json(error, where)
    return value if isinstance(value, dict) else _no_object(where)


def _no_object(where: str) -> DataError:
    return DataError("not a JSON object", where=where, fix='write {"file_name": ..., "prompt": ...}')


def _no_json(error: Exception, where: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        what = f"not valid JSON: {error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        what = "not usable JSON: nested too deeply"
    else:  # a key that stands twice; a number of thousands of digits
        what = f"not usable JSON: {str(error).split(';')[0]}"
    return DataError(what, where=where, fix="write one JSON object per line")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:40]!r} stands twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once_each)

_TEXT = re.compile(r"\S")


# ----------------------------------------------------------------------------------------------------------------- CSV


def _read_csv(path: Path, wanted: frozenset[str], table: Table) -> None:
    """Everything in a CSV is text: a caption may be a number, and "NA" or "None" are words."""
    reader = csv.reader(_whole_lines(path), strict=True)
    header: list[str] = []
    begin = 1
    try:
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = _header(fields, where)
                table.columns = dict.fromkeys(header, "")
                kept = [(place, name) for place, name in enumerate(header) if name in wanted]
            elif len(fields) != len(header):
                what = f"the row has {len(fields)} fields, the header {len(header)}"
                table.refuse(DataError(what, where=where, fix='put captions that hold commas in "quotes"'))
            else:
                table.add({name: fields[place] for place, name in kept}, where)
    except csv.Error as error:
        # What follows cannot be told from the row that broke, so this is about the file.
        raise DataError(f"not valid CSV: {error}", where=f"{path}:{begin}", fix="close every quote") from None


def _whole_lines(path: Path) -> Iterator[str]:
    for _, line in read_lines(path):
        if isinstance(line, DataError):  # in the middle of a quoted cell, perhaps: about the file
            raise line
        yield line + "\n"


def _header(fields: list[str], where: str) -> list[str]:
    if len(set(fields)) < len(fields):
        raise DataError("two columns have the same name", where=where, fix="rename one")
    if len(fields) > MAX_COLUMNS:
        raise DataError(f"there are more than {MAX_COLUMNS:,} columns", where=where)
    return fields


# ------------------------------------------------------------------------------------------------------------- Parquet


def _read_parquet(path: Path, wanted: frozenset[str], table: Table) -> None:
    require_file(path)
    limits = {"most_rows": MAX_ROWS, "most_columns": MAX_COLUMNS, "most_bytes": MAX_FILE_BYTES}
    table.columns, rows = read_columns(path, wanted, **limits)
    for number, values in enumerate(rows, start=1):
        table.add(values, f"{path}, row {number}")
