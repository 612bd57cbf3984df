"""The Grafana dashboards hold every metric, ask for nothing that is not sent, and are the committed ones."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_ray.errors import RequestError
from rlhf_ray.monitoring import REGISTRY
from rlhf_ray.monitoring.alarms.service import JOB, NAMESPACE, SERVICE_ALARMS
from rlhf_ray.monitoring.dashboards import BOARDS, Board, render
from rlhf_ray.monitoring.dashboards.panels import expression, firing_of_runs, firing_of_services
from rlhf_ray.monitoring.other_pages import NODE_METRICS, SERVICE_METRICS, ServiceMetric, service_metric
from rlhf_ray.monitoring.registry import PHASES, RAY_PREFIX, Metric
from tests.monitoring.alarms.promtool import PROMTOOL

DEPLOY = Path(__file__).parents[2] / "deploy" / "monitoring"
every_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
SERIES_NAME = r"\b(?:ray|rlhf)_\w+"


def path(board: Board) -> Path:
    return DEPLOY / "dashboards" / f"{board.name}.json"


@cache
def committed(board: Board) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path(board).read_text())
    return read


def targets(board: Board) -> list[dict[str, str]]:
    return [target for panel in committed(board)["panels"] for target in panel.get("targets", [])]


def of_run(metric: Metric) -> str:
    suffix = "_total" if metric.kind == "counter" else ""  # Prometheus' rule for counters, which Ray follows
    return f"{RAY_PREFIX}{metric.exported_name.rstrip('_')}{suffix}"


def of_service(metric: ServiceMetric) -> set[str]:
    """By Prometheus' rules for the names of counters and histograms."""
    name = f"{NAMESPACE}_{metric.name}"
    suffixes = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {f"{name}{suffix}" for suffix in suffixes[metric.kind]}


def asked(board: Board) -> set[str]:
    return {name.rstrip("_") for target in targets(board) for name in re.findall(SERIES_NAME, target["expr"])}


@every_board
def test_the_committed_dashboard_is_what_the_registry_makes(board: Board) -> None:
    assert path(board).read_text() == render(board), (
        "a metric or an alarm has changed: run python -m rlhf_ray.monitoring.dashboards deploy/monitoring/dashboards"
    )


def test_no_other_dashboard_is_provisioned() -> None:
    assert {file.name for file in (DEPLOY / "dashboards").iterdir()} == {path(board).name for board in BOARDS}
    assert len({committed(board)[key] for board in BOARDS for key in ("uid", "title")}) == 2 * len(BOARDS) == 10


def test_they_take_the_place_of_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "boards"
    own.mkdir()
    (own / "training.json").write_text("older")
    for place, refusal in ((own, ""), (own, "is a link")):
        monkeypatch.setattr(sys, "argv", ["dashboards", str(place)])
        with pytest.raises(RequestError, match=refusal) if refusal else nullcontext():
            runpy.run_module("rlhf_ray.monitoring.dashboards", run_name="__main__")
        assert {file.name: file.read_text() for file in own.iterdir()} == {
            path(board).name: path(board).read_text() for board in BOARDS
        }
        (own / "training.json").rename(tmp_path / "elsewhere.json")
        (own / "training.json").symlink_to(tmp_path / "elsewhere.json")


def test_every_query_asks_for_a_metric_that_is_sent_and_every_metric_is_asked_for() -> None:
    of_runs = {of_run(metric) for metric in REGISTRY} | {f"{RAY_PREFIX}rlhf_phase"}
    of_services = set[str]().union(*(of_service(one) for group in SERVICE_METRICS.values() for one in group.values()))
    of_nodes = {f"{RAY_PREFIX}{name}" for metric in NODE_METRICS for name in metric.names}
    asked_for = set().union(*(asked(board) for board in BOARDS))
    assert asked_for == of_runs | of_services | of_nodes
    for board in BOARDS:
        for target in targets(board):
            names = re.findall(SERIES_NAME, target["expr"])
            assert names or target["expr"] in (firing_of_runs(), firing_of_services()), target["expr"]


def test_every_group_of_metrics_is_on_one_dashboard() -> None:
    assert sorted(group for board in BOARDS for group in board.groups) == sorted(REGISTRY.groups())
    for board in BOARDS:
        wanted = {of_run(metric) for group in board.groups for metric in REGISTRY.groups()[group]}
        assert wanted <= asked(board)
    (service,) = (board for board in BOARDS if board.name == "reward_service")
    for group in SERVICE_METRICS.values():
        assert set[str]().union(*map(of_service, group.values())) <= asked(service)


def test_metrics_of_nodes_are_named_as_ray_names_them() -> None:
    """Ray's page is made from the first file; of what its native part exports, Ray's own panels know the names."""
    found = importlib.util.find_spec("ray")
    assert found is not None and found.origin is not None
    modules = Path(found.origin).parent / "dashboard" / "modules"
    text = (modules / "reporter" / "reporter_agent.py").read_text()
    text += (modules / "metrics" / "dashboards" / "default_dashboard_panels.py").read_text()
    for metric in NODE_METRICS:
        for name in metric.names:
            assert re.search(rf'"{name}"|\bray_{name}\{{', text), f"Ray exports no {name} any more"


def test_alarms_are_marked_in_every_panel_and_have_one_of_their_own() -> None:
    for board in BOARDS:
        critical, warning = committed(board)["annotations"]["list"]
        assert (critical["iconColor"], warning["iconColor"]) == ("red", "orange")
        for marks in (critical, warning):
            assert marks["enable"] and "ALERTS{" in marks["expr"] and "advice" not in marks["expr"]
            assert ('alertname=~"Service.*", instance=~"$instance"' in marks["expr"]) == board.of_services
    panels = [panel for board in BOARDS if board.name == "faults" for panel in committed(board)["panels"]]
    texts = [panel["description"] for panel in panels if panel["title"].startswith("Alarms")]
    names = [alarm.name for alarm in (*REGISTRY.alarms, *SERVICE_ALARMS)]
    assert all(any(name in text for text in texts) for name in names)
    assert {name.startswith("Service") for name in names[: len(REGISTRY.alarms)]} == {False}
    assert {alarm.name.startswith("Service") for alarm in SERVICE_ALARMS} == {True}


