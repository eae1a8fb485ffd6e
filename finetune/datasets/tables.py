"""Files of text and tables of a dataset: bounded, in UTF-8, and every fault with its line.

JSON and CSV are read with Python's own parsers: they name the line of a broken row, take ``NA`` in a CSV for a word,
and never move the columns of a row with an unquoted comma. JSON may be an object per line or one list of objects,
whatever the file is called. Parquet is read with HF ``datasets``, in a worker: over a damaged file it ends the process,
past anything that Python could catch.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError, raise_all
from finetune.core.types import CompanionName
from finetune.datasets.worker import Worker

MAX_FILE_BYTES = 1 << 30
"""Of one metadata file: about a thousand bytes for each of a million rows."""

MAX_LINE_CHARS = 1 << 20
"""Of one line: a hundred times the longest caption."""

MAX_LIST_BYTES = 1 << 28
"""Of a file that is one JSON list: its text is held in memory as a whole."""

MAX_ROWS = 2_000_000
"""Of one source: more want sources of their own, or another tool."""

MAX_COLUMNS = 1_000

MAX_FAULTS = 10_000
"""Rows of one source that are told to be unusable; with more of them it is the wrong file."""

# --- lines ------------------------------------------------------------------------------------------------------------


def require_file(path: Path, *, most_bytes: int = MAX_FILE_BYTES) -> None:
    """Make sure that ``path`` can be opened and read to its end: a pipe would wait, a device would never end.

    Raises:
        DataError: if it is missing, no regular file, or larger than ``most_bytes``.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path), fix="check data.sources") from None
    except (OSError, ValueError) as error:
        raise _unreadable(error, path) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"this is {kind_of(status.st_mode)}, not a file", where=str(path), fix="name a regular file")
    if status.st_size > most_bytes:
        raise DataError(
            f"the file has {status.st_size:,} bytes; at most {most_bytes:,} are read",
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
            if encoding := _wide_encoding(raw.read(4096)):
                fix = f"convert it: `iconv -f {encoding} -t UTF-8 OLD > NEW` (PowerShell: `Out-File -Encoding utf8`)"
                raise DataError(f"the file is {encoding} text, and UTF-8 is read", where=str(path), fix=fix)
        # Bytes that are no UTF-8 come through as marks, so that one of them spoils its own line only.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as source:
            number = 0
            while text := source.readline(most_chars + 1):
                number += 1
                piece = text
                while not piece.endswith("\n") and len(piece) >= most_chars:  # the rest of an endless line
                    piece = source.readline(most_chars)
                line = text.removesuffix("\n")
                yield number, _line_fault(line, f"{path}:{number}", most_chars) or line
    except OSError as error:
        raise _unreadable(error, path) from None


def read_text(path: Path, *, most_bytes: int) -> str:
    """A whole UTF-8 file of at most ``most_bytes``, byte order mark taken out and line ends made ``\\n``.

    Raises:
        DataError: as ``read_lines`` does, and for its first line that cannot be read.
    """
    require_file(path, most_bytes=most_bytes)
    return "\n".join(_sound(line) for _, line in read_lines(path))


def _sound(line: str | DataError) -> str:
    if isinstance(line, DataError):
        raise line
    return line


_BYTE = re.compile("[\udc80-\udcff]")
"""What the decoder makes of a byte that is not UTF-8: 0xDC00 plus the byte."""


def _line_fault(line: str, where: str, most_chars: int) -> DataError | None:
    if len(line) > most_chars:
        fix = "check that this is the right file"
        return DataError(f"the line has more than {most_chars:,} characters", where=where, fix=fix)
    if match := _BYTE.search(line):
        byte = ord(match.group()) - 0xDC00
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


def _unreadable(error: OSError | ValueError, path: Path) -> DataError:
    reason = (isinstance(error, OSError) and os.strerror(error.errno or 0)) or str(error)
    return DataError(f"the file cannot be read: {reason}", where=str(path))


# --- tables -----------------------------------------------------------------------------------------------------------

SUFFIXES = (".jsonl", ".csv", ".parquet", ".json")

VIDEO_COLUMNS = ("file_name", "video", "video_path", "path", "file_path", "file")

CAPTION_COLUMNS = ("prompt", "caption", "text")

IMAGE_COLUMNS = ("image", "image_path", "image_file")

COMPANION_COLUMNS: Mapping[CompanionName, tuple[str, ...]] = {
    "control": ("control", "control_path", "control_file", "control_video"),
    "mask": ("mask", "mask_path", "mask_file", "mask_video"),
}

VARIANTS = "captions"
"""Column of lists of captions, as ``finetune caption --variants`` writes it: the first is the caption. In a CSV, whose
cells are text, it is a column like others."""


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


def column_of(table: Table, named: str | None, usual: tuple[str, ...], option: str, file: Path) -> str:
    """The column to read: the named one, or the only one with a usual name; "" where there is none that may be missing.

    Raises:
        DataError: if there is no such column, several could be meant, or it holds no text.
    """
    columns = f"the columns are: {_listed(table.columns)}"
    if named is not None:
        if named not in table.columns:
            raise DataError(f"there is no column '{named}'; {columns}", where=str(file), fix=f"correct {option}")
        names = [named]
    else:
        names = [name for name in usual if name in table.columns]
    optional = option in ("image_column", *(f"{name}_column" for name in COMPANION_COLUMNS))
    fix = f"name a column of text with {option} (kind: metadata); for videos inside the file, kind: packed"
    if len(names) > 1:
        raise DataError(f"the columns {' and '.join(names)} could both be meant", where=str(file), fix=fix)
    if not names and not optional:
        what = f"none of the usual columns is there ({', '.join(usual)}); {columns}"
        raise DataError(what, where=str(file), fix=fix)
    if names and table.columns[names[0]] and (named is not None or not optional):
        what = f"the column {names[0]} holds {table.columns[names[0]]}, not text"
        raise DataError(what, where=str(file), fix=fix)
    return names[0] if names else ""


def _listed(columns: Collection[str]) -> str:
    """Names of columns for a message, however many and however long they are."""
    names = [name if len(name) <= 40 else f"{name[:37]}..." for name in list(columns)[:20]]
    return ", ".join([*names, *([f"and {len(columns) - 20} more"] if len(columns) > 20 else [])])


# --- JSON -------------------------------------------------------------------------------------------------------------


def _read_json(path: Path, wanted: frozenset[str], table: Table) -> None:
    for where, value in _list_items(path) if _spans_lines(path) else _line_items(path):
        if isinstance(value, DataError):
            table.refuse(value)
            continue
        for name in value:
            table.columns.setdefault(name, "")
        if len(table.columns) > MAX_COLUMNS:
            raise DataError(f"the rows have more than {MAX_COLUMNS:,} different keys", where=where)
        table.add({name: value[name] for name in wanted if name in value}, where)


def _line_items(path: Path) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            yield where, line
        elif line.strip():
            try:
                yield where, _object(_DECODER.decode(line), where)
            except (ValueError, RecursionError) as error:
                yield where, _no_json(error, where)


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
        yield where, _object(value, where)
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
    match = _VISIBLE.search(text, at)
    return match.start() if match else len(text)


def _object(value: Any, where: str) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError("not a JSON object", where=where, fix='write {"file_name": ..., "prompt": ...}')


def _no_json(error: Exception, where: str) -> DataError:
    if isinstance(error, json.JSONDecodeError):
        what = f"not valid JSON: {error.msg} at column {error.colno}"
    elif isinstance(error, RecursionError):
        what = "not usable JSON: nested too deeply"
    else:  # a key that stands twice; a number of thousands of digits
        what = f"not usable JSON: {str(error).split(';')[0]}"
    return DataError(what, where=where, fix="write one JSON object per line")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:40]!r} stands twice")
        values[name] = value
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)

