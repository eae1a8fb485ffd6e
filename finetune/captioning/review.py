"""Captions beside their clips, to be read and changed in a browser, and saved as the table that training reads."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from finetune.captioning.answers import TokenLimit
from finetune.captioning.caption import read_frames
from finetune.captioning.folder import RECORD, TABLE, Row, TextFiles, open_dataset, read_records
from finetune.core.errors import DataError
from finetune.core.files import atomic_write_text
from finetune.core.terminal import Bar
from finetune.datasets.tables import VARIANTS
from finetune.diagnosis.page import Card, Column, Editing, Fault, Page, Picture, render

_FRAMES = 6

_SIDE = 256
"""Pixels of a picture's longer side."""

_COLUMNS = (Column("tokens", "tokens"), Column("words", "words"), Column("length", "length", "{:.1f} s"))


def write_review(folder: Path, limit: TokenLimit, page: Path, *, progress: bool) -> None:
    """Write the page for a folder of clips; nothing else is changed.

    Args:
        folder: as for ``caption_folder``.
        limit: what the model that is to be trained reads of a caption.
        page: the file to write.
        progress: draw a bar.

    Raises:
        DataError: if the folder, its table or its record cannot be used.
        OSError: if the page cannot be written.
    """
    dataset = open_dataset(folder)
    by_model = {(record.file_name, record.caption): record.model for record in read_records(folder / RECORD)}
    same = Counter(row.texts[0] for row in dataset.rows)
    tokens = limit.count([row.texts[0] for row in dataset.rows])
    shown = Bar(
        read_frames(dataset.rows, _FRAMES, _SIDE, ahead=4), total=len(tokens), desc="pictures", disable=not progress
    )
    cards = []
    for count, (row, seconds, frames) in zip(tokens, shown, strict=True):
        text = row.texts[0]
        faults = list(_faults(row, count, limit, same[text]))
        pictures: Sequence[Picture] = ()
        if isinstance(frames, DataError):
            faults.append(Fault("error", "unreadable", frames.what, frames.fix))
        else:
            pictures = [_picture(Image.fromarray(frame), number) for number, frame in enumerate(frames, start=1)]
        writer = by_model.get((row.file_name, text), "by hand") if text else "no caption"
        values = {"tokens": count if text else 0, "words": len(text.split()), "length": seconds}
        cards.append(Card(row.file_name, text, group=writer, pictures=pictures, values=values, faults=faults))
    notes = [f"Change what is wrong, save, and put the file at {TABLE} in {folder}: it is read by training as it is."]
    if isinstance(dataset, TextFiles):
        notes.append("Take the .txt files beside the clips away then: two places of captions are refused.")
    missing = sum(not row.texts[0] for row in dataset.rows)
    summary = f"{len(cards)} clips, {missing} without a caption; the model reads {limit.most} tokens of each."
    rows = [dataset.written(row) for row in dataset.rows]
    editing = Editing(TABLE, rows, dataset.column, VARIANTS)
    html = render(Page(f"captions of {folder.name}", summary, cards, _COLUMNS, notes=notes, editing=editing))
    atomic_write_text(page, html)


def _faults(row: Row, tokens: int, limit: TokenLimit, same: int) -> list[Fault]:
    if not row.texts[0]:
        return [Fault("error", "empty", "there is no caption", "write one")]
    faults = []
    if tokens > limit.most:
        faults.append(Fault("warning", "too long", f"{tokens} tokens; {limit.most} are read", "shorten it"))
    if same > 1:
        faults.append(Fault("note", "the same", f"{same} clips have this caption"))
    return faults


def _picture(image: Image.Image, number: int) -> Picture:
    content = io.BytesIO()
    image.save(content, "WEBP", quality=80)
    return Picture(content.getvalue(), image.height, image.width, f"frame {number}")
