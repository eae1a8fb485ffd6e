"""Curves as SVG, for a page that fetches nothing: axes, lines, a legend; the page's script reads values off them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 10, 26
_MOST_POINTS = 400

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Points
    """(step, value), in the order of steps."""
    color: int = 0
    """Number of a colour of the page's palette."""
    faint: bool = False
    """Drawn behind, without a place in the legend: the raw values of a smoothed curve."""
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """A plot over optimizer steps."""

    title: str
    lines: Sequence[Line]
    unit: str = ""
    note: str = ""
    """What it says, and what it does not."""
    mark: tuple[float, str] | None = None
    """A step to draw a line at, and what it is."""

    @property
    def svg(self) -> str:
        """The drawing."""
        return _draw(self)

    @property
    def values(self) -> dict[str, Any]:
        """What the script shows under the pointer."""
        shown = [line for line in self.lines if line.points and not line.faint]
        (x0, x1), (y0, y1) = _ranges(self.lines)
        frame = [_LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM, x0, x1, y0, y1]
        return {"frame": frame, "lines": [[line.label, line.color, *map(list, thinned(line.points))] for line in shown]}


def smoothed(points: Points, *, over: int = 30) -> list[tuple[float, float]]:
    """A running mean whose memory is about ``over`` points, corrected for its beginning as Adam's averages are."""
    decay, total, weight = 1 - 1 / max(1, min(over, len(points) // 4 + 1)), 0.0, 0.0
    result = []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append((step, total / weight))
    return result


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most ``_MOST_POINTS`` points: of each stretch the lowest and the highest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _ranges(lines: Iterable[Line]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of steps and of values, with some air around the values; single spikes of raw values do not count."""
    points = [point for line in lines for point in line.points]
    if not points:
        return (0, 1), (0, 1)
    steps = [step for step, _ in points]
    firm = [value for line in lines if not line.faint for _, value in line.points]
    raw = sorted(value for line in lines if line.faint for _, value in line.points)
    if raw:
        firm += [raw[len(raw) // 50], raw[-1 - len(raw) // 50]]
    low, high = min(firm), max(firm)
    air = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return (min(steps), max(max(steps), min(steps) + 1)), (low - air, high + air)


def _draw(chart: Chart) -> str:
    (x0, x1), (y0, y1) = _ranges(chart.lines)

    def at(step: float, value: float) -> str:
        x = _LEFT + (step - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - y0) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{min(max(y, _TOP), HEIGHT - _BOTTOM):.1f}"

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">']
    for value in ticks(y0, y1):
        y = at(x0, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{value:.4g}</text>')
    for step in ticks(x0, x1):
        x = at(step, y0).split(",")[0]
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{step:g}</text>')
    if chart.mark is not None:
        x = at(chart.mark[0], y0).split(",")[0]
        parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>')
        anchor, gap = ("end", -4) if float(x) > WIDTH / 2 else ("start", 4)
        where = f'x="{x}" dx="{gap}" y="{_TOP + 10}" text-anchor="{anchor}"'
        parts.append(f'<text class="tick" {where}>{escape(chart.mark[1])}</text>')
    for line in sorted(chart.lines, key=lambda line: not line.faint):
        kinds = " ".join(["line", f"c{line.color}", *["faint"][: line.faint], *["dashed"][: line.dashed]])
        points = thinned(line.points)
        if len(points) == 1:
            x, y = at(*points[0]).split(",")
            parts.append(f'<circle class="{kinds}" cx="{x}" cy="{y}" r="3"/>')
        elif points:
            parts.append(f'<polyline class="{kinds}" points="{" ".join(at(*point) for point in points)}"/>')
        if not line.faint and 1 < len(points) <= 30:
            dots = (at(*point).split(",") for point in points)
            parts += [f'<circle class="dot c{line.color}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in dots]
    parts.append('<line class="cursor" y1="10" y2="214"/></svg>')
    return "".join(parts)
