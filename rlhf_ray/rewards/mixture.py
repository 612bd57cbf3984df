"""Several reward sources as one: a weighted sum, which gates may bring down to a floor, or the reward of an ensemble.

Invariants: a sample has a reward only where every term has one; where the reward of a gate is below its threshold the reward is
the floor, whatever the others say; the rewards of all are kept beside what becomes of them; all score at the same time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.errors import ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.processes import spans
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import RewardSource, compares


@dataclass(frozen=True)
class Part:
    """The weight of one reward in the sum, and the threshold below which it brings the sum to the floor."""

    weight: float
    gate: float | None = None


@dataclass(frozen=True)
class Term:
    """One source, and how its reward counts."""

    source: RewardSource
    part: Part


@dataclass(frozen=True)
class MixedResult(ScoreResult):
    """A sum, with the unweighted reward of each term."""

    terms: Mapping[str, float] | None = None


def combine(rewards: Mapping[str, float], parts: Mapping[str, Part], floor: float) -> float:
    """The weighted sum of rewards; ``floor`` where the reward of a gate is below its threshold."""
    for name, part in parts.items():
        if part.gate is not None and rewards[name] < part.gate:
            return floor
    try:
        return math.fsum(part.weight * rewards[name] for name, part in parts.items())
    except OverflowError:  # each is finite, and their sum is not
        return math.inf


class MixtureSource:
    """Scores with every term and sums weight times reward."""

    def __init__(self, terms: Mapping[str, Term], floor: float = 0.0) -> None:
        self.terms, self.floor = dict(terms), floor
        self.compares = any(compares(term.source) for term in self.terms.values())
        self.reads = "; ".join(f"{name}: {term.source.reads}" for name, term in self.terms.items())

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        columns = score_together([term.source for term in self.terms.values()], samples)
        return columns.then(lambda results: [self._sum(each) for each in zip(*results, strict=True)])

    def _sum(self, results: Sequence[ScoreResult]) -> ScoreResult:
        failed = first_failure(self.terms, results)
        if failed is not None:
            return failed
        rewards = rewards_of(self.terms, results)
        total = combine(rewards, {name: term.part for name, term in self.terms.items()}, self.floor)
        if not math.isfinite(total):
            return ScoreResult.failed(f"the weighted sum of {rewards} is {total}", fault="model")
        tokens = max(result.tokens for result in results)
        return MixedResult(raw=total, reward=total, tokens=tokens, terms=rewards)


Reduction = Literal["mean_minus_std", "minimum", "mean"]


def reduce(rewards: Sequence[float], reduction: Reduction, k: float) -> float:
    """One reward of those that the models of an ensemble give an answer.

    ``mean_minus_std`` is their mean less ``k`` times their (population) standard deviation, ``minimum`` the worst of them: the
    uncertainty-weighted and the worst-case optimisation of Coste et al. 2023 (https://arxiv.org/abs/2310.02743), of which the
    first takes the variance in the place of the deviation.
    """
    if reduction == "minimum":
        return min(rewards)
    return statistics.fmean(rewards) - (k * statistics.pstdev(rewards) if reduction == "mean_minus_std" else 0.0)


SPREAD = "spread"
"""The standard deviation of the rewards of an ensemble, as one of its terms."""


class EnsembleSource:
    """Scores with every model of an ensemble, and reduces their rewards to one."""

    def __init__(self, models: Mapping[str, RewardSource], reduction: Reduction, k: float) -> None:
        self.models, self.reduction, self.k = dict(models), reduction, k
        self.reads = "; ".join(f"{name}: {model.reads}" for name, model in self.models.items())

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        columns = score_together(list(self.models.values()), samples)
        return columns.then(lambda results: [self._reduce(each) for each in zip(*results, strict=True)])

    def _reduce(self, results: Sequence[ScoreResult]) -> ScoreResult:
        failed = first_failure(self.models, results)
        if failed is not None:
            return failed
        rewards = rewards_of(self.models, results)
        reward = reduce(list(rewards.values()), self.reduction, self.k)
        if not math.isfinite(reward):
            return ScoreResult.failed(f"the {self.reduction} of {rewards} is {reward}", fault="model")
        terms = {**rewards, SPREAD: statistics.pstdev(rewards.values())}
        tokens, cut = max(result.tokens for result in results), any(result.truncated for result in results)
        return MixedResult(raw=reward, reward=reward, tokens=tokens, truncated=cut, terms=terms)


def score_together(sources: Sequence[RewardSource], samples: Sequence[TextSample]) -> Pending[list[list[ScoreResult]]]:
    """The results of every source, all asked at the same time."""
    started = [source.score(samples) for source in sources]

    def wait() -> list[list[ScoreResult]]:
        with spans.waiting(name="the terms of the reward"), ThreadPoolExecutor(len(started)) as pool:
            return list(pool.map(lambda pending: _results(pending, len(samples)), started))

    return Pending(wait)


def first_failure(names: Iterable[str], results: Sequence[ScoreResult]) -> ScoreResult | None:
    """The failure of a sample at which sources have failed, with the name of one; none where all have a reward.

    One that no attempt mends comes first: waiting for the others would bring no sum.
    """
    failed = [(name, result) for name, result in zip(names, results, strict=True) if result.error is not None]
    for name, result in sorted(failed, key=lambda item: item[1].fault == "source"):
        assert result.fault is not None
        return ScoreResult.failed(f"{name}: {result.error}", result.tokens, fault=result.fault)
    return None


def rewards_of(names: Iterable[str], results: Sequence[ScoreResult]) -> dict[str, float]:
    """The rewards of one sample by the names of their sources."""
    named = zip(names, results, strict=True)
    return {name: float(result.reward) for name, result in named if result.reward is not None}


def _results(pending: Pending[list[ScoreResult]], count: int) -> list[ScoreResult]:
    """Results of one term; where it failed as a whole, that failure for every sample, so that the message can name it."""
    try:
        return pending.result()
    except ScoringError as error:
        return [ScoreResult.failed_by(error)] * count
