"""Several reward sources as one: the weighted sum of their rewards.

Invariants: a sample has a reward only where every term has one; the rewards of the terms are kept beside their sum; all
terms score at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rlhf_ray.errors import ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.processes import spans
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import RewardSource


@dataclass(frozen=True)
class Term:
    """One source and the weight of its reward in the sum."""

    source: RewardSource
    weight: float


@dataclass(frozen=True)
class MixedResult(ScoreResult):
    """A sum, with the unweighted reward of each term."""

    terms: Mapping[str, float] | None = None


class MixtureSource:
    """Scores with every term and sums weight times reward."""

    def __init__(self, terms: Mapping[str, Term]) -> None:
        self.terms = dict(terms)
        self.reads = "; ".join(f"{name}: {term.source.reads}" for name, term in self.terms.items())

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        started = [term.source.score(samples) for term in self.terms.values()]
        return Pending(lambda: self._sums(started, len(samples)))

    def _sums(self, started: Sequence[Pending[list[ScoreResult]]], count: int) -> list[ScoreResult]:
        with spans.waiting(name="the terms of the reward"), ThreadPoolExecutor(len(started)) as pool:
            columns = list(pool.map(lambda pending: _results(pending, count), started))
        return [self._sum(results) for results in zip(*columns, strict=True)]

    def _sum(self, results: Sequence[ScoreResult]) -> ScoreResult:
        named = dict(zip(self.terms, results, strict=True))
        failed = {name: result for name, result in named.items() if result.error is not None}
        # One that no attempt mends comes first: waiting for the others would bring no sum.
        for name, result in sorted(failed.items(), key=lambda item: item[1].fault == "source"):
            assert result.fault is not None
            return ScoreResult.failed(f"{name}: {result.error}", result.tokens, fault=result.fault)
        rewards = {name: float(result.reward) for name, result in named.items() if result.reward is not None}
        total = math.fsum(self.terms[name].weight * reward for name, reward in rewards.items())
        if not math.isfinite(total):
            return ScoreResult.failed(f"the weighted sum of {rewards} is {total}", fault="model")
        tokens = max(result.tokens for result in results)
        return MixedResult(raw=total, reward=total, tokens=tokens, terms=rewards)


def _results(pending: Pending[list[ScoreResult]], count: int) -> list[ScoreResult]:
    """Results of one term; where it failed as a whole, that failure for every sample, so that the message can name it."""
    try:
        return pending.result()
    except ScoringError as error:
        return [ScoreResult.failed_by(error)] * count
