"""The Grafana dashboard holds every metric, asks for nothing that is not sent, and is the committed one."""

from __future__ import annotations

import json
import re
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from rlhf_ray.errors import RequestError
from rlhf_ray.monitoring import REGISTRY, render_dashboard
from rlhf_ray.monitoring.dashboards import FIRING
from rlhf_ray.monitoring.registry import RAY_PREFIX

DEPLOY = Path(__file__).parents[2] / "deploy" / "monitoring"
COMMITTED = DEPLOY / "rlhf_ray_dashboard.json"


def targets() -> list[dict[str, str]]:
    board = json.loads(COMMITTED.read_text())
    return [target for panel in board["panels"] for target in panel.get("targets", [])]


def test_the_committed_dashboard_is_what_the_registry_makes() -> None:
    assert COMMITTED.read_text() == render_dashboard(), (
        "the registry has changed: run python -m rlhf_ray.monitoring.dashboards deploy/monitoring/rlhf_ray_dashboard.json"
    )


def test_it_takes_the_place_of_a_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "board.json").write_text("older")
    (tmp_path / "link").symlink_to(tmp_path / "board.json")
    for place, refusal in (("link", "is a link"), (".", "is a directory"), ("board.json", "")):
        monkeypatch.setattr(sys, "argv", ["dashboards", str(tmp_path / place)])
        with pytest.raises(RequestError, match=refusal) if refusal else nullcontext():
            runpy.run_module("rlhf_ray.monitoring.dashboards", run_name="__main__")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "board.json").read_text() == COMMITTED.read_text()


def test_every_query_asks_for_a_metric_that_is_sent_and_every_metric_is_asked_for() -> None:
    sent = {f"{RAY_PREFIX}rlhf_phase"}
    for metric in REGISTRY:
        suffix = "_total" if metric.kind == "counter" else ""  # Prometheus' rule for counters, which Ray follows
        sent.add(f"{RAY_PREFIX}{metric.exported_name.rstrip('_')}{suffix}")
    expressions = [target["expr"] for target in targets()]
    queried = [{name.rstrip("_") for name in re.findall(rf"{RAY_PREFIX}rlhf_\w+", one)} for one in expressions]
    assert [one for one, names in zip(expressions, queried, strict=True) if len(names) != 1] == [FIRING]
    assert set().union(*queried) == sent
    assert len(queried) == len(sent) + 1


def test_alarms_are_marked_in_every_panel_and_have_one_of_their_own() -> None:
    board = json.loads(COMMITTED.read_text())
    (marks,) = board["annotations"]["list"]
    assert marks["enable"] and marks["expr"].startswith("ALERTS{") and "advice" not in marks["expr"]
    panel = board["panels"][1]
    assert all(alarm.name in panel["description"] for alarm in REGISTRY.alarms)


def test_every_query_is_of_the_chosen_runs_and_says_which() -> None:
    for target in targets():
        assert 'run=~"$run"' in target["expr"]
        assert "{{run}}" in target["legendFormat"]


def test_panels_lie_beside_each_other_and_not_on_each_other() -> None:
    panels = json.loads(COMMITTED.read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert len({target["refId"] for target in panel.get("targets", ())}) == len(panel.get("targets", ()))


def test_prometheus_reads_the_targets_that_ray_writes() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    files = [
        path for job in config["scrape_configs"] for discovery in job["file_sd_configs"] for path in discovery["files"]
    ]
    assert files == ["/tmp/ray/prom_metrics_service_discovery.json"]
