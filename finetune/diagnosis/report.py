"""What the doctor found: as a table for the terminal, a page for a browser, and a document for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune.caching.planned_clips import ENOUGH
from finetune.core.files import human_size
from finetune.core.types import Bucket
from finetune.diagnosis import outlook as outlooks
from finetune.diagnosis.outlook import Outlook, duration
from finetune.diagnosis.page import LEVELS, Bars, Card, Column, Fault, Level, Page, Picture, Table

MOST_CARDS = 400
"""On a page, those with faults first: a browser shows so many at once without pain."""

COLUMNS = (
    Column("picture", "picture kept", "{:.0%}"),
    Column("seconds", "seconds kept", "{:.0%}"),
    Column("length_s", "length", "{:.1f} s"),
    Column("fps", "rate", "{:.4g} fps"),
    Column("size", "size"),
    Column("motion", "motion", "{:.1f}"),
    Column("sharpness", "sharpness", "{:.0f}"),
    Column("brightness", "brightness", "{:.0f}"),
    Column("tokens", "tokens", "{:.0f}"),
    Column("psnr", "VAE PSNR", "{:.1f} dB"),
)


@dataclass(frozen=True)
class ClipReport:
    """One clip, or a video or row of which there is none."""

    name: str
    where: str
    """The row that names it."""
    caption: str = ""
    bucket: str = ""
    """Empty where nothing is cut from it."""
    holdout: bool = False
    values: Mapping[str, float | str | None] = field(default_factory=dict)
    """By the names of ``COLUMNS``."""
    faults: tuple[Fault, ...] = ()
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    cut_caption: str = ""
    """The end of the caption, which is not read."""
    variants: tuple[tuple[str, str], ...] = ()
    """Its further captions, each with what of it is not read."""

    @property
    def severity(self) -> tuple[int, ...]:
        """Numbers of errors, warnings and notes: larger is worse."""
        return tuple(sum(fault.level == level for fault in self.faults) for level in LEVELS)


@dataclass(frozen=True)
class BucketReport:
    """The clips of one bucket."""

    bucket: Bucket
    clips: int
    held_out: int
    tokens: int
    steps_per_epoch: float
    """That its clips fill."""
    picture: float
    seconds: float | None
    """Shares that are kept, 0 to 1; still images have no seconds."""
    flipped: int = 0
    """How many of ``clips`` are encoded mirrored as well."""

    @property
    def entries(self) -> int:
        """How many encoded clips the cache holds of it."""
        return self.clips + self.held_out + self.flipped


@dataclass(frozen=True)
class DoctorReport:
    """What the doctor found; ``str()`` of it is what the command prints."""

    clips: tuple[ClipReport, ...]
    buckets: tuple[BucketReport, ...]
    faults: tuple[Fault, ...]
    """Of the dataset as a whole."""
    steps: int
    epochs: float
    tokens: tuple[int, ...]
    """Of each different caption; empty where the tokenizer is not at hand."""
    token_limit: int
    outlook: Outlook | None
    """None where nothing can be trained on."""
    notes: tuple[str, ...] = ()
    page: Path | None = None

    @property
    def level(self) -> Level | None:
        """The worst that was found."""
        levels = {fault.level for fault in (*self.faults, *(fault for clip in self.clips for fault in clip.faults))}
        return next((level for level in LEVELS if level in levels), None)

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def to_json(self) -> str:
        """For programs; pictures are left out."""
        outlook = None
        if self.outlook is not None:
            outlook = {**vars(self.outlook)}
            for name in ("encode_s", "cache_bytes"):
                outlook[name] = {str(bucket): value for bucket, value in outlook[name].items()}
        document = {
            "level": self.level,
            "clips": [
                {
                    **{name: getattr(clip, name) for name in ("name", "where", "bucket", "holdout")},
                    "caption": clip.caption + clip.cut_caption,
                    "cut_caption": clip.cut_caption,
                    "variants": ["".join(texts) for texts in clip.variants],
                    "values": dict(clip.values),
                    "faults": [vars(fault) for fault in clip.faults],
                }
                for clip in self.clips
            ],
            "buckets": [{**vars(bucket), "bucket": str(bucket.bucket)} for bucket in self.buckets],
            "faults": [vars(fault) for fault in self.faults],
            "steps": self.steps,
            "epochs": self.epochs,
            "captions": {"tokens": list(self.tokens), "limit": self.token_limit},
            "predicted": outlook,
            "notes": list(self.notes),
            "page": None if self.page is None else str(self.page),
        }
        return json.dumps(document, indent=1, ensure_ascii=True)


# ----------------------------------------------------------------------------------------------- as text, and as a page


def _fault_counts(report: DoctorReport) -> list[tuple[Fault, int, str]]:
    """Each kind of fault once, with how many clips have it and one of them; the worst and most frequent first."""
    kinds: dict[tuple[Level, str], list[tuple[Fault, str]]] = {}
    for clip in report.clips:
        for fault in clip.faults:
            kinds.setdefault((fault.level, fault.name), []).append((fault, clip.name))
    ordered = sorted(kinds.items(), key=lambda item: (LEVELS.index(item[0][0]), -len(item[1])))
    return [(clips[0][0], len(clips), clips[0][1]) for _, clips in ordered]


def _bucket_rows(report: DoctorReport) -> tuple[list[str], list[list[str]]]:
    header = ["bucket", "clips", "held out", "tokens", "steps/epoch", "picture", "seconds", "cache", "encoding"]
    rows = []
    for one in report.buckets:
        cache, encode = "", ""
        if report.outlook is not None:
            cache = human_size(report.outlook.cache_bytes[one.bucket])
            encode = duration(report.outlook.encode_s[one.bucket])
        counts = [str(one.clips), str(one.held_out), f"{one.tokens:,}", f"{one.steps_per_epoch:.4g}"]
        seconds = "" if one.seconds is None else f"{one.seconds:.0%}"
        rows.append([str(one.bucket), *counts, f"{one.picture:.0%}", seconds, cache, encode])
    return header, rows


def _summary(report: DoctorReport) -> str:
    usable = sum(bool(clip.bucket) for clip in report.clips)
    out = len(report.clips) - usable
    faulty = sum(any(fault.level != "note" for fault in clip.faults) for clip in report.clips)
    left = f", {out} left out" if out else ""
    return f"{usable} clips{left}; {faulty} have a fault; {report.steps} steps, {report.epochs:.4g} epochs"


def _text(report: DoctorReport) -> Iterable[str]:
    yield _summary(report)
    if report.buckets:
        header, rows = _bucket_rows(report)
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            yield "  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    if report.outlook is not None:
        yield "predicted, not measured:"
        yield from (f"  {label:>9}: {value}" for label, value in _outlook_rows(report))
    for fault in report.faults:
        yield f"{fault.level}: {fault}"
    for fault, count, name in _fault_counts(report):
        yield f"{fault.level}: {count} x {fault.name}, such as {name}: {fault}"
    yield from (f"note: {note}" for note in report.notes)
    if report.page is not None:
        yield f"page: {report.page}"


def _outlook_rows(report: DoctorReport) -> list[tuple[str, str]]:
    assert report.outlook is not None
    return outlooks.in_words(report.outlook, [one.bucket for one in report.buckets])


def page_of(report: DoctorReport, model: str) -> Page:
    """The report as a page; ``model`` is what it is for."""
    clips = sorted(report.clips, key=lambda clip: clip.severity, reverse=True)[:MOST_CARDS]
    chosen = {id(clip) for clip in clips}
    tables = []
    if report.buckets:
        header, rows = _bucket_rows(report)
        note = f"Below {ENOUGH:.0%} of picture or seconds there is a warning. Encoding is predicted."
        tables.append(Table("Buckets", header, rows, note))
        rows = [[label, value] for label, value in _outlook_rows(report)]
        tables.append(Table("What the run takes: predicted, not measured", [], rows))
    bars = [_token_bars(report)] if report.tokens else []
    notes = list(report.notes)
    if len(report.clips) > MOST_CARDS:
        notes.append(f"{MOST_CARDS} of {len(report.clips)} clips are shown, those with faults first; --json has all.")
    cards = [_card(clip) for clip in report.clips if id(clip) in chosen]
    title = f"doctor: {model}"
    return Page(title, _summary(report), cards, COLUMNS, tables, bars, report.faults, notes)


def _card(clip: ClipReport) -> Card:
    group = clip.bucket or "left out"
    return Card(
        title=clip.name,
        text=clip.caption,
        cut_text=clip.cut_caption,
        variants=clip.variants,
        group=f"{group}, held out" if clip.holdout else group,
        pictures=clip.pictures,
        values=clip.values,
        faults=sorted(clip.faults, key=lambda fault: LEVELS.index(fault.level)),
    )


def _token_bars(report: DoctorReport) -> Bars:
    """Captions by their tokens, in bins of a sixteenth of the limit."""
    width = max(1, report.token_limit // 16)
    last = max(*report.tokens, report.token_limit) // width
    counts = Counter(tokens // width for tokens in report.tokens)
    bins = [(index * width, (index + 1) * width, counts[index]) for index in range(last + 1)]
    over = sum(tokens > report.token_limit for tokens in report.tokens)
    note = f"{len(report.tokens)} captions; {over} are longer than the {report.token_limit} tokens that are read."
    return Bars("Tokens of captions", bins, report.token_limit + 1, note)
