"""Caption a folder of clips: what lacks a caption is shown to a model, people's own captions stay, nothing is lost.

Every answer is appended to ``captions.jsonl`` the moment it is there, with what made it; the dataset's own file is
written from it, so a run that ends at any moment goes on where it stopped. A caption that differs from what the record
says was written is a person's, and is left alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.captioning.captioners import Answer, Captioner, Chat
from finetune.captioning.folder import RECORD, CaptionRecord, Row, open_dataset, read_records
from finetune.cogvideox.captions import load_tokenizer, tokenize
from finetune.cogvideox.config import ModelConfig
from finetune.cogvideox.model_files import json_folder
from finetune.cogvideox.spec import read_spec
from finetune.core import locks
from finetune.core.checksums import digest_file, digest_of
from finetune.core.errors import ConfigError, DataError, FinetuneError
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.datasets.rows import MAX_CAPTION_BYTES, check_caption
from finetune.datasets.tables import read_text

SHORTER = (
    "That is too long: at most {words} words can be read. Write it again in at most {words} words, as one paragraph,"
    " with what matters most to how it looks and moves. Write only the description."
)

WORDS_PER_TOKEN = 0.66
"""Of English prose under T5's tokenizer, on the safe side."""

_ATTEMPTS = 3
"""To make a caption short enough."""

_FRAMES_PER_S = 2.0
"""Shown of a clip, within ``frames``: what video-language models are trained on."""

_FEWEST_FRAMES = 4

_FAILURES = 10
"""Clips in a row that fail before the rest is given up."""

_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class TokenLimit:
    """What CogVideoX's text encoder reads of a caption."""

    most: int
    count: Callable[[Sequence[str]], list[int]]
    """Tokens of each text."""

    @property
    def words(self) -> int:
        """About as many English words."""
        return int(self.most * WORDS_PER_TOKEN)


def token_limit(target: str) -> TokenLimit:
    """What a CogVideoX reads of a caption, counted by its own tokenizer.

    Args:
        target: a folder, a hub id, or a published model's name such as ``5b``.

    Raises:
        ModelError: if its JSON or its tokenizer cannot be found or read.
    """
    spec = read_spec(str(json_folder(target)))
    tokenizer = load_tokenizer(ModelConfig(pretrained=target))
    return TokenLimit(
        spec.max_text_seq_length, lambda texts: [tokens.length for tokens in tokenize(tokenizer, texts, spec)]
    )


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


class _Caption(NamedTuple):
    text: str
    tokens: int


class _Captioning:
    """One run over one folder."""

    def __init__(self, folder: Path, limit: TokenLimit, options: CaptionOptions) -> None:
        self._limit = limit
        self._options = options
        self._instruction = options.instruction.replace("{words}", str(limit.words)).strip()
        self._method = digest_of([self._instruction, options.frames, options.side, limit.most])
        self._dataset = open_dataset(folder, options.variants)
        self._record_file = folder / RECORD
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
        with Bar(total=len(work), desc="captions", disable=not progress) as bar, self._record_file.open("a") as record:
            while batch := list(islice(clips, self._options.batch)):
                for variant in range(self._options.variants):
                    asked = [(row, chat) for row, chat in batch if variant in variants[row.file_name]]
                    answers = self._captions([chat for _, chat in asked], captioner, variant) if asked else []
                    for (row, chat), answer in zip(asked, answers, strict=True):
                        bar.update()
                        if isinstance(answer, FinetuneError):
                            self._report.errors.append(answer)
                            failures += 1
                            continue
                        failures = 0
                        line = CaptionRecord(
                            *(row.file_name, variant, answer.text, answer.tokens),
                            *(captioner.name, captioner.revision, self._method, digest_file(chat.video)),
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
                yield row, Chat(row.video, frames, len(frames) / seconds, (self._instruction,))

    def _captions(self, chats: Sequence[Chat], captioner: Captioner, variant: int) -> list[_Caption | FinetuneError]:
        """A caption for each chat; one that is too long is asked for again, and the shortest taken."""
        captions = self._counted(chats, captioner.answer(chats, variant))
        for attempt in range(1, _ATTEMPTS):
            long = {
                at: caption
                for at, caption in enumerate(captions)
                if isinstance(caption, _Caption) and caption.tokens > self._limit.most
            }
            if not long:
                break
            request = SHORTER.format(words=int(self._limit.words * 0.85**attempt))
            again = [
                replace(chats[at], turns=(chats[at].turns[0], caption.text, request)) for at, caption in long.items()
            ]
            for at, answer in zip(long, self._counted(again, captioner.answer(again, variant)), strict=True):
                if isinstance(answer, _Caption) and answer.tokens < long[at].tokens:
                    captions[at] = answer
        return captions

    def _counted(self, chats: Sequence[Chat], answers: Sequence[Answer]) -> list[_Caption | FinetuneError]:
        counted: list[_Caption | FinetuneError] = []
        for chat, answer in zip(chats, answers, strict=True):
            if isinstance(answer, FinetuneError):
                counted.append(answer)
                continue
            text = " ".join(_THOUGHTS.sub(" ", answer).split()).strip('"\u201c\u201d ')
            try:
                check_caption(text, str(chat.video))
            except DataError as error:
                what = f"the answer is no caption: {error.what}"
                counted.append(DataError(what, where=str(chat.video), fix="repeat the command, or write it by hand"))
                continue
            counted.append(_Caption(text, self._limit.count([text])[0]))
        return counted


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
