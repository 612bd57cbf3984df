"""The scoring backend as a plain ASGI app: it knows a batcher and a description, and no cluster.

Always true: an answer holds finite numbers or an error, in the order of the items; nothing is truncated unless an item asks
for it; overload is answered at once with 503 and Retry-After; texts reach no log.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf_ray.config.schema import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError
from rlhf_ray.rewards.batcher import Batcher, OverloadedError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.auth import TokenGate
from rlhf_ray.serving.bodies import BodyError, openrlhf_requests, read_json, reward_requests
from rlhf_ray.serving.counters import Counters

RETRY_AFTER_S = "1"
READY_IF_SCORED_WITHIN_S = 60.0


class Backend(Protocol):
    """What scores: the reward group behind the app."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result a request, in order."""

    def describe(self) -> Mapping[str, Any]:
        """The model: name, version, tokenizer fingerprint, normalisation, limits."""


class ScoringApp:
    """Routes of the scoring backend."""

    def __init__(self, backend: Backend, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend = backend
        self.config = config
        self.clock = clock
        self.counters = Counters()
        self.batcher = Batcher(self._score, max_tokens=config.max_batch_tokens, max_items=config.max_queue_items)
        self._last_forward = -math.inf

    async def _score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        began = self.clock()
        results = await self.backend.score(requests)
        self._last_forward = self.clock()
        self.counters.forward(
            items=len(results), tokens=sum(r.tokens for r in results), seconds=self._last_forward - began
        )
        return results

    # ------------------------------------------------------------------------------------------------------- scoring

    async def get_reward(self, request: Request) -> Response:
        """OpenRLHF's protocol: ``{"query": [text], ...}`` to ``{"rewards", "scores", "extra_logs"}``."""
        requests = openrlhf_requests(await read_json(request, self.config.max_body_bytes))
        results = await self._results(requests)
        failed = next((result for result in results if result.error is not None), None)
        if failed is not None:
            raise BodyError(422, f"query {list(results).index(failed)}: {failed.error}")
        rewards = [self._chosen(result) for result in results]
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    async def reward(self, request: Request) -> Response:
        """This project's protocol: items in any representation; a bad item fails alone."""
        items = reward_requests(await read_json(request, self.config.max_body_bytes))
        good = [item for item in items if isinstance(item, ScoreRequest)]
        scored = iter(await self._results(good))
        results = [next(scored) if isinstance(item, ScoreRequest) else ScoreResult.failed(item) for item in items]
        answers = [
            {"raw": r.raw, "reward": r.reward, "tokens": r.tokens, "truncated": r.truncated, "error": r.error}
            for r in results
        ]
        identity = request.headers.get("x-request-id") or uuid.uuid4().hex
        return JSONResponse({"request_id": identity, "model": self.backend.describe()["model"], "results": answers})

    async def _results(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        if len(requests) > self.config.max_items:
            raise BodyError(413, f"{len(requests)} items in one request, the limit is {self.config.max_items}")
        return await self.batcher.score(requests) if requests else []

    def _chosen(self, result: ScoreResult) -> float | None:
        return result.reward if self.config.normalize else result.raw

    # ------------------------------------------------------------------------------------------------------- operating

    async def health(self, request: Request) -> Response:
        """The process is up."""
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """The weights are loaded and a forward was done lately; does one where there was none."""
        if self.clock() - self._last_forward > READY_IF_SCORED_WITHIN_S:
            try:
                await self.batcher.score([ScoreRequest(token_ids=(0,))])
            except (GroupError, OverloadedError):
                return Response(status_code=503)
        return Response(status_code=200)

    async def info(self, request: Request) -> Response:
        """What is served and within which limits."""
        limits = {name: getattr(self.config, name) for name in ("max_items", "max_body_bytes", "max_tokens")}
        return JSONResponse({**self.backend.describe(), "normalize": self.config.normalize, "limits": limits})

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        return PlainTextResponse(self.counters.text(waiting=self.batcher.waiting))


def create_app(backend: Backend, config: ServeConfig, tokens: tuple[str, ...] = ()) -> Starlette:
    """The app with its routes behind the token gate."""
    scoring = ScoringApp(backend, config)
    routes = [
        Route("/get_reward", _guarded(scoring.get_reward, scoring), methods=["POST"]),
        Route("/v1/reward", _guarded(scoring.reward, scoring), methods=["POST"]),
        Route("/health", scoring.health),
        Route("/ready", scoring.ready),
        Route("/info", scoring.info),
        Route("/metrics", scoring.metrics),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TokenGate, tokens=tokens)])


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]], scoring: ScoringApp
) -> Callable[[Request], Awaitable[Response]]:
    """``endpoint`` with its failures as answers: what was wrong, and what to do."""

    async def guarded(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except BodyError as error:
            response = JSONResponse({"error": str(error)}, error.status)
        except OverloadedError as error:
            response = JSONResponse({"error": str(error)}, 503, {"Retry-After": RETRY_AFTER_S})
        except GroupError as error:
            get_logger("serving").error("%s", error)
            response = JSONResponse({"error": f"the reward group failed in {error.phase}"}, 503, {"Retry-After": "5"})
        scoring.counters.request(request.url.path, response.status_code)
        return response

    return guarded
