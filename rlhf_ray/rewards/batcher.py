"""Items of many callers, scored together: while one batch is in the model the next one fills.

Always true: every accepted item gets exactly one result or one error; batches keep to the token budget by an estimate that
never reads the tokenizer; callers are served in turn, so that one with many items cannot starve one with a single item;
what is not accepted is refused at once; what its caller gave up is never scored.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rlhf_ray.errors import RlhfRayError, ScoringError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

BYTES_PER_TOKEN = 3
"""A low estimate of UTF-8 bytes a token, so that token counts are rather over- than underestimated."""

Score = Callable[[Sequence[ScoreRequest]], Awaitable[Sequence[ScoreResult]]]


class OverloadedError(RlhfRayError):
    """The queue is full: come back later."""


@dataclass(eq=False)
class Waiting:
    """One item on its way into a batch."""

    request: ScoreRequest
    answer: asyncio.Future[ScoreResult]

    @property
    def tokens(self) -> int:
        """About how many tokens it has."""
        return estimated_tokens(self.request)


class FairQueue:
    """Items in order within a caller, callers in turn."""

    def __init__(self) -> None:
        self._callers: OrderedDict[object, deque[tuple[int, Waiting]]] = OrderedDict()
        self.items = 0

    def put(self, caller: object, waiting: Sequence[Waiting]) -> None:
        """Add a caller with its items, last in turn."""
        if waiting:
            self._callers[caller] = deque((one.tokens, one) for one in waiting)
            self.items += len(waiting)

    def drop(self, caller: object) -> None:
        """Forget what a caller still waits for."""
        self.items -= len(self._callers.pop(caller, ()))

    def take(self, max_tokens: int) -> list[Waiting]:
        """One item of each caller in turn, within the budget; a single item may be over it."""
        batch: list[Waiting] = []
        left = max_tokens
        while self._callers:
            caller, queue = self._callers.popitem(last=False)
            tokens, waiting = queue[0]
            if batch and tokens > left:
                self._callers[caller] = queue
                self._callers.move_to_end(caller, last=False)  # first in turn for the next batch
                break
            queue.popleft()
            self.items -= 1
            if queue:
                self._callers[caller] = queue  # last in turn
            if not waiting.answer.done():
                batch.append(waiting)
                left -= tokens
        return batch


class Batcher:
    """Collects items while a forward runs; one forward at a time."""

    def __init__(self, score: Score, *, max_tokens: int, max_items: int) -> None:
        self._score = score
        self._max_tokens = max_tokens
        self._max_items = max_items
        self._queue = FairQueue()
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that wait for a forward."""
        return self._queue.items

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        """Results of one caller's items, in order; raises :class:`OverloadedError` when they do not fit the queue."""
        if self._queue.items + len(requests) > self._max_items:
            raise OverloadedError(
                f"{self._queue.items} items are waiting and the queue holds {self._max_items}: try again"
            )
        loop, caller = asyncio.get_running_loop(), object()
        mine = [Waiting(request, loop.create_future()) for request in requests]
        self._queue.put(caller, mine)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return list(await asyncio.gather(*(waiting.answer for waiting in mine)))
        finally:
            self._queue.drop(caller)
            for waiting in mine:
                waiting.answer.cancel()  # of one that has its result already, this changes nothing

    async def _work(self) -> None:
        while batch := self._queue.take(self._max_tokens):
            try:
                results = await self._score([waiting.request for waiting in batch])
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
    """About how many tokens an item has, at least one; exact for token ids."""
    if request.token_ids is not None:
        return max(len(request.token_ids), 1)
    return 1 + sum(len(text.encode()) for _, text in request.texts()) // BYTES_PER_TOKEN
