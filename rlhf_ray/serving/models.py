"""The models that a service scores with: each has versions, each version replicas and one queue in front of them.

Invariants: all items of a request are scored by one version; a new version takes new requests while the old one answers
those it has, so that none is dropped; a replica that fails is brought back, however often and however long that takes, and
takes no batch meanwhile; a request is held for ``hold_s`` before that costs it its scores; a batch whose reward group died is
scored again, whole, once the group is back, and in halves if that one died too, for as long as requests are held, so that an
item that kills its group costs only itself its score; a score is never made up.
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
from rlhf_ray.errors import GroupError, RlhfRayError
from rlhf_ray.rewards.batcher import Batcher, Waiting
from rlhf_ray.rewards.request import PROBE, ScoreRequest, ScoreResult
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.recovery import Recovery
from rlhf_ray.serving.refusals import Refusal

TRIES_OF_A_BATCH, TRIES_OF_AN_ITEM = 2, 3
"""Cut a batch into halves after the group has died of it this often; of a half once is enough. An item alone is blamed only
after more deaths, since a group may have been killed from outside, more than once."""
SECONDS_BETWEEN_LOOKS = 1.0
"""At a queue whose replica is being brought back, for whether anybody still waits."""


class Backend(Protocol):
    """One replica of a reward model."""

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result per request, in order; raises :class:`GroupError` where the replica failed."""

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item in tokens."""

    restarts: bool
    """Whether it can come back after a failure."""

    async def restart(self) -> None:
        """Come back after a failure; raises where that fails, and may then be called again."""

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
        self._recoveries = [
            Recovery(model, backend.restart, on_attempt=metrics.restarts.labels(model).inc, clock=clock)
            for backend in self.backends
        ]
        self._probe: asyncio.Task[bool] | None = None
        self.batcher = Batcher(
            *(partial(self._score, *replica) for replica in zip(self.backends, self._recoveries, strict=True)),
            max_tokens=limits.batch_tokens,
            max_items=limits.queue_items,
            max_queue_tokens=limits.queue_tokens,
            on_batch=self._count_batch,
            ready=[partial(self._up, recovery) for recovery in self._recoveries],
        )

    @property
    def down(self) -> int:
        """How many replicas are being brought back."""
        return sum(recovery.down for recovery in self._recoveries)

    async def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        caller: object = None,
        urgent: bool = False,
        on_forward: Callable[[], None] | None = None,
    ) -> list[ScoreResult]:
        """Results in order, as :meth:`Batcher.score`; :class:`GroupError` where all replicas are down for ``hold_s``."""
        hold_s, arrived = self._limits.hold_s, self._clock()
        scoring = asyncio.ensure_future(
            self.batcher.score(requests, caller=caller, urgent=urgent, on_forward=on_forward)
        )
        try:
            while not scoring.done():
                down_since = max(recovery.down_since for recovery in self._recoveries)  # infinite while one is up
                left = hold_s if math.isinf(down_since) else max(arrived, down_since) + hold_s - self._clock()
                if left <= 0 and not math.isinf(down_since):
                    raise GroupError("reward", None, "restart", "it did not come back in time")
                await asyncio.wait({scoring}, timeout=left if left > 0 else SECONDS_BETWEEN_LOOKS)
            return scoring.result()
        finally:
            scoring.cancel()

    def is_down(self, backend: Backend) -> bool:
        """Whether a replica is being brought back."""
        return self._recoveries[self.backends.index(backend)].down

    def recover(self, backend: Backend) -> None:
        """Bring a replica back that was seen to fail, unless that is under way or nobody here can."""
        if backend.restarts:
            self._recoveries[self.backends.index(backend)].begin()

    async def _up(self, recovery: Recovery) -> None:
        """Return when the replica is up, or nothing waits for it."""
        while recovery.down and self.batcher.waiting:
            await recovery.up(SECONDS_BETWEEN_LOOKS)

    def _count_batch(self, batch: Sequence[Waiting]) -> None:
        self._metrics.batch(batch, time.monotonic())

    async def _score(
        self, backend: Backend, recovery: Recovery, requests: Sequence[ScoreRequest]
    ) -> Sequence[ScoreResult]:
        """Results of one batch; where the replica fails, those of other attempts once it is back."""
        deadline = self._clock() + self._limits.hold_s
        return await self._try(backend, recovery, requests, deadline, tries=TRIES_OF_A_BATCH)

    async def _try(
        self, backend: Backend, recovery: Recovery, requests: Sequence[ScoreRequest], deadline: float, *, tries: int
    ) -> Sequence[ScoreResult]:
        for _ in range(tries if len(requests) > 1 else TRIES_OF_AN_ITEM):
            try:
                return await self._forward(backend, requests)
            except GroupError as error:
                get_logger("serving").error("%s: %s", self.model, error)
                self.recover(backend)
                if self._limits.hold_s == 0:
                    raise
                await recovery.back(deadline)
                cause = error.cause.partition("\n")[0]
        if len(requests) > 1:
            middle = len(requests) // 2
            halves = requests[:middle], requests[middle:]
            return [result for half in halves for result in await self._try(backend, recovery, half, deadline, tries=1)]
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

    async def ready(self, within_s: float, timeout_s: float) -> bool:
        """Whether it gave a score in the last ``within_s`` seconds, or scores one token within ``timeout_s``."""
        if self.down == len(self.backends):
            return False
        if self._clock() - self.last_score <= within_s:
            return True
        if self._probe is None or self._probe.done():  # one probe for all who ask
            self._probe = asyncio.create_task(self._scores_one_token())
        await asyncio.wait({self._probe}, timeout=timeout_s)
        return self._probe.done() and self._probe.result()

    async def _scores_one_token(self) -> bool:
        try:
            (result,) = await self.score([PROBE], urgent=True)
        except RlhfRayError:
            return False
        return result.error is None

    async def close(self) -> None:
        """Answer what waits, then free the replicas."""
        await self.batcher.drained()
        for recovery in self._recoveries:
            recovery.cancel()
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

    @property
    def replicas(self) -> int:
        """Replicas of the newest version."""
        return len(self.current.backends)

    @property
    def down(self) -> int:
        """How many of them are being brought back."""
        return self.current.down

    def replace(self, backends: Sequence[Backend]) -> asyncio.Task[None]:
        """Serve a new version from now on; the task ends when the old one has answered what it had, and is freed."""
        old, self.current = self.current, self._next_version(backends)
        self._metrics.reloads.labels(self.name).inc()
        get_logger("serving").info("%s: version %s takes requests from now on", self.name, self.current.name)
        closing = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        return closing


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

    def refuse_when_full(self, caller: str) -> None:
        """Refuse a request where no queue has a place for ``caller``; before its body is read, this costs least."""
        if all(model.current.batcher.full(caller) for model in self.models):
            raise Refusal("overloaded", f"{self.waiting} items are waiting, as many as the queue holds: try again")

    @property
    def replicas(self) -> int:
        """Replicas of all models."""
        return sum(model.replicas for model in self.models)

    @property
    def down(self) -> int:
        """Replicas that are being brought back."""
        return sum(model.down for model in self.models)

    @property
    def waiting(self) -> int:
        """Items that wait for a forward, of all models."""
        return sum(model.current.batcher.waiting for model in self.models)

    @property
    def waiting_tokens(self) -> int:
        """About how many tokens they have."""
        return sum(model.current.batcher.waiting_tokens for model in self.models)
