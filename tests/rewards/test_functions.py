"""A function's call ends in one outcome: a number or a reason for each sample; nothing becomes a number that was none.

The same must hold wherever the function runs: in this process, or in one of its own, which it may hang or end.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.function_process import FunctionProcess
from rlhf_ray.rewards.function_source import FAILED_ALONE, Caller, FunctionSource, InThisProcess
from rlhf_ray.rewards.functions import COLUMNS, load_function
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.source import score_or_hold
from tests.rewards.answers import answer

SAMPLES = [answer("a", "x", "1"), answer("b", "yy", None, finished=False), answer("c", "zzz", "3")]


def source_of(
    function: Callable[..., Any], samples_per_call: int | None = None, timeout_s: float = 5.0
) -> FunctionSource:
    return FunctionSource("f", InThisProcess("f", function, timeout_s), samples_per_call)


def score(source: FunctionSource) -> list[ScoreResult]:
    return source.score(SAMPLES).result()


def raws(results: Sequence[ScoreResult]) -> list[float | None]:
    return [result.raw for result in results]


def errors(results: Sequence[ScoreResult]) -> list[str | None]:
    assert all((result.error is None) == (result.fault is None) for result in results)
    assert {result.fault for result in results} <= {None, "source", "model"}
    return [result.error for result in results]


def test_a_function_sees_every_sample_once_and_in_order_under_the_names_that_it_asks_for() -> None:
    seen: list[Any] = []

    def reward(finished: list[bool], responses: list[str], **others: Any) -> list[float]:
        seen.append((finished, responses, others))
        return [1, 2.5, -3.0]

    results = score(source_of(reward))
    assert raws(results) == [1.0, 2.5, -3.0] == [result.reward for result in results]
    ((finished, responses, others),) = seen
    assert (finished, responses) == ([True, False, True], ["x", "yy", "zzz"])
    assert others == {
        "prompts": ["a", "b", "c"],
        "labels": ["1", None, "3"],
        "sources": ["test"] * 3,
        "messages": [None] * 3,
    }
    assert set(others) | {"finished", "responses"} == set(COLUMNS)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_calls_have_the_size_that_is_asked_for(size: int) -> None:
    seen: list[list[str]] = []

    def reward(responses: list[str]) -> list[float]:
        seen.append(responses)
        return [len(response) for response in responses]

    assert raws(score(source_of(reward, samples_per_call=size))) == [1.0, 2.0, 3.0]
    assert [len(call) for call in seen[:-1]] == [size] * (len(seen) - 1)
    assert [response for call in seen for response in call] == ["x", "yy", "zzz"]


@pytest.mark.parametrize(
    "returned", [np.array([1, 0, 3], dtype=np.float32), (True, False, 3), [np.float32(1), np.int64(0), 3.0]], ids=repr
)
def test_numbers_of_all_kinds_are_numbers(returned: Any) -> None:
    results = score(source_of(lambda responses: returned))
    assert raws(results) == [1.0, 0.0, 3.0]
    assert all(type(result.raw) is float for result in results)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "1.0", [1.0], 1j], ids=repr)
def test_what_is_no_finite_number_is_an_error_of_its_sample_alone(bad: Any) -> None:
    results = score(source_of(lambda responses: [1.0, bad, 3.0]))
    assert raws(results) == [1.0, None, 3.0]
    steps = ", nor a list of steps (characters to its end, reward)" if isinstance(bad, list) else ""
    assert errors(results)[1] == f"reward function f returned {bad!r}, which is not a finite number{steps}"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 samples"),
        ([], "returned 0 rewards for 3 samples"),
        (None, "returned None for 3 samples, not a list of numbers"),
        (1.0, "returned 1.0 for 3 samples, not a list of numbers"),
        ("good", "returned 'good' for 3 samples, not a list of numbers"),
        ({"a": 1.0}, "returned {'a': 1.0} for 3 samples, not a list of numbers"),
    ],
)
def test_another_number_of_rewards_is_an_error_of_every_sample(returned: Any, message: str) -> None:
    assert errors(score(source_of(lambda responses: returned))) == [f"reward function f {message}"] * 3


class Refused(Exception):
    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


def raising(error: Exception) -> Callable[..., list[float]]:
    def function(responses: list[str]) -> list[float]:
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "tries"),
    [
        (raising(ConnectionError("refused")), 3),
        (raising(TimeoutError("late")), 3),
        (raising(Refused(429)), 3),
        (raising(Refused(503)), 3),
        (raising(Refused(401)), 1),
        (raising(KeyError("missing")), 1),
        (lambda responses: [math.nan] * len(responses), 1),
        (lambda responses: [None] * len(responses), 1),
        (lambda responses: [], 1),
        (lambda responses: None, 1),
    ],
    ids=["connection", "timeout", "429", "503", "401", "key", "nan", "none", "too few", "nothing"],
)
def test_only_what_waiting_may_mend_is_asked_again(function: Callable[..., Any], tries: int) -> None:
    """A clock that a sleep moves on by a second: 2 s to hold are two more tries."""
    now, asked = [0.0], []

    def counted(responses: list[str]) -> Any:
        asked.append(responses)
        return function(responses)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    results = score_or_hold(source_of(counted), SAMPLES[:1], hold_s=2.0, clock=lambda: now[0], sleep=sleep)
    assert results[0].reward is None and len(asked) == tries
    assert results[0].fault == ("source" if tries > 1 else "model")


def fails_at(*bad: str) -> tuple[Callable[..., list[float]], list[list[str]]]:
    """A function that raises where a call holds one of ``bad``, and the calls it saw."""
    seen: list[list[str]] = []

    def reward(responses: list[str]) -> list[float]:
        seen.append(responses)
        if set(bad) & set(responses):
            raise KeyError("missing")
        return [float(len(response)) for response in responses]

    return reward, seen


def test_a_call_that_raises_is_repeated_to_find_the_sample() -> None:
    reward, seen = fails_at("yy")
    results = score(source_of(reward))
    assert raws(results) == [1.0, None, 3.0]
    assert errors(results)[1] == "reward function f raised KeyError('missing')"
    assert seen == [["x", "yy", "zzz"], ["x"], ["yy"], ["zzz"]]


def test_a_function_that_fails_at_everything_is_not_asked_about_each() -> None:
    calls: list[int] = []

    def down(responses: list[str]) -> list[float]:
        calls.append(len(responses))
        raise ConnectionError("refused")

    many = [answer("p", str(number)) for number in range(50)]
    results = source_of(down).score(many).result()
    assert calls == [50] + [1] * FAILED_ALONE
    assert {result.error for result in results} == {"reward function f raised ConnectionError('refused')"}
    assert source_of(down).score([]).result() == []


def test_an_async_function_answers_many_calls_at_once_each_within_its_limit() -> None:
    running, most = 0, 0

    async def judge(responses: list[str]) -> list[float]:
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(30.0 if responses == ["yy"] else 0.02)
        running -= 1
        return [len(responses[0])]

    began = time.monotonic()
    results = score(source_of(judge, samples_per_call=1, timeout_s=0.2))
    assert time.monotonic() - began < 5.0 and most == 3
    assert raws(results) == [1.0, None, 3.0]
    late = "reward function f did not answer within 0.2 s (reward.timeout_s) for 1 samples in one call"
    assert errors(results)[1] == late


@pytest.mark.parametrize(
    ("function", "unknown"),
    [(lambda answers: answers, "answers"), (lambda responses, extra: extra, "extra"), (list, "nothing")],
)
def test_a_parameter_that_nothing_is_known_for_is_refused(function: Any, unknown: str) -> None:
    with pytest.raises(
        RequestError, match=rf"reward.function 'f': it asks for {unknown}; .* of prompts, responses, labels"
    ):
        InThisProcess("f", function)


MODULE = """
from __future__ import annotations
import asyncio, os, sys, time
from dataclasses import dataclass

