"""A source answers every request with a value or an error, in order; nothing turns an error into a number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError, RequestError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.source import FunctionSource, ModelSource, load_function, score_or_hold

get_logger()  # set up before pytest looks where to listen


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    prompt: str
    response: str
    label: str | None = None
    finished: bool = True


SAMPLES = [Answer("a", "x", "1"), Answer("b", "yy", None, finished=False), Answer("c", "zzz", "3")]
REQUESTS = [ScoreRequest(prompt=sample.prompt, response=sample.response) for sample in SAMPLES]


def raws(results: Sequence[ScoreResult]) -> list[float | None]:
    return [result.raw for result in results]


# ------------------------------------------------------------------------------------------------------------- functions


def test_a_function_sees_every_sample_once_and_in_order() -> None:
    seen: list[Any] = []

    def reward(*columns: Any) -> list[float]:
        seen.append(columns)
        return [1, 2.5, -3.0]

    results = FunctionSource("f", reward).score(REQUESTS, SAMPLES).result()
    assert raws(results) == [1.0, 2.5, -3.0] == [result.reward for result in results]
    assert seen == [(["a", "b", "c"], ["x", "yy", "zzz"], ["1", None, "3"], [True, False, True])]


@pytest.mark.parametrize(
    "returned", [np.array([1, 2, 3], dtype=np.float32), (1, 2, 3), [np.float32(1), np.int64(2), 3.0]], ids=repr
)
def test_numbers_of_all_kinds_are_numbers(returned: Any) -> None:
    results = FunctionSource("f", lambda *columns: returned).score(REQUESTS, SAMPLES).result()
    assert raws(results) == [1.0, 2.0, 3.0]
    assert all(type(result.raw) is float for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "1.0", [1.0]], ids=repr)
def test_what_is_no_finite_number_is_an_error_of_its_sample_alone(bad: Any) -> None:
    results = FunctionSource("f", lambda *columns: [1.0, bad, 3.0]).score(REQUESTS, SAMPLES).result()
    assert raws(results) == [1.0, None, 3.0]
    assert results[1].fault == "source"
    assert results[1].error == f"reward function f returned {bad!r}, which is not a finite number"


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "returned 1 rewards for 3 samples"), (None, "returned None for 3"), (1.0, "returned 1.0 for 3 samples")],
)
def test_another_number_of_rewards_is_an_error(returned: Any, message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        FunctionSource("f", lambda *columns: returned).score(REQUESTS, SAMPLES).result()


def test_a_function_that_raises_is_an_error_that_says_what() -> None:
    def reward(*columns: Any) -> list[float]:
        raise KeyError("missing")

    with pytest.raises(ScoringError, match="reward function f raised KeyError"):
        FunctionSource("f", reward).score(REQUESTS, SAMPLES).result()


MODULE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Rule:
    factor: float

def lengths(prompts, responses, labels, finished):
    return [Rule(2.0).factor * len(response) for response in responses]

number = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(MODULE)
    return path


def test_a_function_is_found_in_a_file_and_in_a_package(module: Path) -> None:
    results = FunctionSource("f", load_function(f"{module}:lengths")).score(REQUESTS, SAMPLES).result()
    assert raws(results) == [2.0, 4.0, 6.0]
    assert load_function("math:fsum") is math.fsum


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{module}", "write it as package.module:function or path.py:function"),
        ("{module}:absent", "has no function absent"),
        ("{module}:number", "has no function number"),
        ("absent.py:f", "no such file: absent.py"),
        ("no_such_package:f", "No module named 'no_such_package'"),
        ("{broken}:f", "broken.py cannot be imported .SyntaxError"),
    ],
)
def test_a_function_that_is_not_there_is_a_clear_error(module: Path, name: str, message: str) -> None:
    broken = module.with_name("broken.py")
    broken.write_text("def f(:")
    with pytest.raises(RequestError, match=message):
        load_function(name.format(module=module, broken=broken))


# ---------------------------------------------------------------------------------------------------------------- models


class Scorer:
    """A model that answers these scores."""

    def __init__(self, results: list[ScoreResult]) -> None:
        self.results = results

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        return Pending.done(self.results)


def test_a_models_scores_are_normalised_where_its_statistics_are_known() -> None:
    results = [ScoreResult.of(3.0, 5), ScoreResult.failed("too long", 9), ScoreResult.of(-1.0, 2)]
    plain = ModelSource(Scorer(results)).score(REQUESTS, SAMPLES).result()
    assert plain == results
    normalised = ModelSource(Scorer(results), mean=1.0, std=2.0).score(REQUESTS, SAMPLES).result()
    assert [result.reward for result in normalised] == [1.0, None, -1.0]
    assert raws(normalised) == [3.0, None, -1.0]
    assert normalised[1] == results[1]


# ----------------------------------------------------------------------------------------------------------------- holding


class Clock:
    """Time that passes only by sleeping, and by what a call takes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        self.now += seconds


