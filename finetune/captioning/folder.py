"""A folder of clips as captions see it: its rows, where their captions stand, and the record of what models wrote."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.core.files import atomic_write_text
from finetune.datasets.rows import (
    MAX_CAPTION_BYTES,
    VIDEO,
    PathPolicy,
    RowReport,
    Sidecars,
    list_folder,
    without_companions,
)
from finetune.datasets.tables import CAPTION_COLUMNS, VARIANTS, VIDEO_COLUMNS, read_lines, read_text

RECORD = "captions.jsonl"
"""Beside the clips: one line for every caption that a model wrote."""

TABLE = "metadata.jsonl"


@dataclass(frozen=True)
class CaptionRecord:
    """One caption that a model wrote, and what made it."""

    file_name: str
    variant: int
    caption: str
    tokens: int
    """As CogVideoX counts them."""
    model: str
    revision: str
    method: str
    """Digest of the instruction and of how the clip was shown."""
    video: str
    """Digest of the clip's file."""


def mend_records(path: Path) -> None:
    """For who writes: take a line that a crash cut short off the end, so that the next starts a line of its own."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def read_records(path: Path) -> list[CaptionRecord]:
    """Every whole line of a record; none where there is no record."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(CaptionRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            what = f"the line is no record of a caption: {error}"
            fix = "take the line out; its clip is captioned anew"
            raise DataError(what, where=f"{path}:{number}", fix=fix) from None
    return records


@dataclass
class Row:
    """A clip and its captions."""

    file_name: str
    video: Path
    texts: list[str]
    """One per variant; empty where there is none."""
    values: dict[str, Any] = field(default_factory=dict)
    """All columns of the table."""


@dataclass
class Table:
    """A folder with a ``metadata.jsonl``, or one that gets it; columns that are not captions stay as they are."""

    file: Path
    rows: list[Row]
    column: str

    def written(self, row: Row) -> dict[str, Any]:
        """A row as it stands in the file."""
        captions: dict[str, Any] = {}
        if row.texts[0] or self.column in row.values:
            captions[self.column] = row.texts[0]
        if VARIANTS in row.values or len(row.texts) > 1:
            captions[VARIANTS] = [text for text in row.texts if text]
        return {**row.values, **captions}

    def write(self) -> None:
        """Write the file, if it would change."""
        content = "".join(json.dumps(self.written(row), ensure_ascii=False) + "\n" for row in self.rows)
        if not self.file.exists() or self.file.read_bytes() != content.encode("utf-8"):
            atomic_write_text(self.file, content)


@dataclass
class TextFiles:
    """A folder of clips with a ``.txt`` beside each."""

    file: Path
    rows: list[Row]
    texts_before: dict[str, str]
    column: str = "caption"

    def written(self, row: Row) -> dict[str, Any]:
        """A row as a table would have it."""
        return {**row.values, self.column: row.texts[0]}

    def write(self) -> None:
        """Write the files that change."""
        for row in self.rows:
            if row.texts[0] != self.texts_before[row.file_name]:
                atomic_write_text(row.video.with_suffix(".txt"), row.texts[0] + "\n")


def open_dataset(folder: Path, variants: int = 1) -> Table | TextFiles:
    """The rows of a folder, each with room for so many captions.

    Raises:
        DataError: if it holds no clips, keeps its captions in a way that is not written here, or names what it may not.
    """
    table = folder / TABLE
    if table.is_file():
        return _open_table(table, variants)
    others = ("metadata.csv", "metadata.parquet", "metadata.json", "prompts.txt")
    if other := next((name for name in others if (folder / name).is_file()), None):
        fix = f"write its rows into {TABLE}: one object per line, with file_name"
        raise DataError(f"the captions of this folder are in {other}, which is not changed", where=str(folder), fix=fix)
    report = RowReport()
    files, _ = without_companions(list_folder(folder, report, allow_outside=False))
    videos = [file for file in files if file.suffix.lower() in VIDEO.suffixes]
    if not videos:
        fix = f"known are {' '.join(VIDEO.suffixes)}"
        raise DataError("; ".join(["the folder holds no videos", *report.notes]), where=str(folder), fix=fix)
    sidecars = Sidecars(files, videos, (".txt",))
    texts: dict[str, str] = {}
    for video in videos:
        text = sidecars.of(video)
        texts[video.relative_to(folder).as_posix()] = (
            "" if text is None else read_text(text, most_bytes=MAX_CAPTION_BYTES).strip()
        )
    rows = [
        Row(name, folder / name, [text, *[""] * (variants - 1)], {"file_name": name}) for name, text in texts.items()
    ]
    if not any(texts.values()):
        return Table(table, rows, "caption")
    if variants > 1:
        fix = f"move the captions into {TABLE}, or ask for one"
        raise DataError("a .txt beside a clip holds one caption, not several", where=str(folder), fix=fix)
    return TextFiles(folder, rows, texts)


def _open_table(path: Path, variants: int) -> Table:
    policy = PathPolicy()
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        if isinstance(line, DataError):
            raise line
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"the line is no JSON: {error}", where=where, fix="mend it") from None
        if not isinstance(values, dict):
            raise DataError("the line is no JSON object", where=where, fix='write {"file_name": ..., ...}')
        columns |= dict.fromkeys(values)
        name = next((column for column in VIDEO_COLUMNS if column in values), VIDEO_COLUMNS[0])
        video = policy.file(values.get(name), path.parent, VIDEO, where)
        rows.append(Row(str(values[name]), video, [], values))
    captions = [column for column in CAPTION_COLUMNS if column in columns]
    if len(captions) > 1:
        what = f"the columns {' and '.join(captions)} could both be the caption"
        raise DataError(what, where=str(path), fix="rename the one that is not")
    column = captions[0] if captions else "caption"
    if not rows:
        raise DataError("the file has no rows", where=str(path), fix="write one per clip, with its file_name")
    for row in rows:
        texts = row.values.get(VARIANTS) or [row.values.get(column) or ""]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            what = f"the captions of {row.file_name} are no text"
            raise DataError(what, where=str(path), fix=f"write {column} as text, and {VARIANTS} as a list of text")
        row.texts = [row.values.get(column) or "", *texts[1:], *[""] * (variants - len(texts))]
    return Table(path, rows, column)
