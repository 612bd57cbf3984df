"""Readings as input of ``promtool test rules``, and what Prometheus then holds to be firing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.monitoring.alarms.alarm import holding
from rlhf_ray.monitoring.alarms.readings import AGE, Readings
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.rules import INTERVAL_S, series

RULES = Path(__file__).parents[3] / "deploy" / "monitoring" / "rlhf_ray_rules.yml"
SCRAPE_S = 10
PROMTOOL = os.environ.get("PROMTOOL") or shutil.which("promtool")
LABELS = 'run="demo", role="driver", rank="0", instance="node"'


@dataclass(frozen=True)
class Case:
    """Readings from time 0 on, and moments (multiples of 30 s) at which both are asked which alarms hold."""

    name: str
    readings: Readings
    moments: Sequence[int]
    missing: Mapping[str, Sequence[tuple[int, int]]] = field(default_factory=dict)
    """By metric, from when to when Prometheus gets no sample."""

    def holding(self, at: float) -> set[str]:
        """What the evaluator says."""
        return {alarm.name for alarm in holding(REGISTRY.alarms, self.readings, at)}

    def as_test(self) -> dict[str, Any]:
        """The case for promtool, which is to say the same."""
        end = max(self.moments)
        samples = {series(name): self._states(name, end) for name in self.readings.states}
        samples |= {series(name): self._counts(name, end) for name in self.readings.events}
        inputs = [{"series": f"{name}{{{LABELS}}}", "values": " ".join(values)} for name, values in samples.items()]
        inputs.append({"series": 'up{instance="node", job="ray"}', "values": f"1x{end // SCRAPE_S}"})
        asked = [
            {
                "expr": 'ALERTS{alertstate="firing"}',
                "eval_time": f"{at}s",
                "exp_samples": [{"labels": _labels(name), "value": 1} for name in sorted(self.holding(at))],
            }
            for at in self.moments
        ]
        return {"name": self.name, "interval": f"{SCRAPE_S}s", "input_series": inputs, "promql_expr_test": asked}

    def _states(self, name: str, end: int) -> list[str]:
        read = {at for at, _ in self.readings.states[name]}
        gaps = self.missing.get(name, ())
        values = []
        for at in range(0, end + 1, SCRAPE_S):
            value = self.readings.value(name, at)
            silent = name == "run/started" and at not in read  # every look says it anew
            lost = value is None or silent or any(first < at < after for first, after in gaps)
            values.append("stale" if lost else repr(float(value)))
        return values

    def _counts(self, name: str, end: int) -> list[str]:
        counts = [self.readings.counted(name, -math.inf, at) for at in range(0, end + 1, SCRAPE_S)]
        return [f"{count:g}" if count else "_" for count in counts]  # Ray's counters are born with the first event


def _labels(name: str) -> str:
    severity = next(alarm.severity for alarm in REGISTRY.alarms if alarm.name == name)
    return f'ALERTS{{alertname="{name}", alertstate="firing", run="demo", severity="{severity}"}}'


def run(cases: Sequence[Case], directory: Path, rules: Path = RULES) -> str:
    """What promtool says that is wrong; empty where Prometheus agrees with the evaluator in all cases."""
    assert PROMTOOL is not None
    file, copy = directory / "cases.yml", directory / "rules_every_30_s.yml"
    copy.write_text(rules.read_text().replace(f"interval: {INTERVAL_S}s", "interval: 30s"))
    file.write_text(
        json.dumps({"rule_files": [str(copy)], "evaluation_interval": "30s", "tests": [one.as_test() for one in cases]})
    )
    ended = subprocess.run([PROMTOOL, "test", "rules", str(file)], capture_output=True, text=True, timeout=500)
    return "" if ended.returncode == 0 else ended.stdout + ended.stderr


def ages(name: str, begins: Sequence[int], end: int) -> list[tuple[float, float | None]]:
    """An age as it is read every ten seconds, which begins anew at each of ``begins``."""
    assert name.startswith(AGE)
    return [
        (float(at), float(at - max(begin for begin in begins if begin <= at)))
        for at in range(min(begins), end + 1, SCRAPE_S)
    ]
