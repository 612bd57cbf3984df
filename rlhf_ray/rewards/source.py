"""The interface of everything that gives rewards, the reward model behind it, and how long a failed source is tried again.

Invariants: a source gives every sample a value or an error, in order; nothing turns an error into a number; a source that
failed as a whole has failed at every sample.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.errors import ScoringError
from rlhf_ray.monitoring import events
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.sample import TextSample

SECONDS_BETWEEN_TRIES = 1.0
CALL = "reward"
"""What a call to a source is known as while it is under way (``monitoring/events.py``)."""


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


class Forms(NamedTuple):
    """The results of one sample in two forms."""

    sample: TextSample
    by_ids: ScoreResult
    by_text: ScoreResult


class ModelSource:
    """A reward model's scores, normalised with the mean and deviation of its directory where asked.

    Token ids pass as they were sampled where policy and reward model have the same tokenizer, which ``policy`` then is with
    its chat template; otherwise the text is written again with the reward model's own template. A finished answer is read at
    the end token that the reward model was trained with, whichever token has stopped it; one that was cut at its last token.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        policy: ChatFormat | None,
        stop_tokens: Collection[int] = (),
        mean: float = 0.0,
        std: float = 1.0,
    ) -> None:
        """``stop_tokens`` are the ids that end a sampled answer."""
        self.scorer = scorer
        self.policy = policy
        self.stop_tokens = frozenset(stop_tokens)
        self.mean = mean
        self.std = std
        self.reads = "text, tokenized again" if policy is None else "the ids as sampled"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        requests = [self.request(sample) for sample in samples]
        return self.scorer.score(requests).then(
            lambda results: [result.normalised(self.mean, self.std) for result in results]
        )

    def request(self, sample: TextSample) -> ScoreRequest:
        """The request for one sample."""
        return self.text_request(sample) if self.policy is None else ScoreRequest(token_ids=self._ended_ids(sample))

    def text_request(self, sample: TextSample) -> ScoreRequest:
        """The request for one sample as text, which is encoded as in the training of the reward model."""
        if sample.messages is None:
            return ScoreRequest(prompt=sample.prompt, response=sample.response, finished=sample.finished)
        return ScoreRequest(
            messages=sample.messages,
            tools=sample.tools,
            chat_template_kwargs=sample.template_variables,
            finished=sample.finished,
        )

    def compare_forms(self, samples: Sequence[TextSample]) -> list[Forms]:
        """Results of the samples by ids, as the run asks for them, and by text, which is encoded as in training.

        Only of samples whose text has the ids that were sampled; none where ids do not pass.
        """
        same = [sample for sample in samples if self.policy is not None and self._is_its_text(sample, self.policy)]
        by_ids = self.scorer.score([self.request(sample) for sample in same])
        by_text = self.scorer.score([self.text_request(sample) for sample in same])
        return [Forms(*each) for each in zip(same, by_ids.result(), by_text.result(), strict=True)] if same else []

    def _is_its_text(self, sample: TextSample, policy: ChatFormat) -> bool:
        """Whether the ids of a sampled answer in a conversation are those that its text has, with and without an end."""
        if sample.messages is None:
            return False
        prompt, answer = policy.encode(
            sample.messages, sample.tools, sample.template_variables, finished=sample.finished
        )
        return (*prompt, *answer) == self._ended_ids(sample)

    def _ended_ids(self, sample: TextSample) -> tuple[int, ...]:
        """The ids as sampled; of a finished answer with the one end token that reward models are trained with."""
        assert self.policy is not None, "ids pass between equal tokenizers only"
        end = self.policy.tokenizer.eos_token_id if sample.messages is None else self.policy.end_token_id
        if not sample.finished or end is None:
            return sample.token_ids
        stopped = not {*sample.token_ids[-1:]}.isdisjoint({*self.stop_tokens, end})
        return (*(sample.token_ids[:-1] if stopped else sample.token_ids), end)


def score_or_hold(
    source: RewardSource,
    samples: Sequence[TextSample],
    *,
    hold_s: float,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[ScoreResult]:
    """Score everything; samples that the source failed at are tried again for ``hold_s`` seconds, and then keep their error.

    What another attempt would not change (:mod:`rlhf_ray.transient`) is not tried again. A source that compares answers with
    each other is asked again about all answers to a prompt.
    """
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
        asked = _whole_groups(samples, failed) if compares(source) else failed
        again = _try(source, [samples[i] for i in asked])
        for position, result in zip(asked, again, strict=True):
            results[position] = result
        failed = _to_try_again(asked, results)
    return results


def compares(source: RewardSource) -> bool:
    """Whether the reward of an answer depends on the other answers to its prompt, which then have to be scored with it."""
    return bool(getattr(source, "compares", False))


def _whole_groups(samples: Sequence[TextSample], positions: Iterable[int]) -> list[int]:
    """The positions of all answers to the prompts of those at ``positions``."""
    prompts = {samples[position].prompt_id for position in positions}
    return [position for position, sample in enumerate(samples) if sample.prompt_id in prompts]


def _to_try_again(positions: Iterable[int], results: Sequence[ScoreResult]) -> list[int]:
    return [position for position in positions if results[position].fault == "source"]


def _try(source: RewardSource, samples: Sequence[TextSample]) -> list[ScoreResult]:
    """Results of one attempt."""
    try:
        with events.call(CALL):
            results = source.score(samples).result()
    except ScoringError as error:
        results = [ScoreResult.failed_by(error)] * len(samples)
    if _to_try_again(range(len(results)), results):
        events.count("reward/failed_tries")
    return results
