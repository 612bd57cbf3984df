"""A page that compares runs of one kind: where their configs differ, how well each did, and their curves over each other.

Invariants: a run has one letter and one colour on the whole page. A setting is listed if and only if its values differ; one
whose text is withheld is listed too. Nothing is called better where that depends on the run.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.console import printable
from rlhf_ray.monitoring.registry import REGISTRY, Metric
from rlhf_ray.monitoring.report import curves
from rlhf_ray.monitoring.report.charts import COLOURS, number
from rlhf_ray.monitoring.report.summary import Table
from rlhf_ray.monitoring.report.templates import render

MOST_RUNS = COLOURS
"""More would share their colours."""
NOT_SET = "–"


@dataclass(frozen=True)
class Setting:
    """A value of a config, and the text that is shown of it, which may withhold it."""

    value: Any
    shown: str


@dataclass(frozen=True)
class ComparedRun:
    """What the page knows of one run."""

    name: str
    lines: curves.Lines
    facts: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """By dotted key."""


@dataclass(frozen=True)
class Cell:
    """The last value of a metric in one run, and its best one with its step; empty texts where there is none."""

    last: str = ""
    best: str = ""
    leads: bool = False
    """Whether no other run has a best value that is as good."""


@dataclass(frozen=True)
class ValueRow:
    """A metric in all runs."""

    metric: str
    unit: str
    meaning: str
    cells: Sequence[Cell]


def render_comparison(runs: Sequence[ComparedRun]) -> str:
    """The HTML page of two to ``MOST_RUNS`` runs."""
    letters = string.ascii_uppercase[: len(runs)]
    measured = [curves.Run(letter, run.lines) for letter, run in zip(letters, runs, strict=True)]
    judged, others = value_rows(runs)
    pictures = [curves.reward_chart(measured), curves.frontier_chart(measured, ())]
    return render(
        "comparison.html",
        title=" and ".join(run.name for run in runs),
        what="comparison",
        runs=list(zip(letters, runs, strict=True)),
        differences=differences(runs),
        judged=judged,
        others=others,
        reward_charts=[chart for chart in pictures if chart is not None and chart.svg],
        metric_charts=[chart for chart in curves.metric_charts(measured, shared=False) if chart.svg],
    )


def differences(runs: Sequence[ComparedRun]) -> Table:
    """The settings that are not the same in all runs, in the order in which they stand in the configs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    rows = []
    for key in keys:
        found = [run.settings.get(key) for run in runs]
        values = [None if one is None else (type(one.value), one.value) for one in found]
        if any(value != values[0] for value in values):
            rows.append((printable(key), *(NOT_SET if one is None else printable(one.shown) for one in found)))
    return Table(("key", *string.ascii_uppercase[: len(runs)]), tuple(rows))


def value_rows(runs: Sequence[ComparedRun]) -> tuple[list[ValueRow], list[ValueRow]]:
    """The metrics of which every run wants a high value or a low one, and all others of the registry."""
    names = curves.logged(curves.Run(run.name, run.lines) for run in runs) - curves.NO_CURVE
    rows = [(metric, _row(metric, runs)) for metric in curves.in_order(name for name in names if name in REGISTRY)]
    rows = [(metric, row) for metric, row in rows if any(cell.last for cell in row.cells)]
    judged = [row for metric, row in rows if metric.better is not None]
    return judged, [row for metric, row in rows if metric.better is None]


def _row(metric: Metric, runs: Sequence[ComparedRun]) -> ValueRow:
    series = [
        [(line[metric.name], line["step"]) for line in run.lines if line.get(metric.name) is not None] for run in runs
    ]
    sign = {"higher": 1, "lower": -1, None: 0}[metric.better]
    bests = [max(values, key=lambda one: (sign * one[0], -one[1])) if values and sign else None for values in series]
    reached = [sign * best[0] for best in bests if best is not None]
    cells = []
    for values, best in zip(series, bests, strict=True):
        leads = best is not None and len(reached) > 1 and reached.count(max(reached)) == 1
        cells.append(
            Cell(
                last=number(values[-1][0]) if values else "",
                best="" if best is None else f"{number(best[0])} at {best[1]}",
                leads=leads and best is not None and sign * best[0] == max(reached),
            )
        )
    return ValueRow(metric.name, metric.unit, metric.help, cells)
