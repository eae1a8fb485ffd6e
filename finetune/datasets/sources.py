"""From the sources of a dataset to its samples, with every bad row reported at once, before anything is decoded."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import field_validator

from finetune.datasets.layouts import SourceConfig as SourceConfig
from finetune.datasets.layouts import Split
from finetune.datasets.rows import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Gate, RawRow, Reading, check_caption
from finetune.datasets.tables import MAX_FAULTS
from finetune.errors import DataError, raise_all
from finetune.section import Strict
from finetune.text import holds_word, text_fault, without_invisible
from finetune.types import Sample

_Value = TypeVar("_Value")


class CaptionConfig(Strict):
    """What is added to every caption when it is read."""

    trigger: str = ""
    """Trigger word, such as ``zkx``: put before everything else with a space after it, unless prefix, caption and
    suffix together hold it already as a word of its own, in the same case."""
    caption_prefix: str = ""
    """Put before every caption exactly as written: end it with a space where one is wanted (and quote it in YAML)."""
    caption_suffix: str = ""
    """Put after every caption exactly as written."""
    unreadable_captions: Literal["warn", "error"] = "warn"
    """What happens where the model's text encoder does not know a caption's characters (T5 knows English and a few more
    languages; Chinese, emoji and ``{`` become one unknown mark): say so, or stop where most of a caption is unknown and
    where two captions differ in unknown characters only."""

    @field_validator("trigger", "caption_prefix", "caption_suffix")
    @classmethod
    def _plain_text(cls, text: str) -> str:
        if fault := text_fault(text, one_line=True):
            raise ValueError(f"must be one line of text: {fault}")
        return text

    def apply(self, caption: str) -> str:
        """The caption that is trained on: white space joined to single spaces, then prefix, suffix and trigger.

        Characters that are invisible and mean nothing (zero-width spaces, byte order marks, soft hyphens) are left out.
        """
        # T5's tokenizer joins white space too, so this changes no token; it makes equal captions share a cache entry.
        text = f"{self.caption_prefix}{' '.join(without_invisible(caption).split())}{self.caption_suffix}"
        trigger = self.trigger.strip()
        return text if holds_word(text, trigger) else f"{trigger} {text}"


@dataclass(frozen=True)
class SourceRead:
    """All samples of a dataset, in the order of the sources and of their rows."""

    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Advice that is no error, such as duplicate rows."""
    unusable: tuple[DataError, ...] = ()
    """Rows left out because their text cannot be used; empty unless that was asked for."""


def read_samples(
    sources: Sequence[SourceConfig], captions: CaptionConfig, *, image_to_video: bool, base: Path, skip: bool = False
) -> SourceRead:
    """Read and check every row of every source; no video is opened.

    Args:
        sources: where to read.
        captions: what is added to every caption.
        image_to_video: read first-frame images where a source names them; a row without one gets ``image=None``, which
            means the video's own first frame. False: images are neither read nor checked.
        base: folder that relative paths start at.
        skip: leave out rows that cannot be read or whose caption is unusable, and go on. A row that names a missing
            file or one outside its folder is an error all the same: the dataset is not what it should be.

    Raises:
        DataError: listing all that is wrong, each with file and line: rows that cannot be used, sources that cannot be
            read, a video in both splits, or no training clip at all.
    """
    errors: list[DataError] = []
    unusable: list[DataError] = []
    notes: list[str] = []
    split: dict[Split, list[Sample]] = {"train": [], "holdout": []}
    gate = Gate()
    for source in sources:
        reading = Reading()
        try:
            source.read(base, reading)
        except DataError as error:
            errors.append(error)
        errors += reading.errors
        unusable += reading.unusable
        notes += reading.notes
        for row in reading.rows:
            sample = _check(row, captions, source, image_to_video, base, gate, (errors, unusable))
            if sample is not None:
                split[source.split].append(sample)
            if len(errors) + len(unusable) > MAX_FAULTS:
                errors.append(DataError("too much is wrong with the dataset to go on reading it", where=row.where))
                break
    if not skip:
        errors += unusable
    errors += _leaks(split["train"], split["holdout"], gate)
    if not errors and not split["train"]:
        fault = DataError("the sources hold no training clip", where="data.sources", fix="add one of split: train")
        errors += [*unusable, fault]
    raise_all(DataError, errors, what="{n} things are wrong with the dataset")
    notes += _duplicates([*split["train"], *split["holdout"]], gate)
    return SourceRead(tuple(split["train"]), tuple(split["holdout"]), tuple(notes), tuple(unusable) if skip else ())


def source_files(sources: Sequence[SourceConfig], base: Path) -> list[Path]:
    """What decides which rows ``read_samples`` finds: files by their content, folders by their listing.

    Whoever keeps the result of reading can tell from these, without reading again, whether it still holds. Videos and
    images are not among them. Raises DataError if a source's layout cannot be told.
    """
    return list(dict.fromkeys(file for source in sources for file in source.files(base)))


def _check(
    row: RawRow,
    captions: CaptionConfig,
    source: SourceConfig,
    image_to_video: bool,
    base: Path,
    gate: Gate,
    faults: tuple[list[DataError], list[DataError]],
) -> Sample | None:
    """The sample that a row gives; None, and all that is wrong with its files and its text in ``faults``, if none."""

    def tried(into: list[DataError], check: Callable[..., _Value], *arguments: Any, **options: Any) -> _Value | None:
        try:
            return check(*arguments, row.where, **options)
        except DataError as error:
            into.append(error)
            return None

    of_files, of_text = faults
    allowed = {"allow_outside": source.allow_outside}
    wrong_before = len(of_files)
    video = tried(of_files, gate.file, row.video, row.root, VIDEO_SUFFIXES, "video", **allowed)
    image = None
    if image_to_video and isinstance(row.image, DataError):
        of_files.append(row.image)
    elif image_to_video and row.image is not None:
        image = tried(of_files, gate.file, row.image, row.root, IMAGE_SUFFIXES, "image", **allowed)
    caption = tried(of_text, check_caption, row.caption)
    if video is None or caption is None or len(of_files) > wrong_before:
        return None
    where = row.where.removeprefix(f"{os.path.abspath(base)}{os.sep}")  # noqa: PTH100 - as layouts writes it
    return Sample(video, captions.apply(caption), image, where, source.repeats)


def _leaks(train: Sequence[Sample], holdout: Sequence[Sample], gate: Gate) -> Iterator[DataError]:
    """Held-out clips that are trained on: the held-out loss would measure memory."""
    trained = {gate.real(sample.video): sample.where for sample in train} if holdout else {}
    for sample in holdout:
        if (where := trained.get(gate.real(sample.video))) is not None:
            what = f"{sample.video} is held out, and also a training clip ({where})"
            yield DataError(what, where=sample.where, fix="take it out of one of the two")


def _duplicates(samples: Iterable[Sample], gate: Gate) -> list[str]:
    first: dict[tuple[str, str], str] = {}
    twice: list[str] = []
    for sample in samples:
        where = first.setdefault((gate.real(sample.video), sample.caption), sample.where)
        if where != sample.where:
            twice.append(f"{sample.where} repeats {where}")
    return [f"{len(twice)} rows have the video and caption of another row, such as: {twice[0]}"] if twice else []