_VISIBLE = re.compile(r"\S")


# --- CSV --------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, wanted: frozenset[str], table: Table) -> None:
    """Everything in a CSV is text: a caption may be a number, and "NA" or "None" are words."""
    # A line that cannot be read may stand in the middle of a quoted cell: it is about the file.
    reader = csv.reader((_sound(line) + "\n" for _, line in read_lines(path)), strict=True)
    header: list[str] = []
    begin = 1
    try:
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not fields:
                continue
            if not header:
                header = fields
                table.columns = dict.fromkeys(header, "")
                if len(table.columns) < len(header):
                    raise DataError("two columns have the same name", where=where, fix="rename one")
                if len(header) > MAX_COLUMNS:
                    raise DataError(f"there are more than {MAX_COLUMNS:,} columns", where=where)
                kept = [(place, name) for place, name in enumerate(header) if name in wanted]
            elif len(fields) != len(header):
                what = f"the row has {len(fields)} fields, the header {len(header)}"
                table.refuse(DataError(what, where=where, fix='put captions that hold commas in "quotes"'))
            else:
                table.add({name: fields[place] for place, name in kept}, where)
    except csv.Error as error:
        # What follows cannot be told from the row that broke, so this is about the file.
        raise DataError(f"not valid CSV: {error}", where=f"{path}:{begin}", fix="close every quote") from None


# --- Parquet ----------------------------------------------------------------------------------------------------------

PARQUET_WORKER = (
    "import os; os.environ.update(HF_DATASETS_OFFLINE='1', HF_HUB_OFFLINE='1'); "
    "from finetune.datasets import tables, worker; worker.serve(tables.handle_parquet)"
)

