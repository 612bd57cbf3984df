"""The parts of a critical path follow one another through the whole step, and nothing off it has held the step up."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from rlhf_ray.monitoring.spans.critical_path import DELIVERY, by_label, by_role, critical_path, slower_than
from rlhf_ray.monitoring.spans.records import Attempt, Life, Span
from tests.monitoring.spans.simulated import Await, Send, Work, durations, program, run

RANKS = {"policy": 2, "critic": 1, "rollout": 3}


def on_the_path(ran, steps, lengths):
    """The keys of what the path runs through."""
    spans = {
        (span.lane, span.begin, span.end): (span.call, int(span.lane[-1])) for one in ran.lives.values() for span in one
    }
    places = [place for place, step in enumerate(steps) if isinstance(step, Work)]
    works = [span for span in ran.driver if span.kind == "phase"]
    found = set()
    for part in critical_path(ran.attempt(), 0, ran.end):
        if part.lane == "driver":
            found |= {
                ("driver", place)
                for place, span in zip(places, works, strict=True)
                if part.begin <= span.begin and span.end <= part.end
            }
        elif part.lane != DELIVERY:
            inside = [key for key in spans if key[0] == part.lane and part.begin <= key[1] and key[2] <= part.end]
            assert sum(end - begin for _, begin, end in inside) == part.length, (
                "a part is made of whole spans of its lane"
            )
            found |= {spans[key] for key in inside}
    return found


@pytest.mark.parametrize("seed", range(60))
def test_the_parts_add_up_to_the_step_and_only_what_lies_on_the_path_holds_it_up(seed: int) -> None:
    draw = random.Random(seed)
    steps = program(draw, RANKS)
    lengths = durations(draw, steps, RANKS)
    ran = run(steps, RANKS, lengths)
    path = critical_path(ran.attempt(), 0, ran.end)
    assert path[0].begin == 0 and path[-1].end == ran.end
    assert all(one.end == other.begin for one, other in pairwise(path))
    assert sum(by_role(path).values()) == pytest.approx(ran.end / 1e6) == pytest.approx(sum(by_label(path).values()))
    found = on_the_path(ran, steps, lengths)
    # All else could take no time, and the step would take as long.
    assert run(steps, RANKS, {key: length if key in found else 0 for key, length in lengths.items()}).end == ran.end
    # Each thing on the path could take a little less, and so would the step.
    for key in found:
        assert run(steps, RANKS, lengths | {key: lengths[key] - 1}).end == ran.end - 1, key


def test_the_path_goes_through_what_a_busy_rank_did_before() -> None:
    """A call that queues behind another one is held up by that one, not by the driver that sent it early."""
    steps = [Work("a"), Send("first", "critic"), Work("b"), Send("second", "critic"), Work("c"), Await("second")]
    lengths = {
        ("driver", 0): 10_000,
        ("first", 0): 500_000,
        ("driver", 2): 1_000,
        ("second", 0): 300_000,
        ("driver", 4): 1_000,
    }
    ran = run(steps, {"critic": 1}, lengths)
    path = critical_path(ran.attempt(), 0, ran.end)
    assert [(part.lane, part.name, part.length) for part in path] == [
        ("driver", "a", 10_000), (DELIVERY, "call", 7), ("critic/0", "work", 800_000), (DELIVERY, "answer", 7),
    ]  # fmt: skip


def test_a_step_is_cut_out_of_what_began_before_it_and_goes_on_after_it() -> None:
    """An engine that samples in the background is on the path of a step only for as long as the step lasts."""
    call = Span("rollout/0", "generate", "call", 0, 900, call="c", sent=0, process="p")
    driver = [
        Span("driver", "run", "run", 0, 5000),
        Span("driver", "rollout", "phase", 400, 1000),
        Span("driver", "the step that is sampled", "wait", 500, 1000),
        Span("driver", "update", "phase", 1000, 1500),
    ]
    attempt = Attempt("d", 0, 5000, 0, driver, [Life("rollout/0", 0, [call])])
    path = critical_path(attempt, 600, 1200)
    assert [(part.label, part.begin, part.end) for part in path] == [
        ("rollout: generate", 600, 900), (DELIVERY, 900, 1000), ("driver: update", 1000, 1200),
    ]  # fmt: skip


def test_a_wait_that_no_answer_ended_is_with_the_driver() -> None:
    """After a rank was killed the driver waits until it knows; no rank is to blame for that time."""
    wait = Span("driver", "policy.accumulate", "wait", 0, 4000, calls={"c": "policy.accumulate"})
    attempt = Attempt("d", 0, 4000, 0, [wait], [])
    (part,) = critical_path(attempt, 0, 4000)
    assert (part.lane, part.name, part.length) == ("driver", "waiting for policy.accumulate", 4000)


def test_what_made_a_step_longer_comes_first() -> None:
    assert slower_than({"a": 5.0, "b": 1.0}, {"a": 4.5, "c": 2.0}) == [("b", 1.0), ("a", 0.5), ("c", -2.0)]
