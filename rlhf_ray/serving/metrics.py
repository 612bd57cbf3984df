"""What an operator watches, as Prometheus text.

Always true: labels come from fixed sets (protocols, kinds of refusals, stages, models), never from a request; nothing that
a caller sent is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rlhf_ray.rewards.batcher import Waiting

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
STAGES = ("read", "queue", "forward", "answer")


class Metrics:
    """Counts and times since the start."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made = {"registry": self.registry, "namespace": "rlhf_scoring"}
        self.requests = Counter("requests", "Answered requests", ["protocol", "status"], **made)
        self.errors = Counter("errors", "Requests without scores, by kind", ["kind"], **made)
        self.failed_items = Counter("failed_items", "Items without a score, by whose fault it is", ["fault"], **made)
        self.request_seconds = Histogram("request_seconds", "Time of scored requests", ["protocol"], buckets=SECONDS,
                                         **made)  # fmt: skip
        self.stage_seconds = Histogram("stage_seconds", "Time by stage", ["stage"], buckets=SECONDS, **made)
        self.refusal_seconds = Histogram("refusal_seconds", "Time to an overload's refusal", buckets=SECONDS, **made)
        self.batch_tokens = Histogram("batch_tokens", "Tokens of a forward", buckets=SIZES, **made)
        self.batch_items = Histogram("batch_items", "Items of a forward", buckets=SIZES, **made)
        self.items = Counter("items", "Items that went through the model", ["model"], **made)
        self.tokens = Counter("tokens", "Tokens that went through the model", ["model"], **made)
        self.forwards = Counter("forwards", "Forwards", ["model"], **made)
        self.restarts = Counter("restarts", "Restarts of reward groups", ["model"], **made)
        self.reloads = Counter("reloads", "New versions of models", ["model"], **made)
        self._gauges = {"registry": self.registry, "namespace": "rlhf_scoring"}
        for stage in STAGES:
            self.stage_seconds.labels(stage)

    def watch(self, name: str, description: str, value: Callable[[], float]) -> None:
        """A gauge that is read when it is asked for."""
        Gauge(name, description, **self._gauges).set_function(value)

    def batch(self, waiting: Sequence[Waiting], now: float) -> None:
        """One batch leaves the queue."""
        for one in waiting:
            self.stage_seconds.labels("queue").observe(now - one.since)

    def forward(self, model: str, *, items: int, tokens: int, seconds: float) -> None:
        """One batch went through the model."""
        self.forwards.labels(model).inc()
        self.items.labels(model).inc(items)
        self.tokens.labels(model).inc(tokens)
        self.stage_seconds.labels("forward").observe(seconds)
        self.batch_tokens.observe(tokens)
        self.batch_items.observe(items)

    def text(self) -> bytes:
        """All of it in Prometheus' exposition format."""
        return generate_latest(self.registry)
