"""A rehearsal in words: a table for people, a document for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.schema import RunConfig
from finetune.core.gpu import OVERHEAD_GIB, to_gib
from finetune.core.types import GIB
from finetune.planner.cost_model import OTHER, beside_tensors
from finetune.planner.estimate import Estimate
from finetune.planner.memory_tracker import Phase, rank_of


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a machine."""

    card_bytes: int | None
    """Of the GPU; None where nothing is known of it."""
    ram_bytes: int | None
    """Of the host that the run may have."""
    spare_bytes: int | None
    """What is left of the card, or, negative, what is missing."""
    ram_spare_bytes: int | None
    """As ``spare_bytes``, of the host."""
    beside: Mapping[str, int]
    """Bytes of the card that no tensor gets, by what has them."""

    @property
    def fits(self) -> bool | None:
        """None where neither is known."""
        known = [spare for spare in (self.spare_bytes, self.ram_spare_bytes) if spare is not None]
        return all(spare >= 0 for spare in known) if known else None


def verdict(
    rehearsal: Estimate,
    card_bytes: int | None,
    ram_bytes: int | None = None,
    *,
    beside: Mapping[str, int] | None = None,
) -> Verdict:
    """Compare a prediction with a machine.

    Args:
        rehearsal: the prediction.
        card_bytes: memory of the GPU; None if it is not known.
        ram_bytes: host memory for what techniques keep there; None for any amount.
        beside: what of the card is not for tensors (``card.beside_tensors``); None for that of one process.
    """
    beside = beside_tensors(OTHER) if beside is None else beside
    spare = None if card_bytes is None else card_bytes - sum(beside.values()) - rehearsal.peak.peak.nbytes
    ram_spare = None if ram_bytes is None else ram_bytes - rehearsal.host_bytes
    return Verdict(card_bytes, ram_bytes, spare, ram_spare, beside)


def text(config: RunConfig, rehearsal: Estimate, judged: Verdict, *, processes: int = 1) -> str:
    """The whole table."""
    return "\n".join(_lines(config, rehearsal, judged, processes))


def _lines(config: RunConfig, rehearsal: Estimate, judged: Verdict, processes: int) -> Iterator[str]:
    each = f", in each of {processes} processes" if processes > 1 else ""
    yield (
        f"{config.model.pretrained}, {config.method.kind}, {rehearsal.bucket} ({rehearsal.tokens:,} tokens), "
        f"batch size {config.train.batch_size}{each}: predicted, not measured"
    )
    yield ""
    rows = [(phase.name, f"{phase.peak.nbytes / GIB:.2f}", _when(phase)) for phase in rehearsal.phases]
    yield from table(("phase", "GiB", "at its highest"), rows)
    yield ""
    yield f"the peak is in {rehearsal.peak.name}; what each phase is made of at its highest, in GiB"
    yield from _parts(rehearsal.phases)
    yield ""
    yield "beside the tensors, and in none of these figures"
    yield from table(("", "GiB"), [(name, f"{nbytes / GIB:.2f}") for name, nbytes in judged.beside.items()])
    yield ""
    yield sentence(rehearsal, judged)


def _parts(phases: Sequence[Phase]) -> Iterator[str]:
    names = sorted({part for phase in phases for part in phase.peak.parts}, key=rank_of)
    rows = [(part, *(_cell(phase.peak.parts.get(part, 0)) for phase in phases)) for part in names]
    rows = [row for row in rows if any(row[1:])]
    rows.append(("together", *(_cell(phase.peak.nbytes) for phase in phases)))
    for name, points in (("pinned", [p.pinned for p in phases]), ("pageable", [p.pageable for p in phases])):
        if any(point.nbytes for point in points):
            rows.append((f"host memory, {name}", *(_cell(point.nbytes) for point in points)))
    yield from table(("", *(phase.name for phase in phases)), rows)


