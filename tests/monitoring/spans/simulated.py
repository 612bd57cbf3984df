"""Steps whose true critical path is known: a driver and ranks whose times follow from how long each thing takes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_ray.monitoring.spans.records import Attempt, Life, Span

DELAY = 7
"""Microseconds that a call takes to its rank, and an answer to the driver."""


@dataclass(frozen=True)
class Work:
    """The driver works, in a phase."""

    phase: str


@dataclass(frozen=True)
class Send:
    """The driver calls all ranks of a role."""

    call: str
    role: str


@dataclass(frozen=True)
class Await:
    """The driver waits for a call."""

    call: str


Program = Sequence[Work | Send | Await]


@dataclass
class Ran:
    """What became of a program."""

    end: int
    driver: list[Span] = field(default_factory=list)
    lives: dict[str, list[Span]] = field(default_factory=dict)

    def attempt(self) -> Attempt:
        lives = [Life(lane, 0, tuple(spans)) for lane, spans in self.lives.items()]
        return Attempt("driver", 0, self.end, 0, sorted(self.driver, key=lambda span: span.begin), lives)


def program(draw: random.Random, ranks: Mapping[str, int], length: int = 12) -> Program:
    """Works, calls and waits in a random order; every call is waited for once."""
    steps: list[Work | Send | Await] = []
    open_calls: list[str] = []
    for number in range(length):
        kind = draw.choice(["work", "send", "send", "await"])
        if kind == "work":
            steps.append(Work(draw.choice(["rollout", "update", "scoring"])))
        elif kind == "send":
            open_calls.append(f"call {number}")
            steps.append(Send(open_calls[-1], draw.choice(sorted(ranks))))
        elif open_calls:
            steps.append(Await(open_calls.pop(draw.randrange(len(open_calls)))))
    return [*steps, *map(Await, open_calls), Work("update")]


def durations(draw: random.Random, steps: Program, ranks: Mapping[str, int]) -> dict[tuple[str, int], int]:
    """How long everything takes: the driver's works by their place in the program, and each rank's answer to each call."""
    lengths: dict[tuple[str, int], int] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Work):
            lengths["driver", place] = draw.randrange(1_000, 1_000_000)
        elif isinstance(step, Send):
            lengths |= {(step.call, rank): draw.randrange(1_000, 3_000_000) for rank in range(ranks[step.role])}
    return lengths


def run(steps: Program, ranks: Mapping[str, int], lengths: Mapping[tuple[str, int], int]) -> Ran:
    """Run it: ranks answer one call after the other, in the order in which they were sent."""
    now, ran = 0, Ran(0, lives={f"{role}/{rank}": [] for role, count in ranks.items() for rank in range(count)})
    free = dict.fromkeys(ran.lives, 0)
    ends: dict[str, int] = {}
    names: dict[str, str] = {}
    for place, step in enumerate(steps):
        if isinstance(step, Work):
            ran.driver.append(Span("driver", step.phase, "phase", now, now + lengths["driver", place]))
            now += lengths["driver", place]
        elif isinstance(step, Send):
            names[step.call] = f"{step.role}.work"
            for rank in range(ranks[step.role]):
                lane = f"{step.role}/{rank}"
                begin = max(now + DELAY, free[lane])
                free[lane] = begin + lengths[step.call, rank]
                span = Span(lane, "work", "call", begin, free[lane], call=step.call, sent=now, process=lane)
                ran.lives[lane].append(span)
                ends[step.call] = max(ends.get(step.call, 0), free[lane])
        else:
            until = max(now, ends[step.call] + DELAY)
            wait = Span("driver", names[step.call], "wait", now, until, calls={step.call: names[step.call]})
            ran.driver.append(wait)
            now = until
    ran.end = now
    return ran
