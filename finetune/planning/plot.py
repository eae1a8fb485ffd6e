"""The memory curve of a phase as a picture: what is held, part by part, from the first operation to the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.cards import GIB, OVERHEAD_GIB
from finetune.planning.curve import Phase, rank_of

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