print("a module may print")

@dataclass
class Rule:
    factor: float

def lengths(prompts, responses, labels, finished):
    print("so may a function")
    return [Rule(2.0).factor * len(response) for response in responses]

def hangs(responses):
    if "yy" in responses:
        while True:
            pass
    return [1.0] * len(responses)

def dies(responses):
    if "yy" in responses:
        os._exit(7)
    return [1.0] * len(responses)

def killed(responses):
    if "yy" in responses:
        os.kill(os.getpid(), 9)
    return [1.0] * len(responses)

def raises(responses):
    raise KeyError("missing")

def odd(responses):
    return [1.0, Rule(1.0), "3"]

async def blocks(responses):
    if "yy" in responses:
        time.sleep(60)
    await asyncio.sleep(0)
    return [1.0] * len(responses)

async def judges(responses):
    await asyncio.sleep(0.01)
    return [float(os.getpid())] * len(responses)

def wrong(answers):
    return answers

number = 3
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "my_reward.py"
    path.write_text(MODULE)
    return path


@pytest.fixture
def process(module: Path) -> Iterator[Callable[..., Caller]]:
    """``process(function)``: it in a process of its own, which ends with the test."""
    started: list[FunctionProcess] = []

    def start(function: str, timeout_s: float = 10.0) -> FunctionProcess:
        started.append(FunctionProcess(f"{module}:{function}", timeout_s))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_a_function_in_its_own_process_answers_like_one_here(process: Any, module: Path) -> None:
    for caller in (process("lengths"), InThisProcess("f", load_function(f"{module}:lengths"))):
        assert raws(score(FunctionSource("f", caller))) == [2.0, 4.0, 6.0]


