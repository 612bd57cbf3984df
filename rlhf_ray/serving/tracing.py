"""Traces of requests through OpenTelemetry, where it is configured.

Always true: without ``tracing`` nothing of OpenTelemetry is imported; a request is one span, and each stage that it went
through a span below it; a span tells a protocol, counts, a version and the kind of a refusal, never a text. Where spans
go is told by OpenTelemetry's own variables (``OTEL_EXPORTER_OTLP_ENDPOINT`` and so on).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from rlhf_ray.errors import RequestError
from rlhf_ray.serving.refusals import Refusal


class Span(Protocol):
    """One request under way."""

    def tell(self, **attributes: float | str) -> None:
        """Add what is known of it."""

    def stage(self, name: str) -> None:
        """It is in this stage from now on, and no longer in the one before."""


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

    def stage(self, name: str) -> None:
        """Nobody asks."""


class OpenTelemetryTracer:
    """Sends the spans of requests to wherever OpenTelemetry's variables say."""

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
        from opentelemetry.trace import StatusCode

        # What an exception says may be a text: its name has to do.
        names_only = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span(f"score {protocol}", **names_only) as span:
            told = _OpenTelemetrySpan(self._tracer, span)
            try:
                yield told
            except Refusal as refusal:
                told.tell(refused=refusal.kind)
                raise
            except Exception as error:
                span.set_status(StatusCode.ERROR, type(error).__name__)
                raise
            finally:
                told.end_stage()


class _OpenTelemetrySpan:
    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span
        self._stage: Any = None

    def tell(self, **attributes: float | str) -> None:
        for name, value in attributes.items():
            self._span.set_attribute(f"rlhf_ray.{name}", value)

    def stage(self, name: str) -> None:
        from opentelemetry.trace import set_span_in_context

        self.end_stage()
        self._stage = self._tracer.start_span(name, set_span_in_context(self._span))

    def end_stage(self) -> None:
        """It is in no stage any more."""
        if self._stage is not None:
            self._stage.end()
            self._stage = None
