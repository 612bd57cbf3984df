"""A real Prometheus with the project's configuration: what it says, and which expressions of panels and rules have data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray import network
from rlhf_ray.monitoring.alarms.service import SERVICE_ALARMS
from rlhf_ray.monitoring.appearance import GPU, when
from rlhf_ray.monitoring.dashboards import BOARDS, dashboard
from rlhf_ray.monitoring.other_pages import NODE_METRICS, SERVICE_METRICS
from rlhf_ray.monitoring.registry import RAY_PREFIX, REGISTRY
from rlhf_ray.monitoring.rules import series

DEPLOY = Path(__file__).parents[3] / "deploy" / "monitoring"
SERIES = r"\b(?:ray_rlhf|rlhf_scoring)_\w+(?:\{[^}]*\})?"


class Prometheus:
    """A Prometheus that scrapes a page of Ray's, and services."""

    def __init__(self, program: str, page: str, directory: Path, services: Sequence[str] = ()) -> None:
        (directory / "targets.json").write_text(json.dumps([{"targets": [page], "labels": {"job": "ray"}}]))
        (directory / "services.json").write_text(json.dumps([{"targets": [*services]}]))
        config = (DEPLOY / "prometheus.yml").read_text()
        config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(directory / "targets.json"))
        config = config.replace("/tmp/ray/rlhf_ray_targets_*.json", str(directory / "none_*.json"))
        (directory / "prometheus.yml").write_text(config)
        shutil.copy(DEPLOY / "rlhf_ray_rules.yml", directory)
        port = network.free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        command = [program, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
                   f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=(directory / "prometheus.log").open("w")
        )

    def query(self, text: str) -> list[dict[str, Any]]:
        """The samples of an expression now; none while it does not answer."""
        return self._ask("query", {"query": text})

    def over_time(self, text: str, begin: float, end: float, step_s: int) -> list[dict[str, Any]]:
        """The series of an expression between two moments."""
        return self._ask("query_range", {"query": text, "start": begin, "end": end, "step": step_s})

    def firing(self) -> set[str]:
        """The alarms that hold."""
        return {one["metric"]["alertname"] for one in self.query('ALERTS{alertstate="firing"}')}

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)

    def _ask(self, what: str, words: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(words)}", timeout=10
            ) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
                return found
        except OSError:
            return []


def asked(expression: str) -> str:
    """The expression of a panel as Grafana asks it, of all runs and services."""
    return re.sub(r'"\$\w+"', '".+"', expression).replace("$__rate_interval", "1m")


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the expression, of every query of a panel, and of every series that a rule asks for."""
    for board in BOARDS:
        for panel in dashboard(board)["panels"]:
            for target in panel.get("targets", ()):
                yield f"{board.name}: {panel['title']}", target["expr"]
    rules = [(alarm.name, alarm.query(series)) for alarm in REGISTRY.alarms]
    rules += [(alarm.name, alarm.query()) for alarm in SERVICE_ALARMS]
    for name, query in rules:
        for text in dict.fromkeys(re.findall(SERIES, query)):
            yield f"rule {name}", text


@dataclass
class Coverage:
    """Which expressions returned data in one of several looks."""

    prometheus: Prometheus
    found: set[str] = field(default_factory=set)

    def look(self) -> None:
        """Ask all that returned nothing until now."""
        for _, text in expressions():
            if text not in self.found and self.prometheus.query(asked(text)):
                self.found.add(text)

    def missing(self) -> dict[str, list[str]]:
        """The expressions that returned nothing, and where they stand."""
        places: dict[str, list[str]] = {}
        for place, text in expressions():
            if text not in self.found:
                places.setdefault(text, []).append(place)
        return places


def appears(expression: str) -> str | None:
    """When what an expression of a panel or a rule asks for is there; None where nothing special is needed."""
    if expression.startswith("ALERTS"):
        return "while an alarm holds"
    reasons = {metric.series.rstrip("_"): when(metric) for metric in REGISTRY}
    for group in SERVICE_METRICS.values():
        reasons |= {metric.series: metric.when and f"after {metric.when}" for metric in group.values()}
    reasons |= {f"{RAY_PREFIX}{name}": GPU for node in NODE_METRICS if node.with_gpu for name in node.names}
    asked = re.findall(r"\b(?:ray|rlhf)_\w+", expression)
    known = [reasons.get(re.sub("_(bucket|sum|count)$", "", name).rstrip("_")) for name in asked]
    return next((reason for reason in known if reason), None)
