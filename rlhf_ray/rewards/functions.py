"""Calls a reward function, synchronous or not, with the columns that it takes and within a time limit.

Invariants: each call ends in exactly one outcome; each sample of it has a finite number or a failure that says why it has none;
what a function raises becomes a failure and never ends the run; a function gets the columns that its parameters name and no
others.
Nothing here starts a process: this is the code that runs inside one.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.steps.placement import Steps
from rlhf_ray.transient import may_pass
from rlhf_ray.user_code import load_object

RewardFunction = Callable[..., Any]
Columns = Mapping[str, Sequence[Any]]
"""The arguments of one call: by the names in :data:`COLUMNS` a list with one entry per sample."""
COLUMNS = ("prompts", "responses", "labels", "finished", "sources", "messages")
CALLS_AT_ONCE = 64
"""How many calls of an asynchronous function run at the same time."""


@dataclass(frozen=True)
class Failure:
    """Why there is no reward, and whether another attempt may bring one."""

    reason: str
    may_pass: bool = False


Reward = float | Steps
"""Of one sample: a finite number, or the ends and rewards of its steps."""
Outcome = list[Reward | Failure] | Failure
"""How one call ended: for each of its samples its reward or why there is none; or one failure for all."""
Report = Callable[[int, Outcome], None]
"""Takes the number of a call and its outcome."""


def run_calls(function: RewardFunction, calls: Sequence[Columns], timeout_s: float, report: Report) -> None:
    """Report the outcome of each call as it ends: calls run one after the other, those of an async function side by side.

    The time limit holds for each call of an async function; a synchronous one can only be stopped from outside.
    """
    if is_async(function):
        asyncio.run(_run_async(function, calls, timeout_s, report))
        return
    for number, columns in enumerate(calls):
        try:
            outcome = read_returned(function(**columns), call_size(columns))
        except Exception as error:  # the function is the user's program, and fails in its own ways
            outcome = _raised(error)
        report(number, outcome)


def is_async(function: RewardFunction) -> bool:
    """Whether calling the function returns something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def _run_async(function: RewardFunction, calls: Sequence[Columns], timeout_s: float, report: Report) -> None:
    room = asyncio.Semaphore(CALLS_AT_ONCE)

    async def one(number: int, columns: Columns) -> None:
        async with room:
            try:
                outcome = read_returned(await asyncio.wait_for(function(**columns), timeout_s), call_size(columns))
            except TimeoutError:
                outcome = too_late(timeout_s, call_size(columns))
            except Exception as error:
                outcome = _raised(error)
            report(number, outcome)

    await asyncio.gather(*(one(number, columns) for number, columns in enumerate(calls)))


def _raised(error: Exception) -> Failure:
    return Failure(f"raised {error!r}", may_pass(error))


def too_late(timeout_s: float, samples: int, slowest_s: float | None = None) -> Failure:
    """How a call for so many samples ends that did not answer in time: what it waits for may be there later.

    ``slowest_s`` is how long the slowest call that did end has taken, where that is known.
    """
    others = "" if slowest_s is None else f", where the slowest call that ended took {slowest_s:.2f} s"
    return Failure(
        f"did not answer within {timeout_s:g} s (reward.timeout_s) for {samples} samples in one call{others}",
        may_pass=True,
    )


def read_returned(returned: Any, count: int) -> Outcome:
    """The outcome of a call for ``count`` samples that returned this; an array or a tensor counts as a list of numbers."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        return Failure(f"returned {_short(returned)} for {count} samples, not a list of numbers")
    if len(values) != count:
        return Failure(f"returned {len(values)} rewards for {count} samples")
    return [_steps(value) if isinstance(value, list | tuple) else _number(value) for value in values]


def _steps(value: Sequence[Any]) -> Steps | Failure:
    """The steps of one sample: pairs of an end and a reward."""
    steps = []
    for pair in value:
        parts = tuple(pair) if isinstance(pair, list | tuple) else ()
        if len(parts) != 2 or isinstance(parts[0], bool) or not isinstance(parts[0], numbers.Integral):
            return Failure(
                f"returned {_short(value)}, which is not a finite number, nor a list of steps (characters to its end, reward)"
            )
        reward = _number(parts[1])
        if isinstance(reward, Failure):
            return reward
        steps.append((int(parts[0]), reward))
    return tuple(steps)


def _number(value: Any) -> float | Failure:
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return Failure(f"returned {_short(value)}, which is not a finite number")


def _short(value: Any) -> str:
    printed = repr(value)
    return printed if len(printed) <= 80 else f"{printed[:80]}..."


def call_size(columns: Columns) -> int:
    return len(next(iter(columns.values()), ()))


def accepted_columns(name: str, function: RewardFunction) -> tuple[str, ...]:
    """The columns that ``function`` takes, by the names of its parameters."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return COLUMNS
    unknown = [
        parameter.name
        for parameter in parameters
        if parameter.name not in COLUMNS and parameter.default is parameter.empty
    ]
    if not unknown and not any(parameter.name in COLUMNS for parameter in parameters):
        unknown = ["nothing"]
    if unknown:
        raise RequestError(
            f"reward.function {name!r}: it asks for {', '.join(unknown)}; a reward function is given the columns that its "
            f"parameters name, of {', '.join(COLUMNS)}"
        )
    return tuple(parameter.name for parameter in parameters if parameter.name in COLUMNS)


def load_function(name: str) -> RewardFunction:
    """The function named ``package.module:function`` or ``path.py:function``."""
    function: RewardFunction = load_object("reward.function", name, kind="function")
    return function
