"""Batches the items of many callers: while one batch is in the model, the next one fills.

Invariants: every accepted item gets exactly one result or one error; a batch keeps to the token budget by an estimate that
needs no tokenizer; urgent items go first; callers take turns, so that one with many items or many requests cannot starve one
with a single item; an item that does not fit the queue is refused at once; an item whose caller gave up is never scored.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rlhf_ray.errors import RlhfRayError, ScoringError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

BYTES_PER_TOKEN = 3
"""A low estimate of UTF-8 bytes per token, so that token counts are overestimated rather than underestimated."""

Score = Callable[[Sequence[ScoreRequest]], Awaitable[Sequence[ScoreResult]]]
"""Scores one batch: one result per request, in order."""


class OverloadedError(RlhfRayError):
    """The queue is full: come back later."""


@dataclass(eq=False)
class Waiting:
    """One item that waits in the queue."""

    request: ScoreRequest
    answer: asyncio.Future[ScoreResult]
    tokens: int
    """An estimate of its length."""
    since: float = field(default_factory=time.monotonic)
    """When it came, in seconds of the monotonic clock."""
    on_forward: Callable[[], None] | None = None
    """Called when the item leaves the queue."""


class FairQueue:
    """A queue that keeps the order of one caller's items and gives one item of each caller in turn."""

    def __init__(self) -> None:
        self._callers: OrderedDict[object, deque[Waiting]] = OrderedDict()
        self.items = 0
        self.tokens = 0

    def put(self, caller: object, waiting: Sequence[Waiting]) -> None:
        """Add items of a caller, behind those it has already; a new caller comes last in turn."""
        if waiting:
            self._callers.setdefault(caller, deque()).extend(waiting)
            self._count(waiting, 1)

    def drop(self, caller: object, waiting: Iterable[Waiting]) -> None:
        """Remove those of these items of a caller that still wait."""
        queue = self._callers.get(caller)
        unwanted = set(map(id, waiting))
        dropped = [one for one in queue or () if id(one) in unwanted]
        if queue is None or not dropped:
            return
        self._count(dropped, -1)
        kept = deque(one for one in queue if id(one) not in unwanted)
        if kept:
            self._callers[caller] = kept
        else:
            del self._callers[caller]

    def take(self, max_tokens: int, *, at_least_one: bool = True) -> list[Waiting]:
        """Take one item of each caller in turn, within the budget; with ``at_least_one`` the first may be over it."""
        batch: list[Waiting] = []
        left = max_tokens
        while self._callers:
            caller, queue = self._callers.popitem(last=False)
            waiting = queue[0]
            if waiting.tokens > left and (batch or not at_least_one):
                self._callers[caller] = queue
                self._callers.move_to_end(caller, last=False)  # first in turn for the next batch
                break
            queue.popleft()
            self._count([waiting], -1)
            if queue:
                self._callers[caller] = queue  # last in turn
            if not waiting.answer.done():
                batch.append(waiting)
                left -= waiting.tokens
        return batch

    def _count(self, waiting: Sequence[Waiting], sign: int) -> None:
        self.items += sign * len(waiting)
        self.tokens += sign * sum(one.tokens for one in waiting)


class Batcher:
    """Collects items while forwards run; each of ``scorers``, which are replicas, runs one forward at a time.

    A batch has ``max_tokens`` at most, the queue ``max_items`` and ``max_queue_tokens``; ``on_batch`` is called with each
    batch that leaves the queue.
    """

    def __init__(
        self,
        *scorers: Score,
        max_tokens: int,
        max_items: int,
        max_queue_tokens: int | None = None,
        on_batch: Callable[[Sequence[Waiting]], None] = lambda _: None,
    ) -> None:
        self._scorers = scorers
        self._max_tokens = max_tokens
        self._max_items = max_items
        self._max_queue_tokens = max_queue_tokens
        self._on_batch = on_batch
        self._urgent, self._ordinary = FairQueue(), FairQueue()
        self._workers: dict[int, asyncio.Task[None]] = {}

    @property
    def waiting(self) -> int:
        """How many items wait for a forward."""
        return self._urgent.items + self._ordinary.items

    @property
    def full(self) -> bool:
        """Whether the queue has no room for another item."""
        return self.waiting >= self._max_items

    @property
    def waiting_tokens(self) -> int:
        """About how many tokens they have."""
        return self._urgent.tokens + self._ordinary.tokens

    async def score(
        self,
        requests: Sequence[ScoreRequest],
        *,
        caller: object = None,
        urgent: bool = False,
        on_forward: Callable[[], None] | None = None,
    ) -> list[ScoreResult]:
        """Results of one request's items, in order; raises :class:`OverloadedError` where they do not fit into the queue.

        Requests of one ``caller`` share its turn; without one, each request is a caller of its own. ``on_forward`` is
        called when the first item leaves the queue.
        """
        loop, caller = asyncio.get_running_loop(), object() if caller is None else caller
        items = [Waiting(request, loop.create_future(), estimated_tokens(request)) for request in requests]
        for waiting in items[:1]:
            waiting.on_forward = on_forward
        if not urgent:  # urgent items are few, and a training step waits for them
            self._refuse_overload(items)
        queue = self._urgent if urgent else self._ordinary
        queue.put(caller, items)
        self._start_workers(loop)
        try:
            return list(await asyncio.gather(*(waiting.answer for waiting in items)))
        finally:
            queue.drop(caller, items)
            for waiting in items:
                waiting.answer.cancel()  # no effect on an item that has its result

    async def drained(self) -> None:
        """Wait until nothing waits and no forward runs."""
        while workers := [worker for worker in self._workers.values() if not worker.done()]:
            await asyncio.wait(workers)

    def _refuse_overload(self, items: Sequence[Waiting]) -> None:
        if self.waiting + len(items) > self._max_items:
            raise OverloadedError(f"{self.waiting} items are waiting and the queue holds {self._max_items}: try again")
        tokens = sum(waiting.tokens for waiting in items)
        limit = self._max_queue_tokens
        if limit is not None and self.waiting_tokens and self.waiting_tokens + tokens > limit:
            raise OverloadedError(
                f"about {self.waiting_tokens} tokens are waiting and the queue holds {limit}: try again"
            )

    def _start_workers(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, score in enumerate(self._scorers):
            worker = self._workers.get(number)
            if worker is None or worker.done():
                self._workers[number] = loop.create_task(self._work(score))

    def _take(self) -> list[Waiting]:
        batch = self._urgent.take(self._max_tokens)
        left = self._max_tokens - sum(waiting.tokens for waiting in batch)
        return batch + self._ordinary.take(left, at_least_one=not batch)

    async def _work(self, score: Score) -> None:
        while batch := self._take():
            self._on_batch(batch)
            for waiting in batch:
                if waiting.on_forward is not None:
                    waiting.on_forward()
            try:
                results = await score([waiting.request for waiting in batch])
                if len(results) != len(batch):
                    raise ScoringError(f"{len(batch)} items were scored, but {len(results)} results came back")
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.answer.done():
                    waiting.answer.set_result(result)


def estimated_tokens(request: ScoreRequest) -> int:
    """An estimate of how many tokens an item has, at least one; exact for token ids."""
    if request.token_ids is not None:
        return max(len(request.token_ids), 1)
    return 1 + sum(len(text.encode()) for _, text in request.texts()) // BYTES_PER_TOKEN
