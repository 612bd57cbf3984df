"""The models that a service scores with: each has versions, each version replicas and one queue in front of them.

Invariants: all items of a request are scored by one version; a new version takes new requests while the old one answers
those it has, so that none is dropped; a batch whose reward group died is scored again, whole, once the group is back, and
in halves if that one died too, for as long as requests are held, so that an item that kills its group costs only itself its
score; a score is never made up.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from rlhf_ray.config.sections.service import ServiceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import CapacityError, GroupError, RlhfRayError
from rlhf_ray.rewards.batcher import Batcher, Waiting
from rlhf_ray.rewards.request import PROBE, ScoreRequest, ScoreResult
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.refusals import Refusal

TRIES_OF_A_BATCH = 2
"""Cut a batch into halves after the group has died of it this often; of a half, or of an item alone, once is enough."""
SECONDS_BETWEEN_RESTARTS = 1.0


class Backend(Protocol):
    """One replica of a reward model."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result per request, in order; raises :class:`GroupError` where the replica failed."""

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item in tokens."""

    async def restart(self) -> None:
        """Come back after a failure; raises :class:`GroupError` or :class:`CapacityError` where that fails."""

    async def close(self) -> None:
        """Free what it holds."""


@dataclass(frozen=True)
class Limits:
    """How much a model's queue holds, and how long requests wait for a replica that restarts."""

    batch_tokens: int
    queue_items: int
    queue_tokens: int
    hold_s: float

    @classmethod
    def of(cls, config: ServiceConfig) -> Limits:
        """The limits that a service is configured with."""
        return cls(config.max_batch_tokens, config.max_queue_items, config.max_queue_tokens, config.hold_s)


class ModelVersion:
    """One version of a model: its replicas, and the queue in front of them."""

    def __init__(
        self, model: str, name: str, backends: Sequence[Backend], limits: Limits, metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self.model, self.name, self.backends = model, name, tuple(backends)
        self.last_score = -math.inf
        self._limits, self._metrics, self._clock = limits, metrics, clock
        self.batcher = Batcher(
            *(partial(self._score, backend) for backend in self.backends),
            max_tokens=limits.batch_tokens,
            max_items=limits.queue_items,
            max_queue_tokens=limits.queue_tokens,
            on_batch=self._count_batch,
        )

    def _count_batch(self, batch: Sequence[Waiting]) -> None:
        self._metrics.batch(batch, time.monotonic())

    async def _score(self, backend: Backend, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """Results of one batch; where the replica fails, those of other attempts once it is back."""
        return await self._try(backend, requests, self._clock() + self._limits.hold_s, tries=TRIES_OF_A_BATCH)

    async def _try(
        self, backend: Backend, requests: Sequence[ScoreRequest], deadline: float, *, tries: int
    ) -> Sequence[ScoreResult]:
        for _ in range(tries):
            try:
                return await self._forward(backend, requests)
            except GroupError as error:
                get_logger("serving").error("%s: %s", self.model, error)
                if self._limits.hold_s == 0:
                    raise
                await self.restart(backend, deadline)
                cause = error.cause.partition("\n")[0]
        if len(requests) > 1:
            middle = len(requests) // 2
            halves = requests[:middle], requests[middle:]
            return [result for half in halves for result in await self._try(backend, half, deadline, tries=1)]
        await backend.score([PROBE])  # raises where the replica fails on everything
        return [ScoreResult.failed(f"the reward group fails on this item: {cause}", fault="item")]

    async def _forward(self, backend: Backend, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        began = self._clock()
        results = await backend.score(requests)
        ended = self._clock()
        if any(result.error is None for result in results):
            self.last_score = ended
        tokens = sum(result.tokens for result in results)
        self._metrics.forward(self.model, items=len(results), tokens=tokens, seconds=ended - began)
        return results

    async def restart(self, backend: Backend, deadline: float) -> None:
        """Bring a replica back; raises the last failure where that does not work before ``deadline``, in clock seconds."""
        while True:
            self._metrics.restarts.labels(self.model).inc()
            try:
                async with asyncio.timeout(max(deadline - self._clock(), 0.0)):
                    await backend.restart()
            except (GroupError, CapacityError) as error:
                if self._clock() + SECONDS_BETWEEN_RESTARTS >= deadline:
                    raise
                get_logger("serving").error(
                    "%s: the reward group does not come back (%s): trying again", self.model, error
                )
                await asyncio.sleep(SECONDS_BETWEEN_RESTARTS)
            except TimeoutError:
                raise GroupError("reward", None, "restart", "it did not come back in time") from None
            else:
                get_logger("serving").info("%s: the reward group is back", self.model)
                return

    async def close(self) -> None:
        """Answer what waits, then free the replicas."""
        await self.batcher.drained()
        for backend in self.backends:
            await backend.close()


class ServedModel:
    """One model under a name, which its newest version answers for."""

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend],
        limits: Limits,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._limits, self._metrics, self.clock = limits, metrics, clock
        self._count = 0
        self._closing: set[asyncio.Task[None]] = set()
        self.current = self._next_version(backends)

    def _next_version(self, backends: Sequence[Backend]) -> ModelVersion:
        self._count += 1
        return ModelVersion(self.name, str(self._count), backends, self._limits, self._metrics, self.clock)

    def describe(self) -> Mapping[str, Any]:
        """What the newest version is."""
        return {**self.current.backends[0].describe(), "version": self.current.name}

    @property
    def names(self) -> set[str]:
        """What requests may call it."""
        return {self.name, str(self.current.backends[0].describe()["model"])}

    def replace(self, backends: Sequence[Backend]) -> asyncio.Task[None]:
        """Serve a new version from now on; the task ends when the old one has answered what it had, and is freed."""
        old, self.current = self.current, self._next_version(backends)
        self._metrics.reloads.labels(self.name).inc()
        get_logger("serving").info("%s: version %s takes requests from now on", self.name, self.current.name)
        closing = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing

    async def ready(self, within_s: float) -> bool:
        """Whether it gave a score in the last ``within_s`` seconds; scores one token where nobody asked for a score."""
        version = self.current
        if self.clock() - version.last_score <= within_s:
            return True
        try:
            (result,) = await version.batcher.score([PROBE], urgent=True)
        except RlhfRayError:
            return False
        return result.error is None


class ModelCatalog:
    """All models of a service; the first is meant where a request names none."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self.models = tuple(models)

    def named(self, name: str | None) -> ServedModel:
        """The model that a request asks for."""
        if name is None:
            return self.models[0]
        for model in self.models:
            if name in model.names:
                return model
        known = ", ".join(sorted(set().union(*(model.names for model in self.models))))
        raise Refusal("unknown_model", f"no such model is served here: {known}")

    def refuse_when_full(self) -> None:
        """Refuse a request where no queue has a place; before its body is read, this costs least."""
        if all(model.current.batcher.full for model in self.models):
            raise Refusal("overloaded", f"{self.waiting} items are waiting, as many as the queue holds: try again")

    @property
    def waiting(self) -> int:
        """Items that wait for a forward, of all models."""
        return sum(model.current.batcher.waiting for model in self.models)

    @property
    def waiting_tokens(self) -> int:
        """About how many tokens they have."""
        return sum(model.current.batcher.waiting_tokens for model in self.models)
