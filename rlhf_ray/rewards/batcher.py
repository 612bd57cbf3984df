"""Items of many callers, scored together: while one batch is in the model the next one fills.

Always true: every accepted item gets exactly one result or one error; batches keep to the token budget by an estimate that
never reads the tokenizer; callers are served in turn, so that one with many items cannot starve one with a single item;
what is not accepted is refused at once.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

BYTES_PER_TOKEN = 3
"""A low estimate of UTF-8 bytes a token, so that token counts are rather over- than underestimated."""

Score = Callable[[Sequence[ScoreRequest]], Awaitable[Sequence[ScoreResult]]]


class OverloadedError(RlhfRayError):
    """The queue is full: come back later."""


@dataclass(eq=False)
class _Waiting:
    request: ScoreRequest
    tokens: int
    answer: asyncio.Future[ScoreResult]


class FairQueue:
    """Items in order within a caller, callers in turn."""

    def __init__(self) -> None:
        self._callers: OrderedDict[object, deque[_Waiting]] = OrderedDict()
        self.items = 0

    def put(self, caller: object, waiting: _Waiting) -> None:
        self._callers.setdefault(caller, deque()).append(waiting)
        self.items += 1

    def take(self, max_tokens: int) -> list[_Waiting]:
        """One item of each caller in turn, within the budget (a single item may be over it); those given up are dropped."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._callers:
            caller, queue = next(iter(self._callers.items()))
            if queue[0].answer.done():
                self._pop(caller)
                continue
            if batch and tokens + queue[0].tokens > max_tokens:
                break
            tokens += queue[0].tokens
            batch.append(self._pop(caller))
        return batch

    def _pop(self, caller: object) -> _Waiting:
        queue = self._callers.pop(caller)
        waiting = queue.popleft()
        self.items -= 1
        if queue:
            self._callers[caller] = queue  # last in turn
        return waiting


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
        caller = object()
        loop = asyncio.get_running_loop()
        mine = [_Waiting(request, estimated_tokens(request), loop.create_future()) for request in requests]
        for waiting in mine:
            self._queue.put(caller, waiting)
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._work())
        try:
            return list(await asyncio.gather(*(waiting.answer for waiting in mine)))
        except BaseException:
            for waiting in mine:
                waiting.answer.cancel()
            raise

    async def _work(self) -> None:
        while batch := self._queue.take(self._max_tokens):
            try:
                results = await self._score([waiting.request for waiting in batch])
                for waiting, result in zip(batch, results, strict=True):
                    if not waiting.answer.done():
                        waiting.answer.set_result(result)
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)


def estimated_tokens(request: ScoreRequest) -> int:
    """About how many tokens an item has; exact for token ids."""
    if request.token_ids is not None:
        return len(request.token_ids)
    texts = [request.text, request.prompt, request.response]
    texts += [str(message.get("content", "")) for message in request.messages or ()]
    return 1 + sum(len(text.encode()) for text in texts if text) // BYTES_PER_TOKEN