def test_it_is_another_process_and_stays_the_same_one(process: Any) -> None:
    caller = process("judges")
    first, again = (raws(score(FunctionSource("f", caller, 1))) for _ in range(2))
    assert first == again and len(set(first)) == 1 and first[0] != os.getpid()


def test_a_call_that_hangs_costs_itself_and_no_other(process: Any) -> None:
    began = time.monotonic()
    results = score(FunctionSource("f", process("hangs", 0.5), samples_per_call=1))
    assert raws(results) == [1.0, None, 1.0] and time.monotonic() - began < 10.0
    late = r"reward function f did not answer within 0\.5 s \(reward\.timeout_s\) for 1 samples in one call, where the slowest "
    assert re.fullmatch(rf"{late}call that ended took 0\.\d\d s", str(errors(results)[1])), errors(results)[1]
    assert results[1].fault == "source", "what it waits for may be there later"


def test_one_that_blocks_the_event_loop_is_ended_too(process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.rewards.function_process.GRACE_S", 0.1)
    results = score(FunctionSource("f", process("blocks", 0.4)))
    assert raws(results) == [1.0, None, 1.0]


def test_a_function_may_end_its_process(process: Any) -> None:
    results = score(FunctionSource("f", process("dies"), samples_per_call=1))
    assert raws(results) == [1.0, None, 1.0]
    assert errors(results)[1] == "reward function f ended its process (exit code 7)"
    assert results[1].fault == "model"


def test_a_process_that_was_killed_from_outside_may_not_be_the_next_time(process: Any) -> None:
    results = score(FunctionSource("f", process("killed"), samples_per_call=1))
    assert raws(results) == [1.0, None, 1.0] and results[1].fault == "source"


def test_what_is_no_number_and_what_is_raised_cross_as_text(process: Any) -> None:
    assert errors(score(FunctionSource("f", process("odd")))) == [
        None,
        "reward function f returned Rule(factor=1.0), which is not a finite number",
        "reward function f returned '3', which is not a finite number",
    ]
    assert set(errors(score(FunctionSource("f", process("raises"))))) == {
        "reward function f raised KeyError('missing')"
    }


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


@pytest.mark.parametrize(
    ("function", "message"), [("absent", "has no function absent"), ("wrong", "it asks for answers")]
)
def test_it_is_refused_before_anything_is_scored(module: Path, function: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        FunctionProcess(f"{module}:{function}", 1.0)


def test_a_module_that_ends_its_process_is_refused(tmp_path: Path) -> None:
    (tmp_path / "exits.py").write_text("import os; os._exit(3)")
    with pytest.raises(RequestError, match="its process ended while it was imported"):
        FunctionProcess(f"{tmp_path / 'exits.py'}:f", 1.0)
