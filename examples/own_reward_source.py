"""A reward source of your own: the nearer an answer is to a length, the better.

    rlhf-ray train ppo demo-ppo reward.model=null reward.source=examples/own_reward_source.py:Length reward.parameters.tokens=12

For a function of texts, ``reward.function`` is simpler, and runs in a process of its own. A source sees whole samples, keeps
what it needs between the steps (a connection, a model, a cache), and says of each sample why it has no reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample


class Length:
    """``-|length - tokens| / tokens``, the length in tokens of the policy's tokenizer."""

    reads = "text"
    """What it reads of a sample, in words: the self-check of a run prints it."""

    def __init__(self, tokenizer: Any, tokens: int = 16) -> None:
        """``tokenizer`` comes from the run, because it is asked for by this name; ``tokens`` from the config."""
        self.tokenizer = tokenizer
        self.tokens = tokens

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order: a number, or the reason why there is none."""
        return Pending.done([self._score(sample) for sample in samples])

    def close(self) -> None:
        """Called when the run ends, where a source has it."""

    def _score(self, sample: TextSample) -> ScoreResult:
        if not sample.response.strip():
            return ScoreResult.of(-1.0)
        length = len(self.tokenizer.encode(sample.response))
        return ScoreResult.of(-abs(length - self.tokens) / self.tokens, tokens=length)
