"""Panels of Grafana, each made of metrics that the registry and ``other_pages.py`` know.

Invariant: every query of a panel asks for a metric that is sent, or for the alarms that Prometheus holds to be true, and is of
the chosen runs or services alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rlhf_ray.monitoring.alarms.service import SERVICE_ALARMS
from rlhf_ray.monitoring.appearance import GPU, when
from rlhf_ray.monitoring.dashboards.shared import choose_panel
from rlhf_ray.monitoring.other_pages import CHOSEN_RUNS, NODE_METRICS, SERVICE_METRICS, NodeMetric, ServiceMetric, grown
from rlhf_ray.monitoring.registry import PHASES, RANKS, RAY_PREFIX, REGISTRY, Metric

SERVICES = "Service.*"
SEVERITY_COLOURS = {"critical": "red", "warning": "orange", "advice": "blue"}
FULL_WIDTH, COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 24, 3, 8, 7
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {
    "s": "s", "share": "percentunit", "percent": "percent", "GB": "decgbytes", "MB": "decmbytes", "bytes": "bytes",
    "bytes/s": "Bps", "": "none",
}  # fmt: skip

Panel = dict[str, Any]
Query = tuple[str, str]
"""A legend and an expression."""


def firing_of_runs(more: str = "") -> str:
    """The alarms that hold of the chosen runs; ``more`` are further matchers, each after a comma."""
    return f'ALERTS{{alertstate="firing", run=~"$run"{more}}}'


def firing_of_services(more: str = "") -> str:
    """The same of the chosen services."""
    return f'ALERTS{{alertstate="firing", alertname=~"{SERVICES}", instance=~"$instance"{more}}}'


def expression(metric: Metric) -> str:
    """The Prometheus query of a metric of runs: the value of a gauge, the increase of a counter."""
    if metric.is_family:
        return f'{{__name__=~"{metric.series.removesuffix("_")}.+", run=~"$run"}}'
    if metric.kind == "counter":  # Ray's counters are born with the first event
        return grown(f"{metric.series}{CHOSEN_RUNS}", "run, role")
    return f"{metric.series}{CHOSEN_RUNS}"


def panels_of_runs(metrics: Sequence[Metric]) -> list[Panel]:
    """Panels of metrics of runs; those that belong together share one."""
    by_name = {metric.name: metric for metric in metrics}
    names, panels = list(by_name), []
    while names:
        title, members = choose_panel(names[0], names)
        names = [name for name in names if name not in members]
        chosen = [by_name[member] for member in members]
        queries = [(_legend(metric, alone=len(chosen) == 1), expression(metric)) for metric in chosen]
        panels.append(time_series(title, chosen[0].unit, _described(chosen), queries))
    return panels


def _described(metrics: Sequence[Metric]) -> str:
    """What metrics mean, and when they are there if that takes something: an empty panel says why."""
    reasons = dict.fromkeys(reason for metric in metrics if (reason := when(metric)) is not None)
    return ". ".join([*(metric.help for metric in metrics), *(f"Only {reason}" for reason in reasons)])


def panels_of_service(group: str) -> list[Panel]:
    """Panels of a group of the service's metrics."""
    return [_service_panel(metric) for metric in SERVICE_METRICS[group].values()]


def _service_panel(metric: ServiceMetric) -> Panel:
    per = " in an interval" if metric.kind == "counter" else ""
    description = f"{metric.help}. Only after {metric.when}" if metric.when else metric.help
    return time_series(f"{metric.name}{per}", metric.unit, description, list(metric.queries()))


def panels_of_nodes() -> list[Panel]:
    """Panels of the nodes on which the chosen runs are."""
    return [_node_panel(metric) for metric in NODE_METRICS]


def _node_panel(metric: NodeMetric) -> Panel:
    legend = "{{instance}} {{GpuIndex}}" if metric.with_gpu else "{{instance}} {{Location}}"
    description = f"{metric.help}. Only {GPU}" if metric.with_gpu else metric.help
    return time_series(metric.title, metric.unit, description, [(legend, metric.query())])


def time_by_phase() -> Panel:
    """What a step took, phase on phase."""
    timed = [REGISTRY[f"time/{phase}"] for phase in PHASES if phase != "start"]
    queries = [(_legend(metric, alone=False), expression(metric)) for metric in timed]
    panel = time_series("Time of a step, by phase", "s", "What a step took, phase on phase", queries)
    panel["fieldConfig"]["defaults"]["custom"] = {"stacking": {"mode": "normal", "group": "A"}, "fillOpacity": 40}
    return panel


def time_series(title: str, unit: str, description: str, queries: Sequence[Query]) -> Panel:
    """A panel with a line for each series of its queries."""
    return {
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": UNITS.get(unit, f"suffix: {unit}")}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": _targets(queries),
    }


def phases() -> Panel:
    """What each run is doing, over time."""
    phase = f"{RAY_PREFIX}rlhf_phase{CHOSEN_RUNS} == 1"
    panel = _states(
        "What the run is doing", f"Exactly one of {', '.join(PHASES)} at a time", "{{run}} {{phase}}", phase
    )
    panel["fieldConfig"]["defaults"]["color"] = {"mode": "palette-classic"}
    return panel


def run_alarms() -> Panel:
    """Which alarms hold of the chosen runs, over time."""
    names = ", ".join(alarm.name for alarm in REGISTRY.alarms)
    return _states(
        "Alarms and advice", f"What docs/monitoring.md explains, by Prometheus' rules: {names}",
        "{{run}} {{alertname}} {{severity}}", firing_of_runs(),
    )  # fmt: skip


def service_alarms() -> Panel:
    """Which alarms hold of services, over time."""
    names = ", ".join(alarm.name for alarm in SERVICE_ALARMS)
    return _states(
        "Alarms of services", f"What docs/monitoring.md explains, by Prometheus' rules: {names}",
        "{{instance}} {{alertname}} {{severity}}", firing_of_services(),
    )  # fmt: skip


def _states(title: str, description: str, legend: str, query: str) -> Panel:
    return {
        "type": "state-timeline",
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {"unit": "none", "noValue": "none", "color": {"mode": "fixed", "fixedColor": "orange"}},
            "overrides": [
                {
                    "matcher": {"id": "byRegexp", "options": f".* {severity}$"},
                    "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
                }
                for severity, colour in SEVERITY_COLOURS.items()
            ],
        },
        "options": {"mergeValues": True, "showValue": "never", "legend": {"showLegend": False}},
        "targets": _targets([(legend, query)]),
    }


def _targets(queries: Iterable[Query]) -> list[dict[str, Any]]:
    return [
        {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend.strip()}
        for number, (legend, query) in enumerate(queries)
    ]


def _legend(metric: Metric, alone: bool) -> str:
    name = "{{__name__}} " if metric.is_family else "" if alone else f"{metric.name} "
    return f"{name}{{{{run}}}} {{{{role}}}}{' {{rank}}' if metric.group == RANKS else ''}"
