"""A report as one HTML file: cards with pictures, captions and faults, tables above them, sorted and filtered in place.

The page is whole in itself (``core.html``). It knows nothing of CogVideoX. Who makes one fills in a ``Page``:

- ``columns`` say which values of a card are shown, in which format, and can be sorted by; their order is the page's;
- a ``Card`` is a clip or whatever has pictures; its ``group`` and the names of its faults become filters;
- ``Table``, ``Bars`` and ``notes`` stand above the cards;
- ``Editing`` makes captions fields, and adds a button that saves them as a table.

All text is shown as it is (``core.text.shown``), escaped, and in a direction of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.core import html
from finetune.core.text import shown

TEMPLATE = Path(__file__).parent.parent / "templates" / "page.html"

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")
"""The worst first."""


@dataclass(frozen=True)
class Fault:
    """Something to know of a clip."""

    level: Level
    """``error``: training stops at it. ``warning``: it can be trained on, and should be looked at. ``note``: what is
    done to it."""
    name: str
    """One or two words, the same for all faults of its kind: the page filters by it."""
    text: str
    """What was found, with its numbers."""
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.fix}" if self.fix else self.text


@dataclass(frozen=True)
class Picture:
    """A picture on a card."""

    content: bytes
    """A WebP file."""
    height: int
    width: int
    label: str
    exact: bool = False
    """Whether its pixels are the ones that are claimed; it then opens at its own size."""
    cut: tuple[float, float, float, float] | None = None
    """What of it is kept: top, left, height and width, each a share of 0 to 1. The rest is dimmed."""

    @property
    def url(self) -> str:
        """The picture itself."""
        return html.data_url(self.content, "image/webp")


@dataclass(frozen=True)
class Column:
    """A value that cards have."""

    name: str
    """Its key in ``Card.values``."""
    label: str
    format: str = "{}"
    """How it is written, for ``str.format``; numbers are sorted as numbers whatever it is."""


@dataclass(frozen=True)
class Card:
    """One clip."""

    title: str
    text: str = ""
    """Its caption."""
    cut_text: str = ""
    """What of the caption is not read: its end."""
    group: str = ""
    """What it belongs to, such as its bucket."""
    pictures: Sequence[Picture] = ()
    values: Mapping[str, float | str | None] = field(default_factory=dict)
    """By ``Column.name``; a value may be missing."""
    faults: Sequence[Fault] = ()
    variants: Sequence[tuple[str, str]] = ()
    """Further captions, each with its end that is not read."""


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A histogram."""

    title: str
    bins: Sequence[tuple[float, float, int]]
    """From, up to, and how many."""
    limit: float | None = None
    """Where a line is drawn; bins that begin at or above it are marked."""
    note: str = ""


@dataclass(frozen=True)
class Editing:
    """Lets a card's caption be changed, and the table that the captions stand in be saved from the page."""

    file_name: str
    """That is offered to save under; the browser asks where, and the page itself writes nothing."""
    rows: Sequence[Mapping[str, Any]]
    """One per card, in the cards' order: every column, as JSON has it."""
    column: str
    """Of the caption."""
    variants: str
    """Of all its variants, where a row has them: the first is the caption."""


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    summary: str
    cards: Sequence[Card]
    columns: Sequence[Column] = ()
    tables: Sequence[Table] = ()
    bars: Sequence[Bars] = ()
    faults: Sequence[Fault] = ()
    """Of the dataset as a whole."""
    notes: Sequence[str] = ()
    editing: Editing | None = None


def render(page: Page) -> str:
    """The page as HTML."""
    counts = Counter((fault.level, fault.name) for card in page.cards for fault in card.faults)
    names = sorted(counts, key=lambda key: (LEVELS.index(key[0]), -counts[key], key[1]))
    return html.render(
        TEMPLATE,
        {"written": _written, "editing": asdict},
        page=page,
        groups=sorted({card.group for card in page.cards if card.group}),
        fault_names=[(level, name, counts[level, name]) for level, name in names],
        levels=LEVELS,
    )


def _written(value: float | str | None, layout: str) -> str:
    return "–" if value is None else shown(layout.format(value))
