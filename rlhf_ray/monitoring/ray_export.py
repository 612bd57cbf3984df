"""Metrics to Ray's metrics agent, from where Prometheus collects them.

Always true: a metric is called ``rlhf_<name>`` with tags ``run``, ``role`` and ``rank``, and nothing else tells its
series apart; of a run's phases exactly one stands at 1 and every other at 0, from the start on.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from rlhf_ray.monitoring.registry import PHASES, REGISTRY

TAGS = ("run", "role", "rank")
PHASE_GAUGE = "rlhf_phase"


class RayExporter:
    """A sink of :class:`rlhf_ray.monitoring.metrics_log.MetricsLog`, for the driver or one rank of a role."""

    def __init__(self, run: str, role: str = "driver", rank: int = 0) -> None:
        self._tags = {"run": run, "role": role, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges and raise the counters."""
        for name, value in values.items():
            if REGISTRY[name].kind == "gauge":
                self._gauge(name).set(value)
            elif value > 0:  # Ray refuses to add nothing
                self._counter(name).inc(value)

    def close(self) -> None:
        """Ray sends by itself, until the process ends."""

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            metric = REGISTRY[name]
            self._gauges[name] = Gauge(metric.exported_name, metric.help, TAGS).set_default_tags(self._tags)
        return self._gauges[name]

    def _counter(self, name: str) -> Counter:
        if name not in self._counters:
            metric = REGISTRY[name]
            self._counters[name] = Counter(metric.exported_name, metric.help, TAGS).set_default_tags(self._tags)
        return self._counters[name]


class PhaseGauge:
    """What the run is doing now."""

    def __init__(self, run: str) -> None:
        self._gauge = Gauge(PHASE_GAUGE, "1 for what the run is doing now, 0 for all else", ("run", "phase"))
        self._run = run
        self.enter(PHASES[0])

    def enter(self, phase: str) -> None:
        """Say that ``phase`` has begun and every other has ended."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase} is none of {', '.join(PHASES)}")
        for other in PHASES:
            self._gauge.set(float(other == phase), tags={"run": self._run, "phase": other})
