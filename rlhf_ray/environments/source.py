"""The rewards of environments as a reward source.

Invariant: an episode has the sum of the rewards of its turns, or the reason why its environment gave none.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.environments.protocol import FAILURES, EpisodeFailure
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample


class EnvironmentSource:
    """Reads the rewards that episodes brought with them."""

    reads = "nothing: the environment gave the reward with each turn"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        return Pending.done([_result(sample) for sample in samples])


def _result(sample: TextSample) -> ScoreResult:
    if sample.episode_reward is not None:
        return ScoreResult.of(sample.episode_reward)
    reason = FAILURES[EpisodeFailure(sample.episode_failure)] if sample.episode_failure else "played no episode"
    return ScoreResult.failed(f"the environment {reason}", fault="model")