@every_board
def test_every_query_is_of_what_is_chosen_and_says_of_which(board: Board) -> None:
    chosen = {variable["name"] for variable in committed(board)["templating"]["list"]}
    for target in targets(board):
        variables = set(re.findall(r'"\$(\w+)"', target["expr"]))
        assert variables and variables <= chosen
        wanted = "instance" if "ray_node" in target["expr"] or "ray_object" in target["expr"] else min(variables)
        assert f"{{{{{wanted}}}}}" in target["legendFormat"], target


@every_board
def test_all_runs_are_no_services_and_all_services_no_runs(board: Board) -> None:
    for variable in committed(board)["templating"]["list"]:
        if variable["type"] == "query":
            assert re.fullmatch(variable["allValue"], "demo") and not re.fullmatch(variable["allValue"], "")


@needs_promtool
def test_a_panel_of_a_counter_shows_the_event_that_makes_it_appear_and_those_after_it(tmp_path: Path) -> None:
    """A series that begins after 300 s at 1 and stays so, and one that begins at 2 and counts on at every scrape."""
    (of_run,) = (metric for metric in REGISTRY if metric.name == "reward/failed_tries")
    ((_, of_service),) = service_metric("restarts").queries()
    run, service = '{run="demo", role="driver", instance="node"}', '{instance="node", model="reward"}'
    asked_for = [
        (expression(of_run), f"{of_run.series}{run}", '{run="demo", role="driver"}'),
        (of_service, f"{service_metric('restarts').series}{service}", service),
    ]
    shown = {290: None, 300: 1, 310: 1, 330: 1, 350: 0, 500: 0}
    counting = {0: 2, 30: 5, 640: 4}
    gap = {640: 4, 650: 4, 670: 4}
    tests = [
        {
            "interval": "10s",
            "input_series": [{"series": series, "values": values}],
            "promql_expr_test": [
                {
                    "expr": re.sub(r'"\$\w+"', '".+"', query).replace("$__rate_interval", "40s"),
                    "eval_time": f"{at}s",
                    "exp_samples": [] if value is None else [{"labels": labels, "value": value}],
                }
                for at, value in expected.items()
            ],
        }
        for query, series, labels in asked_for
        for values, expected in (("_x30 1x40", shown), ("2+1x80", counting), ("1000+1x60 stale 1062+1x60", gap))
    ]
    (tmp_path / "cases.yml").write_text(json.dumps({"evaluation_interval": "10s", "tests": tests}))
    command = [str(PROMTOOL), "test", "rules", str(tmp_path / "cases.yml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@every_board
def test_panels_lie_beside_each_other_and_not_on_each_other(board: Board) -> None:
    panels = committed(board)["panels"]
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


def test_the_time_of_a_step_is_shown_phase_on_phase() -> None:
    (panel,) = (
        panel
        for board in BOARDS
        if board.name == "cluster"
        for panel in committed(board)["panels"]
        if panel["title"] == "Time of a step, by phase"
    )
    assert panel["fieldConfig"]["defaults"]["custom"]["stacking"]["mode"] == "normal"
    names = [re.findall(r"time_(\w+)", target["expr"])[0] for target in panel["targets"]]
    assert names == [phase for phase in PHASES if phase != "start"]


def test_prometheus_reads_the_targets_that_are_written_and_hands_alarms_on() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    files = {
        job["job_name"]: [path for discovery in job["file_sd_configs"] for path in discovery["files"]]
        for job in config["scrape_configs"]
    }
    assert files == {
        "ray": ["/tmp/ray/prom_metrics_service_discovery.json", "/tmp/ray/rlhf_ray_targets_*.json"],
        JOB: ["services.json"],
    }
    assert isinstance(json.loads((DEPLOY / "services.json").read_text()), list)  # whoever runs this fills it
    assert (DEPLOY / config["rule_files"][0]).is_file()
    (alertmanager,) = config["alerting"]["alertmanagers"]
    assert alertmanager["static_configs"] == [{"targets": ["127.0.0.1:9093"]}]


def test_advice_wakes_nobody() -> None:
    config = yaml.safe_load((DEPLOY / "alertmanager.yml").read_text())
    (advice,) = config["route"]["routes"]
    assert advice["matchers"] == ['severity="advice"'] and advice["receiver"] != config["route"]["receiver"]
    assert {"name": advice["receiver"]} in config["receivers"], "which sends nothing"


def test_grafana_finds_dashboards_and_prometheus_where_they_are_started() -> None:
    """Ray's head deletes its own folder of dashboards, so these are provisioned from this one."""
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "rlhf_ray.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "rlhf_ray.yml").read_text())["providers"]
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert (
        source["url"] == "http://127.0.0.1:9090"
        and "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    )
    variable = provider["options"]["path"].strip("${}")
    assert services["grafana"]["environment"][variable] == "/etc/rlhf_ray/dashboards"
    assert f'{variable}="$here/dashboards"' in (DEPLOY / "start.sh").read_text()
    for service in services.values():
        assert service["network_mode"] == "host" and ".:/etc/rlhf_ray:ro" in service["volumes"]
    for name, text in ((name, " ".join(map(str, service.get("command", ())))) for name, service in services.items()):
        assert name == "grafana" or "127.0.0.1:" in text, "listens at every address"
