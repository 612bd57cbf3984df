"""The pieces of a lane fill every interval without a gap, and agree with a slow count, moment by moment."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from rlhf_ray.monitoring.spans.lanes import (
    AWAY,
    ON_ITS_WAY,
    OUTSIDE,
    STARTING,
    WAIT,
    WORK,
    driver_pieces,
    idle_shares,
    lane_pieces,
)
from rlhf_ray.monitoring.spans.records import Attempt, Life, Span
from tests.monitoring.spans.simulated import durations, program, run

RANKS = {"policy": 2, "rollout": 2}


def small(seed: int) -> Attempt:
    """A run of a few dozen moments."""
    draw = random.Random(seed)
    steps = program(draw, RANKS)
    lengths = {key: 1 + length % 9 for key, length in durations(draw, steps, RANKS).items()}
    attempt = run(steps, RANKS, lengths).attempt()
    born = {life.lane: draw.randrange(0, 12) for life in attempt.lives}
    lives = [
        replace(life, born=born[life.lane], started=life.spans[0].begin if life.spans else 0) for life in attempt.lives
    ]
    return replace(attempt, lives=[replace(life, born=min(life.born, life.started)) for life in lives])


@pytest.mark.parametrize("seed", range(60))
def test_pieces_fill_an_interval_and_are_what_a_count_of_every_moment_says(seed: int) -> None:
    attempt = small(seed)
    begin, end = 3, attempt.until - 2
    driver = driver_pieces(attempt.driver, begin, end)
    for lives in [None, *attempt.lanes().values()]:
        pieces = driver if lives is None else lane_pieces(lives, driver, begin, end)
        assert pieces[0].begin == begin and pieces[-1].end == end
        assert all(one.end == other.begin for one, other in pairwise(pieces)) and all(
            piece.length > 0 for piece in pieces
        )
        for moment in range(begin, end):
            (piece,) = [piece for piece in pieces if piece.begin <= moment < piece.end]
            if lives is None:
                inside = [span for span in attempt.driver if span.begin <= moment < span.end]
                waits = [span for span in inside if span.kind == "wait"]
                assert piece.kind == (WAIT if waits else WORK)
                assert piece.name == (waits[0].name if waits else inside[0].name if inside else OUTSIDE)
            else:
                (life,) = lives
                at_work = [span.name for span in life.spans if span.begin <= moment < span.end]
                expected = (
                    WORK if at_work else AWAY if moment < life.born else STARTING if moment < life.started else WAIT
                )
                assert piece.kind == expected and (not at_work or piece.name == at_work[0])


@pytest.mark.parametrize("seed", range(20))
def test_the_idle_share_is_that_of_all_moments_of_all_ranks(seed: int) -> None:
    attempt = small(seed)
    begin, end = 2, attempt.until
    for role, share in idle_shares(attempt, begin, end).items():
        lived = worked = 0
        for life in attempt.lives:
            if life.lane.startswith(role):
                moments = range(max(life.born, begin), end)
                lived += len(moments)
                worked += sum(any(span.begin <= moment < span.end for span in life.spans) for moment in moments)
        assert share == pytest.approx(1 - worked / lived)


def wait(begin: int, end: int, **calls: str) -> Span:
    return Span("driver", "", "wait", begin, end, calls=calls)


def test_an_idle_rank_says_for_whom_it_waits() -> None:
    """For another role's call, for its peers, for its own call, for the driver's work: each by its name."""
    own = Span("policy/0", "accumulate", "call", 30, 50, call="mine")
    driver = [
        wait(0, 10, other="rollout.generate"),
        Span("driver", "update", "phase", 10, 70),
        wait(20, 60, mine="policy.accumulate"),
    ]
    pieces = lane_pieces([Life("policy/0", 0, [own])], driver_pieces(driver, 0, 80), 0, 80)
    assert [(piece.kind, piece.name, piece.begin) for piece in pieces] == [
        (WAIT, "rollout.generate", 0),
        (WAIT, "driver: update", 10),
        (WAIT, ON_ITS_WAY, 20),
        (WORK, "accumulate", 30),
        (WAIT, "other ranks: policy.accumulate", 50),
        (WAIT, "driver: update", 60),
        (WAIT, f"driver: {OUTSIDE}", 70),
    ]


def test_a_process_that_was_started_again_takes_its_lane_over() -> None:
    first = Life("rollout/0", 0, [Span("rollout/0", "generate", "call", 5, 20, call="a")], started=5)
    second = Life("rollout/0", 30, [Span("rollout/0", "setup", "call", 40, 60, call="b")], started=40)
    pieces = lane_pieces([first, second], driver_pieces([], 0, 70), 0, 70)
    assert [(piece.kind, piece.begin, piece.end) for piece in pieces] == [
        (STARTING, 0, 5), (WORK, 5, 20), (WAIT, 20, 30), (STARTING, 30, 40), (WORK, 40, 60), (WAIT, 60, 70),
    ]  # fmt: skip


def test_what_a_rank_does_beside_its_calls_is_no_work() -> None:
    beside = Span("policy/0", "saved", "beside", 0, 50, call="a")
    attempt = Attempt("d", 0, 50, 0, [], [Life("policy/0", 0, [beside])])
    assert idle_shares(attempt, 0, 50) == {"policy": 1.0}
