"""Send metrics to Ray's metrics agent, from which Prometheus collects them.

Invariants: a metric is called ``rlhf_<name>``, and its series differ by the tags ``run``, ``role`` and ``rank`` alone. Of
the phases of a run exactly one is 1 and every other is 0, from the start on. Ray 2.60 forgets a gauge twice its report interval
(20 s) after it was last set: ``again`` sets all that still hold. A gauge that a step, or a look at the state of the run, no
longer gives does not hold.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from rlhf_ray.monitoring.registry import PHASES, REGISTRY

TAGS = ("run", "role", "rank")
PHASE_GAUGE = "rlhf_phase"
SOURCES = frozenset({"time/step", "run/started"})
"""What the metrics of every step hold, and those of every look at the state of the run."""


class RayExporter:
    """A sink of ``MetricsLog`` that sets Ray's gauges and counters for the driver or one rank of a role."""

    def __init__(self, run: str, role: str = "driver", rank: int = 0) -> None:
        self._tags = {"run": run, "role": role, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}
        self._held: dict[str, float] = {}
        self._given: dict[str, frozenset[str]] = {}
        """The gauges that the last step gave, and those that the last look at the state of the run gave."""
        self._lock = threading.Lock()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Set the gauges and raise the counters."""
        gauges = {name: value for name, value in values.items() if REGISTRY[name].kind == "gauge"}
        with self._lock:
            for source in SOURCES & values.keys():
                for gone in self._given.get(source, frozenset()) - gauges.keys():  # not finite, or not known, any more
                    self._held.pop(gone, None)
                self._given[source] = frozenset(gauges)
            self._held |= gauges
            for name, value in gauges.items():
                self._gauge(name).set(value)
            for name, value in values.items():
                if name not in gauges and value > 0:  # Ray refuses to add nothing
                    self._counter(name).inc(value)

    def again(self) -> None:
        """Set all gauges that still hold once more; any thread may call this."""
        with self._lock:
            for name, value in self._held.items():
                self._gauge(name).set(value)

    def close(self) -> None:
        """Nothing to do: Ray sends by itself until the process ends."""

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
    """A gauge for each phase that shows which one the run is in."""

    def __init__(self, run: str) -> None:
        self._gauge = Gauge(PHASE_GAUGE, "1 for the phase that the run is in, 0 for all others", ("run", "phase"))
        self._run = run
        self._lock = threading.Lock()
        self.enter(PHASES[0])

    def enter(self, phase: str) -> None:
        """Set ``phase`` to 1 and every other to 0."""
        if phase not in PHASES:
            raise ValueError(f"{phase} is not a phase: choose one of {', '.join(PHASES)}")
        with self._lock:
            self._phase = phase
            self._set()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing: the phase does not depend on metrics."""

    def again(self) -> None:
        """Set the phases once more; any thread may call this."""
        with self._lock:
            self._set()

    def _set(self) -> None:
        for phase in PHASES:
            self._gauge.set(float(phase == self._phase), tags={"run": self._run, "phase": phase})
