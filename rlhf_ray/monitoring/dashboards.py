"""Generate the Grafana dashboard from the registry of metrics.

Invariants: every registered metric is on the dashboard, and every query asks for a metric that the exporter sends, or for the
alarms that Prometheus holds to be true. The
committed ``deploy/monitoring/rlhf_ray_dashboard.json`` is what :func:`render_dashboard` returns; after a change of the
registry write it anew: ``python -m rlhf_ray.monitoring.dashboards deploy/monitoring/rlhf_ray_dashboard.json``.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.monitoring.registry import PHASES, RAY_PREFIX, REGISTRY, Metric, choose_panel
from rlhf_ray.storage.output import OutputFile

FIRING = 'ALERTS{alertstate="firing", run=~"$run"}'
SEVERITY_COLOURS = {"critical": "red", "warning": "orange", "advice": "blue"}
SELECTION = '{run=~"$run"}'
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 3, 8, 7
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"s": "s", "share": "percentunit", "GB": "decgbytes", "": "none"}

Panel = dict[str, Any]


def render_dashboard() -> str:
    """The dashboard as JSON text, for Grafana's import or provisioning."""
    return json.dumps(dashboard(), indent=1) + "\n"


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana's dashboard model."""
    return {
        "uid": "rlhf-ray",
        "title": "rlhf_ray",
        "description": "Reinforcement learning from human feedback on Ray: every metric of the registry, by run.",
        "tags": ["rlhf_ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "graphTooltip": 1,
        "annotations": {"list": [_alarm_annotation()]},
        "templating": {"list": [_datasource_variable(), _run_variable()]},
        "panels": _numbered([_phases(), _alarms(), *_metric_panels()]),
    }


def expression(metric: Metric) -> str:
    """The Prometheus query of a metric: the value of a gauge, the increase of a counter."""
    if metric.is_family:
        return f'{{__name__=~"{metric.series.removesuffix("_")}.+", run=~"$run"}}'
    if metric.kind == "counter":  # Ray's counters are born with the first event, which increase() alone would not see
        name = f"{metric.series}{SELECTION}"
        return f"increase({name}[$__rate_interval]) or ({name} unless {name} offset $__rate_interval)"
    return f"{metric.series}{SELECTION}"


def _metric_panels() -> list[Panel]:
    """A row for each group of metrics, and below it the panels of the group from left to right."""
    panels, top = [], 2 * PANEL_HEIGHT
    for group, metrics in REGISTRY.groups().items():
        panels.append({"type": "row", "title": group, "collapsed": False, "panels": [], **_place(0, top, 24, 1)})
        group_panels = _group_panels(metrics)
        for index, panel in enumerate(group_panels):
            row, column = divmod(index, COLUMNS)
            place = _place(column * PANEL_WIDTH, top + 1 + row * PANEL_HEIGHT, PANEL_WIDTH, PANEL_HEIGHT)
            panels.append(panel | place)
        top += 1 + math.ceil(len(group_panels) / COLUMNS) * PANEL_HEIGHT
    return panels


def _group_panels(metrics: Sequence[Metric]) -> list[Panel]:
    by_name = {metric.name: metric for metric in metrics}
    names, panels = list(by_name), []
    while names:
        title, members = choose_panel(names[0], names)
        names = [name for name in names if name not in members]
        panels.append(_time_series(title, [by_name[member] for member in members]))
    return panels


def _time_series(title: str, metrics: Sequence[Metric]) -> Panel:
    unit = metrics[0].unit
    return {
        "type": "timeseries",
        "title": title,
        "description": ". ".join(metric.help for metric in metrics),
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": UNITS.get(unit, f"suffix: {unit}")}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [_target(metric, alone=len(metrics) == 1, number=number) for number, metric in enumerate(metrics)],
    }


def _target(metric: Metric, alone: bool, number: int) -> dict[str, Any]:
    name = "{{__name__}} " if metric.is_family else "" if alone else f"{metric.name} "
    return {
        "refId": chr(ord("A") + number),
        "datasource": SOURCE,
        "expr": expression(metric),
        "legendFormat": f"{name}{{{{run}}}} {{{{role}}}}",
    }


def _phases() -> Panel:
    return {
        "type": "state-timeline",
        "title": "What the run is doing",
        "description": f"Exactly one of {', '.join(PHASES)} at a time",
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": "none", "color": {"mode": "palette-classic"}}, "overrides": []},
        "options": {"mergeValues": True, "showValue": "never", "legend": {"showLegend": False}},
        "targets": [
            {
                "refId": "A",
                "datasource": SOURCE,
                "expr": f"{RAY_PREFIX}rlhf_phase{SELECTION} == 1",
                "legendFormat": "{{run}} {{phase}}",
            }
        ],
        **_place(0, 0, 24, PANEL_HEIGHT),
    }


def _alarms() -> Panel:
    names = ", ".join(alarm.name for alarm in REGISTRY.alarms)
    return {
        "type": "state-timeline",
        "title": "Alarms and advice",
        "description": f"What docs/monitoring.md explains, by Prometheus' rules: {names}",
        "datasource": SOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": "none",
                "noValue": "none",
                "color": {"mode": "fixed", "fixedColor": "orange"},
            },
            "overrides": [
                {
                    "matcher": {"id": "byRegexp", "options": f".* {severity}$"},
                    "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
                }
                for severity, colour in SEVERITY_COLOURS.items()
            ],
        },
        "options": {"mergeValues": True, "showValue": "never", "legend": {"showLegend": False}},
        "targets": [
            {
                "refId": "A",
                "datasource": SOURCE,
                "expr": FIRING,
                "legendFormat": "{{run}} {{alertname}} {{severity}}",
            }
        ],
        **_place(0, PANEL_HEIGHT, 24, PANEL_HEIGHT),
    }


def _alarm_annotation() -> dict[str, Any]:
    """Marks in every panel while an alarm holds."""
    return {
        "name": "Alarms",
        "datasource": SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": FIRING.replace("}", ', severity=~"critical|warning"}'),
        "titleFormat": "{{alertname}}",
        "tagKeys": "run,severity",
    }


def _place(x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _numbered(panels: Sequence[Panel]) -> list[Panel]:
    return [{"id": number, **panel} for number, panel in enumerate(panels, 1)]


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _run_variable() -> dict[str, Any]:
    query = f"label_values({RAY_PREFIX}rlhf_phase, run)"
    return {
        "name": "run",
        "label": "Run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "runs"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "sort": 1,
    }


if __name__ == "__main__":
    OutputFile(Path(sys.argv[1]), "the dashboard", overwrite=True).write(render_dashboard())
