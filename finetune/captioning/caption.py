"""Caption a folder of clips: what lacks a caption is shown to a model, people's own captions stay, nothing is lost.

Every answer is appended to ``captions.jsonl`` the moment it is there, with what made it; the dataset's own file is
written from it, so a run that ends at any moment goes on where it stopped. A caption that differs from what the record
says was written is a person's, and is left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.captioning.answers import TokenLimit, answers_within
from finetune.captioning.captioners import Captioner, Chat
from finetune.captioning.folder import RECORD, CaptionRecord, Row, mend_records, open_dataset, read_records
from finetune.core import locks
from finetune.core.checksums import digest_file, digest_of
from finetune.core.errors import ConfigError, DataError, FinetuneError
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.rows import MAX_CAPTION_BYTES
from finetune.datasets.tables import read_text

_FRAMES_PER_S = 2.0
"""Shown of a clip, within ``frames``: what video-language models are trained on."""

_FEWEST_FRAMES = 4

_FAILURES = 10
"""Clips in a row that fail before the rest is given up."""


def read_instruction(path: Path | None = None) -> str:
    """What a model is asked for: a file's text, or the one that ships. Raises DataError if the file cannot be read."""
    if path is None:
        return (resources.files("finetune") / "templates" / "caption_prompt.txt").read_text(encoding="utf-8")
    return read_text(path, most_bytes=MAX_CAPTION_BYTES)


@dataclass(frozen=True)
class CaptionOptions:
    """How clips are shown and what is asked."""

    instruction: str
    """``{words}`` in it becomes the number of words that CogVideoX reads."""
    variants: int = 1
    """Captions per clip."""
    frames: int = 16
    """Shown of a clip, at most."""
    side: int = 448
    """Longest side of a shown frame, in pixels."""
    batch: int = 4
    """Clips that are asked about side by side."""
    replace: bool = False
    """Write captions anew that another model, or another instruction, wrote; people's are kept in any case."""

    def __post_init__(self) -> None:
        for name, least in (("variants", 1), ("frames", 1), ("side", 64), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}, at least {least} is possible", fix=f"raise {name}")
        if not self.instruction.strip():
            raise ConfigError("the instruction is empty", fix="write what the model is to do, or leave it out")


@dataclass
class CaptionReport:
    """What became of a folder's captions; ``str()`` of it is what the command prints."""

    file: Path
    """The dataset's file, or its folder where each clip has a file of its own."""
    written: int = 0
    present: int = 0
    """Captions that were there already, from a model."""
    human: int = 0
    """Captions that a person wrote or changed."""
    too_long: list[str] = field(default_factory=list)
    """Clips whose shortest caption is still longer than the model reads."""
    errors: list[FinetuneError] = field(default_factory=list)
    """Clips that have no caption now."""

    def __str__(self) -> str:
        lines = [
            f"{self.written} captions written into {self.file}; {self.present} there already, {self.human} by hand"
        ]
        if self.too_long:
            some = ", ".join(self.too_long[:5])
            lines.append(f"warning: {len(self.too_long)} are longer than the model reads, such as those of {some}")
        if self.errors:
            lines.append(f"{len(self.errors)} clips have no caption; the first: {self.errors[0]}")
        return "\n".join(lines)


def caption_folder(
    folder: Path, captioner: Callable[[], Captioner], limit: TokenLimit, options: CaptionOptions, *, progress: bool
) -> CaptionReport:
    """Write the captions that a folder of clips lacks.

    Args:
        folder: with a ``metadata.jsonl``, or with clips, which may have a ``.txt`` beside them.
        captioner: makes the one that is asked; called once, and only if there is something to ask.
        limit: of the model that is to be trained.
        options: how clips are shown and what is asked.
        progress: draw a bar.

    Raises:
        DataError: if the folder, its table or its record cannot be used.
        ConfigError: if another process captions this folder.
        ModelError: if the captioner cannot be had. What is captioned by then is kept.
    """
    with ExitStack() as stack:
        if not folder.is_dir():
            raise DataError("there is no such folder", where=str(folder), fix="name the folder of the clips")
        try:
            stack.enter_context(locks.hold(folder / ".captions.lock", "caption"))
        except locks.HeldError as holder:
            raise ConfigError(f"{holder} captions this folder", where=str(folder), fix="wait for it to end") from None
        except locks.NoLocksError:
            pass
        return _Captioning(folder, limit, options).run(captioner, progress)


