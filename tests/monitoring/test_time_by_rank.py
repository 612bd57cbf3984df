"""Why a step was slow: by the last attempt that ended a step, and by steps of which nothing is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from rlhf_ray.monitoring.report.lanes import CUT, time_by_rank
from rlhf_ray.monitoring.spans.records import Attempt, Life, Span


def attempt(seconds: Mapping[int, int], name: str = "driver") -> Attempt:
    """Steps one after the other, each of so many seconds, in which a rank works for all but one."""
    driver, calls, now = list[Span](), list[Span](), 0
    for step, length in seconds.items():
        end = now + length * 1_000_000
        call = f"{name} {step}"
        waits = {call: "policy.apply"}
        driver.append(Span("driver", "step", "step", now, end, step=step))
        driver.append(Span("driver", "policy.apply", "wait", now, end, calls=waits, answered=[call]))
        calls.append(Span("policy/0", "apply", "call", now, end - 1_000_000, call=call, sent=now))
        now = end
    return Attempt(name, 0, now, 0, driver, [Life("policy/0", 0, calls)])


def test_without_a_step_that_ended_there_are_no_lanes() -> None:
    assert time_by_rank([]) is None and time_by_rank([attempt({})]) is None


def test_the_lanes_are_those_of_the_last_attempt_that_ended_a_step() -> None:
    shown = time_by_rank([attempt({1: 90, 2: 4}), attempt({3: 4, 4: 20, 5: 5}), attempt({})])
    assert shown is not None and shown.answer.startswith(
        "The slowest recorded step, 4, took 20 s, the usual one, 5, 5 s."
    )
    assert [share for _, share, _ in shown.idle] == [pytest.approx(3 / 29)], "and so is what its ranks waited for"
    assert shown.note == ""


def test_steps_older_than_what_every_file_holds_are_left_out() -> None:
    """The rank's file lacks what it did in the first step, which looks like a wait and is the slowest."""
    whole = attempt({1: 30, 2: 4, 3: 9, 4: 5})
    (rank,) = whole.lives
    for lost, slowest in ((0, 1), (1, 3), (3, 4)):
        since = whole.steps()[lost].begin if lost else None
        shown = time_by_rank([replace(whole, lives=[replace(rank, spans=rank.spans[lost:])], whole_since=since)])
        assert shown is not None and shown.answer.startswith(f"The slowest recorded step, {slowest},")
        assert shown.note == "" and all(lane.note.startswith("works") for lane in shown.steps[0].lanes)
        times = [step.seconds for step in whole.steps()[lost:]]
        assert [share for _, share, _ in shown.idle] == [pytest.approx(len(times) / sum(times))]


def test_where_no_step_is_whole_all_count_and_the_report_says_so() -> None:
    whole = attempt({1: 30, 2: 4})
    shown = time_by_rank([replace(whole, whole_since=whole.until - 1, damaged=2)])
    assert shown is not None and shown.answer.startswith("The slowest recorded step, 1, took 30 s")
    assert shown.note == f"2 damaged lines of the spans were left out. {CUT}"


def test_a_step_that_took_no_time_has_an_answer() -> None:
    shown = time_by_rank([Attempt("driver", 0, 5, 0, [Span("driver", "step", "step", 5, 5, step=1)], [])])
    assert shown is not None and shown.answer == "The slowest recorded step, 1, took 0 s."
