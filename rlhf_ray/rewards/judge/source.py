"""A judge as a reward source: each answer is graded by itself.

Invariants: a reward is a score that the judge gave, as a share of its range; an answer without one has an error, never a
number. The same question is asked once, and every sample that asks it gets the same score.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Generic, TypeVar

from rlhf_ray.pending import Pending
from rlhf_ray.rewards.judge.endpoint import Endpoint, NoReply
from rlhf_ray.rewards.judge.questions import Messages, Questions
from rlhf_ray.rewards.judge.verdicts import Refusal, Scale, read_score, read_scores
from rlhf_ray.rewards.mixture import MixedResult, Part, combine
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rows.labels import KEY

REMEMBERED = 10_000
"""Verdicts that are kept, the newest: what is asked again, such as by the start-up self-check, costs nothing."""
Verdict = TypeVar("Verdict")


@dataclass(frozen=True)
class Tally:
    """What a judge did."""

    requests: int = 0
    tokens: int = 0
    cost: float = 0.0
    refusals: int = 0
    """Replies that hold no verdict."""
    unanswered: int = 0
    """Questions without a reply."""
    comparisons: int = 0
    """Replies that say which of two answers is better."""
    first: float = 0.0
    """Of these, how many say the one that is shown first; ties half."""


class Judge(Generic[Verdict]):
    """Asks questions of one kind and reads their replies, each question once."""

    def __init__(self, endpoint: Endpoint, read: Callable[[str], Verdict | Refusal]) -> None:
        self.endpoint = endpoint
        self._read = read
        self._known: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._refusals = self._unanswered = 0
        self.comparisons, self.first = 0, 0.0
        self._taken = self._total()

    def verdicts(self, questions: Sequence[Messages]) -> list[Verdict | NoReply]:
        """The verdict on each question, in order, or why there is none."""
        keys = [tuple(message["content"] for message in question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        answers = dict(zip(new, map(self._verdict, self.endpoint.ask(list(new.values()))), strict=True))
        verdicts = [answers[key] if key in answers else self._known[key] for key in keys]
        for key, answer in answers.items():
            if not isinstance(answer, NoReply):
                self._known[key] = answer
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return verdicts

    def _verdict(self, reply: str | NoReply) -> Verdict | NoReply:
        if isinstance(reply, NoReply):
            self._unanswered += 1
            return reply
        verdict = self._read(reply)
        if isinstance(verdict, Refusal):
            self._refusals += 1
            return NoReply(f"the judge {verdict.reason}", "item")
        return verdict

    def take_tally(self) -> Tally:
        """What was done since the last call of this."""
        before, self._taken = self._taken, self._total()
        return Tally(*(now - then for now, then in zip(astuple(self._taken), astuple(before), strict=True)))

    def _total(self) -> Tally:
        spent = self.endpoint.budget.spent
        return Tally(
            spent.requests, spent.tokens, spent.cost, self._refusals, self._unanswered, self.comparisons, self.first
        )


class JudgeSource:
    """Grades each answer by itself: one score, or one for each part of a rubric."""

    def __init__(
        self, endpoint: Endpoint, questions: Questions, scale: Scale, parts: Mapping[str, Part], floor: float
    ) -> None:
        """``parts`` are weighed, and their gates bring the reward to ``floor``; without parts the score is the reward."""
        self.questions, self.scale, self.parts, self.floor = questions, scale, dict(parts), floor
        self.judge: Judge[dict[str, float]] = Judge(endpoint, self._read)
        self.reads = "text, by a judge"

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        """One result per sample, in order."""
        return Pending(lambda: self._score(samples))

    def _score(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        asked = [sample for sample in samples if not self._lacks_label(sample)]
        verdicts = iter(self.judge.verdicts([self.questions.rate(sample) for sample in asked]))
        return [no_label() if self._lacks_label(sample) else self._result(next(verdicts)) for sample in samples]

    def _lacks_label(self, sample: TextSample) -> bool:
        return self.questions.reference and sample.label is None

    def _read(self, text: str) -> dict[str, float] | Refusal:
        if self.parts:
            return read_scores(text, self.parts, self.scale)
        score = read_score(text, self.scale)
        return score if isinstance(score, Refusal) else {"": score}

    def _result(self, verdict: dict[str, float] | NoReply) -> ScoreResult:
        if isinstance(verdict, NoReply):
            return ScoreResult.failed(verdict.reason, fault=verdict.fault)
        if not self.parts:
            return ScoreResult(raw=verdict[""], reward=self.scale.share(verdict[""]))
        shares = {name: self.scale.share(score) for name, score in verdict.items()}
        gates = {name: Part(part.weight, self._gate(part)) for name, part in self.parts.items()}
        reward = combine(shares, gates, self.floor)
        return MixedResult(raw=reward, reward=reward, terms=shares)

    def _gate(self, part: Part) -> float | None:
        return None if part.gate is None else self.scale.share(part.gate)


def no_label() -> ScoreResult:
    """The result of an answer that is to be held against the label of its prompt, which has none."""
    return ScoreResult.failed(f"the prompt has no label to hold the answer against: {KEY}", fault="model")
