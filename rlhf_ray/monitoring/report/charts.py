"""Draw line charts as SVG text, without a library or a script.

Invariants: every finite point lies inside its panel, where the labelled axes say. A missing value breaks the line.
Colours come from the CSS variables in ``style.css`` alone, so that a chart can be read on light and on dark ground.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import groupby, pairwise
from typing import Literal

Point = tuple[float, float | None]

LEFT, RIGHT, TOP, BOTTOM = 50, 54, 52, 40
"""Space around a panel for axis labels, last values and heading, in pixels."""
PANEL_GAP = 62
CHARACTER = 7.0
"""Mean width of a character of the legend, in pixels."""
COLOURS = 6
SHOWN_POINTS = 400
"""Points that a line has at most: more would not be seen."""
TOUCHABLE_POINTS = 80
"""Points of a line that show their numbers under the pointer, at most."""
MARKED_POINTS = 12
"""Up to this many points a line has visible marks."""
SMOOTHED_FROM = 120
"""Lines of more points are averaged if they are noisy."""
NOISY = 4.0


@dataclass(frozen=True)
class Curve:
    """One series of points: a line, marks that grow stronger towards the last one, or both.

    ``colour`` is the number of the series, from 0; ``None`` in place of a y value is a missing value.
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    style: Literal["line", "marks", "both"] = "line"
    names: Sequence[str] = ()
    """A name for each point, or none at all: then the label names them."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes and its curves; ``height`` is in pixels."""

    title: str
    unit: str
    curves: Sequence[Curve]
    height: int = 170
    include: Sequence[float] = field(default_factory=tuple)
    """Values that the vertical axis must include."""


@dataclass(frozen=True)
class Axis:
    """A linear scale from values ``low``..``high`` to pixels ``start``..``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """About ``wanted`` round values inside the scale."""
        step = _round_step((self.high - self.low) / wanted)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def line_chart(panels: Sequence[Panel], x_label: str, description: str, width: int = 390) -> str:
    """One SVG with the panels below each other over the same horizontal axis; empty text if there is no point at all."""
    panels = [replace(panel, curves=[curve for curve in panel.curves if _finite(curve.points)]) for panel in panels]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return ""
    xs = [x for panel in panels for curve in panel.curves for x, y in curve.points if y is not None]
    x_axis = Axis(*_widened(min(xs), max(xs), padding=0.0), LEFT, width - RIGHT)
    top, parts = float(TOP), []
    for panel in panels:
        parts.append(_panel(panel, x_axis, top))
        top += panel.height + PANEL_GAP
    bottom = top - PANEL_GAP
    parts.append(_x_labels(x_axis, bottom, x_label))
    height = bottom + BOTTOM
    return (
        f'<svg viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(description)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def number(value: float, digits: int = 4) -> str:
    """A number for people: ``digits`` significant digits, commas between thousands, 1.5e-6 for tiny and huge ones."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if not 1e-4 <= abs(value) < 1e7:
        mantissa, _, exponent = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        return f"{_without_zeros(mantissa)}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _without_zeros(f"{value:,.{decimals}f}")


def _without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _panel(panel: Panel, x_axis: Axis, top: float) -> str:
    values = [y for curve in panel.curves for _, y in _finite(curve.points)] + list(panel.include)
    low, high = _widened(min(values), max(values), padding=0.06)
    if min(values) >= 0:
        low = 0.0 if min(values) < 0.5 * max(values) else max(low, 0.0)
    y_axis = Axis(low, high, top + panel.height, top)
    parts = [_heading(panel, top), _grid(x_axis, y_axis)]
    parts += [_curve(curve, x_axis, y_axis) for curve in panel.curves]
    parts += _last_values(panel, x_axis, y_axis)
    return "\n".join(parts)


def _heading(panel: Panel, top: float) -> str:
    window = max(smoothing_window(curve) for curve in panel.curves)
    notes = [panel.unit] * bool(panel.unit) + [f"mean of the last {window}"] * (window > 1)
    unit = f' <tspan class="unit">{escape(", ".join(notes))}</tspan>' if notes else ""
    parts = [f'<text class="title" x="0" y="{top - 33:g}">{escape(panel.title)}{unit}</text>']
    if len(panel.curves) > 1:
        x = 0.0
        for curve in panel.curves:
            parts.append(f'<rect class="f{curve.colour % COLOURS}" x="{x:g}" y="{top - 18:g}" width="12" height="3"/>')
            parts.append(f'<text class="legend" x="{x + 17:g}" y="{top - 12:g}">{escape(curve.label)}</text>')
            x += 34 + CHARACTER * len(curve.label)
    return "\n".join(parts)


