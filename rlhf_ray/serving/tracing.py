"""Traces of requests through OpenTelemetry, where the service is configured to send them.

Invariants: without ``tracing`` nothing of OpenTelemetry is imported; a request is one span, with one below it for each stage
that the request went through; a span holds a protocol, counts, a version and the kind of a refusal, never a text; a collector
that does not answer holds up no request, and the end of the service for ``CLOSE_TIMEOUT_S`` at most. Where spans are sent is
set by OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT`` and so on).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_ray.errors import RequestError
from rlhf_ray.serving.refusals import Refusal

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter


CLOSE_TIMEOUT_S = 3.0


class Span(Protocol):
    """One request under way."""

    def add(self, **attributes: float | str) -> None:
        """Add what is known of the request."""

    def stage(self, name: str) -> None:
        """Begin this stage, and end the one before."""


class Tracer(Protocol):
    """Follows requests."""

    def request(self, protocol: str) -> AbstractContextManager[Span]:
        """The span of one request, which ends with the block."""


class NoTracer:
    """Follows nothing."""

    @contextmanager
    def request(self, protocol: str) -> Iterator[Span]:
        yield self

    def add(self, **attributes: float | str) -> None:
        """Ignore them."""

    def stage(self, name: str) -> None:
        """Ignore it."""


class OpenTelemetryTracer:
    """Sends the spans of requests to wherever OpenTelemetry's variables say, or to ``exporter``."""

    def __init__(self, exporter: SpanExporter | None = None) -> None:
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
        resource = Resource.create({"service.name": "rlhf-ray-scoring"})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # its own end waits half a minute
        self.provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self.provider.get_tracer("rlhf_ray.serving")

    def close(self) -> None:
        """Send the spans that are left; those that cannot be sent in time are lost."""
        closing = threading.Thread(target=self.provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)

    @contextmanager
    def request(self, protocol: str) -> Iterator[Span]:
        from opentelemetry.trace import StatusCode

        with self._tracer.start_as_current_span(
            f"score {protocol}",
            record_exception=False,  # its message may hold a text: the name of its type is set below
            set_status_on_exception=False,
        ) as span:
            request = _RequestSpan(self._tracer, span)
            try:
                yield request
            except Refusal as refusal:
                request.add(refused=refusal.kind)
                raise
            except Exception as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise
            finally:
                request.end_stage()


class _RequestSpan:
    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span
        self._stage: Any = None

    def add(self, **attributes: float | str) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"rlhf_ray.{name}", value)

    def stage(self, name: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self.end_stage()
        self._stage = self._tracer.start_span(name, set_span_in_context(self._span))

    def end_stage(self) -> None:
        """End the stage that the request is in, if any."""
        if self._stage is not None:
            self._stage.end()
            self._stage = None