class _Captioning:
    """One run over one folder."""

    def __init__(self, folder: Path, limit: TokenLimit, options: CaptionOptions) -> None:
        self._limit = limit
        self._options = options
        self._instruction = options.instruction.replace("{words}", str(limit.words)).strip()
        self._method = digest_of([self._instruction, options.frames, options.side, limit.most])
        self._dataset = open_dataset(folder, options.variants)
        self._record_file = folder / RECORD
        mend_records(self._record_file)
        self._records = {(record.file_name, record.variant): record for record in read_records(self._record_file)}
        self._report = CaptionReport(self._dataset.file)

    def run(self, make_captioner: Callable[[], Captioner], progress: bool) -> CaptionReport:
        captioner = make_captioner() if self._options.replace else None
        work = self._missing(captioner)
        try:
            if work:
                self._ask_all(captioner or make_captioner(), work, progress)
        finally:
            self._dataset.write()
        limit, long = self._limit.most, self._report.too_long
        for row in self._dataset.rows:
            records = (self._records.get((row.file_name, variant)) for variant in range(self._options.variants))
            if any(record.tokens > limit and record.caption in row.texts for record in records if record):
                long.append(row.file_name)
        return self._report

    def _missing(self, captioner: Captioner | None) -> list[tuple[Row, int]]:
        """Each row and variant that has to be asked for; what the record already has goes into the dataset."""
        missing = []
        for row in self._dataset.rows:
            digest = ""
            for variant in range(self._options.variants):
                text, record = row.texts[variant], self._records.get((row.file_name, variant))
                if text and (record is None or record.caption != text):
                    self._report.human += 1
                    continue
                if record is not None:
                    digest = digest or digest_file(row.video)
                    made = (record.model, record.revision, record.method)
                    wanted = made if captioner is None else (captioner.name, captioner.revision, self._method)
                    if record.video == digest and made == wanted:
                        row.texts[variant] = record.caption
                        self._report.present += 1
                        continue
                missing.append((row, variant))
        return missing

    def _ask_all(self, captioner: Captioner, work: Sequence[tuple[Row, int]], progress: bool) -> None:
        variants: dict[str, list[int]] = {}
        for row, variant in work:
            variants.setdefault(row.file_name, []).append(variant)
        rows = {row.file_name: row for row, _ in work}
        failures = 0
        clips = self._shown_clips(rows.values())
        with (
            Bar(total=len(work), desc="captions", disable=not progress) as bar,
            self._record_file.open("a", encoding="utf-8") as record,
        ):
            while batch := list(islice(clips, self._options.batch)):
                for variant in range(self._options.variants):
                    asked = [(row, chat) for row, chat in batch if variant in variants[row.file_name]]
                    answers = (
                        answers_within(self._limit, [chat for _, chat in asked], captioner, variant) if asked else []
                    )
                    for (row, _), answer in zip(asked, answers, strict=True):
                        bar.update()
                        if isinstance(answer, FinetuneError):
                            self._report.errors.append(answer)
                            failures += 1
                            continue
                        failures = 0
                        line = CaptionRecord(
                            *(row.file_name, variant, answer.text, answer.tokens),
                            *(captioner.name, captioner.revision, self._method, digest_file(row.video)),
                        )
                        record.write(json.dumps(asdict(line), ensure_ascii=False) + "\n")
                        self._records[row.file_name, variant] = line
                        row.texts[variant] = answer.text
                        self._report.written += 1
                record.flush()
                os.fsync(record.fileno())
                if failures >= _FAILURES:
                    last = self._report.errors[-1]
                    what = f"{failures} clips in a row could not be captioned; the last: {last.what}"
                    raise DataError(what, where=last.where, fix=last.fix or "mend that, and repeat the command")

    def _shown_clips(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Chat]]:
        """Every clip with the frames that are shown of it; one that cannot be decoded becomes an error."""
        options = self._options
        for row, seconds, frames in read_frames(rows, options.frames, options.side, ahead=2 * options.batch):
            if isinstance(frames, DataError):
                self._report.errors.append(DataError(frames.what, where=row.file_name, fix=frames.fix))
            else:
                yield row, Chat(str(row.video), (self._instruction,), row.video, frames, len(frames) / seconds)


# --- frames -----------------------------------------------------------------------------------------------------------


def read_frames(
    rows: Iterable[Row], most: int, side: int, *, ahead: int
) -> Iterator[tuple[Row, float, NDArray[np.uint8] | DataError]]:
    """Frames of each clip, evenly over its length, whole pictures: [F, H, W, 3] RGB, or why there are none.

    Args:
        rows: the clips.
        most: frames of a clip, at most; two per second where that is fewer.
        side: longest side of a frame, in pixels.
        ahead: clips that are decoded before they are asked for.

    Returns:
        Each row with the clip's length in seconds and its frames.
    """
    rows = list(rows)
    with DecodePool(2, in_flight=ahead) as pool:
        probes = [probe for _, probe in pool.probe_many(row.video for row in rows)]
        clips = pool.decode_many(
            DecodeJob(row.video, probe, _spread(probe, most, side))
            for row, probe in zip(rows, probes, strict=True)
            if isinstance(probe, VideoProbe)
        )
        for row, probe in zip(rows, probes, strict=True):
            if isinstance(probe, DataError):
                yield row, 0.0, probe
                continue
            _, clip = next(clips)
            frames = clip if isinstance(clip, DataError) else clip.pixels.permute(1, 2, 3, 0).contiguous().numpy()
            yield row, probe.frames / probe.fps, frames


def _spread(probe: VideoProbe, most: int, side: int) -> ClipPlan:
    """Each frame from the middle of its share of the clip."""
    count = min(max(_FEWEST_FRAMES, round(probe.frames / probe.fps * _FRAMES_PER_S)), most, probe.frames)
    indices = tuple(int((number + 0.5) * probe.frames / count) for number in range(count))
    scale = min(1.0, side / max(probe.height, probe.width))
    height, width = (max(1, round(length * scale)) for length in (probe.height, probe.width))
    return ClipPlan(indices, (height, width), (0, 0), Bucket(count, height, width))
