"""A judge that compares the answers to a prompt with each other, as a reward source.

Invariants: the answers to a prompt have rewards together or not at all, from the comparisons of all of them; a comparison that
the judge gave no verdict on is no tie. Two answers that are the same tie without being asked about.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.pending import Pending
from rlhf_ray.rewards.judge.endpoint import Endpoint, NoReply
from rlhf_ray.rewards.judge.questions import Messages, Questions
from rlhf_ray.rewards.judge.ranking import Compare, Comparison, Ranking, comparisons, scores
from rlhf_ray.rewards.judge.source import Judge, no_label
from rlhf_ray.rewards.judge.verdicts import Refusal, read_better
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample


class ComparingSource:
    """Ranks the answers to each prompt by comparisons of two at a time."""

    compares = True
    """Whether the reward of an answer depends on the other answers to its prompt."""

    def __init__(
        self, endpoint: Endpoint, questions: Questions, compare: Compare, ranking: Ranking, *, both_orders: bool
    ) -> None:
        """``both_orders`` asks about two answers twice, each of them once shown first."""
        self.questions, self.compare, self.ranking, self.both_orders = questions, compare, ranking, both_orders
        self.judge: Judge[float] = Judge(endpoint, self._read)
        self.reads = "text, by a judge that compares answers"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order; the samples hold all answers to each of their prompts."""
        return Pending(lambda: self._score(samples))

    def _score(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        groups: dict[int, list[int]] = {}
        for position, sample in enumerate(samples):
            groups.setdefault(sample.prompt_id, []).append(position)
        members = {prompt: [samples[position] for position in positions] for prompt, positions in groups.items()}
        failures = {prompt: failure for prompt, group in members.items() if (failure := self._unfit(group)) is not None}
        met = {
            prompt: comparisons(len(group), self.compare, both_orders=self.both_orders)
            for prompt, group in members.items()
            if prompt not in failures
        }
        shares = iter(self.judge.verdicts(self._questions(members, met)))
        results: dict[int, ScoreResult] = {}
        for prompt, positions in groups.items():
            group = members[prompt]
            given = [
                0.5 if _same(group[first], group[second]) else next(shares) for first, second in met.get(prompt, [])
            ]
            ranked = [failures[prompt]] * len(group) if prompt in failures else self._ranked(group, met[prompt], given)
            results |= zip(positions, ranked, strict=True)
        return [results[position] for position in range(len(samples))]

    def _unfit(self, group: Sequence[TextSample]) -> ScoreResult | None:
        """Why the answers cannot be compared, which no attempt changes."""
        if self.questions.reference and group[0].label is None:
            return no_label()
        if len(group) < 2:
            return ScoreResult.failed("a prompt with one answer has nothing to compare it with", fault="model")
        if self.compare == "pairs" and len(group) % 2:
            return ScoreResult.failed(
                f"{len(group)} answers to a prompt do not make pairs: sample an even number", fault="model"
            )
        return None

    def _questions(self, members: dict[int, list[TextSample]], met: dict[int, list[tuple[int, int]]]) -> list[Messages]:
        return [
            self.questions.compare(members[prompt][first], members[prompt][second])
            for prompt, pairs in met.items()
            for first, second in pairs
            if not _same(members[prompt][first], members[prompt][second])
        ]

    def _ranked(
        self, group: Sequence[TextSample], met: Sequence[tuple[int, int]], given: Sequence[float | NoReply]
    ) -> list[ScoreResult]:
        missing = [share for share in given if isinstance(share, NoReply)]
        if missing:
            worst = min(missing, key=lambda one: one.fault == "source")  # what no attempt mends comes first
            why = f"{len(missing)} of {len(given)} comparisons of the answers to its prompt have no verdict, such as: "
            return [ScoreResult.failed(why + worst.reason, fault=worst.fault)] * len(group)
        verdicts = [
            Comparison(first, second, share)
            for (first, second), share in zip(met, given, strict=True)
            if not isinstance(share, NoReply)
        ]
        return [ScoreResult(raw=score, reward=score) for score in scores(len(group), verdicts, self.ranking)]

    def _read(self, text: str) -> float | Refusal:
        share = read_better(text)
        if not isinstance(share, Refusal):
            self.judge.comparisons += 1
            self.judge.first += share
        return share


def _same(one: TextSample, other: TextSample) -> bool:
    return (one.response, one.finished) == (other.response, other.finished)