PARQUET_TIMEOUT_S = 900.0

_PARQUET_BATCH = 256
"""Rows in memory at once."""


def _read_parquet(path: Path, wanted: frozenset[str], table: Table) -> None:
    require_file(path)
    with closing(Worker("Parquet reader", PARQUET_WORKER)) as worker:
        request = {"wanted": sorted(wanted)}
        fields, body = worker.ask(path.absolute(), request, most_bytes=MAX_FILE_BYTES, timeout_s=PARQUET_TIMEOUT_S)
    table.columns = fields["columns"]
    for number, line in enumerate(body.splitlines(), start=1):
        table.add(dict(zip(fields["names"], json.loads(line), strict=True)), f"{path}, row {number}")


def handle_parquet(fields: dict[str, Any]) -> tuple[dict[str, Any], list[bytes]]:
    """Read the wanted columns of a Parquet file, as far as they hold text; in a worker.

    Returns:
        Every column of the file with what is wrong with it as a column of text (empty: nothing), and the names of those
        that are read; and a line of JSON for each row.

    Raises:
        DataError: if the file is damaged or claims more than is read.
    """
    path = Path(fields["path"])
    fix = "write the file again, or a smaller one"
    try:
        columns, fault = _parquet_columns(path, set(fields["wanted"]))
        names = [name for name, trouble in columns.items() if name in fields["wanted"] and not trouble]
        lines = _parquet_lines(path, names) if names and not fault else []
    except DataError:
        raise
    except Exception as error:  # pyarrow's and datasets' own kinds: all say that the file is not as it should be
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"not a readable Parquet file: {reason:.300}", where=str(path), fix=fix) from None
    if fault:
        raise DataError(fault, where=str(path), fix=fix)
    return {"columns": columns, "names": names}, lines


def _parquet_columns(path: Path, wanted: set[str]) -> tuple[dict[str, str], str]:
    """The columns with what is wrong with each, and what the file claims amiss."""
    import pyarrow
    from pyarrow import parquet

    pyarrow.set_cpu_count(1)  # a thread for every core would take memory of its own
    columns: dict[str, str] = {}
    with parquet.ParquetFile(path) as file:
        schema, claims = file.schema_arrow, file.metadata
        if len(set(schema.names)) < len(schema.names):
            return {}, "two columns have the same name"
        if len(schema.names) > MAX_COLUMNS:
            return {}, f"there are more than {MAX_COLUMNS:,} columns"
        if not 0 < claims.num_rows <= MAX_ROWS:
            return {}, f"the file has {claims.num_rows:,} rows; 1 to {MAX_ROWS:,} are read"
        for column in schema:
            kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
            if column.name == VARIANTS and (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
                kind = kind.value_type
            text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            columns[column.name] = "" if text else f"{column.type}"[:60]
        # What compressed text unfolds to is written beside it.
        groups = [claims.row_group(number) for number in range(claims.num_row_groups)]
        chunks = [group.column(place) for group in groups for place in range(group.num_columns)]
        read = {name for name in wanted if columns.get(name) == ""}
        paths = {path for path in (chunk.path_in_schema for chunk in chunks) if path.partition(".")[0] in read}
        claimed = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in read | paths)
        if claimed > MAX_FILE_BYTES:
            return {}, f"its text unfolds to {claimed:,} bytes; at most {MAX_FILE_BYTES:,} are read"
    return columns, ""


def _parquet_lines(path: Path, names: list[str]) -> list[bytes]:
    """The rows, read with HF ``datasets``.

    It is told what the columns are. Left to itself it would follow what the file says of them, and open the images,
    sounds and addresses that rows name.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    types, text = parquet.read_schema(path), datasets.Value("string")
    lines: list[bytes] = []
    characters = 0
    with tempfile.TemporaryDirectory() as folder:
        # Under a plain name: HF datasets takes some names for patterns, addresses or archives.
        link = Path(folder) / "table.parquet"
        link.symlink_to(path.absolute())
        rows = datasets.Dataset.from_parquet(
            str(link),
            columns=names,
            features=datasets.Features(
                {n: datasets.List(text) if pyarrow.types.is_nested(types.field(n).type) else text for n in names}
            ),
            batch_size=_PARQUET_BATCH,
            cache_dir=folder,
            streaming=True,
        )
        for row in rows:
            values = [row[name] for name in names]
            cells = [cell for value in values for cell in (value if isinstance(value, list) else [value])]
            characters += sum(len(cell) for cell in cells if cell is not None)
            if characters > MAX_FILE_BYTES:
                what = f"its text unfolds to more than {MAX_FILE_BYTES:,} characters"
                raise DataError(what, where=str(path), fix="write the file again, or a smaller one")
            lines.append(json.dumps(values, ensure_ascii=False).encode() + b"\n")
    return lines
