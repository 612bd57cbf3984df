"""The alarms of a served reward model, which Prometheus alone evaluates: the service itself keeps no readings.

Invariants: an expression has a sample, labelled ``instance``, for each service in which the alarm holds; a counter that
Prometheus first sees above 0 has grown by all of it, and no state ends because it was missing for less than ``GAP_S``, as in
``conditions.py``. Every name of a service's alarm begins with ``Service``, and none of a run's does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlhf_ray.console import duration
from rlhf_ray.monitoring.alarms.alarm import Severity
from rlhf_ray.monitoring.alarms.conditions import GAP_S

NAMESPACE = "rlhf_scoring"
"""Before every name of the service; ``other_pages.py`` has the names."""
JOB = "rlhf_ray_service"
"""The job of Prometheus that reads the pages of services, in ``deploy/monitoring/prometheus.yml``."""
DOWN_S, RECENT_S, FAILING_S, SLOW_S = 45, 600, 120, 300
SLOW_FROM_S = 10.0
ENOUGH = 20
"""Requests, of which 5 % are one."""


class ServiceCondition(Protocol):
    """Something that holds of a service, or does not."""

    def query(self) -> str:
        """An expression of Prometheus with a sample, labelled ``instance``, for each service in which it holds."""

    def words(self) -> str:
        """When it holds, in a phrase of Markdown."""


@dataclass(frozen=True)
class PageSilent:
    """The page of a service that Prometheus is to read has not answered for ``for_s`` seconds, in which it was asked."""

    for_s: int

    def query(self) -> str:
        up = f'up{{job="{JOB}"}}'
        silent = f"max by (instance) (max_over_time({up}[{self.for_s}s])) == 0"
        return (
            f"{silent} and on (instance) {up} offset {self.for_s}s"  # one failed scrape of a new service is no silence
        )

    def words(self) -> str:
        return f"`up` of job `{JOB}` is 0 for {duration(self.for_s)}"


@dataclass(frozen=True)
class Reaches:
    """For a model of the service a gauge is above 0, and at least what another one is, where one is named."""

    metric: str
    least: str | None = None

    def query(self) -> str:
        least = "" if self.least is None else f" >= {_last(self.least)}"
        return f"max by (instance) ({_last(self.metric)}{least} > 0)"

    def words(self) -> str:
        held = f"`{self.metric}` is above 0" if self.least is None else f"`{self.metric}` is `{self.least}`"
        return f"{held} for a model"


@dataclass(frozen=True)
class Grown:
    """A counter has grown within ``within_s`` seconds; of its series only those whose ``label`` is one of ``values``.

    One that has fallen began anew, with the service: it has grown by all that it counts.
    """

    metric: str
    within_s: int
    label: str = ""
    values: tuple[str, ...] = ()

    def query(self) -> str:
        chosen = f'{{{self.label}=~"{"|".join(self.values)}"}}' if self.values else ""
        name = f"{NAMESPACE}_{self.metric}_total{chosen}"
        now, before = f"last_over_time({name}[{GAP_S}s])", f"last_over_time({name}[{GAP_S}s] offset {self.within_s}s)"
        return f"sum by (instance) ({now} - ({before} <= {now}) or {now}) > 0"

    def words(self) -> str:
        chosen = f" of {self.label} {' or '.join(self.values)}" if self.values else ""
        return f"`{self.metric}`{chosen} has grown within {duration(self.within_s)}"


@dataclass(frozen=True)
class Slow:
    """Of at least ``least`` observations of a histogram of seconds, within ``within_s`` seconds, 5 % exceed ``limit_s``."""

    metric: str
    limit_s: float
    within_s: int
    least: int

    def query(self) -> str:
        buckets, count = (
            f"increase({NAMESPACE}_{self.metric}_{part}[{self.within_s}s])" for part in ("bucket", "count")
        )
        slow = f"histogram_quantile(0.95, sum by (instance, le) ({buckets})) > {self.limit_s:g}"
        return f"{slow} and on (instance) sum by (instance) ({count}) >= {self.least}"

    def words(self) -> str:
        of = f"of {self.least} or more `{self.metric}` within {duration(self.within_s)}"
        return f"{of}, 95 of 100 do not stay below {self.limit_s:g} s"


@dataclass(frozen=True)
class AnyOf:
    """One of two conditions holds, or both."""

    first: ServiceCondition
    second: ServiceCondition

    def query(self) -> str:
        return f"({self.first.query()}) or ({self.second.query()})"

    def words(self) -> str:
        return f"{self.first.words()}, or {self.second.words()}"


@dataclass(frozen=True)
class ServiceAlarm:
    """What the service may lack: the condition over its metrics, what it means, and the way out."""

    name: str
    severity: Severity
    condition: ServiceCondition
    meaning: str
    way_out: str
    explained_by: tuple[str, ...] = ()
    """Alarms that say more of the same, which come before it."""

    def query(self) -> str:
        """When it holds, for Prometheus."""
        query = self.condition.query()
        if not self.explained_by:
            return query
        explained = "|".join(self.explained_by)
        return f'({query}) unless on (instance) ALERTS{{alertstate="firing", alertname=~"{explained}"}}'


def _last(metric: str) -> str:
    return f"max by (instance, model) (last_over_time({NAMESPACE}_{metric}[{GAP_S}s]))"


SERVICE_ALARMS = (
    ServiceAlarm(
        "ServiceDown", "critical", PageSilent(DOWN_S),
        "The service does not answer, or lets Prometheus not read its page",
        "Start it again (rlhf-ray serve); if it runs, look at its address in services.json and its token in service.token; if"
        " it is not meant to run, take it out of services.json",
    ),
    ServiceAlarm(
        "ServiceModelGone", "critical", Reaches("replicas_down", "replicas"),
        "No replica of a model is loaded: its requests wait for hold_s seconds, and are refused then",
        "The log of the service says which and why, and it goes on trying by itself: free the memory or the GPU that it lacks",
    ),
    ServiceAlarm(
        "ServiceFails", "critical", Grown("errors", FAILING_S, "kind", ("model", "server", "source")),
        "Requests got no scores because the model or the service failed",
        "Look at the log of the service and at /ready. If the model gives no finite number, compare its dtype with the one that"
        " it was trained in",
        explained_by=("ServiceModelGone",),
    ),
    ServiceAlarm(
        "ServiceReplicaLost", "warning", AnyOf(Reaches("replicas_down"), Grown("restarts", RECENT_S)),
        "A replica of a model was lost and is started again; other replicas of this model take over its requests",
        "The log of the service says why it was lost. If it was killed for its memory, lower max_batch_tokens",
        explained_by=("ServiceModelGone",),
    ),
    ServiceAlarm(
        "ServiceOverloaded", "warning", Grown("errors", FAILING_S, "kind", ("overloaded",)),
        "The queue was full and requests were refused; callers try them again",
        "Raise replicas, or max_queue_items where callers may wait longer; or let fewer callers ask at once",
        explained_by=("ServiceModelGone", "ServiceReplicaLost"),
    ),
    ServiceAlarm(
        "ServiceSlow", "warning", Slow("request_seconds", SLOW_FROM_S, SLOW_S, ENOUGH),
        "Requests take longer than ten seconds",
        "Look at the time by stage: if they queue, raise replicas; if the forward pass takes it, lower max_batch_tokens or give"
        " the model a GPU",
        explained_by=("ServiceModelGone", "ServiceReplicaLost", "ServiceOverloaded"),
    ),
)  # fmt: skip
"""Each after those that explain it."""
