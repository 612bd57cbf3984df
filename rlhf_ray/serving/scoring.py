"""The scoring core: items in, results out, whatever protocol they came by.

Always true: an answer holds finite numbers or an error, in the order of the items; nothing is truncated unless an item asks
for it; overload is refused at once; a caller that went away costs nothing more; texts reach no log.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.requests import ClientDisconnect, Request

from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.errors import GroupError, ScoringError
from rlhf_ray.rewards.batcher import OverloadedError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.auth import KEY
from rlhf_ray.serving.models import Limits, Models, Version
from rlhf_ray.serving.protocol import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import Refusal

IDENTITY = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""What is given back as the identity of a request; anything else gets one of ours."""


def limits_of(config: ServiceConfig) -> Limits:
    """What a model's queue takes."""
    return Limits(
        batch_tokens=config.max_batch_tokens,
        queue_items=config.max_queue_items,
        queue_tokens=config.max_queue_tokens,
        hold_s=config.hold_s,
    )


class ScoringCore:
    """Scores what protocols ask for."""

    def __init__(self, models: Models, config: ServiceConfig) -> None:
        self.models = models
        self.max_items = min(config.max_items, config.max_queue_items)
        self._normalize = config.normalize

    async def score(
        self, http: Request, asked: ParsedRequest, on_forward: Callable[[], None] = lambda: None
    ) -> ScoredRequest:
        """Results of all items asked for; raises a :class:`Refusal`, or :class:`ClientDisconnect` where nobody waits.

        ``on_forward`` is called when the first of them leaves the queue.
        """
        if len(asked.items) > self.max_items:
            raise Refusal("too_many_items", f"{len(asked.items)} items in one request, the limit is {self.max_items}")
        model = self.models.named(asked.model)
        version = model.current
        requests = [item for item in asked.items if isinstance(item, ScoreRequest)]
        scored = iter(await self._scores(http, version, requests, on_forward))
        results = [next(scored) if isinstance(item, ScoreRequest) else item for item in asked.items]
        if not asked.reports_errors:
            _refuse_errors(results)
        return ScoredRequest(
            results=results,
            model=asked.model or str(version.backends[0].describe()["model"]),
            version=version.name,
            request_id=request_identity(http, asked),
            created=int(time.time()),
            normalize=self._normalize,
        )

    async def _scores(
        self, http: Request, version: Version, requests: Sequence[ScoreRequest], on_forward: Callable[[], None]
    ) -> Sequence[ScoreResult]:
        """Results of all items, or :class:`ClientDisconnect` as soon as nobody waits for them any more."""
        scoring = asyncio.create_task(version.batcher.score(requests, caller=caller_of(http), on_forward=on_forward))
        leaving = asyncio.create_task(_left(http))
        try:
            await asyncio.wait({scoring, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not scoring.done():
                raise ClientDisconnect
            return scoring.result()
        except OverloadedError as error:
            raise Refusal("overloaded", str(error)) from error
        except GroupError as error:
            raise Refusal("source", f"the reward group failed in {error.phase}") from error
        except ScoringError as error:
            raise Refusal("source", "the reward group answered what is no result") from error
        finally:
            scoring.cancel()
            leaving.cancel()


def _refuse_errors(results: Sequence[ScoreResult]) -> None:
    """Refuse a request with an item that has no score: its protocol cannot say which one."""
    for position, result in enumerate(results):
        if result.fault is not None:
            raise Refusal(result.fault, f"item {position}: {result.error}")


def caller_of(http: Request) -> str:
    """Who takes turns with others: a key, or where there is none a machine."""
    return str(http.scope.get(KEY) or (http.client.host if http.client else ""))


def request_identity(http: Request, asked: ParsedRequest) -> str:
    """The identity of a request: the caller's, where it gave a plain one."""
    given = http.headers.get("x-request-id") or asked.request_id or ""
    return given if IDENTITY.fullmatch(given) else uuid.uuid4().hex


async def _left(http: Request) -> None:
    """Wait until the client is gone; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
