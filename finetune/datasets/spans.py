"""Rows that are parts of longer videos: their time spans and captions, as Panda-70M and others write them."""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.core.errors import DataError
from finetune.datasets.rows import VIDEO, RawRow
from finetune.datasets.tables import Row

PANDA_COLUMNS = ("videoID", "timestamp", "caption")
"""By which a table of Panda-70M is known: a row per video, with a list of spans and one of captions."""

MAX_SPANS = 10_000
"""Of one row."""

_CLOCK = re.compile(r"(?:(\d{1,3}):)?(?:(\d{1,3}):)?(\d{1,6}(?:\.\d{1,9})?)")
"""Hours, minutes and seconds, or the latter only."""


def rows_of(row: Row, columns: tuple[str, str], spans: Sequence[str], root: Path) -> list[RawRow]:
    """The clips of one row of a table.

    Args:
        row: with the values of all columns named here.
        columns: of the video's name, with or without its ending, and of the caption.
        spans: one column with a span or a list of spans (then the caption is a list of as many), or two with its begin
            and end.
        root: the folder that names start at.

    Raises:
        DataError: if they are no spans, or not as many as captions.
    """
    video, caption = (row.values.get(column) for column in columns)
    values = [row.values.get(column) for column in spans]
    parts = _literal(values[0]) if len(values) == 1 else values
    listed = isinstance(parts, list | tuple) and bool(parts) and isinstance(parts[0], list | tuple)
    texts = _literal(caption) if listed else [caption]
    parts = list(parts) if listed else [parts]
    if not isinstance(texts, list | tuple) or len(texts) != len(parts) or len(parts) > MAX_SPANS:
        count = f"{len(texts)} captions" if isinstance(texts, list | tuple) else "one caption"
        fix = f"write a list of as many captions as spans, at most {MAX_SPANS:,}"
        raise DataError(f"there are {len(parts):,} spans and {count}", where=row.where, fix=fix)
    name = _file_name(video, root)
    clips = []
    for text, part in zip(texts, parts, strict=True):
        begin, end = _span(part, row.where)
        clips.append(RawRow(name, text, None, root, f"{row.where}, {begin:g} to {end:g} s", span_s=(begin, end)))
    return clips


def _literal(value: Any) -> Any:
    """A list that stands in a cell of text, as Python and JSON write it; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "(")):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            return value
    return value


def _span(part: Any, where: str) -> tuple[float, float]:
    times = [_seconds(value) for value in part] if isinstance(part, list | tuple) and len(part) == 2 else []
    if len(times) != 2 or not 0 <= times[0] < times[1] < math.inf:
        fix = "write its begin and end in seconds, or as 0:01:02.345"
        raise DataError(f"{part!r:.60} is no time span", where=where, fix=fix)
    return times[0], times[1]


def _seconds(value: Any) -> float:
    """Seconds of a time that is a number or ``[[H:]M:]S``; NaN if it is none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _CLOCK.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        return math.nan
    hours, minutes, seconds = match.groups()
    if minutes is None:  # one colon: what the first group took are minutes
        hours, minutes = None, hours
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds)


def _file_name(video: Any, root: Path) -> Any:
    """The name of the file that a video's id means, where it has no ending; whether it may be read is checked later."""
    if not isinstance(video, str) or not video or video.lower().endswith(VIDEO.suffixes):
        return video
    names = [f"{video}{suffix}" for suffix in VIDEO.suffixes]
    return next((name for name in names if os.path.isfile(root / name)), names[0])  # noqa: PTH113 - of any text
