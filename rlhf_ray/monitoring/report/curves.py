"""Draw the curves of a report from the lines of ``metrics.jsonl``.

Invariants: every logged metric that the registry holds appears once, as a curve, or as a number if it never changed.
Curves share a panel only if they share a unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.monitoring.dashboards.shared import choose_panel
from rlhf_ray.monitoring.registry import REGISTRY, Metric
from rlhf_ray.monitoring.report.charts import Curve, Panel, Point, line_chart, number
from rlhf_ray.monitoring.report.summary import BestOf

Lines = Sequence[Mapping[str, Any]]
WIDE = 600
NO_CURVE = {"step", "update", "weights/version", "timestamp"}
"""Metrics that only count up."""
TIMES = "time/"


@dataclass(frozen=True)
class Chart:
    """A finished chart as SVG text, with a caption and the group of metrics that it belongs to."""

    svg: str
    caption: str = ""
    group: str = ""


@dataclass(frozen=True)
class Run:
    """The name of a run and the lines that it logged."""

    name: str
    lines: Lines


def logged(runs: Iterable[Run]) -> set[str]:
    """The names of all metrics that any of the runs logged."""
    return {name for run in runs for line in run.lines for name in line}


def reward_chart(runs: Sequence[Run]) -> Chart | None:
    """The gold score above the learned reward over the same steps, or None if a run has none.

    Where the two part, the reward model is over-optimised.
    """
    if not {"gold/mean", "reward/learned"} <= logged(runs):
        return None
    panels = [
        Panel("Gold score", "0 to 1, never trained on", _curves(runs, ["gold/mean"])),
        Panel(
            "Learned reward", "score of the reward model", _curves(runs, ["reward/learned"], colour=int(len(runs) == 1))
        ),
    ]
    caption = "Where the learned reward still rises while the gold score falls, the policy exploits the reward model."
    return Chart(line_chart(panels, "step", "Gold score and learned reward by step", WIDE), caption)


def frontier_chart(runs: Sequence[Run], best_of: Sequence[BestOf]) -> Chart | None:
    """The gold score against the KL from the reference, with best-of-n at its own KL (Gao et al. 2022)."""
    curves = []
    for index, run in enumerate(runs):
        points = [(line["kl/k1"], line["gold/mean"]) for line in run.lines if _has(line, "kl/k1", "gold/mean")]
        names = [f"{run.name}, step {line['step']}" for line in run.lines if _has(line, "kl/k1", "gold/mean")]
        if points:
            curves.append(Curve("PPO" if len(runs) == 1 else run.name, points, index, "marks", names))
    if not curves:
        return None
    if best_of:
        labels = [f"best of {entry.n}" for entry in best_of]
        points = [(entry.kl, entry.gold) for entry in best_of]
        curves.append(Curve("best of n, from the starting policy", points, len(runs), "both", labels))
    panel = Panel("Gold score bought with KL", "a mark for each step, the strongest is the last", curves, height=402)
    caption = "Higher at the same KL is better: it is what the same distance from the reference buys."
    return Chart(line_chart([panel], "KL from the reference, nats a sequence", "Gold score against KL", WIDE), caption)


def metric_charts(runs: Sequence[Run], *, shared: bool = True) -> list[Chart]:
    """Charts of all other metrics that changed, in the order of the registry.

    Unless panels are ``shared`` by metrics, each metric has its own, in which a run has the same colour as in all others.
    """
    undrawn = {name for name in _other_metrics(runs) if not _is_constant(runs, name)}
    charts = []
    for metric in in_order(undrawn):
        if metric.name in undrawn:
            title, members = choose_panel(metric.name, undrawn) if shared else (metric.name, [metric.name])
            undrawn -= set(members)
            charts.append(_chart(runs, title, members))
    return charts


def constants(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics that had one value in all lines of all runs, with that value as text."""
    names = {name for name in _other_metrics(runs) if _is_constant(runs, name)}
    return {metric.name: number(_values(runs, metric.name)[0]) for metric in in_order(names)}


def _is_curve(name: str) -> bool:
    return name not in NO_CURVE and not name.startswith(TIMES) and name in REGISTRY


def _other_metrics(runs: Sequence[Run]) -> set[str]:
    """The metrics to draw, without those that :func:`reward_chart` shows already."""
    in_reward_chart = {"gold/mean", "reward/learned"} if reward_chart(runs) is not None else set()
    return {name for name in logged(runs) if _is_curve(name)} - in_reward_chart


def _is_constant(runs: Sequence[Run], name: str) -> bool:
    return len(set(_values(runs, name))) == 1


def _values(runs: Sequence[Run], name: str) -> list[float]:
    return [line[name] for run in runs for line in run.lines if _has(line, name)]


def _has(line: Mapping[str, Any], *names: str) -> bool:
    return all(line.get(name) is not None for name in names)


def in_order(names: Iterable[str]) -> list[Metric]:
    """Metrics in the order of the registry; those of families come last, by name."""
    order = {metric.name: index for index, metric in enumerate(REGISTRY)}
    metrics = [REGISTRY[name] for name in names]
    return sorted(metrics, key=lambda metric: (order.get(metric.name, len(order)), metric.name))


def _chart(runs: Sequence[Run], title: str, names: list[str]) -> Chart:
    panel = Panel(title, REGISTRY[names[0]].unit, _curves(runs, names))
    caption = ". ".join(dict.fromkeys(REGISTRY[name].help for name in names))
    return Chart(line_chart([panel], "step", f"{', '.join(names)} by step"), caption, REGISTRY[names[0]].group)


def _curves(runs: Sequence[Run], names: Sequence[str], colour: int = 0) -> list[Curve]:
    curves: list[Curve] = []
    for run in runs:
        for name in names:
            label = name if len(runs) == 1 else run.name if len(names) == 1 else f"{run.name} {name}"
            points: list[Point] = [(line["step"], line[name]) for line in run.lines if name in line]
            curves.append(Curve(label, points, colour + len(curves)))
    return curves
