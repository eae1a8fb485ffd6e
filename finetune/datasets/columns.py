"""Which column of a metadata file is the video, the caption, the image."""

from __future__ import annotations

from pathlib import Path

from finetune.datasets.tables import Table, listed
from finetune.errors import DataError

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
