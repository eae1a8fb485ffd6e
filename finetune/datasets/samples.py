"""The samples of a dataset: every row of every source checked, its caption as it is trained on, and who is held out.

Every bad row is reported at once, with its file and line, before a video is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from finetune.core.errors import DataError, raise_all
from finetune.core.rng import seed_for
from finetune.core.text import holds_word, without_invisible
from finetune.core.types import CompanionName, RowFile, Sample, Strict
from finetune.datasets.rows import (
    IMAGE,
    MEDIA,
    VIDEO,
    FileKind,
    MediaPlace,
    PathPolicy,
    RawRow,
    RowReport,
    Streamed,
    check_caption,
    is_still,
    or_error,
)
from finetune.datasets.sources import Line, SourceConfig, Split
from finetune.datasets.tables import MAX_FAULTS


class CaptionConfig(Strict):
    """What is added to every caption when it is read."""

    trigger: Line = ""
    """Trigger word, such as ``zkx``: put before everything else with a space after it, unless prefix, caption and
    suffix together hold it already as a word of its own, in the same case."""
    caption_prefix: Line = ""
    """Put before every caption exactly as written: end it with a space where one is wanted (and quote it in YAML)."""
    caption_suffix: Line = ""
    """Put after every caption exactly as written."""
    unreadable_captions: Literal["warn", "error"] = "warn"
    """What happens where the model's text encoder does not know a caption's characters (T5 knows English and a few more
    languages; Chinese, emoji and ``{`` become one unknown mark): say so, or stop where most of a caption is unknown and
    where two captions differ in unknown characters only."""

    def apply(self, caption: str) -> str:
        """The caption that is trained on: white space joined to single spaces, then prefix, suffix and trigger.

        Characters that are invisible and mean nothing (zero-width spaces, byte order marks, soft hyphens) are left out.
        """
        # T5's tokenizer joins white space too, so this changes no token; it makes equal captions share a cache entry.
        text = f"{self.caption_prefix}{' '.join(without_invisible(caption).split())}{self.caption_suffix}"
        trigger = self.trigger.strip()
        return text if holds_word(text, trigger) else f"{trigger} {text}"

    def added_to(self, text: str) -> str:
        """What ``apply`` may have added to a caption; empty if ``text`` does not begin and end so."""
        trigger = f"{self.trigger.strip()} " if self.trigger.strip() else ""
        begins = [begin for begin in (trigger + self.caption_prefix, self.caption_prefix) if text.startswith(begin)]
        return begins[0] + self.caption_suffix if begins and text.endswith(self.caption_suffix) else ""


@dataclass(frozen=True)
class SourceRead:
    """All samples of a dataset, in the order of the sources and of their rows."""

    train: tuple[Sample, ...]
    holdout: tuple[Sample, ...]
    notes: tuple[str, ...]
    """Advice that is no error, such as duplicate rows."""
    unusable: tuple[DataError, ...] = ()
    """Rows left out because their text cannot be used; empty unless that was asked for."""
    streamed: Streamed = field(default_factory=Streamed)
    """Of media that came as a stream."""


def read_samples(
    sources: Sequence[SourceConfig],
    captions: CaptionConfig,
    *,
    base: Path,
    row_files: Collection[RowFile] = (),
    skip: bool = False,
    media: MediaPlace | None = None,
) -> SourceRead:
    """Read and check every row of every source; no video is opened.

    Args:
        sources: where to read.
        captions: what is added to every caption.
        base: folder that relative paths start at.
        row_files: what is read of a row beside its video and captions; nothing else is looked at. With ``image``, a row
            that names none gets ``image=None``, which means the video's own first frame; a ``control`` each row has to
            have, a ``mask`` at least one clip that is trained on.
        skip: leave out rows that cannot be read or whose caption is unusable, and go on. A row that names a missing
            file or one outside its folder is an error all the same: the dataset is not what it should be.
        media: where media inside a dataset's own files go; None: such a dataset is an error.

    Raises:
        DataError: listing all that is wrong, each with file and line: rows that cannot be used, sources that cannot be
            read, a video in both splits, or no training clip at all.
    """
    dataset = RowReport()
    samples: dict[Split, list[Sample]] = {"train": [], "holdout": []}
    policy = PathPolicy()
    for source in sources:
        report = RowReport(media=media, streamed=dataset.streamed)
        try:
            source.read(base, report)
        except DataError as error:
            dataset.errors.append(error)
        dataset.errors += report.errors
        dataset.unusable += report.unusable
        dataset.notes += report.notes
        own = captions_of(source, captions)
        reader = _RowReader(source, own, dataset, policy, base, row_files)
        for row in report.rows:
            sample = reader.sample(row)
            if sample is not None:
                samples[source.split].append(sample)
            if len(dataset.errors) + len(dataset.unusable) > MAX_FAULTS:
                what = "too much is wrong with the dataset to go on reading it"
                dataset.errors.append(DataError(what, where=row.where))
                break
        if unflipped := reader.unflipped:
            rows = ", ".join(unflipped[:_NAMED]) + (" and others" if len(unflipped) > _NAMED else "")
            what = f"{len(unflipped)} rows are not flipped, for a caption says left or right (or clockwise)"
            dataset.notes.append(f"{what}: {rows}")
    train, holdout = samples["train"], samples["holdout"]
    errors = [*dataset.errors, *([] if skip else dataset.unusable), *_leaks(train, holdout, policy)]
    if not errors and not train and (media is None or media.part is None):
        what = "the sources hold no training clip"
        errors = [*dataset.unusable, DataError(what, where="data.sources", fix="add one of split: train")]
    if not errors and "mask" in row_files and not any("mask" in dict(sample.companions) for sample in train):
        fix = "name masks in a column mask or beside the clips as NAME.mask.mp4, or leave objective.masked out"
        errors.append(DataError("no training clip has a mask", where="objective.masked is set", fix=fix))
    raise_all(DataError, errors, what="{n} things are wrong with the dataset")
    notes = (*dataset.notes, *_duplicates([*train, *holdout], policy))
    unusable = tuple(dataset.unusable) if skip else ()
    return SourceRead(tuple(train), tuple(holdout), notes, unusable, dataset.streamed)


def usable_sample(
    row: RawRow,
    source: SourceConfig,
    captions: CaptionConfig,
    *,
    base: Path,
    row_files: Collection[RowFile] = (),
) -> Sample | None:
    """The sample that ``read_samples`` makes of one row of a source; None where the row cannot be used."""
    own = captions_of(source, captions)
    return _RowReader(source, own, RowReport(), PathPolicy(), base, row_files).sample(row)


@dataclass
class _RowReader:
    """Makes samples of the rows of one source; all that is wrong goes into ``dataset``."""

    source: SourceConfig
    captions: CaptionConfig
    dataset: RowReport
    policy: PathPolicy
    base: Path
    row_files: Collection[RowFile]
    unflipped: list[str] = field(default_factory=list)
    """Rows that are not mirrored although their source's are, because of what a caption says."""

    def sample(self, row: RawRow) -> Sample | None:
        """None if the row cannot be used."""
        checked = self._checked(row)
        if checked is None:
            return None
        video, image, written, companions = checked
        caption, *variants = dict.fromkeys(map(self.captions.apply, written))
        where = row.where.removeprefix(f"{os.path.abspath(self.base)}{os.sep}")  # noqa: PTH100 - as `_located` does
        repeats = self.source.repeats * row.repeats
        flip = self.source.random_flip
        if flip and any(map(names_a_side, (caption, *variants))):
            flip = False
            self.unflipped.append(where)
        own = (self.source.caption_dropout, self.source.weight, flip, self.source.prior_preservation)
        return Sample(video, caption, image, where, repeats, row.span_s, tuple(variants), *own, companions)

    def _checked(
        self, row: RawRow
    ) -> tuple[Path, Path | None, list[str], tuple[tuple[CompanionName, Path], ...]] | None:
        """The video, image, captions and companions of a row; None, and all that is wrong with them in ``dataset``, if
        it cannot be used.
        """
        source, dataset = self.source, self.dataset

        def located(name: object, kind: FileKind) -> Path | DataError:
            if isinstance(name, DataError):
                return name
            if row.is_streamed and isinstance(name, str):
                return self.policy.streamed(row.root / name)
            return or_error(self.policy.file, name, row.root, kind, row.where, allow_outside=source.allow_outside)

        video = located(row.video, MEDIA if source.images else VIDEO)
        if isinstance(video, DataError) and not source.images and isinstance(row.video, str) and is_still(row.video):
            fix = (
                "set images: true for its source to train on it as a clip of one frame (text-to-video), or take it out"
            )
            video = DataError(f"{row.video:.200} is a still image", where=row.where, fix=fix)
        image = located(row.image, IMAGE) if "image" in self.row_files and row.image is not None else None
        companion_files = [
            (name, located(row.companions[name], MEDIA) if row.companions.get(name) else _missing(name, row.where))
            for name in self.row_files
            if name != "image" and (row.companions.get(name) or name != "mask")  # all of a clip without one is learnt
        ]
        texts = row.caption if isinstance(row.caption, tuple) else (row.caption,)
        checked = [text if isinstance(text, DataError) else or_error(check_caption, text, row.where) for text in texts]
        captions = [text for text in checked if isinstance(text, str)]
        # A stream is what somebody else has made: a row of it that holds no video is left out like one without a
        # caption.
        faults = dataset.unusable if row.is_streamed else dataset.errors
        faults += [
            fault for fault in (video, image, *(one for _, one in companion_files)) if isinstance(fault, DataError)
        ]
        dataset.unusable += [fault for fault in checked if isinstance(fault, DataError)]
        companions = tuple((name, path) for name, path in companion_files if isinstance(path, Path))
        complete = len(captions) == len(checked) and len(companions) == len(companion_files)
        if isinstance(video, Path) and isinstance(image, Path | None) and complete:
            return video, image, captions, companions
        return None


def _missing(name: CompanionName, where: str) -> DataError:
    what = f"the row names no {name} video, and this run needs one for every clip"
    fix = f"name it in the column {name} of a table, or lay it beside the clip as NAME.{name}.mp4"
    return DataError(what, where=where, fix=fix)


def captions_of(source: SourceConfig, captions: CaptionConfig) -> CaptionConfig:
    """What is added to a source's captions, where ``captions`` is added to those of a source that says nothing."""
    own = {
        "trigger": source.trigger,
        "caption_prefix": source.caption_prefix,
        "caption_suffix": source.caption_suffix,
    }
    return captions.model_copy(update={name: text for name, text in own.items() if text is not None})


_NAMED = 5
"""Rows that a note names."""

_SIDES = re.compile(
    r"(?<![^\W\d_])(?:(?:left|right)(?:most|wards?|[- _]?hand(?:ed)?|s)?|(?:counter|anti)?-?clockwise)(?![^\W\d_])",
    re.IGNORECASE,
)


def names_a_side(caption: str) -> bool:
    """Whether a caption says left or right, or clockwise, as a word of its own in any case: of the mirrored clip it may
    be wrong. What the word means is not asked: "the left lane", "she left" and "right away" count, "bright" does not.
    """
    return _SIDES.search(caption) is not None


def source_files(sources: Sequence[SourceConfig], base: Path) -> list[Path]:
    """What decides which rows ``read_samples`` finds: files by their content, folders by their listing.

    Whoever keeps the result of reading can tell from these, without reading again, whether it still holds. Videos and
    images are not among them. Raises DataError if a source's layout cannot be told.
    """
    return list(dict.fromkeys(file for source in sources for file in source.files(base)))


def _leaks(train: Sequence[Sample], holdout: Sequence[Sample], policy: PathPolicy) -> Iterator[DataError]:
    """Held-out clips that are trained on: the held-out loss would measure memory."""
    trained = {policy.real(sample.video): sample.where for sample in train} if holdout else {}
    for sample in holdout:
        if (where := trained.get(policy.real(sample.video))) is not None:
            what = f"{sample.video} is held out, and also a training clip ({where})"
            yield DataError(what, where=sample.where, fix="take it out of one of the two")


def _duplicates(samples: Iterable[Sample], policy: PathPolicy) -> list[str]:
    first: dict[tuple[object, ...], str] = {}
    repeated: list[str] = []
    for sample in samples:
        content = (policy.real(sample.video), sample.captions, sample.span_s, sample.companions)
        where = first.setdefault(content, sample.where)
        if where != sample.where:
            repeated.append(f"{sample.where} repeats {where}")
    rows = f"{len(repeated)} rows have the video and caption of another row"
    return [f"{rows}, such as: {repeated[0]}"] if repeated else []


# --- held-out clips ---------------------------------------------------------------------------------------------------


class ValSplitConfig(Strict):
    """Which clips are kept out of training, to measure on."""

    holdout: float = Field(0, ge=0, le=1_000_000)
    """Videos to keep out of training for the held-out loss: a fraction below 1, or a whole number of videos. All
    clips of one video go to the same side. Still images count only where there are no videos. Sources marked ``split:
    holdout`` are held out in any case."""

    @model_validator(mode="after")
    def _fraction_or_count(self) -> ValSplitConfig:
        if self.holdout >= 1 and not float(self.holdout).is_integer():
            raise ValueError(f"data.holdout is {self.holdout}: give a fraction below 1 or a whole number of videos")
        return self


def choose_val_split(videos: Sequence[str], holdout: float) -> frozenset[str]:
    """Pick the held-out videos by the digest of their identity, so that adding a clip moves as few others as possible.

    Args:
        videos: one identity per video (its content digest); repeats count once.
        holdout: ``ValSplitConfig.holdout``.

    Returns:
        The identities held out; never all of them, because training needs one.
    """
    unique = sorted(set(videos), key=lambda video: seed_for(0, "holdout", video))
    count = round(holdout * len(unique)) if holdout < 1 else int(holdout)
    if 0 < holdout < 1 and len(unique) > 1:
        count = max(1, count)
    return frozenset(unique[: min(count, max(len(unique) - 1, 0))])
