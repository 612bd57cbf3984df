"""Scores what a protocol read from a body, whatever protocol that was.

Invariants: an answer holds finite numbers or an error, in the order of the items; nothing is truncated unless an item asks
for it; overload is refused at once; texts reach no message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.errors import GroupError, ScoringError
from rlhf_ray.rewards.batcher import OverloadedError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.models import ModelCatalog, ModelVersion
from rlhf_ray.serving.protocols.requests import ParsedRequest, ScoredRequest
from rlhf_ray.serving.refusals import Refusal


class RequestScorer:
    """Scores requests with the models of a catalog."""

    def __init__(self, catalog: ModelCatalog, config: ServiceConfig) -> None:
        self.catalog = catalog
        self.max_items = min(config.max_items, config.max_queue_items)
        self._normalize = config.normalize

    async def score(
        self,
        request: ParsedRequest,
        *,
        caller: str,
        request_id: str,
        on_forward: Callable[[], None] = lambda: None,
    ) -> ScoredRequest:
        """Results of all items; raises a :class:`Refusal`.

        Requests of one ``caller`` share its turn in the queue. ``on_forward`` is called when the first item leaves it.
        """
        if len(request.items) > self.max_items:
            raise Refusal("too_many_items", f"{len(request.items)} items in one request, the limit is {self.max_items}")
        version = self.catalog.named(request.model).current
        well_formed = [item for item in request.items if isinstance(item, ScoreRequest)]
        scored = iter(await _score(version, well_formed, caller, on_forward))
        results = [next(scored) if isinstance(item, ScoreRequest) else item for item in request.items]
        if not request.reports_errors:
            _refuse_errors(results)
        return ScoredRequest(
            results=results,
            model=request.model or str(version.backends[0].describe()["model"]),
            version=version.name,
            request_id=request_id,
            created=int(time.time()),
            normalize=self._normalize,
        )


async def _score(
    version: ModelVersion, items: Sequence[ScoreRequest], caller: str, on_forward: Callable[[], None]
) -> Sequence[ScoreResult]:
    try:
        return await version.score(items, caller=caller, on_forward=on_forward)
    except OverloadedError as error:
        raise Refusal("overloaded", str(error)) from error
    except GroupError as error:
        raise Refusal("source", f"the reward group failed in {error.phase}") from error
    except ScoringError as error:
        raise Refusal("source", "the reward group gave an answer that is not a result") from error


def _refuse_errors(results: Sequence[ScoreResult]) -> None:
    """Refuse a request with an item that has no score: its protocol cannot say which one."""
    for position, result in enumerate(results):
        if result.fault is not None:
            raise Refusal(result.fault, f"item {position}: {result.error}")
