"""What suits 10, 100 and 10 000 clips: the starting points of docs/training.md, as numbers, for whoever gives advice.

The page's table is written from these by ``scripts/make_config_docs.py``; they are for LoRA at the native size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class StartingPoint:
    """What to set for so many clips."""

    clips: int
    teaches: str
    rank: int
    alpha: int
    other_rank: str
    """What may be set instead of ``rank``, in words of the table; empty for nothing."""
    lr: str
    schedule: str
    warmup_steps: int
    batch: str
    """Clips per update."""
    accumulation: int
    """What ``finetune init`` writes, with one clip at a time."""
    length: str
    """In the words of the table."""
    seen: tuple[int, int]
    """How often a clip is to be seen, at least and at most."""
    holdout: float
    """What ``finetune init`` writes; ``data.holdout``."""
    holdout_range: str
    every: int
    """``validation.every``."""
    sample_every: int


STARTING_POINTS = (
    StartingPoint(
        clips=10,
        teaches="one subject or one look",
        rank=32,
        alpha=32,
        other_rank="",
        lr="1e-4",
        schedule="constant",
        warmup_steps=20,
        batch="1 or 2",
        accumulation=1,
        length="500 to 1000",
        seen=(50, 100),
        holdout=1,
        holdout_range="1 or 2 videos",
        every=50,
        sample_every=100,
    ),
    StartingPoint(
        clips=100,
        teaches="a concept, a style, a kind of motion",
        rank=64,
        alpha=64,
        other_rank="or 128, 64",
        lr="1e-4 to 2e-4",
        schedule="constant",
        warmup_steps=100,
        batch="2 to 4",
        accumulation=1,
        length="2000 to 4000",
        seen=(20, 40),
        holdout=0.1,
        holdout_range="0.1",
        every=200,
        sample_every=500,
    ),
    StartingPoint(
        clips=10_000,
        teaches="a domain",
        rank=128,
        alpha=64,
        other_rank="or `method.kind: full`",
        lr="1e-4; full: 1e-5",
        schedule="cosine",
        warmup_steps=500,
        batch="16 or more",
        accumulation=16,
        length="2 to 5 epochs (`train.epochs`)",
        seen=(2, 5),
        holdout=64,
        holdout_range="64 videos",
        every=500,
        sample_every=1000,
    ),
)

MOST_SEEN = max(point.seen[1] for point in STARTING_POINTS)
"""How often a clip may be seen before any run is told of it."""


def starting_point(clips: int) -> StartingPoint:
    """The row for the number of clips that is nearest, as a ratio: 30 clips are nearer to 10 than to 100."""
    return min(STARTING_POINTS, key=lambda point: abs(math.log(max(clips, 1) / point.clips)))


def suited(clips: int) -> tuple[float, float]:
    """How often each of so many clips is to be seen, at least and at most: between two rows in proportion, on a
    logarithmic scale; beyond them as the nearest.
    """
    for few, many in pairwise(STARTING_POINTS):
        if clips <= many.clips:
            part = math.log(max(clips, few.clips) / few.clips) / math.log(many.clips / few.clips)
            low, high = (a * (b / a) ** part for a, b in zip(few.seen, many.seen, strict=True))
            return low, high
    low, high = map(float, STARTING_POINTS[-1].seen)
    return low, high


def word_on_length(clips: int, seen: float, steps: float) -> str:
    """What a run's length means for its clips: empty if it suits them.

    Args:
        clips: that are trained on.
        seen: how often each of them will be.
        steps: optimizer steps in all. With larger batches as many suit, so that each clip is seen more often.
    """
    low, high = suited(clips)
    usual = f"{low:.0f} to {high:.0f} times, at batch 1, suit {clips} clips"
    if steps / clips > high or seen > MOST_SEEN:
        return f"each clip is seen {seen:.4g} times, and {usual}: likely to be learnt by heart"
    if seen < low:
        return f"each clip is seen {seen:.4g} times, and {usual}: likely to have learnt little"
    return ""


def table() -> str:
    """The starting points as docs/training.md shows them."""

    def row(label: str, cell: Callable[[StartingPoint], str]) -> str:
        return f"| {label} | {' | '.join(map(cell, STARTING_POINTS))} |"

    def ranks(point: StartingPoint) -> str:
        joined = ";" if point.other_rank.startswith("or `") else ""
        return f"{point.rank}, {point.alpha}{joined}{' ' if point.other_rank else ''}{point.other_rank}"

    rows = [
        row("", lambda point: f"{point.clips:,} clips".replace(",", " ")),
        "|---" * (len(STARTING_POINTS) + 1) + "|",
        row("what it can teach", lambda point: point.teaches),
        row("`method.rank`, `alpha`", ranks),
        row("`optimizer.lr`", lambda point: point.lr),
        row("`lr_schedule`", lambda point: f"{point.schedule}, warm-up {point.warmup_steps}"),
        row("effective batch", lambda point: point.batch),
        row("`train.steps`", lambda point: point.length),
        row("how often a clip is seen, at batch 1", lambda point: f"{point.seen[0]} to {point.seen[1]} times"),
        row("`data.holdout`", lambda point: point.holdout_range),
        row("`validation.every`", lambda point: str(point.every)),
        row("`validation.sample_every`", lambda point: str(point.sample_every)),
        row("`data.caption_dropout`", lambda point: "0.1"),
    ]
    return "\n".join(rows).replace("|  |", "| |")
