"""What was recorded of one attempt of a run, as plain data.

Invariant: times are microseconds of the driver's monotonic clock, those of other machines too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

DRIVER = "driver"


@dataclass(frozen=True)
class Span:
    """Something that a process did or waited for. ``end`` is when it ended, or was last known to go on."""

    lane: str
    """``driver``, or role and rank, such as ``policy/0``."""
    name: str
    kind: str
    """``run``, ``phase``, ``step`` and ``wait`` of the driver; ``call`` of a rank, and ``beside`` what it did besides."""
    begin: int
    end: int
    call: str = ""
    """The call that a rank answers."""
    sent: int | None = None
    """When the driver sent that."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """What a wait was for: calls, and their names."""
    answered: Sequence[str] = ()
    """Those of them whose answers the driver had when the wait ended."""
    step: int | None = None
    thread: str = ""
    """Empty for the main thread of the driver."""
    inline: bool = False
    """Whether a rank answered in the driver's own process and thread, which waited meanwhile."""
    finished: bool = True
    failed: bool = False
    process: str = ""

    @property
    def role(self) -> str:
        """The role of the lane."""
        return role_of(self.lane)


@dataclass(frozen=True)
class Life:
    """One process of a lane: from ``born``, and what it did."""

    lane: str
    born: int
    spans: Sequence[Span]
    """In the order in which they began."""
    started: int = 0
    """When it first had a call to answer."""
    in_driver: bool = False
    """Whether it has no process of its own."""


@dataclass(frozen=True)
class Step:
    """A step, or an update of supervised training."""

    number: int
    begin: int
    end: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.begin) / 1e6


@dataclass(frozen=True)
class Attempt:
    """Everything that was recorded under one driver, up to ``until``."""

    name: str
    began: int
    until: int
    unix_offset: int
    """What the driver's clock is behind microseconds since 1970."""
    driver: Sequence[Span]
    """What the driver did, all threads and kinds, in the order in which it began."""
    lives: Sequence[Life]
    """The processes of ranks; several of a lane where one was started again."""
    damaged: int = 0
    """Lines that could not be read."""
    whole_since: int | None = None
    """From when on all is known: files keep their last part alone, each for another time. None where nothing was lost."""

    def steps(self) -> list[Step]:
        """The steps that ended, in their order; of one that was done again after going back the last time."""
        found = {
            span.step: Step(span.step, span.begin, span.end)
            for span in self.driver
            if span.kind == "step" and span.step is not None
        }
        return sorted(found.values(), key=lambda step: step.begin)

    def by_step(self) -> list[tuple[Step, Attempt]]:
        """Each step with what was under way in it alone, so that many steps are looked at in little time."""
        steps = self.steps()
        starts, ends = [step.begin for step in steps], [step.end for step in steps]
        driver: list[list[Span]] = [[] for _ in steps]
        lives: list[list[list[Span]]] = [[[] for _ in self.lives] for _ in steps]

        def during(span: Span) -> range:
            return range(bisect_right(ends, span.begin), bisect_left(starts, span.end))

        for span in self.driver:
            for number in during(span):
                driver[number].append(span)
        for place, life in enumerate(self.lives):
            for span in life.spans:
                for number in during(span):
                    lives[number][place].append(span)
        return [
            (
                step,
                replace(
                    self,
                    driver=own,
                    lives=[replace(life, spans=cut) for life, cut in zip(self.lives, ranks, strict=True)],
                ),
            )
            for step, own, ranks in zip(steps, driver, lives, strict=True)
        ]

    def lanes(self) -> dict[str, list[Life]]:
        """The lives of each lane, one after the other; lanes by role and rank."""
        found: dict[str, list[Life]] = {}
        for life in sorted(self.lives, key=lambda life: (_order(life.lane), life.born)):
            found.setdefault(life.lane, []).append(life)
        return found

    def calls(self) -> Iterator[Span]:
        """What ranks did for the driver."""
        return (span for life in self.lives for span in life.spans if span.kind == "call")


def role_of(lane: str) -> str:
    """The role of a lane."""
    return lane.partition("/")[0]


def _order(lane: str) -> tuple[str, int]:
    role, _, rank = lane.partition("/")
    return role, int(rank) if rank.isdecimal() else 0
