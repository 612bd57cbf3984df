"""The rules of services hold, by promtool, when what they say has happened, and at no other time."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.monitoring.alarms.service import JOB, NAMESPACE, SERVICE_ALARMS
from rlhf_ray.monitoring.other_pages import SERVICE_METRICS, ServiceMetric
from rlhf_ray.monitoring.rules import rules
from tests.monitoring.alarms import promtool
from tests.monitoring.alarms.promtool import RULES

needs_promtool = pytest.mark.skipif(promtool.PROMTOOL is None, reason="promtool is not installed (Debian: prometheus)")
SERVICE = 'instance="10.0.0.1:5000"'
STEADY = {f'up{{job="{JOB}", {SERVICE}}}': "1x180"}
"""A reading every ten seconds, for half an hour."""


def series(name: str, values: str, labels: str = "") -> dict[str, str]:
    return {f"{NAMESPACE}_{name}{{{SERVICE}{labels}}}": values}


def replicas(model: str, count: int, down: str) -> dict[str, str]:
    label = f', model="{model}"'
    return series("replicas", f"{count}x180", label) | series("replicas_down", down, label)


WELL = STEADY | replicas("reward", 2, "0x180")


def seconds(slow_from: int) -> dict[str, str]:
    """A request a second of 0.5 s each; from reading ``slow_from`` on all of them take 20 s."""
    rest, quick = 180 - slow_from, 10 * slow_from
    below = f"0+10x{slow_from}" + (f" {quick}x{rest - 1}" if rest else "")
    labels = ', protocol="reward", le='
    return {
        **series("request_seconds_bucket", below, labels + '"1.0"'),
        **series("request_seconds_bucket", below, labels + '"10.0"'),
        **series("request_seconds_bucket", "0+10x180", labels + '"30.0"'),
        **series("request_seconds_bucket", "0+10x180", labels + '"+Inf"'),
        **series("request_seconds_count", "0+10x180", ', protocol="reward"'),
    }


def few_seconds(count: int) -> dict[str, str]:
    """No requests for ten minutes, then ``count`` within 100 s, of 20 s each; Prometheus knows the series before."""
    values, labels = f"0x59 0+{count / 10:g}x10 {count}x109", ', protocol="reward", le='
    return {
        **series("request_seconds_bucket", "0x180", labels + '"10.0"'),
        **series("request_seconds_bucket", values, labels + '"30.0"'),
        **series("request_seconds_bucket", values, labels + '"+Inf"'),
        **series("request_seconds_count", values, ', protocol="reward"'),
    }


def gone_at(reading: int, again: int) -> str:
    return f"0x{reading - 1} 2x{again - reading - 1} 0x{180 - again}"


CASES: Mapping[str, tuple[dict[str, str], Mapping[int, set[str]]]] = {
    "all is well": (WELL | seconds(180), {60: set(), 600: set(), 1500: set()}),
    "down for a scrape, and then for good": (
        {f'up{{job="{JOB}", {SERVICE}}}': "1x29 0x2 1x57 0x90"},
        {300: set(), 330: set(), 600: set(), 930: set(), 990: {"ServiceDown"}, 1500: {"ServiceDown"}},
    ),
    "never there": (
        {f'up{{job="{JOB}", {SERVICE}}}': "_x10 0x169"}, {120: set(), 150: {"ServiceDown"}, 900: {"ServiceDown"}},
    ),
    "new, and not there for a scrape": (
        {f'up{{job="{JOB}", {SERVICE}}}': "_x11 0x1 1x160"}, {120: set(), 150: set(), 300: set()},
    ),
    "no replica is left, and requests fail": (
        STEADY
        | replicas("reward", 2, gone_at(30, 60))
        | series("errors_total", "_x31 4x149", ', kind="source"') | series("restarts_total", "0x30 2x150", ', model="reward"'),
        {270: set(), 330: {"ServiceModelGone"}, 570: {"ServiceModelGone"}, 630: {"ServiceReplicaLost"}, 1200: set()},
    ),
    "one of two replicas": (
        STEADY | replicas("reward", 2, "0x29 1x29 0x120"),
        {270: set(), 330: {"ServiceReplicaLost"}, 570: {"ServiceReplicaLost"}, 750: set()},
    ),
    "one of two models is gone": (
        WELL | replicas("other", 1, "0x29 1x29 0x120"),
        {270: set(), 330: {"ServiceModelGone"}, 570: {"ServiceModelGone"}, 750: set()},
    ),
    "the model gives no number": (
        WELL | series("errors_total", "_x30 1x150", ', kind="model"') | series("errors_total", "1+1x180", ', kind="item"'),
        {270: set(), 330: {"ServiceFails"}, 390: {"ServiceFails"}, 480: set()},
    ),
    "the model gives no number, and again once the service was started anew": (
        WELL | series("errors_total", "9x59 1x120", ', kind="model"'),
        {30: {"ServiceFails"}, 570: set(), 630: {"ServiceFails"}, 690: {"ServiceFails"}, 780: set()},
    ),
    "the queue is full": (
        WELL | series("errors_total", "3x29 8x150", ', kind="overloaded"'),
        {270: set(), 330: {"ServiceOverloaded"}, 480: set()},
    ),
    "requests take long": (WELL | seconds(60), {600: set(), 900: {"ServiceSlow"}, 1500: {"ServiceSlow"}}),
    "ten requests take long": (WELL | few_seconds(10), {600: set(), 720: set(), 840: set(), 1200: set()}),
    "forty requests take long": (WELL | few_seconds(40), {570: set(), 720: {"ServiceSlow"}, 840: {"ServiceSlow"}, 1200: set()}),
}  # fmt: skip
"""Readings, and which alarms hold at which second."""


def alert(name: str) -> str:
    severity = next(alarm.severity for alarm in SERVICE_ALARMS if alarm.name == name)
    return f'ALERTS{{alertname="{name}", alertstate="firing", {SERVICE}, severity="{severity}"}}'


def as_test(name: str) -> dict[str, object]:
    readings, expected = CASES[name]
    return {
        "name": name,
        "interval": "10s",
        "input_series": [{"series": one, "values": values} for one, values in readings.items()],
        "promql_expr_test": [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{at}s",
                "exp_samples": [{"labels": alert(one), "value": 1} for one in sorted(alarms)],
            }
            for at, alarms in expected.items()
        ],
    }


@needs_promtool
def test_each_alarm_of_a_service_holds_when_it_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "rules.yml"
    copy.write_text(re.sub(r"interval: \d+s", "interval: 30s", RULES.read_text()))
    tests = {"rule_files": [str(copy)], "evaluation_interval": "30s", "tests": [as_test(name) for name in CASES]}
    (tmp_path / "cases.yml").write_text(json.dumps(tests))
    command = [str(promtool.PROMTOOL), "test", "rules", str(tmp_path / "cases.yml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alarm_of_a_service_is_in_a_case_and_is_a_rule() -> None:
    names = [alarm.name for alarm in SERVICE_ALARMS]
    assert set().union(*(alarms for _, expected in CASES.values() for alarms in expected.values())) == {*names}
    _, group = rules()["groups"]
    assert [rule["alert"] for rule in group["rules"]] == names
    for rule, alarm in zip(group["rules"], SERVICE_ALARMS, strict=True):
        assert rule["labels"] == {"severity": alarm.severity}
        assert alarm.meaning in rule["annotations"]["summary"] and rule["annotations"]["description"] == alarm.way_out
        assert all(names.index(other) < names.index(alarm.name) for other in alarm.explained_by)
    known = {name for metrics in SERVICE_METRICS.values() for one in metrics.values() for name in named(one)}
    asked = set(re.findall(rf"\b{NAMESPACE}_\w+", json.dumps(group["rules"])))
    assert asked and asked <= known


def named(metric: ServiceMetric) -> set[str]:
    """What its series are called on the service's page."""
    return (
        {f"{metric.series}_{part}" for part in ("bucket", "sum", "count")}
        if metric.kind == "histogram"
        else {metric.series}
    )
