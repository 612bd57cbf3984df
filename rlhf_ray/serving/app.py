"""The scoring backend as a plain ASGI app: it knows a batcher and a description, and no cluster.

Always true: an answer holds finite numbers or an error, in the order of the items; nothing is truncated unless an item asks
for it; overload is answered at once with 503 and Retry-After; a caller that went away costs nothing more; texts reach no
log.
"""

from __future__ import annotations

import asyncio
import math
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlhf_ray.config.schema import ServeConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError, RlhfRayError
from rlhf_ray.rewards.batcher import Batcher, OverloadedError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.auth import TokenGate
from rlhf_ray.serving.bodies import BodyError, openrlhf_requests, read_json, reward_requests
from rlhf_ray.serving.counters import Counters

OVERLOADED_RETRY_S, FAILED_RETRY_S = 1, 5
READY_IF_SCORED_WITHIN_S = 60.0
STATUS_OF = {"item": 422, "model": 500, "source": 503}
"""How an answer says whose fault it is that an item has no reward."""


class Backend(Protocol):
    """What scores: the reward group behind the app."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result a request, in order."""

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item."""


class ScoringApp:
    """Routes of the scoring backend."""

    def __init__(self, backend: Backend, config: ServeConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.backend = backend
        self.config = config
        self.clock = clock
        self.counters = Counters()
        self.batcher = Batcher(self._score, max_tokens=config.max_batch_tokens, max_items=config.max_queue_items)
        self.max_items = min(config.max_items, config.max_queue_items)
        self._last_score = -math.inf

    async def _score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        began = self.clock()
        results = await self.backend.score(requests)
        ended = self.clock()
        if any(result.error is None for result in results):
            self._last_score = ended
        self.counters.forward(items=len(results), tokens=sum(r.tokens for r in results), seconds=ended - began)
        return results

    # ------------------------------------------------------------------------------------------------------- scoring

    async def get_reward(self, http: Request) -> Response:
        """OpenRLHF's protocol: ``{"query": [text], ...}`` to ``{"rewards", "scores", "extra_logs"}``."""
        requests = openrlhf_requests(await read_json(http, self.config.max_body_bytes))
        results = await self._results(http, requests)
        for position, result in enumerate(results):
            if result.fault is not None:
                raise BodyError(STATUS_OF[result.fault], f"query {position}: {result.error}")
        rewards = [result.reward if self.config.normalize else result.raw for result in results]
        return JSONResponse({"rewards": rewards, "scores": rewards, "extra_logs": {}})

    async def reward(self, http: Request) -> Response:
        """This project's protocol: items in any representation; a bad item fails alone."""
        items = reward_requests(await read_json(http, self.config.max_body_bytes))
        scored = iter(await self._results(http, [item for item in items if isinstance(item, ScoreRequest)]))
        results = [next(scored) if isinstance(item, ScoreRequest) else ScoreResult.failed(item) for item in items]
        identity = http.headers.get("x-request-id") or uuid.uuid4().hex
        model = self.backend.describe()["model"]
        return JSONResponse({"request_id": identity, "model": model, "results": [vars(result) for result in results]})

    async def _results(self, http: Request, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """Results of all items, or :class:`ClientDisconnect` as soon as nobody waits for them any more."""
        if len(requests) > self.max_items:
            raise BodyError(413, f"{len(requests)} items in one request, the limit is {self.max_items}")
        scoring = asyncio.create_task(self.batcher.score(requests))
        leaving = asyncio.create_task(_left(http))
        try:
            await asyncio.wait({scoring, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not scoring.done():
                raise ClientDisconnect
            return scoring.result()
        finally:
            scoring.cancel()
            leaving.cancel()

    # ------------------------------------------------------------------------------------------------------- operating

    async def health(self, http: Request) -> Response:
        """The process is up."""
        return Response(status_code=200)

    async def ready(self, http: Request) -> Response:
        """The weights are loaded and gave a score lately; asks for one where nobody did."""
        if self.clock() - self._last_score > READY_IF_SCORED_WITHIN_S:
            try:
                (result,) = await self.batcher.score([ScoreRequest(token_ids=(0,))])
            except RlhfRayError:
                return Response(status_code=503)
            if result.error is not None:
                return Response(status_code=503)
        return Response(status_code=200)

    async def info(self, http: Request) -> Response:
        """What is served and within which limits."""
        limits = {"items": self.max_items, "body_bytes": self.config.max_body_bytes}
        return JSONResponse({**self.backend.describe(), "normalize": self.config.normalize, "limits": limits})

    async def metrics(self, http: Request) -> Response:
        """Prometheus text."""
        return PlainTextResponse(self.counters.text(waiting=self.batcher.waiting))


async def _left(http: Request) -> None:
    """Wait until the client is gone; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def create_app(backend: Backend, config: ServeConfig, tokens: tuple[str, ...] = ()) -> Starlette:
    """The app with its routes behind the token gate."""
    scoring = ScoringApp(backend, config)
    routes = [
        Route("/get_reward", _guarded(scoring.get_reward, scoring.counters), methods=["POST"]),
        Route("/v1/reward", _guarded(scoring.reward, scoring.counters), methods=["POST"]),
        Route("/health", scoring.health),
        Route("/ready", scoring.ready),
        Route("/info", scoring.info),
        Route("/metrics", scoring.metrics),
    ]
    return Starlette(routes=routes, middleware=[Middleware(TokenGate, tokens=tokens)])


def _guarded(
    endpoint: Callable[[Request], Awaitable[Response]], counters: Counters
) -> Callable[[Request], Awaitable[Response]]:
    """``endpoint`` with its failures as answers: what was wrong, and what to do."""

    async def guarded(http: Request) -> Response:
        try:
            response = await endpoint(http)
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it; nginx counts such requests under this number
        except BodyError as error:
            response = _answer(error.status, str(error))
        except OverloadedError as error:
            response = _answer(503, str(error), retry_after_s=OVERLOADED_RETRY_S)
        except GroupError as error:
            get_logger("serving").error("%s", error)
            response = _answer(503, f"the reward group failed in {error.phase}", retry_after_s=FAILED_RETRY_S)
        except Exception as error:  # its message may hold a text
            where = "".join(traceback.format_tb(error.__traceback__))
            get_logger("serving").error("%s: %s at\n%s", http.url.path, type(error).__name__, where)
            response = _answer(500, "the server failed; its log says where")
        counters.request(http.url.path, response.status_code)
        return response

    return guarded


def _answer(status: int, error: str, *, retry_after_s: int | None = None) -> JSONResponse:
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return JSONResponse({"error": error}, status, headers)
