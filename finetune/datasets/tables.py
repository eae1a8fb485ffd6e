"""Rows of ``jsonl``, ``csv`` and ``parquet`` files, read by HF ``datasets``, each with the line it stands on.

HF ``datasets`` reads the values, from local files only and without leaving anything in its cache. Around it stands what
it does not do: it names no line for a broken row, takes ``NA`` in a CSV for nothing, and moves the columns of a CSV row
with an unquoted comma, all of which would change captions silently.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.errors import DataError, raise_all

SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row: its values by column, and where it was written, such as ``metadata.jsonl:17``."""

    values: dict[str, Any]
    where: str


def read_table(path: Path) -> list[Row]:
    """Read every row of a metadata file.

    Raises:
        DataError: if the file is missing, empty, of another kind, not UTF-8, or has rows that cannot be read; all such
            rows are named together.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError("a metadata file is .jsonl, .csv or .parquet", where=str(path))
    if path.suffix.lower() == ".parquet":
        values = _load("parquet", path, path)
        places = [f"{path}, row {number}" for number in range(1, len(values) + 1)]
    elif path.suffix.lower() == ".csv":
        values, lines = _read_csv(path)
        places = [f"{path}:{line}" for line in lines]
    else:
        values, lines = _read_jsonl(path)
        places = [f"{path}:{line}" for line in lines]
    if not values:
        raise DataError("the file has no rows", where=str(path))
    return [Row(row, place) for row, place in zip(values, places, strict=True)]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, stripped, with their numbers from 1. Raises DataError."""
    lines = ((number, line.strip()) for number, line in enumerate(read_text(path).split("\n"), 1))
    return [(number, line) for number, line in lines if line]


def read_text(path: Path) -> str:
    """A UTF-8 file, byte order mark and CRLF taken out. Raises DataError naming the line that is not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=str(path)) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"the text is not UTF-8 (byte 0x{content[error.start]:02x})",
            where=f"{path}:{line}",
            fix="save the file as UTF-8",
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError("the text holds NUL characters", where=f"{path}:{line}", fix="save the file as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_jsonl(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    lines = read_lines(path)
    if not lines:
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        # Blank lines and byte order marks are taken out, because the reader stumbles over both and counts only rows.
        cleaned = Path(folder) / path.name
        cleaned.write_text("".join(line + "\n" for _, line in lines), encoding="utf-8", newline="\n")
        try:
            values = _load("json", cleaned, path)
        except DataError:
            values = []
    if len(values) != len(lines):
        values = _parse_lines(path, lines)
    return values, [number for number, _ in lines]


def _parse_lines(path: Path, lines: list[tuple[int, str]]) -> list[dict[str, Any]]:
    """Read lines that HF ``datasets`` will not: either some are no JSON objects, which is told for each of them, or a
    column changes its type between rows, which is nobody's fault as long as it is not a column that is used.
    """
    errors: list[DataError] = []
    values: list[dict[str, Any]] = []
    for number, line in lines:
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is valid JSON, and no text
        except ValueError as error:
            errors.append(DataError(f"not valid JSON: {error}", where=where, fix="write one JSON object per line"))
            continue
        if not isinstance(value, dict):
            errors.append(DataError("not a JSON object", where=where, fix='write {"file_name": ..., "prompt": ...}'))
            continue
        values.append(value)
    raise_all(DataError, errors, what="{n} lines cannot be read")
    columns = dict.fromkeys(column for value in values for column in value)
    return [{column: value.get(column) for column in columns} for value in values]


def _read_csv(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    numbers: list[int] = []
    errors: list[DataError] = []
    begin = 1
    try:
        for fields in reader:
            where, line, begin = f"{path}:{begin}", begin, reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError("two columns have the same name", where=where, fix="rename one")
            elif len(fields) != len(header):
                what = f"the row has {len(fields)} fields, the header {len(header)}"
                errors.append(DataError(what, where=where, fix='put captions that hold commas in "quotes"'))
            else:
                numbers.append(line)
    except csv.Error as error:
        errors.append(DataError(f"not valid CSV: {error}", where=f"{path}:{begin}", fix="close every quote"))
    raise_all(DataError, errors, what="{n} rows cannot be read")
    if not numbers:
        return [], []
    with tempfile.TemporaryDirectory() as folder:
        cleaned = Path(folder) / path.name
        cleaned.write_text(text, encoding="utf-8", newline="\n")
        # Everything is text: a caption may be a number, and "NA" or "None" are words.
        values = _load("csv", cleaned, path, text_columns=header)
    return values, numbers


def _load(kind: str, file: Path, shown: Path, text_columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Read a local file with HF ``datasets`` into rows; ``shown`` is the path for messages."""
    import datasets

    if not file.is_file():
        raise DataError("there is no such file", where=str(shown))
    with tempfile.TemporaryDirectory() as cache, _quiet(datasets):
        options: dict[str, Any] = {"cache_dir": cache, "streaming": True}
        try:
            if kind == "json":
                table = datasets.Dataset.from_json(str(file), **options)
            elif kind == "csv":
                features = datasets.Features({name: datasets.Value("string") for name in text_columns or ()})
                table = datasets.Dataset.from_csv(str(file), features=features, keep_default_na=False, **options)
            else:
                table = datasets.Dataset.from_parquet(str(file), **options)
            return [dict(row) for row in table]
        except Exception as error:  # pyarrow's, pandas' and datasets' own: all say that the file is not as it should be
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"HF datasets cannot read the file: {reason}", where=str(shown)) from None


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep HF ``datasets`` from logging an error that is about to be raised, better explained."""
    before = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(before)
