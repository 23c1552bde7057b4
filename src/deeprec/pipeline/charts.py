"""Charts as inline SVG, styled by the report's own style sheet (classes, not colours)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Interval", "Series", "interval_chart", "line_chart", "nice_ticks"]

LINE_WIDTH, LINE_HEIGHT = 320, 170
ROW_HEIGHT = 26
ROW_WIDTH, VALUE_WIDTH = 1000, 150
LETTER_WIDTH = 6.6  # of the labels' font size on average, in the same units
SMOOTHED_FROM = 16  # points; shorter curves are read as they are


@dataclass(frozen=True)
class Series:
    """One curve: ``css`` is its class, ``points`` (x, y) in order of x."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart: a value and its bounds; ``text`` stands at the right."""

    label: str
    value: float
    low: float
    high: float
    text: str
    css: str = ""


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers that cover low..high, steps 1, 2, 2.5 or 5 times 10^n."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, up to rounding
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def line_chart(series: Sequence[Series], show: Callable[[float], str]) -> Markup:
    """Curves over a shared x; ``show`` writes a y value. Long curves get a moving average."""
    left, right, top, bottom = 46, 10, 8, 22
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    ticks = nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(*xs, min(xs) + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (LINE_WIDTH - left - right)
        up = (y - ticks[0]) / (ticks[-1] - ticks[0]) * (LINE_HEIGHT - top - bottom)
        return left + across, LINE_HEIGHT - bottom - up

    parts = []
    for tick in ticks:
        _, y = place(x_low, tick)
        parts.append(_line("grid", (left, y), (LINE_WIDTH - right, y)))
        parts.append(_text("tick end", left - 6, y + 3.5, show(tick)))
    for x, anchor in ((x_low, "start"), (x_high, "end")):
        at, _ = place(x, ticks[0])
        parts.append(_text(f"tick {anchor}", at, LINE_HEIGHT - 6, f"step {x:g}"))
    for s in series:
        raw = [place(x, y) for x, y in s.points]
        if len(raw) >= SMOOTHED_FROM:
            parts.append(_polyline(f"curve raw {s.css}", raw))
            raw = [place(x, y) for x, y in _smoothed(s.points)]
        if len(raw) == 1:
            parts.append(_dot(f"dot {s.css}", *raw[0]))
        parts.append(_polyline(f"curve {s.css}", raw))
    return _svg(LINE_WIDTH, LINE_HEIGHT, parts)


def interval_chart(
    rows: Sequence[Interval], show: Callable[[float], str], *, zero: bool = False
) -> Markup:
    """One dot with its interval a row; ``zero`` draws a line at 0 to compare with."""
    bounds = [b for row in rows for b in (row.low, row.high)] + ([0.0] if zero else [])
    ticks = nice_ticks(min(bounds), max(bounds), count=5)
    height = ROW_HEIGHT * len(rows) + 30
    left = LETTER_WIDTH * max(len(row.label) for row in rows) + 30
    plot = ROW_WIDTH - left - VALUE_WIDTH

    def place(x: float) -> float:
        return left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * plot

    parts = []
    for tick in ticks:
        parts.append(_line("grid", (place(tick), 4), (place(tick), height - 22)))
        parts.append(_text("tick middle", place(tick), height - 6, show(tick)))
    if zero:
        parts.append(_line("zero", (place(0), 4), (place(0), height - 22)))
    for i, row in enumerate(rows):
        y = ROW_HEIGHT * (i + 0.5) + 4
        parts.append(_text("label end", left - 16, y + 4.5, row.label))
        parts.append(_line(f"whisker {row.css}", (place(row.low), y), (place(row.high), y)))
        parts.append(_dot(f"dot {row.css}", place(row.value), y))
        parts.append(_text("value", left + plot + 16, y + 4.5, row.text))
    return _svg(ROW_WIDTH, height, parts)


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over about a tenth of the curve."""
    half = max(1, len(points) // 20)
    smoothed = []
    for i, (x, _) in enumerate(points):
        around = [y for _, y in points[max(0, i - half) : i + half + 1]]
        smoothed.append((x, sum(around) / len(around)))
    return smoothed


def _svg(width: float, height: float, parts: Sequence[Markup]) -> Markup:
    # Markup.format escapes what is not markup itself.
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(
        width, height, Markup("").join(parts)
    )


def _line(css: str, start: tuple[float, float], end: tuple[float, float]) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        css, *start, *end
    )


def _polyline(css: str, points: Sequence[tuple[float, float]]) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup('<polyline class="{}" points="{}"/>').format(css, path)


def _dot(css: str, x: float, y: float) -> Markup:
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(css, x, y)


def _text(css: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
        css, x, y, escape(text)
    )
