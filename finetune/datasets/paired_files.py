"""Layouts in which a clip's names stand in several files, which pair line by line or by an id in each row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.core.errors import DataError, raise_all
from finetune.core.text import stripped
from finetune.datasets.rows import RawRow, RowReport, is_foreign_absolute, require_inside
from finetune.datasets.tables import MAX_FAULTS, MAX_ROWS, Row, read_lines, read_table


def read_paired_lines(files: Sequence[Path], folder: Path, report: RowReport, *, allow_outside: bool) -> None:
    """Add a row for every line of files that pair line by line.

    Args:
        files: of captions, of videos, and optionally of images.
        folder: where names in them start.
        report: gets the rows, and the lines that cannot be read.
        allow_outside: whether the files may be links that lead out of the folder.

    Raises:
        DataError: if a file cannot be used, or their counts of lines differ.
    """
    columns: list[list[str | DataError]] = []
    faults: list[DataError] = []
    for file in files:
        try:
            require_inside(file, folder, allow_outside=allow_outside)
            columns.append(_paired_lines(file))
        except DataError as error:
            faults.append(error)
    raise_all(DataError, faults, what="{n} of the files that pair line by line cannot be used")
    report.unusable += [line for column in columns for line in column if isinstance(line, DataError)]
    counts = [len(column) for column in columns]
    if len(set(counts)) > 1 or not counts[0]:
        listed = ", ".join(f"{file.name} {count}" for file, count in zip(files, counts, strict=True))
        what = f"the files pair line by line, but their counts of lines are: {listed}"
        raise DataError(what, where=str(folder), fix="write one line per clip in each file")
    for number, (caption, video, *image) in enumerate(zip(*columns, strict=True), start=1):
        if not any(isinstance(value, DataError) for value in (caption, video, *image)):
            where = f"{files[0]}:{number}"
            report.rows.append(RawRow(video, caption, image[0] if image else None, folder, where))


def read_paired_tables(folder: Path, report: RowReport) -> None:
    """Add the rows of CogKit's three tables, which pair by their ids.

    Args:
        folder: with ``metadata.jsonl`` of captions, and one each in ``videos`` and, where there are any, in ``images``.
        report: gets the rows, and an error for each that has no partner.

    Raises:
        DataError: if a table cannot be read.
    """
    videos = _rows_by_id(folder / "videos" / "metadata.jsonl", report)
    images = _rows_by_id(folder / "images" / "metadata.jsonl", report)
    prompts = _rows_by_id(folder / "metadata.jsonl", report)
    for key, row in prompts.items():
        if key not in videos:
            what = f"id {key!r} is not in videos/metadata.jsonl"
            report.errors.append(DataError(what, where=row.where, fix="add it there, or take the row out"))
            continue
        image = _inner_name("images", images[key]) if key in images else None
        video = _inner_name("videos", videos[key])
        report.rows.append(RawRow(video, row.values.get("prompt"), image, folder, row.where))
    for key, row in videos.items():
        if key not in prompts:
            what = f"id {key!r} has no prompt in {folder / 'metadata.jsonl'}"
            report.errors.append(DataError(what, where=row.where, fix="add it there, or take the row out"))


def only_file(folder: Path, names: Sequence[str]) -> Path:
    """The file of one of these names; of the first if there is none."""
    present = [folder / name for name in names if (folder / name).is_file()]
    if len(present) > 1:
        listed = " and ".join(file.name for file in present)
        raise DataError(f"{listed} could both be meant", where=str(folder), fix="leave one of them there")
    return present[0] if present else folder / names[0]


def _paired_lines(path: Path) -> list[str | DataError]:
    """The lines of a file that pairs line by line with another: line 1 first, stripped, blank ones at the end left out.

    Returns:
        Text, or an error for a line that cannot be read.

    Raises:
        DataError: if the file cannot be read, if there are too many lines or errors, and for the blank lines that
            others follow: nobody can say which line of the other file belongs to what comes after them.
    """
    lines: list[str | DataError] = []
    faults: list[DataError] = []
    blank: list[int] = []
    last = 0
    for number, line in read_lines(path):
        text = line if isinstance(line, DataError) else stripped(line)
        if text == "":
            if len(blank) <= MAX_FAULTS:  # what follows may be endless, and blank to its end
                blank.append(number)
            continue
        last = number
        lines.append(text)
        faults += [text] if isinstance(text, DataError) else []
        if len(lines) > MAX_ROWS or len(faults) + len(blank) > MAX_FAULTS:
            most = f"{MAX_ROWS:,} lines" if len(lines) > MAX_ROWS else f"{MAX_FAULTS:,} lines that cannot be read"
            fix = "check that this is the right file"
            raise DataError(f"the file has more than {most}", where=f"{path}:{number}", fix=fix)
    fix = "write what belongs there, or take the line out of every file"
    places = [f"{path}:{number}" for number in blank if number < last]
    between = [DataError("the line is blank, and more follow", where=place, fix=fix) for place in places]
    if between:
        what = "{n} lines cannot be used, so that it cannot be told what belongs together"
        raise_all(DataError, [*between, *faults], what=what)
    return lines


def _rows_by_id(file: Path, report: RowReport) -> dict[str, Row]:
    """The rows of one of CogKit's files by their id, as text so that 7 and "7" are the same; none if there is no file.

    Rows that cannot be read, have no id or one that another has are handed on.
    """
    rows: dict[str, Row] = {}
    if file.parent.name == "images" and not file.is_file():
        return rows
    table = read_table(file, ("id", "file_name", "prompt"))
    report.unusable += table.faults
    for row in table.rows:
        value = row.values.get("id")
        if not isinstance(value, int | str) or isinstance(value, bool) or value == "":
            fix = 'write "id" as a number or text'
            report.errors.append(DataError("the row has no id", where=row.where, fix=fix))
        elif str(value) in rows:
            fix = "give every row its own"
            report.errors.append(DataError(f"id {value!r} is there twice", where=row.where, fix=fix))
        else:
            rows[str(value)] = row
    return rows


def _inner_name(folder: str, row: Row) -> object:
    """A file name seen from the folder above ``folder``; as it is where it names no file below ``folder`` at all."""
    name = row.values.get("file_name")
    is_inner = isinstance(name, str) and name and not name.startswith("/") and not is_foreign_absolute(name)
    return f"{folder}/{name}" if is_inner else name
