"""What every lane did in one step, and the works that took longest, as the report and the live view show them.

Invariants: a lane that did no work in the step is left out, the driver's never. Works are numbered from the longest; where
there are more of them than numbers, all others share the last number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.monitoring.spans.lanes import WORK, Piece, driver_pieces, lane_pieces
from rlhf_ray.monitoring.spans.records import DRIVER, Attempt, Step, role_of

OTHER_WORK = "other work"
Lanes = Mapping[str, Sequence[Piece]]


@dataclass(frozen=True)
class StepLanes:
    """A step and what every lane did in it."""

    step: Step
    lanes: Lanes


def step_pieces(attempt: Attempt, step: Step) -> dict[str, list[Piece]]:
    """The pieces of each lane, the driver's first."""
    driver = driver_pieces(attempt.driver, step.begin, step.end)
    lanes = {lane: lane_pieces(lives, driver, step.begin, step.end) for lane, lives in attempt.lanes().items()}
    return {DRIVER: driver, **{lane: own for lane, own in lanes.items() if any(piece.kind == WORK for piece in own)}}


def work_name(lane: str, piece: Piece) -> str:
    """The name of a work: its role and what it did; of the driver alone that it was the driver."""
    return DRIVER if lane == DRIVER else f"{role_of(lane)}.{piece.name}"


def numbered(steps: Iterable[Lanes], count: int) -> dict[str, int]:
    """A number below ``count`` for each of the works that took longest."""
    lengths: dict[str, int] = {}
    for lanes in steps:
        for lane, pieces in lanes.items():
            for piece in pieces:
                if piece.kind == WORK:
                    name = work_name(lane, piece)
                    lengths[name] = lengths.get(name, 0) + piece.length
    longest = sorted(lengths, key=lambda name: -lengths[name])
    named = longest if len(longest) <= count else longest[: count - 1]
    return {name: number for number, name in enumerate(named)} | ({OTHER_WORK: count - 1} if named != longest else {})
