"""What is overdue is decided by its own median and the floor; what goes on, or is only slow below the floor, is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.monitoring.stalls import (
    FACTOR,
    KEPT,
    CallBook,
    Durations,
    Limits,
    OpenCall,
    OpenPhase,
    Verdict,
    judge,
    seeded,
)

LIMITS = Limits(floor_s=60.0, unknown_s=600.0)
PHASE = OpenPhase("update", 1000.0, 20.0)
CALL = OpenCall("policy", "accumulate", 1000.0, 20.0, (1,))
seconds = st.floats(0.0, 5000.0)
usual = st.one_of(st.none(), seconds)


def at(now: float, phases=(PHASE,), calls=(CALL,), progress_at: float = 0.0, noticed=()) -> Verdict:
    return judge(now, phases, calls, progress_at=progress_at, limits=LIMITS, noticed=noticed)


def test_a_call_is_given_up_after_six_medians_and_not_before() -> None:
    assert at(1119.0) == Verdict()
    assert at(1120.0) == Verdict(notice=(PHASE,), give_up=(CALL,))
    assert at(1120.0, noticed=[PHASE]) == Verdict(give_up=(CALL,)), "stacks are written once"


def test_ten_times_a_short_median_is_below_the_floor() -> None:
    short, call = replace(PHASE, usual_s=2.0), replace(CALL, usual_s=2.0)
    assert at(1020.0, [short], [call]) == Verdict()
    assert at(1060.0, [short], [call]).give_up == (call,)


def test_the_first_of_its_kind_has_the_time_of_any_call() -> None:
    first, call = replace(PHASE, usual_s=None), replace(CALL, usual_s=None)
    assert at(1599.0, [first], []) == Verdict() and at(1600.0, [first], []).end_driver
    assert at(5000.0, [first], [call]).give_up == (), "its own deadline ends a call of which no median is known"
    assert at(1120.0, [PHASE], [call]) == Verdict(notice=(PHASE,)), "nor does the driver end that waits for one"


def test_in_a_phase_of_which_no_median_is_known_calls_have_their_own_deadlines() -> None:
    """The first evaluation asks for more answers in a call than the self-check did, whose calls the median knows."""
    first = replace(PHASE, usual_s=None)
    assert at(5000.0, [first]) == Verdict(notice=(first,))
    assert at(5000.0, [first, replace(PHASE, name="inner")]).give_up == (CALL,)


def test_a_long_phase_of_short_calls_goes_on() -> None:
    young = replace(CALL, began_at=1200.0)
    assert at(1250.0, calls=[young]) == Verdict(notice=(PHASE,))


def test_a_late_call_in_a_phase_that_is_in_time_is_left_alone() -> None:
    """Such as one of the background, for which nobody waits yet."""
    assert at(1300.0, [replace(PHASE, entered_at=1290.0)]) == Verdict()


def test_the_driver_ends_only_if_it_waits_for_no_call_and_nothing_shows_progress() -> None:
    assert "no progress for 120 s" in at(1120.0, calls=[]).end_driver
    assert at(1120.0, calls=[], progress_at=1001.0).end_driver == ""
    assert at(1121.0, calls=[], progress_at=1001.0).end_driver
    assert at(1120.0, calls=[replace(CALL, began_at=1119.0)]).end_driver == ""


def test_a_call_that_was_given_up_and_does_not_end_takes_the_driver_with_it() -> None:
    given_up = replace(CALL, given_up_at=1120.0)
    assert at(1179.0, calls=[given_up], noticed=[PHASE]) == Verdict()
    assert "policy.accumulate" in at(1180.0, calls=[given_up]).end_driver


@given(now=seconds, began=seconds, phase_usual=usual, call_usual=usual, entered=seconds, floor=st.floats(1.0, 100.0))
def test_nothing_is_ever_ended_below_the_floor_or_six_medians(
    now, began, phase_usual, call_usual, entered, floor
) -> None:
    phase, call = OpenPhase("update", entered, phase_usual), replace(CALL, began_at=began, usual_s=call_usual)
    limits = Limits(floor, 600.0)
    for calls in ([call], []):
        verdict = judge(now, [phase], calls, progress_at=0.0, limits=limits)
        if verdict.notice or verdict.give_up or verdict.end_driver:
            assert now - entered >= max(floor if phase_usual is not None else 600.0, FACTOR * (phase_usual or 0.0))
        if verdict.give_up:
            assert now - began >= max(floor, FACTOR * call_usual)
        assert not (verdict.end_driver and calls)


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=60))
def test_the_median_is_that_of_the_last_durations(values: list[float]) -> None:
    durations = Durations()
    for value in values:
        durations.add("update", value)
    last = sorted(values[-KEPT:])
    assert durations.median("update") == pytest.approx((last[(len(last) - 1) // 2] + last[len(last) // 2]) / 2)
    assert durations.median("rollout") is None


def test_a_resumed_run_knows_the_times_of_its_earlier_attempts() -> None:
    durations = seeded({"step": step, "time/update": float(step), "reward/learned": None} for step in range(1, 31))
    assert durations.median("update") == 20.5 and durations.median("reward/learned") is None


def test_the_book_holds_a_call_until_all_have_answered_or_nobody_asks_any_more() -> None:
    book, missing = CallBook("policy"), {"a": (0, 1), "b": (1,), "c": (0,)}
    first, second, failed = (book.begin("accumulate", [name], 10.0) for name in missing)
    assert [call.missing for call in book.open(lambda handles: missing[handles[0]], 12.0)] == [(0, 1), (1,), (0,)]
    book.fail(failed)
    missing["a"] = ()
    (call,) = book.open(lambda handles: missing[handles[0]], 14.0)
    assert (call.number, call.missing, call.usual_s) == (second.number, (1,), 4.0), (
        "that of the first, which was there at 14"
    )
    book.end(first, 99.0)  # its values are read later than they came, which was known before
    book.give_up(second.number, 15.0)
    (call,) = book.open(lambda handles: missing[handles[0]], 16.0)
    assert (call.usual_s, call.given_up_at) == (4.0, 15.0)
    loads = book.begin("setup", ["a"], 10.0, usual=False)
    book.end(loads, 11.0)
    loads = book.begin("setup", ["c"], 20.0, usual=False)
    assert [one.usual_s for one in book.open(lambda handles: missing[handles[0]], 21.0) if one.method == "setup"] == [
        None
    ]
    del second, loads
    assert book.open(lambda handles: missing[handles[0]], 20.0) == []
