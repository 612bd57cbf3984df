"""The scoring app over a backend, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette

from rlhf_ray.config.files.tokens import Keys
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import Backend, Limits, ModelCatalog, ServedModel


def served_models(
    config: ServeConfig, *backends: Backend, clock: Callable[[], float] = time.monotonic, metrics: Metrics | None = None
) -> ModelCatalog:
    """One model of each backend: the first under the config's name, others as ``model-2`` and so on."""
    names = [config.name, *(f"model-{number}" for number in range(2, len(backends) + 1))]
    kept = metrics or Metrics()
    return ModelCatalog(
        [
            ServedModel(name, [backend], Limits.of(config), kept, clock)
            for name, backend in zip(names, backends, strict=True)
        ]
    )


def service(config: ServeConfig, *backends: Backend, keys: Callable[[], Keys] = dict, **options: Any) -> Starlette:
    """The app over one model of each backend."""
    metrics = Metrics()
    return create_app(served_models(config, *backends, metrics=metrics, **options), config, metrics, keys)


class Lengths:
    """Scores an item as the length of its text in characters, or of its ids: tells at once who got whose."""

    def __init__(self, name: str = "lengths", plus: float = 0.0) -> None:
        self.name, self.plus = name, plus
        self.batches: list[list[ScoreRequest]] = []
        self.closed = False

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.batches.append(list(requests))
        return [self.result(request) for request in requests]

    def result(self, request: ScoreRequest) -> ScoreResult:
        """What one item gets."""
        if request.token_ids is not None:
            return ScoreResult.of(len(request.token_ids) + self.plus, len(request.token_ids))
        size = sum(len(text) for name, text in request.texts() if name != "messages") + sum(
            len(turn["content"]) for turn in request.messages or ()
        )
        return ScoreResult.of(size + self.plus, size) if size else ScoreResult.failed("the item is empty")

    def describe(self) -> Mapping[str, Any]:
        return {"model": self.name, "max_tokens": 100}

    restarts = True

    async def restart(self) -> None:
        raise AssertionError("nothing fails here")

    async def close(self) -> None:
        self.closed = True
