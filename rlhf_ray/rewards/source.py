"""The interface of everything that gives rewards, the reward model behind it, and how long a failed source is tried again.

Invariants: a source gives every sample a value or an error, in order; nothing turns an error into a number; a source that
failed as a whole has failed at every sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.errors import ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.sample import TextSample

SECONDS_BETWEEN_TRIES = 1.0


class RewardSource(Protocol):
    """Scores samples in order."""

    reads: str
    """What the source reads of a sample, in words, for the log."""

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""


class Scorer(Protocol):
    """A reward model, wherever it runs (a group of ranks, in this process, over HTTP)."""

    def score(self, requests: Sequence[ScoreRequest]) -> Pending[list[ScoreResult]]:
        """One result per request, in order."""


class ModelSource:
    """A reward model's scores, normalised with the mean and deviation of its directory where asked.

    Token ids pass as they were sampled where policy and reward model have the same tokenizer; otherwise the text is written
    again with the reward model's own template.
    """

    def __init__(self, scorer: Scorer, *, same_tokenizer: bool, mean: float = 0.0, std: float = 1.0) -> None:
        self.scorer = scorer
        self.same_tokenizer = same_tokenizer
        self.mean = mean
        self.std = std
        self.reads = "the ids as sampled" if same_tokenizer else "text, tokenized again"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        requests = [self.request(sample) for sample in samples]
        return self.scorer.score(requests).then(
            lambda results: [result.normalised(self.mean, self.std) for result in results]
        )

    def request(self, sample: TextSample) -> ScoreRequest:
        """The request for one sample."""
        if self.same_tokenizer:
            return ScoreRequest(token_ids=sample.token_ids)
        if sample.messages is not None:
            return ScoreRequest(messages=sample.messages)
        return ScoreRequest(prompt=sample.prompt, response=sample.response)


def score_or_hold(
    source: RewardSource,
    samples: Sequence[TextSample],
    *,
    hold_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[ScoreResult]:
    """Score everything; samples that the source failed at are tried again for ``hold_s`` seconds, and then keep their error."""
    results = _try(source, samples)
    failed = _to_try_again(range(len(results)), results)
    if failed and hold_s > 0:
        first = samples[failed[0]]
        get_logger("rewards").warning(
            "%d of %d samples have no reward, such as sample %d of prompt %d (%s): trying again for %g s",
            len(failed), len(results), first.sample_index, first.prompt_id, results[failed[0]].error, hold_s,
        )  # fmt: skip
    deadline = clock() + hold_s
    while failed and (left := deadline - clock()) > 0:
        sleep(min(SECONDS_BETWEEN_TRIES, left))
        again = _try(source, [samples[i] for i in failed])
        for position, result in zip(failed, again, strict=True):
            results[position] = result
        failed = _to_try_again(failed, results)
    return results


def _to_try_again(positions: Iterable[int], results: Sequence[ScoreResult]) -> list[int]:
    return [position for position in positions if results[position].fault == "source"]


def _try(source: RewardSource, samples: Sequence[TextSample]) -> list[ScoreResult]:
    """Results of one attempt."""
    try:
        return source.score(samples).result()
    except ScoringError as error:
        return [ScoreResult.failed(str(error), fault="source")] * len(samples)
