"""The metrics that Prometheus reads beside those of runs: of a served reward model, and of Ray's nodes.

Invariants: the service counts under these names and labels alone, and every one of them has a panel. Of Ray's own metrics those
are here that a panel asks for. Labels of the service come from fixed sets, never from a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.monitoring.alarms.conditions import GAP_S
from rlhf_ray.monitoring.alarms.service import NAMESPACE
from rlhf_ray.monitoring.registry import RAY_PREFIX, REGISTRY

PageKind = Literal["gauge", "counter", "histogram"]
QUANTILES = (0.5, 0.95, 0.99)
WITH_LABELS = (0.95,)
"""Where there is a line for each label, and more of them could not be told apart."""
CHOSEN_SERVICES = '{instance=~"$instance"}'
CHOSEN_RUNS = '{run=~"$run"}'


def grown(series: str, by: str) -> str:
    """How much a counter has grown in the interval of a panel, summed by these labels, with the event that made it appear.

    ``increase`` alone does not see that event: it is 0 over samples that are all the same. So what was not there an interval
    ago comes first, with all that it counts; what was missing for less than ``GAP_S``, as after a failed scrape, was there.
    """
    before = f"last_over_time({series}[{GAP_S}s] offset $__rate_interval)"
    return f"sum by ({by}) (({series} unless {before}) or increase({series}[$__rate_interval]))"


@dataclass(frozen=True)
class ServiceMetric:
    """A metric on the page of a service; counters and histograms count since its start."""

    name: str
    unit: str
    help: str
    kind: PageKind = "counter"
    labels: tuple[str, ...] = ()
    when: str = ""
    """The first event that makes it appear, where it is not there from the start on."""

    @property
    def series(self) -> str:
        """The name of its series in Prometheus; of a histogram the beginning of their names."""
        return f"{NAMESPACE}_{self.name}{'_total' if self.kind == 'counter' else ''}"

    def queries(self) -> Iterator[tuple[str, str]]:
        """What a panel shows of it: a legend and an expression, for each line."""
        shown = " ".join(f"{{{{{label}}}}}" for label in ("instance", *self.labels))
        by = ", ".join(("instance", *self.labels))
        if self.kind == "gauge":
            yield shown, f"{self.series}{CHOSEN_SERVICES}"
        elif self.kind == "counter":
            yield shown, grown(f"{self.series}{CHOSEN_SERVICES}", by)
        else:
            buckets = f"sum by ({by}, le) (rate({self.series}_bucket{CHOSEN_SERVICES}[$__rate_interval]))"
            for quantile in WITH_LABELS if self.labels else QUANTILES:
                yield f"{shown} {quantile:.0%}", f"histogram_quantile({quantile:g}, {buckets})"
            total, count = (
                f"sum by ({by}) (rate({self.series}_{part}{CHOSEN_SERVICES}[$__rate_interval]))"
                for part in ("sum", "count")
            )
            yield f"{shown} mean", f"{total} / {count}"


SERVICE_METRICS: Mapping[str, Mapping[str, ServiceMetric]] = {
    group: {metric.name: metric for metric in metrics}
    for group, metrics in {
        "Requests": (
            ServiceMetric("requests", "requests", "Answered requests", labels=("protocol", "status")),
            ServiceMetric("errors", "requests", "Requests without scores, by kind", labels=("kind",), when="a refused request"),
            ServiceMetric(
                "failed_items", "items", "Items without a score, by whose fault it is", labels=("fault",),
                when="an item that cannot be scored",
            ),
            ServiceMetric("request_seconds", "s", "Time of scored requests", "histogram", ("protocol",)),
            ServiceMetric("refusal_seconds", "s", "Time to an overload's refusal", "histogram", when="a full queue"),
        ),
        "Queue and forward": (
            ServiceMetric("waiting_items", "items", "Items that wait for a forward", "gauge"),
            ServiceMetric("waiting_tokens", "tokens", "About how many tokens they have", "gauge"),
            ServiceMetric("body_bytes", "bytes", "Bytes of bodies that are held", "gauge"),
            ServiceMetric("stage_seconds", "s", "Time by stage", "histogram", ("stage",)),
            ServiceMetric("batch_tokens", "tokens", "Tokens of a forward", "histogram"),
            ServiceMetric("batch_items", "items", "Items of a forward", "histogram"),
        ),
        "Models": (
            ServiceMetric("items", "items", "Items that went through the model", labels=("model",)),
            ServiceMetric("tokens", "tokens", "Tokens that went through the model", labels=("model",)),
            ServiceMetric("forwards", "forwards", "Forwards", labels=("model",)),
            ServiceMetric("replicas", "replicas", "Replicas of the model", "gauge", ("model",)),
            ServiceMetric("replicas_down", "replicas", "Replicas that are being brought back", "gauge", ("model",)),
            ServiceMetric("restarts", "restarts", "Restarts of reward groups", labels=("model",)),
            ServiceMetric("reloads", "versions", "New versions of models", labels=("model",), when="a new version of a model"),
        ),
    }.items()
}  # fmt: skip
"""By group and name."""


def service_metric(name: str) -> ServiceMetric:
    """A metric of the service by its name; raises ``KeyError``."""
    return {name: metric for metrics in SERVICE_METRICS.values() for name, metric in metrics.items()}[name]


@dataclass(frozen=True)
class NodeMetric:
    """What Ray says of its nodes; shown of the clusters that the chosen runs are on."""

    title: str
    unit: str
    help: str
    expression: str
    names: tuple[str, ...]
    """The names of Ray's own metrics, which the expression asks for as ``{0}`` and so on."""
    with_gpu: bool = False
    """Whether it is there only on a node with a GPU."""

    def query(self) -> str:
        """The expression, of the sessions of Ray in which the chosen runs are."""
        runs = f"{REGISTRY['run/started'].series}{CHOSEN_RUNS}"
        of_runs = [f"({RAY_PREFIX}{name} and on (SessionName) {runs})" for name in self.names]
        return self.expression.format(*of_runs)


NODE_METRICS = (
    NodeMetric("CPU", "percent", "Use of the CPUs, by node", "{0}", ("node_cpu_utilization",)),
    NodeMetric("Memory in use", "bytes", "Memory in use, by node", "{0}", ("node_mem_used",)),
    NodeMetric(
        "Share of the memory in use", "share", "Memory in use over all, by node", "{0} / {1}",
        ("node_mem_used", "node_mem_total"),
    ),
    NodeMetric("Free disk", "bytes", "Free space on the disk of Ray's files, by node", "{0}", ("node_disk_free",)),
    NodeMetric(
        "Object store", "bytes", "Memory of Ray's object store in use, by node and place", "sum by (instance, Location) ({0})",
        ("object_store_memory",),
    ),
    NodeMetric("Sent", "bytes/s", "Sent over the network, by node", "{0}", ("node_network_send_speed",)),
    NodeMetric("Received", "bytes/s", "Received over the network, by node", "{0}", ("node_network_receive_speed",)),
    NodeMetric("GPU", "percent", "Use of the GPUs, by node and GPU", "{0}", ("node_gpus_utilization",), with_gpu=True),
    NodeMetric("GPU memory", "MB", "Memory of the GPUs in use, by node and GPU", "{0}", ("node_gram_used",), with_gpu=True),
)  # fmt: skip
