"""The five dashboards of Grafana: which metrics are on which, and how the panels lie.

Invariants: every registered metric of runs is on the dashboard of its group, every metric of the service on its own one, and no
two panels of a dashboard lie on each other. A key of Grafana's that ``grafana-foundation-sdk`` does not know is not used: so
marks of alarms have no text (``titleFormat``) and differ by colour; the panel of alarms has their names. The committed
``deploy/monitoring/dashboards/*.json`` are what :func:`render` returns: after a change of a metric or an alarm write
them anew with ``python -m rlhf_ray.monitoring.dashboards deploy/monitoring/dashboards``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.monitoring.alarms.service import JOB
from rlhf_ray.monitoring.dashboards import panels
from rlhf_ray.monitoring.dashboards.panels import COLUMNS, FULL_WIDTH, PANEL_HEIGHT, PANEL_WIDTH, SOURCE, Panel
from rlhf_ray.monitoring.other_pages import SERVICE_METRICS
from rlhf_ray.monitoring.registry import RANKS, RAY_PREFIX, REGISTRY, STATE

TAG = "rlhf_ray"
CALLS = ("age/reward_call", "limit/reward_call", "reward/failed_tries")
EVENTS = ("updates/skipped", "updates/stood_out", "prompts/dropped")


@dataclass(frozen=True)
class Board:
    """A dashboard: panels over its whole width, then rows of panels."""

    name: str
    """What its file is called."""
    title: str
    description: str
    wide: tuple[Callable[[], Panel], ...]
    groups: tuple[str, ...] = ()
    """Groups of metrics of runs, a row of panels each."""
    more: Callable[[], Iterable[tuple[str, list[Panel]]]] = tuple
    """Further rows: their titles and panels."""
    of_services: bool = False
    """Whether it is about services too, and these are chosen at its top."""


def _service_rows() -> Iterable[tuple[str, list[Panel]]]:
    for group in SERVICE_METRICS:
        yield group, panels.panels_of_service(group)
    yield "As runs see it", panels.panels_of_runs([REGISTRY[name] for name in CALLS])


def _node_rows() -> Iterable[tuple[str, list[Panel]]]:
    yield "Nodes", panels.panels_of_nodes()


def _event_rows() -> Iterable[tuple[str, list[Panel]]]:
    yield "Events of the training", panels.panels_of_runs([REGISTRY[name] for name in EVENTS])


BOARDS = (
    Board(
        "training", "rlhf_ray: training", "What the run learns: reward, distance from the reference, losses, evaluation.",
        (panels.run_alarms,),
        (
            "Progress", "Reward", "Distance from the reference", "Losses", "Updates", "Advantages and critic", "Preferences",
            "Evaluation",
        ),
    ),
    Board(
        "rollout", "rlhf_ray: rollout", "What the policy samples, and how its engines are.",
        (panels.run_alarms,), ("Sequences", "Rollout"),
    ),
    Board(
        "reward_service", "rlhf_ray: reward service", "What a served reward model answers, how fast, and what runs see of it.",
        (panels.service_alarms,), (), _service_rows, of_services=True,
    ),
    Board(
        "cluster", "rlhf_ray: cluster and time by phase", "Where the time of a step goes, and how full the machines are.",
        (panels.phases, panels.time_by_phase), ("Time", "Throughput and memory", RANKS), _node_rows,
    ),
    Board(
        "faults", "rlhf_ray: faults", "What is the matter with runs and services: alarms, and what they look at.",
        (panels.run_alarms, panels.service_alarms, panels.phases), (STATE,), _event_rows, of_services=True,
    ),
)  # fmt: skip


def render(board: Board) -> str:
    """The dashboard as JSON text, for Grafana's import or provisioning."""
    return json.dumps(dashboard(board), indent=1) + "\n"


def dashboard(board: Board) -> dict[str, Any]:
    """The dashboard as Grafana's dashboard model."""
    variables = [_datasource_variable(), _run_variable(), *([_service_variable()] if board.of_services else [])]
    return {
        "uid": f"rlhf-ray-{board.name.replace('_', '-')}",
        "title": board.title,
        "description": board.description,
        "tags": [TAG, "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "graphTooltip": 1,
        "links": [_link()],
        "annotations": {"list": [_marks(severity, board) for severity in ("critical", "warning")]},
        "templating": {"list": variables},
        "panels": _laid_out(board),
    }


def _laid_out(board: Board) -> list[Panel]:
    wide = [panel() | _place(0, row * PANEL_HEIGHT, FULL_WIDTH) for row, panel in enumerate(board.wide)]
    groups = REGISTRY.groups()
    rows = [(group, panels.panels_of_runs(groups[group])) for group in board.groups]
    return _numbered([*wide, *_rows([*rows, *board.more()], len(wide) * PANEL_HEIGHT)])


def _rows(rows: Sequence[tuple[str, list[Panel]]], top: int) -> list[Panel]:
    """A heading for each row, and below it its panels from left to right."""
    placed = []
    for title, own in rows:
        placed.append(
            {"type": "row", "title": title, "collapsed": False, "panels": [], **_place(0, top, FULL_WIDTH, 1)}
        )
        for index, panel in enumerate(own):
            row, column = divmod(index, COLUMNS)
            placed.append(panel | _place(column * PANEL_WIDTH, top + 1 + row * PANEL_HEIGHT, PANEL_WIDTH))
        top += 1 + math.ceil(len(own) / COLUMNS) * PANEL_HEIGHT
    return placed


def _marks(severity: str, board: Board) -> dict[str, Any]:
    """Marks in every panel while an alarm of this severity holds."""
    alarms = [panels.firing_of_runs, *([panels.firing_of_services] if board.of_services else [])]
    return {
        "name": f"{severity} alarms".capitalize(),
        "datasource": SOURCE,
        "enable": True,
        "iconColor": panels.SEVERITY_COLOURS[severity],
        "expr": " or ".join(firing(f', severity="{severity}"') for firing in alarms),
    }


def _link() -> dict[str, Any]:
    """To the other dashboards, with the same runs and time."""
    return {
        "title": "rlhf_ray",
        "type": "dashboards",
        "icon": "dashboard",
        "tooltip": "",
        "url": "",
        "tags": [TAG],
        "asDropdown": False,
        "targetBlank": False,
        "includeVars": True,
        "keepTime": True,
    }


def _place(x: int, y: int, width: int, height: int = PANEL_HEIGHT) -> dict[str, Any]:
    return {"gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _numbered(every: Sequence[Panel]) -> list[Panel]:
    return [{"id": number, **panel} for number, panel in enumerate(every, 1)]


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _run_variable() -> dict[str, Any]:
    return _variable("run", "Run", f"label_values({RAY_PREFIX}rlhf_phase, run)")


def _service_variable() -> dict[str, Any]:
    return _variable("instance", "Service", f'label_values(up{{job="{JOB}"}}, instance)')


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",  # ".*" would take what has no such label too: alarms of services among those of runs
        "sort": 1,
    }