def _cell(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes >= GIB / 200 else ""


def sentence(rehearsal: Estimate, judged: Verdict) -> str:
    """Peak and verdict in one line."""
    beside = sum(judged.beside.values())
    need = rehearsal.peak.peak.nbytes + beside
    said = f"with {beside / GIB:.1f} GiB beside the tensors: {to_gib(need)}"
    if judged.spare_bytes is not None and judged.card_bytes is not None:
        short = judged.spare_bytes < 0
        said += f"; a card of {judged.card_bytes / GIB:.1f} GiB " + (
            f"is {to_gib(-judged.spare_bytes)} too small" if short else f"has {to_gib(judged.spare_bytes)} to spare"
        )
        said += f" ({to_gib(judged.card_bytes - beside)} of it are for tensors)"
    if judged.ram_spare_bytes is not None and judged.ram_spare_bytes < 0:
        said += f"; {to_gib(-judged.ram_spare_bytes)} of host memory are missing"
    return said


def _when(phase: Phase) -> str:
    return f"{phase.where}; {phase.note}" if phase.note else phase.where


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first and those that hold words to the left, numbers to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    right = [all(_is_number(row[column]) for row in cells[1:]) for column in range(len(head))]
    for row in cells:
        aligned = (
            cell.rjust(width) if numbers else cell.ljust(width)
            for cell, width, numbers in zip(row, widths, right, strict=True)
        )
        yield ("  " + "  ".join(aligned)).rstrip()


def _is_number(text: str) -> bool:
    return not text or text.replace(".", "", 1).replace(",", "").replace("-", "", 1).isdigit()


def document(rehearsal: Estimate, judged: Verdict) -> dict[str, Any]:
    """For programs: bytes throughout, curves left out."""
    return {
        "bucket": rehearsal.bucket,
        "tokens": rehearsal.tokens,
        "phases": [
            {
                "name": phase.name,
                "peak_bytes": phase.peak.nbytes,
                "where": phase.where,
                "note": phase.note,
                "parts": dict(phase.peak.parts),
                "pinned_bytes": phase.pinned.nbytes,
                "pageable_bytes": phase.pageable.nbytes,
            }
            for phase in rehearsal.phases
        ],
        "peak_bytes": rehearsal.peak.peak.nbytes,
        "host_bytes": rehearsal.host_bytes,
        "overhead_bytes": sum(judged.beside.values()),
        "beside_bytes": dict(judged.beside),
        "card_bytes": judged.card_bytes,
        "ram_bytes": judged.ram_bytes,
        "spare_bytes": judged.spare_bytes,
        "ram_spare_bytes": judged.ram_spare_bytes,
        "fits": judged.fits,
        "measured": False,
    }


# -------- The memory curve of a phase as a picture: what is held, part by part, from the first operation to the last.

_WIDTH, _HEIGHT = 1500, 840

_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 330, 92, 86

_SCALE = 2
"""Drawn twice as large and reduced: PIL does not smooth edges."""

_INK, _FAINT, _GRID, _PAPER = (34, 38, 46), (110, 116, 128), (226, 229, 235), (255, 255, 255)

_COLOURS = (
    (62, 84, 122),
    (96, 125, 168),
    (141, 166, 200),
    (83, 140, 128),
    (134, 183, 165),
    (187, 164, 86),
    (217, 196, 133),
    (150, 110, 150),
    (190, 156, 189),
    (229, 152, 92),
    (214, 106, 92),
    (165, 70, 74),
)


def draw(phase: Phase, title: str, path: Path, *, card_bytes: int | None = None) -> None:
    """Write the curve of ``phase`` as a PNG.

    Args:
        phase: what to draw.
        title: above it.
        path: the file to write.
        card_bytes: a card, drawn as a line where its memory for tensors ends.

    Raises:
        OSError: if it cannot be written.
    """
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), _PAPER)
    canvas = _Canvas(ImageDraw.Draw(image), phase, card_bytes)
    canvas.spans()
    canvas.grid()
    canvas.areas()
    canvas.card()
    canvas.peak()
    canvas.legend()
    canvas.words(title)
    image.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS).save(path, format="PNG")