def _grid(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick in y_axis.ticks(4):
        y = y_axis.at(tick)
        parts.append(f'<line class="grid" x1="{x_axis.start:g}" x2="{x_axis.end:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{x_axis.start - 8:g}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    base = y_axis.start
    parts.append(f'<line class="axis" x1="{x_axis.start:g}" x2="{x_axis.end:g}" y1="{base:g}" y2="{base:g}"/>')
    return "\n".join(parts)


def _x_labels(x_axis: Axis, bottom: float, label: str) -> str:
    parts = [
        f'<text class="tick" x="{x_axis.at(tick):.1f}" y="{bottom + 16:g}" text-anchor="middle">{number(tick)}</text>'
        for tick in x_axis.ticks(round((x_axis.end - x_axis.start) / 70))
    ]
    middle = (x_axis.start + x_axis.end) / 2
    parts.append(f'<text class="label" x="{middle:g}" y="{bottom + 33:g}" text-anchor="middle">{escape(label)}</text>')
    return "\n".join(parts)


def _curve(curve: Curve, x_axis: Axis, y_axis: Axis) -> str:
    colour = curve.colour % COLOURS
    points = thinned(curve.points)
    parts = []
    if curve.style != "marks":
        window = smoothing_window(curve)
        line = points if window == 1 else thinned(smoothed(curve.points, window))
        if window > 1:
            parts += [_line(part, f"s{colour} raw", x_axis, y_axis) for part in _unbroken(points)]
        parts += [_line(part, f"s{colour}", x_axis, y_axis) for part in _unbroken(line)]
    parts += _marks(curve, x_axis, y_axis)
    return "\n".join(parts)


def _line(points: Sequence[tuple[float, float]], style: str, x_axis: Axis, y_axis: Axis) -> str:
    places = " ".join(f"{x_axis.at(x):.1f},{y_axis.at(y):.1f}" for x, y in points)
    return f'<polyline class="{style}" points="{places}"/>'


def _marks(curve: Curve, x_axis: Axis, y_axis: Axis) -> list[str]:
    """A mark at each point, with its numbers as a tooltip; on a long line the mark shows only under the pointer."""
    visible = curve.style != "line" or len(_finite(curve.points)) <= MARKED_POINTS
    points = thinned(curve.points, TOUCHABLE_POINTS) if curve.style == "line" else curve.points
    kind = f"f{curve.colour % COLOURS} {'mark' if visible else 'touch'}"
    parts = []
    for index, ((x, y), name) in enumerate(zip(points, curve.names or [curve.label] * len(points), strict=True), 1):
        if y is not None:
            title = f"{escape(name)}: {number(y)} at {number(x)}"
            strength = f' fill-opacity="{0.25 + 0.75 * index / len(points):.2f}"' if curve.style == "marks" else ""
            place = f'cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}"'
            parts.append(f'<circle class="{kind}"{strength} {place} r="4"><title>{title}</title></circle>')
    return parts


def _last_values(panel: Panel, x_axis: Axis, y_axis: Axis) -> list[str]:
    """The last value of each line, to the right of its end, moved apart where values would overlap."""
    ends = []
    for curve in panel.curves:
        points = smoothed(curve.points, smoothing_window(curve))
        finite = _finite(points)
        if finite and curve.style == "line":
            ends.append((y_axis.at(finite[-1][1]), finite[-1][1], curve.colour % COLOURS))
    places = _apart([y for y, _, _ in sorted(ends)], 13.0, y_axis.end, y_axis.start)
    return [
        f'<text class="last t{colour}" x="{x_axis.end + 8:g}" y="{y + 3.5:.1f}">{number(value, 3)}</text>'
        for y, (_, value, colour) in zip(places, sorted(ends), strict=True)
    ]


def _apart(places: list[float], distance: float, low: float, high: float) -> list[float]:
    """Ascending places, moved so that neighbours keep their distance and, if there is room, all stay inside."""
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + distance)
    if places and places[-1] > high:
        places[-1] = high
        for index in range(len(places) - 2, -1, -1):
            places[index] = min(places[index], places[index + 1] - distance)
    return [max(place, low) for place in places]


def smoothing_window(curve: Curve) -> int:
    """How many points a line is averaged over; 1, not at all, for a line that is short or not noisy.

    Noisy is a line whose way up and down is more than ``NOISY`` times the range of its values.
    """
    if len(curve.points) <= SMOOTHED_FROM or curve.style == "marks":
        return 1
    values = [y for _, y in _finite(curve.points)]
    way = sum(abs(after - before) for before, after in pairwise(values))
    return max(3, len(curve.points) // 40) if way > NOISY * (max(values) - min(values)) else 1


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the last ``window`` values that are not missing; a missing value stays missing."""
    if window == 1:
        return list(points)
    recent: list[float] = []
    out: list[Point] = []
    for x, y in points:
        if y is not None:
            recent = [*recent, y][-window:]
        out.append((x, None if y is None else sum(recent) / len(recent)))
    return out


def thinned(points: Sequence[Point], limit: int = SHOWN_POINTS) -> list[Point]:
    """Every k-th point, so that about ``limit`` are left, and always the last one."""
    stride = max(1, math.ceil(len(points) / limit))
    kept = list(points[::stride])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _unbroken(points: Sequence[Point]) -> Iterator[list[tuple[float, float]]]:
    for missing, part in groupby(points, key=lambda point: point[1] is None):
        if not missing:
            yield [(x, y) for x, y in part if y is not None]


def _finite(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if y is not None]


def _widened(low: float, high: float, padding: float) -> tuple[float, float]:
    if low == high:
        around = abs(low) * 0.1 or 1.0
        return low - around, high + around
    extra = (high - low) * padding
    return low - extra, high + extra


def _round_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(factor * magnitude for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * magnitude >= rough * (1 - 1e-9))
