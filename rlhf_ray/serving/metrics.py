"""What an operator watches, as Prometheus text.

Invariants: labels come from fixed sets (protocols, kinds of refusals, stages, models), never from a request; nothing that a
caller sent is exported. Names, meanings and labels are those of ``monitoring/other_pages.py``, from which the panels are made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rlhf_ray.monitoring.alarms.service import NAMESPACE
from rlhf_ray.monitoring.other_pages import service_metric
from rlhf_ray.rewards.batcher import Waiting

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
Watched = TypeVar("Watched")
STAGES = ("read", "queue", "forward", "answer")
"""Where a request spends its time, in order."""


class Metrics:
    """Counts and times since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests")
        self.errors = self._counter("errors")
        self.failed_items = self._counter("failed_items")
        self.request_seconds = self._seconds("request_seconds")
        self.stage_seconds = self._seconds("stage_seconds")
        self.refusal_seconds = self._seconds("refusal_seconds")
        self.batch_tokens = self._sizes("batch_tokens")
        self.batch_items = self._sizes("batch_items")
        self.items = self._counter("items")
        self.tokens = self._counter("tokens")
        self.forwards = self._counter("forwards")
        self.restarts = self._counter("restarts")
        self.reloads = self._counter("reloads")
        self.series = cache(lambda metric, *labels: metric.labels(*labels))
        """``metric.labels(*labels)``, kept: prometheus_client looks it up anew each time, which costs as much as counting."""
        for stage in STAGES:
            self.series(self.stage_seconds, stage)  # shown from the start on, at zero

    def watch(self, name: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read whenever metrics are asked for."""
        Gauge(name, service_metric(name).help, namespace=NAMESPACE, registry=self.registry).set_function(value)

    def watch_each(self, name: str, watched: Mapping[str, Watched], value: Callable[[Watched], float]) -> None:
        """The same with a value for each label, such as the name of a model, of what is ``watched`` under it."""
        metric = service_metric(name)
        gauge = Gauge(name, metric.help, metric.labels, namespace=NAMESPACE, registry=self.registry)
        for label, one in watched.items():
            gauge.labels(label).set_function(partial(value, one))

    def batch(self, waiting: Sequence[Waiting], now: float) -> None:
        """Count one batch that leaves the queue."""
        queued = self.series(self.stage_seconds, "queue")
        for one in waiting:
            queued.observe(now - one.since)

    def forward(self, model: str, *, items: int, tokens: int, seconds: float) -> None:
        """Count one batch that went through the model."""
        self.series(self.forwards, model).inc()
        self.series(self.items, model).inc(items)
        self.series(self.tokens, model).inc(tokens)
        self.series(self.stage_seconds, "forward").observe(seconds)
        self.batch_tokens.observe(tokens)
        self.batch_items.observe(items)

    def text(self) -> bytes:
        """All of it in Prometheus' exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str) -> Counter:
        metric = service_metric(name)
        return Counter(name, metric.help, metric.labels, namespace=NAMESPACE, registry=self.registry)

    def _seconds(self, name: str) -> Histogram:
        return self._histogram(name, SECONDS)

    def _sizes(self, name: str) -> Histogram:
        return self._histogram(name, SIZES)

    def _histogram(self, name: str, buckets: Sequence[float]) -> Histogram:
        metric = service_metric(name)
        return Histogram(
            name, metric.help, metric.labels, namespace=NAMESPACE, registry=self.registry, buckets=tuple(buckets)
        )
