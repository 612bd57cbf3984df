"""Traces of requests through OpenTelemetry, where it is configured.

Always true: without ``tracing`` nothing of OpenTelemetry is imported; a span tells a protocol, counts and a version, never
a text. Where spans go is told by OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT`` and so on).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rlhf_ray.errors import RequestError


class Span(Protocol):
    """One request under way."""

    def tell(self, **attributes: float | str) -> None:
        """Add what is known of it."""


class Tracer(Protocol):
    """Follows requests."""

    def request(self, protocol: str) -> AbstractContextManager[Span]:
        """One request, as long as the block lasts."""


class NoTracer:
    """Follows nothing."""

    @contextmanager
    def request(self, protocol: str) -> Iterator[Span]:
        yield self

    def tell(self, **attributes: float | str) -> None:
        """Nobody asks."""


class OpenTelemetryTracer:
    """Sends a span a request to wherever OpenTelemetry's variables say."""

    def __init__(self, exporter: Any = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise RequestError(
                f"tracing needs OpenTelemetry, which is not installed ({error.name}): "
                "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http, or leave tracing off"
            ) from error
        self.provider = TracerProvider(resource=Resource.create({"service.name": "rlhf-ray-scoring"}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("rlhf_ray.serving")

    @contextmanager
    def request(self, protocol: str) -> Iterator[Span]:
        with self._tracer.start_as_current_span(f"score {protocol}", record_exception=False) as span:
            yield _OpenTelemetrySpan(span)


class _OpenTelemetrySpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def tell(self, **attributes: float | str) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"rlhf_ray.{name}", value)
