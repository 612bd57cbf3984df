"""Dashboards drawn from a real Prometheus' answers, an SVG each, with the panels where Grafana puts them.

Nothing of Grafana's is in it: it shows that each panel's expressions give the lines that its title promises.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_ray.monitoring.dashboards import Board, dashboard
from tests.monitoring.alarms.prometheus import Prometheus, asked

CELL_W, CELL_H, MARGIN = 50, 30, 8
COLOURS = ("#3274d9", "#e0752d", "#37872d", "#c4162a", "#8f3bb8", "#e0b400", "#1f9e9e", "#7a5c3e")
SHOWN = 8
"""Lines of a panel that are named below it."""
Point = tuple[float, float]
Line = tuple[str, list[Point]]


def draw(board: Board, prometheus: Prometheus, begin: float, end: float) -> str:
    """The dashboard between two moments."""
    panels = dashboard(board)["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) * CELL_H
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{24 * CELL_W}" height="{height}" font-family="sans-serif">',
             '<rect width="100%" height="100%" fill="#f4f5f5"/>']  # fmt: skip
    for panel in panels:
        place = panel["gridPos"]
        box = (place["x"] * CELL_W, place["y"] * CELL_H, place["w"] * CELL_W - MARGIN, place["h"] * CELL_H - MARGIN)
        parts += _panel(panel, lines(panel, prometheus, begin, end), box, begin, end)
    return "\n".join([*parts, "</svg>"])


def lines(panel: dict[str, Any], prometheus: Prometheus, begin: float, end: float) -> list[Line]:
    """Legend and points of every series that a panel shows."""
    found = []
    for target in panel.get("targets", ()):
        for one in prometheus.over_time(asked(target["expr"]), begin, end, 10):
            points = [(float(at), float(value)) for at, value in one["values"]]
            found.append((_legend(target["legendFormat"], one["metric"]), [(at, y) for at, y in points if y == y]))
    return [(legend, points) for legend, points in found if points]


def _legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: labels.get(match[1], ""), form).strip()


def _panel(
    panel: dict[str, Any], shown: Sequence[Line], box: tuple[int, int, int, int], begin: float, end: float
) -> Iterator[str]:
    x, y, width, height = box
    title = html.escape(panel["title"])
    if panel["type"] == "row":
        yield f'<text x="{x + 4}" y="{y + 20}" font-size="15" font-weight="bold">{title}</text>'
        return
    yield f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="white" stroke="#ccc"/>'
    yield f'<text x="{x + 6}" y="{y + 16}" font-size="12" font-weight="bold">{title}</text>'
    if not shown:
        yield f'<text x="{x + width / 2}" y="{y + height / 2}" font-size="12" fill="#888" text-anchor="middle">no data</text>'
        return
    inner = (x + 54, y + 26, width - 62, height - 44 - 12 * ((min(len(shown), SHOWN) + 1) // 2))
    draw_lines = _bars if panel["type"] == "state-timeline" else _curves
    yield from draw_lines(shown, inner, begin, end)
    for number, (legend, _) in enumerate(shown[:SHOWN]):
        at_x, at_y = (
            x + 8 + (number % 2) * width // 2,
            y + height - 6 - 12 * ((min(len(shown), SHOWN) - 1 - number) // 2),
        )
        yield f'<text x="{at_x}" y="{at_y}" font-size="9" fill="{_colour(number)}">{html.escape(legend[:46])}</text>'


def _curves(shown: Sequence[Line], box: tuple[int, int, int, int], begin: float, end: float) -> Iterator[str]:
    x, y, width, height = box
    values = [value for _, points in shown for _, value in points if abs(value) != float("inf")]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or abs(high) or 1.0
    for value in (low, low + span / 2, low + span):
        at = y + height - (value - low) / span * height
        yield f'<line x1="{x}" y1="{at:.1f}" x2="{x + width}" y2="{at:.1f}" stroke="#eee"/>'
        yield f'<text x="{x - 4}" y="{at + 3:.1f}" font-size="9" fill="#666" text-anchor="end">{value:.4g}</text>'
    for number, (_, points) in enumerate(shown):
        path = " ".join(
            f"{x + (at - begin) / (end - begin) * width:.1f},{y + height - (value - low) / span * height:.1f}"
            for at, value in points
            if abs(value) != float("inf")
        )
        dot = path if " " in path else f"{path} {path}"
        yield f'<polyline points="{dot}" fill="none" stroke="{_colour(number)}" stroke-width="1.5" stroke-linecap="round"/>'


def _bars(shown: Sequence[Line], box: tuple[int, int, int, int], begin: float, end: float) -> Iterator[str]:
    x, y, width, height = box
    each = height / len(shown)
    for number, (_, points) in enumerate(shown):
        for at, _ in points:
            left, wide = x + (at - begin) / (end - begin) * width, max(10 / (end - begin) * width, 1.0)
            yield (
                f'<rect x="{left:.1f}" y="{y + number * each:.1f}" width="{wide:.1f}" height="{max(each - 2, 1):.1f}" '
                f'fill="{_colour(number)}"/>'
            )


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]
