"""Where rewards come from, behind one protocol: a reward model's ranks, or a Python function.

Always true: a source answers every request with a value or an error, in order; nothing turns an error into a number.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_ray.console import get_logger
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
        """One result a request."""
        return self.scorer.score(requests).then(
            lambda results: [result.normalised(self.mean, self.std) for result in results]
        )


class FunctionSource:
    """A Python function ``f(prompts, responses, labels, finished) -> rewards``, called once for all samples."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        self.name = name
        self.function = function

    def score(self, requests: Sequence[ScoreRequest], samples: Sequence[Sample]) -> Pending[list[ScoreResult]]:
        """One result a sample; the requests are not looked at."""
        return Pending(lambda: self._call(samples))

    def _call(self, samples: Sequence[Sample]) -> list[ScoreResult]:
        try:
            returned = self.function(
                [sample.prompt for sample in samples],
                [sample.response for sample in samples],
                [sample.label for sample in samples],
                [sample.finished for sample in samples],
            )
        except Exception as error:
            raise ScoringError(f"reward function {self.name} raised {error!r}") from error
        if not hasattr(returned, "__len__") or len(returned) != len(samples):
            count = f"{len(returned)} rewards" if hasattr(returned, "__len__") else repr(returned)
            raise ScoringError(f"reward function {self.name} returned {count} for {len(samples)} samples")
        values = returned.tolist() if hasattr(returned, "tolist") else returned  # arrays and tensors
        return [self._result(value) for value in values]

    def _result(self, value: Any) -> ScoreResult:
        if isinstance(value, numbers.Real) and math.isfinite(value):
            return ScoreResult.of(float(value))
        what = f"reward function {self.name} returned {value!r}, which is not a finite number"
        return ScoreResult.failed(what, fault="source")


def load_function(name: str) -> RewardFunction:
    """The function named ``package.module:function`` or ``path.py:function``."""
    origin, colon, attribute = name.rpartition(":")
    if not colon:
        raise RequestError(f"reward.function {name!r}: write it as package.module:function or path.py:function")
    try:
        module = _module_from_file(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except Exception as error:  # the module is the user's program, and fails in its own ways
        raise RequestError(f"reward.function {name!r}: {origin} cannot be imported ({error!r})") from error
    function = vars(module).get(attribute)
    if not callable(function):
        raise RequestError(f"reward.function {name!r}: {origin} has no function {attribute}")
    return function  # type: ignore[no-any-return]


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    spec = importlib.util.spec_from_file_location(f"rlhf_ray_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
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
    """Score everything; what the source failed at is tried again for ``hold_s`` seconds, and then keeps its error."""
    results = _try(source, requests, samples)
    failed = _to_try_again(range(len(results)), results)
    if failed:
        get_logger("rewards").warning(
            "%d of %d samples have no reward (%s): trying again for %g s",
            len(failed), len(results), results[failed[0]].error, hold_s,
        )  # fmt: skip
    deadline = clock() + hold_s
    while failed and (left := deadline - clock()) > 0:
        sleep(min(SECONDS_BETWEEN_TRIES, left))
        again = _try(source, [requests[i] for i in failed], [samples[i] for i in failed])
        for position, result in zip(failed, again, strict=True):
            results[position] = result
        failed = _to_try_again(failed, results)
    return results


def _to_try_again(positions: Iterable[int], results: Sequence[ScoreResult]) -> list[int]:
    return [position for position in positions if results[position].fault == "source"]


def _try(source: RewardSource, requests: Sequence[ScoreRequest], samples: Sequence[Sample]) -> list[ScoreResult]:
    """Results of one attempt; a source that failed as a whole has failed at every request."""
    try:
        return source.score(requests, samples).result()
    except ScoringError as error:
        return [ScoreResult.failed(str(error), fault="source")] * len(requests)
