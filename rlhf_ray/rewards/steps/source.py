"""A source of rewards of steps, reduced to what the run asks for.

Invariant: where rewards of steps are asked for, an answer has them or an error; a reward of the whole answer is never taken
for one.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import RewardSource, compares
from rlhf_ray.rewards.steps.placement import Reduction, SteppedResult, misplaced, reduced


class SteppedSource:
    """Checks the steps that a source gives, and reduces them: ``sum`` keeps each at its place, the others leave one score."""

    def __init__(self, source: RewardSource, reduction: Reduction) -> None:
        self.source, self.reduction = source, reduction
        self.reads = f"{source.reads}, step by step"
        self.compares = compares(source)

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        return self.source.score(samples).then(
            lambda results: [self._result(*each) for each in zip(samples, results, strict=True)]
        )

    def _result(self, sample: TextSample, result: ScoreResult) -> ScoreResult:
        if result.error is not None:
            return result
        if not isinstance(result, SteppedResult):
            return ScoreResult.failed(
                f"the answer has the reward {result.reward} and none for its steps: return a list of (end, reward) for each "
                "answer, or set reward.steps to null",
                fault="model",
            )
        problem = misplaced(result.steps, sample.response)
        if problem is not None:
            return ScoreResult.failed(problem, fault="model")
        return result if self.reduction == "sum" else ScoreResult.of(reduced(result.steps, self.reduction))