class Scripted:
    """A source that answers one list of results after the other, each a second late; raises what is an error."""

    def __init__(self, clock: Clock, answers: Iterator[list[ScoreResult] | Exception]) -> None:
        self.clock, self.answers = clock, answers
        self.asked: list[list[str | None]] = []

    def score(self, requests: Sequence[ScoreRequest], samples: Sequence[Answer]) -> Pending[list[ScoreResult]]:
        assert [request.prompt for request in requests] == [sample.prompt for sample in samples]
        self.asked.append([request.prompt for request in requests])
        self.clock.now += 1.0
        answer = next(self.answers)

        def wait() -> list[ScoreResult]:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return Pending(wait)


def hold(answers: Iterator[Any], hold_s: float) -> tuple[list[ScoreResult], Scripted, Clock]:
    clock = Clock()
    source = Scripted(clock, answers)
    return score_or_hold(source, REQUESTS, SAMPLES, hold_s=hold_s, clock=clock, sleep=clock.sleep), source, clock


OK, LATE = ScoreResult.of, ScoreResult.failed("not now", fault="source")


def test_only_what_failed_is_asked_again_and_lands_in_its_place() -> None:
    answers = iter([[LATE, OK(2.0), LATE], [LATE, OK(3.0)], [OK(1.0)]])
    results, source, clock = hold(answers, 100.0)
    assert raws(results) == [1.0, 2.0, 3.0]
    assert source.asked == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert clock.slept == [1.0, 1.0]


def test_a_source_that_failed_as_a_whole_is_asked_again_for_everything() -> None:
    results, source, _ = hold(iter([ScoringError("down"), [OK(1.0), LATE, OK(3.0)], [OK(2.0)]]), 100.0)
    assert raws(results) == [1.0, 2.0, 3.0]
    assert source.asked == [["a", "b", "c"], ["a", "b", "c"], ["b"]]


def always(answer: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield answer()


def test_what_still_fails_in_the_end_keeps_its_error(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results, source, clock = hold(always(lambda: ScoringError("down")), 4.5)
    assert [(result.raw, result.error, result.fault) for result in results] == [(None, "down", "source")] * 3
    assert clock.slept == [1.0, 1.0, 0.5], "a try takes 1 s: the last one begins when the time is over"
    assert len(source.asked) == 4
    assert caplog.messages == ["3 of 3 samples have no reward (down): trying again for 4.5 s"]


def test_without_time_to_hold_nothing_is_asked_twice() -> None:
    results, source, clock = hold(iter([[OK(1.0), LATE, OK(3.0)]]), 0.0)
    assert raws(results) == [1.0, None, 3.0]
    assert (len(source.asked), clock.slept) == (1, [])


@pytest.mark.parametrize("fault", ["item", "model"])
def test_what_no_other_try_would_change_is_not_tried(fault: Any) -> None:
    failed = ScoreResult.failed("never", fault=fault)
    results, source, clock = hold(iter([[OK(1.0), failed, OK(3.0)]]), 100.0)
    assert results[1] == failed
    assert (len(source.asked), clock.slept) == (1, [])


def test_a_group_that_died_is_not_held() -> None:
    with pytest.raises(GroupError):
        hold(iter([GroupError("reward", 0, "score", "its process died")]), 100.0)
