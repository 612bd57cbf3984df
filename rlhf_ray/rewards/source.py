"""Where rewards come from, behind one protocol: a reward model's ranks, or a Python function.

Always true: a source answers every request with a value or an error, in order; nothing turns an error into a number.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

RewardFunction = Callable[..., Sequence[float]]
SECONDS_BETWEEN_TRIES = 1.0


class RewardSource(Protocol):
    """Scores requests in order."""

    def score(self, requests: Sequence[ScoreRequest], samples: Sequence[Sample]) -> Pending[list[ScoreResult]]:
        """One result a request."""


class Sample(Protocol):
    """What a reward function may look at."""

    prompt: str
    response: str
    label: str | None
    finished: bool


class Scorer(Protocol):
    """A reward model, wherever it runs (a group of ranks, in this process, over HTTP)."""

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """One result a request, in order."""


class ModelSource:
    """A reward model's scores, normalised with the mean and deviation of its directory where asked."""

    def __init__(self, scorer: Scorer, *, mean: float = 0.0, std: float = 1.0) -> None:
        self.scorer = scorer
        self.mean = mean
        self.std = std

    def score(self, requests: Sequence[ScoreRequest], samples: Sequence[Sample]) -> Pending[list[ScoreResult]]:
        return self.scorer.score(requests).then(lambda results: [self._normalised(result) for result in results])

    def _normalised(self, result: ScoreResult) -> ScoreResult:
        return result if result.raw is None else replace(result, reward=(result.raw - self.mean) / self.std)


class FunctionSource:
    """A Python function ``f(prompts, responses, labels, finished) -> rewards``, called once for all samples."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.function = function

    def score(self, requests: Sequence[ScoreRequest], samples: Sequence[Sample]) -> Pending[list[ScoreResult]]:
        return Pending(lambda: self._call(samples))

    def _call(self, samples: Sequence[Sample]) -> list[ScoreResult]:
        try:
            rewards = list(
                self.function(
                    [sample.prompt for sample in samples],
                    [sample.response for sample in samples],
                    [sample.label for sample in samples],
                    [sample.finished for sample in samples],
                )
            )
        except Exception as error:
            raise ScoringError(f"reward function {self.name} raised {error!r}") from error
        if len(rewards) != len(samples):
            raise ScoringError(
                f"reward function {self.name} returned {len(rewards)} rewards for {len(samples)} samples"
            )
        return [self._result(value) for value in rewards]

    def _result(self, value: Any) -> ScoreResult:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return ScoreResult.failed(f"reward function {self.name} returned {value!r}, which is not a finite number")
        return ScoreResult(raw=float(value), reward=float(value))


def load_function(name: str) -> RewardFunction:
    """The function named ``package.module:function`` or ``path.py:function``."""
    origin, colon, attribute = name.rpartition(":")
    if not colon:
        raise RequestError(f"reward.function {name!r}: write it as package.module:function or path.py:function")
    try:
        module = _module_from_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except (ImportError, FileNotFoundError) as error:
        raise RequestError(f"reward.function {name!r}: {origin} cannot be imported ({error})") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RequestError(f"reward.function {name!r}: {origin} has no function {attribute}")
    return function  # type: ignore[no-any-return]


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def score_or_hold(
    source: RewardSource,
    requests: Sequence[ScoreRequest],
    samples: Sequence[Sample],
    *,
    hold_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[ScoreResult]:
    """Score everything, trying what failed again for up to ``hold_s`` seconds; what still fails keeps its error."""
    results = source.score(requests, samples).result()
    deadline = clock() + hold_s
    while (failed := [i for i, result in enumerate(results) if result.error is not None]) and clock() < deadline:
        sleep(SECONDS_BETWEEN_TRIES)
        again = source.score([requests[i] for i in failed], [samples[i] for i in failed]).result()
        for position, result in zip(failed, again, strict=True):
            results[position] = result
    return results
