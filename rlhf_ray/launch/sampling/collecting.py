"""Has prompts answered while answers that are there are scored and kept: engines, rewards and the disk work at once.

Invariants: every prompt ends in one call of ``finish``, or is returned as set aside; ``finish`` is called by one thread at a
time, in the order in which prompts end; its first error ends the whole. Engines always have more to do than they can at once,
and no more prompts are begun while many wait to be finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

from rlhf_ray.rollout.fleet import Answered
from rlhf_ray.rollout.requests import GenerationRequest

AT_ONCE = 64
"""Prompts that are finished together at most: few enough that a reward model answers soon, and that little is lost."""
UNFINISHED = 4 * AT_ONCE
"""Prompts that wait to be finished from which on no further ones are begun."""
WAIT_S = 1.0
"""How long it waits for what is being finished before it looks again."""


class Sampling(Protocol):
    """What samples: a :class:`rlhf_ray.rollout.fleet.Pump`."""

    def give(self, number: int, requests: Sequence[GenerationRequest]) -> None:
        """Add a prompt."""

    def turn(self) -> list[Answered]:
        """Sample for a moment; returns the prompts that ended."""


def answer_all(
    pump: Sampling,
    prompts: Sequence[Sequence[GenerationRequest]],
    finish: Callable[[Sequence[Answered]], None],
    *,
    in_work: int,
) -> Iterator[Answered]:
    """Yield every prompt once it has been answered; ``prompts`` are the requests of each.

    ``in_work`` prompts are begun at once. One that was set aside is yielded without generations, and not finished.
    """
    left, given = deque(enumerate(prompts)), 0
    ended, finishing = list[Answered](), deque[tuple[int, Future[None]]]()
    thread = ThreadPoolExecutor(1, "finish")
    try:
        while left or given or ended or finishing:
            waiting = len(ended) + sum(count for count, _ in finishing)
            while left and given < in_work and waiting < UNFINISHED:
                pump.give(*left.popleft())
                given += 1
            if given:
                new = pump.turn()
                given -= len(new)
                ended += [one for one in new if one.generations]
                yield from new
            elif finishing:
                wait([finishing[0][1]], timeout=WAIT_S)
            while finishing and finishing[0][1].done():
                finishing.popleft()[1].result()
            while ended and not finishing:
                batch, ended = ended[:AT_ONCE], ended[AT_ONCE:]
                finishing.append((len(batch), thread.submit(finish, batch)))
    finally:
        thread.shutdown(wait=False, cancel_futures=True)