class _Canvas:
    def __init__(self, draw: Any, phase: Phase, card_bytes: int | None) -> None:
        self._draw, self._phase = draw, phase
        self._limit = None if card_bytes is None else card_bytes / GIB - OVERHEAD_GIB
        highest = phase.peak.nbytes / GIB
        if self._limit is not None and self._limit < 2.5 * highest:
            highest = max(highest, self._limit)
        self._step = _round_step(highest * 1.08 / 8)
        self._top = self._step * (int(highest * 1.08 / self._step) + 1)
        names = {part for point in phase.curve for part in point.parts}
        self._parts = sorted(names, key=rank_of)
        self._colour = {part: _COLOURS[at * len(_COLOURS) // len(self._parts)] for at, part in enumerate(self._parts)}

    def _x(self, at: float) -> float:
        return (_LEFT + at * (_WIDTH - _LEFT - _RIGHT)) * _SCALE

    def _y(self, gib: float) -> float:
        return (_HEIGHT - _BOTTOM - gib / self._top * (_HEIGHT - _TOP - _BOTTOM)) * _SCALE

    def _text(
        self, x: float, y: float, text: str, *, size: int = 15, anchor: str = "lm", fill: tuple[int, ...] = _INK
    ) -> None:
        from PIL import ImageFont

        self._draw.text((x, y), text, font=ImageFont.load_default(size * _SCALE), fill=fill, anchor=anchor)

    def spans(self) -> None:
        """Stripes behind the stretches of the phase, named below the axis."""
        for number, span in enumerate(self._phase.spans):
            left, right = self._x(span.begin), self._x(span.end)
            if number % 2:
                self._draw.rectangle((left, self._y(self._top), right, self._y(0)), fill=(247, 248, 250))
            self._draw.line((left, self._y(0), left, self._y(0) + 10 * _SCALE), fill=_FAINT, width=_SCALE)
            if right - left > 60 * _SCALE:
                self._text((left + right) / 2, self._y(0) + 20 * _SCALE, span.name, anchor="mm")
            else:  # at the edge: beside its stretch
                self._text(right + 4 * _SCALE, self._y(0) + 20 * _SCALE, span.name, anchor="lm")

    def grid(self) -> None:
        """Horizontal lines with their GiB."""
        gib = 0.0
        while gib <= self._top + 1e-9:
            y = self._y(gib)
            self._draw.line((self._x(0), y, self._x(1), y), fill=_GRID, width=_SCALE)
            self._text(self._x(0) - 10 * _SCALE, y, f"{gib:g}", anchor="rm", fill=_FAINT)
            gib += self._step

    def areas(self) -> None:
        """One band per part, the lasting ones below."""
        curve = self._phase.curve
        floor = [0.0] * len(curve)
        xs = [self._x(point.at) for point in curve]
        for part in self._parts:
            roof = [low + point.parts.get(part, 0) / GIB for low, point in zip(floor, curve, strict=True)]
            # Level until the next moment: memory does not slope.
            upper = [edge for x, y, end in zip(xs, roof, [*xs[1:], xs[-1]], strict=True) for edge in ((x, y), (end, y))]
            lower = [
                edge for x, y, end in zip(xs, floor, [*xs[1:], xs[-1]], strict=True) for edge in ((x, y), (end, y))
            ]
            outline = [(x, self._y(y)) for x, y in [*upper, *reversed(lower)]]
            self._draw.polygon(outline, fill=self._colour[part])
            floor = roof

    def card(self) -> None:
        """Where the card ends."""
        if self._limit is not None and self._limit <= self._top:
            y = self._y(self._limit)
            for start in range(int(self._x(0)), int(self._x(1)), 14 * _SCALE):
                self._draw.line((start, y, start + 8 * _SCALE, y), fill=(190, 40, 40), width=2 * _SCALE)
            said = f"card of {self._limit + OVERHEAD_GIB:g} GiB, less {OVERHEAD_GIB} GiB overhead"
            self._text(self._x(0) + 8 * _SCALE, y - 12 * _SCALE, said, fill=(190, 40, 40), size=14)

    def peak(self) -> None:
        """A mark at the peak, with what ran."""
        peak = self._phase.peak
        x, y = self._x(peak.at), self._y(peak.nbytes / GIB)
        radius = 5 * _SCALE
        self._draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=_INK, fill=_PAPER, width=2 * _SCALE
        )
        rightwards = peak.at < 0.45
        said = f"{peak.nbytes / GIB:.2f} GiB: {self._phase.where}"
        self._text(x + (10 if rightwards else -10) * _SCALE, y - 16 * _SCALE, said, anchor="ls" if rightwards else "rs")

    def legend(self) -> None:
        """Parts from top to bottom as they are stacked, with their size at the peak."""
        x, y = self._x(1) + 24 * _SCALE, self._y(self._top) + 10 * _SCALE
        self._text(x, y, "at the peak, GiB", size=14, fill=_FAINT)
        for part in reversed(self._parts):
            y += 27 * _SCALE
            self._draw.rectangle((x, y - 8 * _SCALE, x + 16 * _SCALE, y + 8 * _SCALE), fill=self._colour[part])
            self._text(x + 25 * _SCALE, y, part)
            gib = self._phase.peak.parts.get(part, 0) / GIB
            self._text((_WIDTH - 24) * _SCALE, y, f"{gib:.2f}", anchor="rm")

    def words(self, title: str) -> None:
        """Title and axes."""
        self._text(self._x(0), 34 * _SCALE, title, size=22)
        self._text(self._x(0), 64 * _SCALE, "GiB of device memory that tensors hold; predicted", size=15, fill=_FAINT)
        middle = self._x(0.5)
        said = "allocations and releases, in the order in which the step makes them"
        self._text(middle, (_HEIGHT - 24) * _SCALE, said, size=15, fill=_FAINT, anchor="mm")


def _round_step(wanted: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 1.0
    while power > wanted:
        power /= 10
    while power * 10 <= wanted:
        power *= 10
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= wanted)
