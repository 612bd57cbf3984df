"""A Python function as a source of rewards.

Invariants: a sample gets a finite number, or an error that says what the function did with it; a call of several samples that
fails as a whole is repeated sample by sample, to find the one that it failed at; where the first few fail alone too, the
function itself counts as failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlhf_ray.pending import Pending
from rlhf_ray.rewards.functions import Columns, Failure, Outcome, Reward, RewardFunction, accepted_columns, run_calls
from rlhf_ray.rewards.request import Fault, ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.steps.placement import SteppedResult

FAILED_ALONE = 3
"""Give the rest of a call up after so many of its samples have failed alone."""


class Caller(Protocol):
    """Runs a function, here or in another process."""

    @property
    def columns(self) -> Sequence[str]:
        """Which lists the function takes, of those in :data:`~rlhf_ray.rewards.functions.COLUMNS`."""

    def run(self, calls: Sequence[Columns]) -> list[Outcome]:
        """The outcome of every call, in order."""


class InThisProcess:
    """Calls a function in this process, where nothing could stop it: for functions of this project."""

    def __init__(self, name: str, function: RewardFunction, timeout_s: float = 60.0) -> None:
        self.function = function
        self.timeout_s = timeout_s
        self.columns: Sequence[str] = accepted_columns(name, function)

    def run(self, calls: Sequence[Columns]) -> list[Outcome]:
        """The outcome of every call, in order."""
        ended: dict[int, Outcome] = {}
        run_calls(self.function, calls, self.timeout_s, ended.__setitem__)
        return [ended[number] for number in range(len(calls))]


class FunctionSource:
    """The rewards that a function returns, in calls of ``samples_per_call`` samples, or of all samples where it is None."""

    def __init__(self, name: str, caller: Caller, samples_per_call: int | None = None, *, steps: bool = False) -> None:
        """``steps`` says whether the function may give rewards of steps."""
        self.name = name
        self.steps = steps
        self.caller = caller
        self.samples_per_call = samples_per_call
        self.reads = "text and labels"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        return Pending(lambda: self._score(samples))

    def _score(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        size = self.samples_per_call or max(1, len(samples))
        calls = [samples[start : start + size] for start in range(0, len(samples), size)]
        outcomes = self.caller.run([self._columns(call) for call in calls])
        results: list[ScoreResult] = []
        for call, outcome in zip(calls, outcomes, strict=True):
            results += self._one_by_one(call, outcome) if isinstance(outcome, Failure) else map(self._result, outcome)
        return results

    def _one_by_one(self, call: Sequence[TextSample], failure: Failure) -> list[ScoreResult]:
        """Results of a call that ended in ``failure``, from calls of one sample each."""
        if len(call) == 1:
            return [self._result(failure)]
        alone: list[Reward | Failure] = []
        for sample in call:
            (outcome,) = self.caller.run([self._columns([sample])])
            alone.append(outcome if isinstance(outcome, Failure) else outcome[0])
            if len(alone) == FAILED_ALONE and all(isinstance(one, Failure) for one in alone):
                return [self._result(failure)] * len(call)
        return [self._result(one) for one in alone]

    def _result(self, outcome: Reward | Failure) -> ScoreResult:
        if isinstance(outcome, tuple) and not self.steps:
            outcome = Failure(
                "returned a list for an answer: return a number, or set reward.steps if these are its steps"
            )
        if isinstance(outcome, Failure):
            fault: Fault = "source" if outcome.may_pass else "model"
            return ScoreResult.failed(f"reward function {self.name} {outcome.reason}", fault=fault)
        return SteppedResult.of_steps(outcome) if isinstance(outcome, tuple) else ScoreResult.of(outcome)

    def _columns(self, samples: Sequence[TextSample]) -> dict[str, list[Any]]:
        values: dict[str, list[Any]] = {
            "prompts": [sample.prompt for sample in samples],
            "responses": [sample.response for sample in samples],
            "labels": [sample.label for sample in samples],
            "finished": [sample.finished for sample in samples],
            "sources": [sample.source for sample in samples],
            "messages": [None if sample.messages is None else list(map(dict, sample.messages)) for sample in samples],
        }
        return {name: values[name] for name in self.caller.columns}
