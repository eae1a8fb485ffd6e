"""The ledger as a page: every span with pictures, what was measured, and why it was dropped, to sort and filter."""

from __future__ import annotations

import io
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from finetune.core.errors import DataError
from finetune.core.terminal import Bar
from finetune.core.types import Bucket, ClipPlan, VideoProbe
from finetune.datasets.decode_pool import DecodeJob, DecodePool
from finetune.diagnosis.page import Bars, Card, Column, Fault, Page, Picture, Table, render
from finetune.footage.filters import Limits, Span
from finetune.footage.ledger import Source, clip_name

MOST_CARDS = 400
"""On a page, the longest spans first: a browser shows so many at once without pain."""

_PICTURES = 3

_SHORT_SIDE = 144
"""Pixels of a picture."""

_BINS = 20

_COLUMNS = (
    Column("source", "source"),
    Column("start_s", "begins", "{:.2f} s"),
    Column("seconds", "lasts", "{:.2f} s"),
    Column("value", "dropped for", "{:.4g}"),
    Column("limit", "limit", "{:.4g}"),
)


class _Part(NamedTuple):
    source: Source
    span: Span


def write_report(sources: Sequence[Source], limits: Limits, *, workers: int, progress: bool) -> str:
    """The page as HTML.

    Args:
        sources: with what became of them.
        limits: that they were compared with.
        workers: processes that decode the pictures.
        progress: draw a progress bar.
    """
    parts = [_Part(source, span) for source in sources for span in source.spans]
    chosen = sorted(sorted(parts, key=lambda part: -part.span.seconds)[:MOST_CARDS], key=parts.index)
    pictures = _pictures(chosen, workers, progress)
    scores = sorted({name for part in parts for name in part.span.scores})
    seconds: dict[str, float] = defaultdict(float)
    for part in parts:
        seconds[part.span.reason or "kept"] += part.span.seconds
    total = sum(seconds.values())
    rows = [
        [name, f"{value:.1f} s", f"{value / total if total else 0:.1%}"]
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    notes = []
    if len(chosen) < len(parts):
        notes.append(f"{len(chosen)} of {len(parts)} spans are shown, the longest; ledger.jsonl has all of them.")
    page = Page(
        title="prepare: where the footage went",
        summary=f"{seconds['kept']:.1f} s of {total:.1f} s of footage are kept, from {len(sources)} videos.",
        cards=[_card(part, shown) for part, shown in zip(chosen, pictures, strict=True)],
        columns=[*_COLUMNS, *(Column(name, name, "{:.4g}") for name in scores)],
        tables=[Table("Seconds", ["fate", "seconds", "share"], rows)],
        bars=[bars for name in scores if (bars := _bars(name, [part.span for part in parts], limits))],
        notes=notes,
    )
    return render(page)


def _card(part: _Part, pictures: Sequence[Picture]) -> Card:
    source, span = part
    title = f"{source.name}, {span.start_s:.2f} s" if span.reason else clip_name(source, span)
    faults = []
    if span.reason:
        numbers = "" if span.value is None or span.limit is None else f"{span.value:.4g}, the limit is {span.limit:.4g}"
        faults = [Fault("warning", span.reason, "; ".join(filter(None, [span.detail, numbers])))]
    return Card(
        title=title,
        group=span.reason or "kept",
        pictures=pictures,
        values={
            "source": source.name,
            "start_s": span.start_s,
            "seconds": span.seconds,
            "value": span.value,
            "limit": span.limit,
            **span.scores,
        },
        faults=faults,
    )


def _pictures(parts: Sequence[_Part], workers: int, progress: bool) -> list[list[Picture]]:
    """A few frames of each part, whole, with what is cut away from them; none of what cannot be decoded."""
    jobs: list[DecodeJob] = []
    places: list[int] = []
    for place, part in enumerate(parts):
        header = part.source.header
        if header is not None and part.span.reason != "unreadable":
            jobs.append(DecodeJob(part.source.path, header, _plan(part.span, header)))
            places.append(place)
    pictures: list[list[Picture]] = [[] for _ in parts]
    with DecodePool(workers=workers) as pool:
        bar = Bar(pool.decode_many(jobs), total=len(jobs), desc="pictures", disable=not progress)
        for place, (job, clip) in zip(places, bar, strict=True):
            if isinstance(clip, DataError):
                continue
            frames = clip.pixels.permute(1, 2, 3, 0).contiguous().numpy()
            cut = _share(parts[place].span, job.probe)
            labels = [f"{job.probe.frame_times_s[index]:.2f} s" for index in job.plan.frame_indices]
            pictures[place] = [_picture(frame, label, cut) for frame, label in zip(frames, labels, strict=True)]
    return pictures


def _plan(span: Span, header: VideoProbe) -> ClipPlan:
    first, after = (bisect_left(header.frame_times_s, time_s - 1e-9) for time_s in (span.start_s, span.end_s))
    count = max(1, after - first)
    indices = tuple(sorted({first + count * (2 * place + 1) // (2 * _PICTURES) for place in range(_PICTURES)}))
    scale = min(1.0, _SHORT_SIDE / min(header.height, header.width))
    size_hw = max(1, round(header.height * scale)), max(1, round(header.width * scale))
    return ClipPlan(indices, size_hw, (0, 0), Bucket(len(indices), *size_hw))


def _share(span: Span, header: VideoProbe) -> tuple[float, float, float, float] | None:
    if span.plan is None:
        return None
    top, left, height, width = span.plan.crop
    share = top / header.height, left / header.width, height / header.height, width / header.width
    return None if min(share[2:]) > 0.99 else share


def _picture(frame: NDArray[np.uint8], label: str, cut: tuple[float, float, float, float] | None) -> Picture:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "WEBP", quality=75)
    return Picture(file.getvalue(), frame.shape[0], frame.shape[1], label, cut=cut)


def _bars(name: str, spans: Sequence[Span], limits: Limits) -> Bars | None:
    """How a score lies over the clips, with its limit."""
    values = [span.scores[name] for span in spans if name in span.scores]
    if not values or min(values) == max(values):
        return None
    low, high = min(values), max(values)
    width = (high - low) / _BINS
    counts = Counter(min(_BINS - 1, int((value - low) / width)) for value in values)
    bins = [(low + place * width, low + (place + 1) * width, counts[place]) for place in range(_BINS)]
    bounds = {"least": getattr(limits, f"min_{name}", None), "most": getattr(limits, f"max_{name}", None)}
    stated = "".join(f"; the {kind} is {bound:g}" for kind, bound in bounds.items() if bound is not None)
    return Bars(f"{name} of clips", bins, bounds["most"], f"{len(values)} clips, the dropped ones too{stated}.")
