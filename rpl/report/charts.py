"""The page's charts as inline SVG: rows of dots for accuracies, lines for learning curves.

Pure functions of numbers and labels. Colours and fonts come from the page's style sheet through classes, so the same
drawing serves light and dark. Drawn 400 units wide, which is legible on a phone at its natural size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rpl.report.text import percent

WIDTH = 400
ROW = 26
POINTS_PER_LINE = 240
"""More points than that are thinned: they would fall on the same pixel."""


@dataclass(frozen=True)
class Dot:
    """A row of a dot chart. `css_class` says whose it is; `gap`: set it apart from the row above."""

    label: str
    value: float | None
    css_class: str
    gap: bool = False


@dataclass(frozen=True)
class Line:
    """A curve with a label at its end. Values that are None break nothing: they are left out."""

    label: str
    css_class: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Axis:
    """A range and the ticks in it."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float, start: float, end: float) -> float:
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def nice_axis(values: Sequence[float], *, from_zero: bool = False, tight: bool = False, ticks: int = 4) -> Axis:
    """An axis around `values` whose about `ticks` steps are 1, 2 or 5 times a power of ten.

    `tight`: it ends with the largest value instead of the tick beyond it.
    """
    low = 0.0 if from_zero else min(values, default=0.0)
    high = max(values, default=1.0)
    if high - low < 1e-9:
        high = low + (abs(low) * 0.1 or 1.0)
    rough = (high - low) / ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    marks = tuple(round(i * step, 10) for i in range(first, last + 1))
    if tight:
        return Axis(marks[0], high, tuple(mark for mark in marks if mark <= high))
    return Axis(marks[0], marks[-1], marks)


def dot_chart(rows: Sequence[Dot], axis: Axis, guide: float | None, title: str) -> Markup:
    """Fractions as dots on one axis, a number beside each.

    `guide`: the value of a dotted line to compare the rows with. `title` is read out by a screen reader.
    """
    left, right, top = 128, WIDTH - 52, 6
    parts: list[Markup] = []
    middles: list[float] = []
    y = float(top)
    for row in rows:
        y += 12 if row.gap else 0
        middles.append(y + ROW / 2)
        y += ROW
    bottom = y + 2
    for tick in axis.ticks:
        x = axis.place(tick, left, right)
        parts.append(_svg('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', x, x, top, bottom))
        parts.append(_text(x, bottom + 15, percent(tick, 0), "tick", "middle"))
    if guide is not None:
        x = axis.place(guide, left, right)
        parts.append(_svg('<line class="guide" x1="{}" x2="{}" y1="{}" y2="{}"/>', x, x, middles[0], bottom))
    for row, middle in zip(rows, middles, strict=True):
        parts.append(_text(left - 10, middle + 4, row.label, f"label {row.css_class}", "end"))
        if row.value is None:
            parts.append(_text(left + 6, middle + 4, "not measured", "tick", "start"))
            continue
        x = axis.place(row.value, left, right)
        parts.append(
            _svg('<line class="stem {}" x1="{}" x2="{}" y1="{}" y2="{}"/>', row.css_class, left, x, middle, middle)
        )
        parts.append(_svg('<circle class="dot {}" cx="{}" cy="{}" r="5"/>', row.css_class, x, middle))
        parts.append(_text(x + 10, middle + 4, percent(row.value), f"value {row.css_class}", "start"))
    return _figure(parts, bottom + 22, title)


def line_chart(
    lines: Sequence[Line], x_axis: Axis, y_axis: Axis, *, x_label: str, as_percent: bool, title: str
) -> Markup:
    """Curves over a common axis, each labelled with its last value at its end."""
    left, right, top, bottom = 44, WIDTH - 112, 8, 168
    parts: list[Markup] = []
    for tick in y_axis.ticks:
        y = y_axis.place(tick, bottom, top)
        parts.append(_svg('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>', left, right, y, y))
        parts.append(_text(left - 8, y + 4, _tick(tick, y_axis, as_percent), "tick", "end"))
    for tick in x_axis.ticks:
        parts.append(_text(x_axis.place(tick, left, right), bottom + 17, f"{tick:,.0f}", "tick", "middle"))
    parts.append(_text((left + right) / 2, bottom + 34, x_label, "tick", "middle"))
    drawn = [line for line in lines if any(y is not None for _, y in line.points)]
    ends: list[tuple[float, float]] = []
    for line in drawn:
        known = thin([(x, y) for x, y in line.points if y is not None], POINTS_PER_LINE)
        places = [(x_axis.place(x, left, right), y_axis.place(y, bottom, top)) for x, y in known]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(_svg('<polyline class="curve {}" points="{}"/>', line.css_class, path))
        parts.append(_svg('<circle class="dot {}" cx="{}" cy="{}" r="2.5"/>', line.css_class, *places[-1]))
        ends.append(places[-1])
    heights = apart([y for _, y in ends], 17, top, bottom)
    for line, (x, _), y in zip(drawn, ends, heights, strict=True):
        last = [value for _, value in line.points if value is not None][-1]
        shown = percent(last) if as_percent else f"{last:.3f}"
        parts.append(
            _svg(
                '<text class="{}" x="{}" y="{}"><tspan class="value">{}</tspan> {}</text>',
                f"label {line.css_class}", x + 8, y + 4, shown, line.label,
            )
        )  # fmt: skip
    return _figure(parts, bottom + 42, title)


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` of `points`, evenly apart, the first and the last included."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def apart(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """`places` moved as little as needed to stand `distance` from each other, within `low`..`high` if they fit."""
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    moved = [min(max(places[i], low), high) for i in order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + distance)
    if moved and moved[-1] > high:
        moved[-1] = high
        for i in range(len(moved) - 2, -1, -1):
            moved[i] = min(moved[i], moved[i + 1] - distance)
    result = [0.0] * len(places)
    for position, i in enumerate(order):
        result[i] = moved[position]
    return result


def _tick(value: float, axis: Axis, as_percent: bool) -> str:
    step = axis.ticks[1] - axis.ticks[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return percent(value, max(0, digits - 2)) if as_percent else f"{value:.{digits}f}"


def _text(x: float, y: float, text: str, css_class: str, anchor: str) -> Markup:
    return _svg('<text class="{}" x="{}" y="{}" text-anchor="{}">{}</text>', css_class, x, y, anchor, text)


def _svg(template: str, *values: object) -> Markup:
    """`template` with every value escaped; numbers with one decimal, enough for a screen and stable as text."""
    shown = (f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else value for value in values)
    return Markup(template).format(*(escape(value) for value in shown))  # noqa: S704 - templates are literals above


def _figure(parts: Sequence[Markup], height: float, title: str) -> Markup:
    head = _svg('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">', WIDTH, height, title)
    return head + Markup("").join(parts) + Markup("</svg>")
