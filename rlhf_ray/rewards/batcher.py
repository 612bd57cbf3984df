"""Batches the items of many callers: while one batch is in the model, the next one fills.

Invariants: every accepted item gets exactly one result or one error; a batch keeps to the token budget by an estimate that
needs no tokenizer; urgent items go first; callers take turns, so that one with many items or many requests cannot starve one
with a single item; an item that does not fit the queue is refused at once, but what one caller has waiting never costs another
a place; an item whose caller gave up is never scored.
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

    def share(self, caller: object) -> tuple[int, int, int]:
        """How many items and tokens of a caller wait, and among how many callers the queue is shared, this one included."""
        own = self._callers.get(caller, ())
        return len(own), sum(one.tokens for one in own), len(self._callers) + (caller not in self._callers)

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

    A batch has ``max_tokens`` at most, the queue ``max_items`` and ``max_queue_tokens``. A named caller that has no more than
    its share of these, with all callers that wait, is let in beyond them, up to twice as many. ``on_batch`` is called with each
    batch that leaves the queue; a scorer takes none before its ``ready`` returns, where that is given.
    """

    def __init__(
        self,
        *scorers: Score,
        max_tokens: int,
        max_items: int,
        max_queue_tokens: int | None = None,
        on_batch: Callable[[Sequence[Waiting]], None] = lambda _: None,
        ready: Sequence[Callable[[], Awaitable[None]]] = (),
    ) -> None:
        self._scorers = scorers
        self._ready = ready
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

    def full(self, caller: object = None) -> bool:
        """Whether the queue has no room for another item of ``caller``."""
        return not self._items_fit(caller, 1)

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
        loop = asyncio.get_running_loop()
        items = [Waiting(request, loop.create_future(), estimated_tokens(request)) for request in requests]
        for waiting in items[:1]:
            waiting.on_forward = on_forward
        if not urgent:  # urgent items are few, and a training step waits for them
            self._refuse_overload(caller, items)
        caller = object() if caller is None else caller
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

    def _refuse_overload(self, caller: object, items: Sequence[Waiting]) -> None:
        if not self._items_fit(caller, len(items)):
            raise OverloadedError(f"{self.waiting} items are waiting and the queue holds {self._max_items}: try again")
        if not self._tokens_fit(caller, sum(waiting.tokens for waiting in items)):
            raise OverloadedError(
                f"about {self.waiting_tokens} tokens are waiting and the queue holds {self._max_queue_tokens}: try again"
            )

    def _items_fit(self, caller: object, more: int) -> bool:
        """Whether so many more items of ``caller`` fit into the queue, or into its share of the queue."""
        own, _, callers = self._ordinary.share(caller)
        return _fits(self.waiting, more, own, 0 if caller is None else callers, self._max_items)

    def _tokens_fit(self, caller: object, more: int) -> bool:
        if self._max_queue_tokens is None or not self.waiting_tokens:  # one request may have any number of them
            return True
        _, own, callers = self._ordinary.share(caller)
        return _fits(self.waiting_tokens, more, own, 0 if caller is None else callers, self._max_queue_tokens)

    def _start_workers(self, loop: asyncio.AbstractEventLoop) -> None:
        for number, score in enumerate(self._scorers):
            worker = self._workers.get(number)
            if worker is None or worker.done():
                ready = self._ready[number] if self._ready else _at_once
                self._workers[number] = loop.create_task(self._work(score, ready))

    def _take(self) -> list[Waiting]:
        batch = self._urgent.take(self._max_tokens)
        left = self._max_tokens - sum(waiting.tokens for waiting in batch)
        return batch + self._ordinary.take(left, at_least_one=not batch)

    async def _work(self, score: Score, ready: Callable[[], Awaitable[None]]) -> None:
        while True:
            await ready()
            if not (batch := self._take()):
                return
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


async def _at_once() -> None:
    """What a scorer that is always ready waits for."""


def _fits(waiting: int, more: int, own: int, callers: int, limit: int) -> bool:
    """Whether ``more`` fits beside what waits; ``callers`` is 0 where the caller has no share of its own."""
    if waiting + more <= limit:
        return True
    return callers > 0 and own + more <= limit // callers and waiting + more <= 2 * limit


def estimated_tokens(request: ScoreRequest) -> int:
    """An estimate of how many tokens an item has, at least one; exact for token ids."""
    if request.token_ids is not None:
        return max(len(request.token_ids), 1)
    return 1 + request.written_bytes() // BYTES_PER_TOKEN
