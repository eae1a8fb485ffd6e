"""From the sources of a dataset to its samples, with every bad row reported at once, before anything is decoded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import field_validator

from finetune.datasets.layouts import SourceConfig as SourceConfig
from finetune.datasets.layouts import Split
from finetune.datasets.rows import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    RawRow,
    Reading,
    check_caption,
    check_file,
    text_fault,
)
from finetune.errors import DataError, raise_all
from finetune.section import Strict
from finetune.types import Sample

_Value = TypeVar("_Value")
_Checked = Sample | list[DataError]


class CaptionConfig(Strict):
    """What is added to every caption when it is read."""

    trigger: str = ""
    """Trigger word, such as ``zkx``: put before everything else with a space after it, unless prefix, caption and
    suffix together hold it already as a word of its own, in the same case."""
    caption_prefix: str = ""
    """Put before every caption exactly as written: end it with a space where one is wanted (and quote it in YAML)."""
    caption_suffix: str = ""
    """Put after every caption exactly as written."""

    @field_validator("trigger", "caption_prefix", "caption_suffix")
    @classmethod
    def _plain_text(cls, text: str) -> str:
        if (fault := text_fault(text)) or len(text.splitlines()) > 1:
            raise ValueError(fault or "must be one line")
        return text

    def apply(self, caption: str) -> str:
        """The caption that is trained on: white space joined to single spaces, then prefix, suffix and trigger."""
        # T5's tokenizer joins white space too, so this changes no token; it makes equal captions share a cache entry.
        text = f"{self.caption_prefix}{' '.join(caption.split())}{self.caption_suffix}"
        trigger = self.trigger.strip()
        if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text):
            return text
        return f"{trigger} {text}"


@dataclass(frozen=True)
class SourceRead:
    """All samples of a dataset, in the order of the sources and of their rows."""

    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Advice that is no error, such as duplicate rows."""


def read_samples(
    sources: Sequence[SourceConfig], captions: CaptionConfig, *, image_to_video: bool, base: Path
) -> SourceRead:
    """Read and check every row of every source; no video is opened.

    Args:
        sources: where to read.
        captions: what is added to every caption.
        image_to_video: read first-frame images where a source names them; a row without one gets ``image=None``, which
            means the video's own first frame. False: images are neither read nor checked.
        base: folder that relative paths start at.

    Raises:
        DataError: listing all that is wrong, each with file and line: rows that cannot be used, sources that cannot be
            read, a video in both splits, or no training clip at all.
    """
    errors: list[DataError] = []
    notes: list[str] = []
    split: dict[Split, list[Sample]] = {"train": [], "holdout": []}
    for source in sources:
        reading = Reading()
        try:
            source.read(base, reading)
        except DataError as error:
            errors.append(error)
        errors += reading.errors
        notes += reading.notes
        for row in reading.rows:
            checked = _check(row, captions, source, image_to_video, base)
            if isinstance(checked, Sample):
                split[source.split].append(checked)
            else:
                errors += checked
    errors += _leaks(split["train"], split["holdout"])
    if not errors and not split["train"]:
        errors.append(
            DataError("the sources hold no training clip", where="data.sources", fix="add one of split: train")
        )
    raise_all(DataError, errors, what="{n} things are wrong with the dataset")
    notes += _duplicates([*split["train"], *split["holdout"]])
    return SourceRead(tuple(split["train"]), tuple(split["holdout"]), tuple(notes))


def source_files(sources: Sequence[SourceConfig], base: Path) -> list[Path]:
    """What decides which rows ``read_samples`` finds: files by their content, folders by their listing.

    Whoever keeps the result of reading can tell from these, without reading again, whether it still holds. Videos and
    images are not among them. Raises DataError if a source's layout cannot be told.
    """
    return list(dict.fromkeys(file for source in sources for file in source.files(base)))


def _check(row: RawRow, captions: CaptionConfig, source: SourceConfig, image_to_video: bool, base: Path) -> _Checked:
    """The sample that a row gives, or everything that is wrong with it."""
    errors: list[DataError] = []

    def tried(check: Callable[..., _Value], *arguments: Any) -> _Value | None:
        try:
            return check(*arguments)
        except DataError as error:
            errors.append(error)
            return None

    video = tried(check_file, row.video, row.root, VIDEO_SUFFIXES, "video", row.where)
    caption = tried(check_caption, row.caption, row.where)
    image = None
    if image_to_video and row.image is not None:
        image = tried(check_file, row.image, row.root, IMAGE_SUFFIXES, "image", row.where)
    if video is None or caption is None or errors:
        return errors
    where = row.where.removeprefix(f"{os.path.abspath(base)}{os.sep}")  # noqa: PTH100 - as layouts writes it
    return Sample(video, captions.apply(caption), image, where, source.repeats)


def _leaks(train: Sequence[Sample], holdout: Sequence[Sample]) -> Iterator[DataError]:
    """Held-out clips that are trained on: the held-out loss would measure memory."""
    trained = {sample.video.resolve(): sample.where for sample in train}
    for sample in holdout:
        if (where := trained.get(sample.video.resolve())) is not None:
            what = f"{sample.video} is held out, and also a training clip ({where})"
            yield DataError(what, where=sample.where, fix="take it out of one of the two")


def _duplicates(samples: Iterable[Sample]) -> list[str]:
    first: dict[tuple[Path, str], str] = {}
    twice: list[str] = []
    for sample in samples:
        where = first.setdefault((sample.video.resolve(), sample.caption), sample.where)
        if where != sample.where:
            twice.append(f"{sample.where} repeats {where}")
    return [f"{len(twice)} rows have the video and caption of another row, such as: {twice[0]}"] if twice else []
