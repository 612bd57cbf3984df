"""The ASGI app that answers requests for scores: it knows models and protocols, and no cluster.

Invariants: every route stands behind the token gate but the two that say whether the service is up, and the page, which asks
for the token; every failure is an
answer with a status, a kind and a sentence; a caller that went away costs nothing more; texts reach no log.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rlhf_ray.config.files.tokens import Keys
from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.serving.auth import OPEN_ROUTES, PAGE_ROUTE, RateLimit, TokenGate
from rlhf_ray.serving.bodies import BodyReader
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import ModelCatalog, ServedModel
from rlhf_ray.serving.page.document import document as page_document
from rlhf_ray.serving.protocols.openapi import OPERATING, document, page
from rlhf_ray.serving.protocols.protocol import Protocol
from rlhf_ray.serving.protocols.registry import PROTOCOLS
from rlhf_ray.serving.protocols.requests import ScoredRequest
from rlhf_ray.serving.protocols.tei import info_keys
from rlhf_ray.serving.refusals import Refusal, plain
from rlhf_ray.serving.scoring import RequestScorer
from rlhf_ray.serving.tracing import NoTracer, Span, Tracer
from rlhf_ray.serving.transport.callers import caller_of, refuse_upgrade, request_identity, while_connected

READY_IF_SCORED_WITHIN_S, READY_TIMEOUT_S = 60.0, 5.0
CALLER_LEFT = 499
"""The status of a request whose caller hung up, as nginx counts it; nobody reads the answer."""

STOPPING = "the service stops: send the request again, to the next one"
CLOSING = frozenset({"stopping", "upgrade"})
"""Kinds of refusals after which the connection is closed."""

Endpoint = Callable[[Request], Awaitable[Response]]


class ScoringApp:
    """The endpoints of the scoring backend."""

    def __init__(
        self,
        catalog: ModelCatalog,
        config: ServiceConfig,
        metrics: Metrics,
        tracer: Tracer,
        keys: Callable[[], Keys] = dict,
    ) -> None:
        self.catalog, self.config, self.metrics, self.tracer = catalog, config, metrics, tracer
        self._keys = keys
        self.scorer = RequestScorer(catalog, config)
        self.rate = RateLimit(config.requests_per_minute)
        self.bodies = BodyReader(
            max_bytes=config.max_body_bytes,
            max_bytes_together=config.max_bodies_bytes,
            timeout_s=config.body_timeout_s,
            max_items=self.scorer.max_items,
        )
        self._answering: set[asyncio.Task[Any]] = set()
        self._given_up = False
        metrics.watch("waiting_items", lambda: catalog.waiting)
        metrics.watch("waiting_tokens", lambda: catalog.waiting_tokens)
        models = {model.name: model for model in catalog.models}
        metrics.watch_each("replicas", models, lambda model: model.replicas)
        metrics.watch_each("replicas_down", models, lambda model: model.down)
        metrics.watch("body_bytes", lambda: self.bodies.held)

    def scoring(self, protocol: Protocol) -> Endpoint:
        """The endpoint of one protocol."""

        async def endpoint(http: Request) -> Response:
            began = time.monotonic()
            try:
                with self._answered(), self.tracer.request(protocol.name) as span:
                    response = await self._answer(protocol, http, began, span)
            except ClientDisconnect:
                response = Response(status_code=CALLER_LEFT)
            except Refusal as refusal:
                response = self.refuse(refusal, protocol.refuse)
                if refusal.kind == "overloaded":
                    self.metrics.refusal_seconds.observe(time.monotonic() - began)
            except Exception as error:  # its message may hold a text
                response = self.refuse(_unexpected(http, error), protocol.refuse)
            self.metrics.series(self.metrics.requests, protocol.name, response.status_code).inc()
            return response

        return endpoint

    async def _answer(self, protocol: Protocol, http: Request, began: float, span: Span) -> Response:
        span.stage("read")
        caller = caller_of(http)
        self.rate.spend(caller)
        self.catalog.refuse_when_full(caller)
        refuse_upgrade(http)
        with self.bodies.reserving(http, caller) as body:
            request = await body.read(partial(protocol.read, max_items=self.scorer.max_items))
            read = time.monotonic()
            span.stage("queue")
            scored = await while_connected(
                http,
                self.scorer.score(
                    request,
                    caller=caller,
                    request_id=request_identity(http, request),
                    on_forward=lambda: span.stage("forward"),
                ),
            )
        back = time.monotonic()
        span.stage("answer")
        response = JSONResponse(request.answer(scored), headers=_headers(scored))
        self._count(
            protocol, scored, read_s=read - began, answer_s=time.monotonic() - back, total_s=time.monotonic() - began
        )
        span.add(
            items=len(scored.results), tokens=scored.tokens, version=scored.version, seconds=time.monotonic() - began
        )
        return response

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """A request that :meth:`give_up` may end."""
        if self._given_up:
            raise Refusal("stopping", STOPPING)
        task = asyncio.current_task()
        assert task is not None, "a server answers in tasks"
        self._answering.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self._given_up:
                raise
            task.uncancel()
            raise Refusal("stopping", STOPPING) from None
        finally:
            self._answering.discard(task)

    def give_up(self) -> None:
        """Answer every request that is under way now, and those that still come, with a refusal: the service stops."""
        self._given_up = True
        for task in self._answering:
            task.cancel()

    def _count(
        self, protocol: Protocol, scored: ScoredRequest, *, read_s: float, answer_s: float, total_s: float
    ) -> None:
        metrics = self.metrics
        for result in scored.results:
            if result.fault is not None:
                metrics.series(metrics.failed_items, result.fault).inc()
        metrics.series(metrics.stage_seconds, "read").observe(read_s)
        metrics.series(metrics.stage_seconds, "answer").observe(answer_s)
        metrics.series(metrics.request_seconds, protocol.name).observe(total_s)

    def refuse(self, refusal: Refusal, form: Callable[[Refusal], Any] = plain) -> Response:
        """The answer that says why there are no scores."""
        self.metrics.series(self.metrics.errors, refusal.kind).inc()
        headers = {} if refusal.retry_after_s is None else {"Retry-After": str(refusal.retry_after_s)}
        if refusal.kind in CLOSING:
            headers["Connection"] = "close"
        return JSONResponse(form(refusal), refusal.status, headers)

    async def health(self, http: Request) -> Response:
        """The process is up."""
        return Response(status_code=200)

    async def ready(self, http: Request) -> Response:
        """Whether the weights are loaded and have scored something lately; if nobody asked for a score, this does.

        Where replicas are being brought back, the body says how many.
        """
        asked = (model.current.ready(READY_IF_SCORED_WITHIN_S, READY_TIMEOUT_S) for model in self.catalog.models)
        ready = all(await asyncio.gather(*asked))
        if ready and not self.catalog.down:
            return Response(status_code=200)
        about = {"ready": ready, "replicas": self.catalog.replicas, "restarting": self.catalog.down}
        return JSONResponse(about, 200 if ready else 503)

    async def info(self, http: Request) -> Response:
        """What is served and within which limits; the keys of the first model also stand at the top."""
        first, *_ = models = [{"name": model.name, **model.describe()} for model in self.catalog.models]
        about = {
            "normalize": self.config.normalize,
            "limits": {"items": self.scorer.max_items, "body_bytes": self.config.max_body_bytes},
            "activation": "raw scores unless use_activation is true",
            "models": models,
        }
        return JSONResponse({**info_keys(first, self.config), **first, **about})

    async def list_models(self, http: Request) -> Response:
        """The models in OpenAI's form."""
        rows = [row for model in self.catalog.models for row in _openai_rows(model)]
        return JSONResponse({"object": "list", "data": rows})

    async def text_metrics(self, http: Request) -> Response:
        """Prometheus text."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    @cached_property
    def _document(self) -> dict[str, Any]:
        operating = [path for path in OPERATING if self.config.page or path != PAGE_ROUTE]
        return document(PROTOCOLS, operating=operating, open_routes=self.open_routes)

    @property
    def open_routes(self) -> frozenset[str]:
        """The routes that need no token."""
        return OPEN_ROUTES | {PAGE_ROUTE} if self.config.page else OPEN_ROUTES

    async def openapi(self, http: Request) -> Response:
        """The description of all routes, for programs."""
        return JSONResponse(self._document)

    async def docs(self, http: Request) -> Response:
        """The description of all routes, for people; it loads nothing from anywhere."""
        return HTMLResponse(page(self._document))

    async def page(self, http: Request) -> Response:
        """The page for people, which asks for the token where one is needed."""
        shown = page_document(asks_for_token=bool(self._keys()))
        return HTMLResponse(shown.html, headers=shown.headers)

    async def unknown(self, http: Request, error: Exception) -> Response:
        """The refusal of a route or a method that does not exist."""
        assert isinstance(error, HTTPException)
        kind = "method_not_allowed" if error.status_code == 405 else "not_found"
        message = {"not_found": "no such route: see /docs", "method_not_allowed": "another method is needed: see /docs"}
        response = self.refuse(Refusal(kind, message[kind]))
        response.headers.update(error.headers or {})  # the methods that are allowed
        return response


def create_app(
    catalog: ModelCatalog,
    config: ServiceConfig,
    metrics: Metrics,
    keys: Callable[[], Keys] = dict,
    tracer: Tracer | None = None,
) -> Starlette:
    """The app with its routes behind the token gate."""
    app = ScoringApp(catalog, config, metrics, tracer or NoTracer(), keys)
    operating: Mapping[str, Endpoint] = {
        "/health": app.health,
        "/ready": app.ready,
        "/info": app.info,
        "/v1/models": app.list_models,
        "/metrics": app.text_metrics,
        "/openapi.json": app.openapi,
        "/docs": app.docs,
        **({PAGE_ROUTE: app.page} if config.page else {}),
    }
    routes = [Route(path, app.scoring(protocol), methods=["POST"]) for protocol in PROTOCOLS for path in protocol.paths]
    routes += [Route(path, endpoint) for path, endpoint in operating.items()]
    gate = Middleware(
        TokenGate,
        keys=keys,
        on_refusal=lambda _, refusal: metrics.errors.labels(refusal.kind).inc(),
        open_routes=app.open_routes,
    )
    served = Starlette(routes=routes, middleware=[gate], exception_handlers={404: app.unknown, 405: app.unknown})
    served.router.redirect_slashes = False  # a redirection would lead to whatever the header Host names
    served.state.give_up = app.give_up
    return served


def _headers(scored: ScoredRequest) -> dict[str, str]:
    headers = {"X-Request-Id": scored.request_id, "X-Model-Version": scored.version}
    if truncated := sum(result.truncated for result in scored.results):
        headers["X-Truncated-Items"] = str(truncated)
    return headers


def _openai_rows(model: ServedModel) -> list[dict[str, Any]]:
    """One row for each name of a model."""
    about = model.describe()
    common = {"object": "model", "created": 0, "owned_by": "rlhf_ray", "version": about["version"]}
    return [{"id": name, **common, "max_model_len": about.get("max_tokens")} for name in sorted(model.names)]


def _unexpected(http: Request, error: Exception) -> Refusal:
    """The refusal of a failure nobody foresaw; the log says where it happened, not its message, which may be a text."""
    frames = traceback.format_tb(error.__traceback__)
    get_logger("serving").error("%s: %s at\n%s", http.scope["path"], type(error).__name__, "".join(frames))
    return Refusal("server", "the server failed; its log says where")
