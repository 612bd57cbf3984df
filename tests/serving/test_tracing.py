"""A request is one span, with one below it for each stage that it went through; no span holds a text."""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.applications import Starlette

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.metrics import STAGES, Metrics
from rlhf_ray.serving.tracing import OpenTelemetryTracer

from .services import Lengths, served_models

SECRET = "a text of a caller"


class Failing(Lengths):
    """Fails with a message that holds the text."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        raise ValueError(requests[0].text)


def spans_of(config: ServeConfig, backend: Lengths, *bodies: Any) -> tuple[list[int], list[Any]]:
    """Statuses of requests with these bodies, sent one after another, and the spans that came of them."""
    exporter, metrics = InMemorySpanExporter(), Metrics()
    tracer = OpenTelemetryTracer(exporter)
    app: Starlette = create_app(served_models(config, backend, metrics=metrics), config, metrics, tracer=tracer)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return [(await client.post("/get_reward", json=body)).status_code for body in bodies]

    statuses = asyncio.run(ask())
    tracer.provider.force_flush()
    spans = list(exporter.get_finished_spans())
    tracer.provider.shutdown()
    assert all(SECRET not in span.to_json() for span in spans)
    return statuses, spans


def test_a_request_is_a_span_with_one_below_it_for_each_stage_in_order(config: Callable[..., ServeConfig]) -> None:
    statuses, spans = spans_of(config(), Lengths(), {"query": [SECRET, "b"]}, {"query": ["c"]})
    assert statuses == [200, 200]
    requests = [span for span in spans if span.parent is None]
    assert [span.name for span in requests] == ["score openrlhf"] * 2
    assert len({span.context.trace_id for span in requests}) == 2
    for request, items in zip(requests, (2, 1), strict=True):
        stages = [span for span in spans if span.parent is not None and span.parent.span_id == request.context.span_id]
        assert tuple(span.name for span in stages) == STAGES
        times = [request.start_time, *(time for span in stages for time in (span.start_time, span.end_time))]
        assert times == sorted(times) and times[-1] <= request.end_time
        assert request.attributes["rlhf_ray.items"] == items and request.attributes["rlhf_ray.version"] == "1"
    assert len(spans) == 2 * (1 + len(STAGES))


def test_a_refusal_tells_its_kind_and_only_the_stages_that_it_went_through(config: Callable[..., ServeConfig]) -> None:
    statuses, spans = spans_of(config(), Lengths(), {"query": SECRET})
    assert statuses == [422]
    assert [span.name for span in spans] == ["read", "score openrlhf"]
    assert spans[-1].attributes == {"rlhf_ray.refused": "wrong_body"}


def test_a_failure_tells_its_name_and_not_what_it_says(config: Callable[..., ServeConfig]) -> None:
    statuses, spans = spans_of(config(), Failing(), {"query": [SECRET]})
    assert statuses == [500]
    assert [span.name for span in spans] == ["read", "queue", "forward", "score openrlhf"]
    assert (spans[-1].status.is_ok, spans[-1].status.description) == (False, "ValueError")


def test_without_opentelemetry_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RequestError, match="pip install opentelemetry-sdk"):
        OpenTelemetryTracer()


class Unreachable(InMemorySpanExporter):
    """A collector that never answers."""

    def export(self, spans: Any) -> Any:
        threading.Event().wait(30)
        raise AssertionError("nobody waits so long")


def test_a_collector_that_never_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.tracing.CLOSE_TIMEOUT_S", 0.2)
    registered: list[Any] = []
    monkeypatch.setattr(atexit, "register", lambda call, *_, **__: registered.append(call))
    tracer = OpenTelemetryTracer(Unreachable())
    with tracer.request("reward"):
        pass
    began = time.monotonic()
    tracer.close()
    assert 0.1 < time.monotonic() - began < 2
    assert tracer.provider.shutdown not in registered, "the end of the process waits for nothing either"


def test_spans_that_are_left_are_sent_at_the_end() -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetryTracer(exporter)
    with tracer.request("reward"):
        pass
    tracer.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["score reward"]
