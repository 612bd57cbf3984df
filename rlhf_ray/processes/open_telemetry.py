"""Spans in the format of OpenTelemetry's files: JSON of its protocol (OTLP), one request a line.

Invariant: a line is a whole ``ExportTraceServiceRequest``, as the receiver ``otlpjsonfile`` of OpenTelemetry's collector reads
it (https://opentelemetry.io/docs/specs/otel/protocol/file-exporter/). No SDK is needed, and nothing is held back in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SERVICE = "rlhf-ray"
INTERNAL, SERVER, CLIENT = 1, 2, 3
KINDS = {"call": SERVER, "beside": SERVER, "wait": CLIENT}
FAILED = 2


def render(span: Mapping[str, Any], wall_offset_us: int, about: Mapping[str, str | int]) -> dict[str, Any]:
    """A span with its begin and end in microseconds, which ``wall_offset_us`` turns into those since 1970.

    ``about`` are attributes of the process.
    """
    known = {
        "rlhf_ray.kind": span["kind"],
        **{f"rlhf_ray.{name}": span[name] for name in ("step", "call") if name in span},
    }
    entry: dict[str, Any] = {
        "traceId": span["trace"],
        "spanId": span["id"],
        "name": span["name"],
        "kind": KINDS.get(span["kind"], INTERNAL),
        "startTimeUnixNano": str((span["begin"] + wall_offset_us) * 1000),
        "endTimeUnixNano": str((span["end"] + wall_offset_us) * 1000),
        "attributes": _attributes(known),
    }
    if span.get("parent"):
        entry["parentSpanId"] = span["parent"]
    if span.get("failed"):
        entry["status"] = {"code": FAILED}
    resource = {"attributes": _attributes({"service.name": SERVICE, **about})}
    return {
        "resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "rlhf_ray"}, "spans": [entry]}]}]
    }


def _attributes(values: Mapping[str, str | int]) -> list[dict[str, Any]]:
    return [
        {"key": key, "value": {"intValue": str(value)} if isinstance(value, int) else {"stringValue": value}}
        for key, value in values.items()
    ]
