"""What the answers of one policy, or of two to the same prompts, say: rewards, pass@k, win rates, each with an interval.

Pure. Invariants: two policies are compared at the prompts where every answer of both has a reward, and the others are counted;
every figure is a mean over prompts, and its interval is over prompts too; a tie counts one half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.evaluation import pass_at_k
from rlhf_ray.evaluation.intervals import Interval, mean_interval, share_interval
from rlhf_ray.evaluation.win_rates import Meetings, length_controlled_win_rate, meet, paired_win_rate
from rlhf_ray.launch.sampling.answers import Answer, AnsweredPrompt

RIGHT_AT = 1.0
"""The reward from which on an answer counts as right, as in evaluations of PPO."""
Prompts = Sequence[AnsweredPrompt]


@dataclass(frozen=True)
class Figure:
    """A mean over prompts, with its interval of 95 % where one was asked for."""

    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Scored:
    """One policy's answers to the prompts that count."""

    prompts: Prompts

    @property
    def rewards(self) -> list[list[float]]:
        """Of the answers to each prompt."""
        return [[answer.reward for answer in one.answers if answer.reward is not None] for one in self.prompts]

    @property
    def lengths(self) -> list[list[int]]:
        """In characters, which two policies with different tokenizers share."""
        return [[len(answer.response) for answer in one.answers] for one in self.prompts]

    def means(self, value: Callable[[Answer], float]) -> list[float]:
        """The mean over the answers to each prompt."""
        return [_mean([value(answer) for answer in one.answers]) for one in self.prompts]

    def passes(self, k: int) -> list[float]:
        """pass@k of each prompt."""
        return [pass_at_k(len(row), sum(reward >= RIGHT_AT for reward in row), k) for row in self.rewards]


@dataclass(frozen=True)
class PolicyReport:
    """What was found of one policy, or of the first against the second."""

    names: Sequence[str]
    """The policies as they were named, the first one first."""
    prompts: int
    """That count."""
    left_out: int
    """Prompts with an answer that has no reward."""
    samples: int
    """Answers of each policy to each prompt."""
    figures: Sequence[Mapping[str, Figure]]
    """Of each policy: ``reward``, ``pass_at_K``, ``characters``, ``tokens``, ``cut`` (the share that a limit cut off)."""
    comparison: Mapping[str, Figure] = field(default_factory=dict)
    """Of the first against the second: ``win_rate``, ``wins``, ``ties``, ``losses``, ``length_controlled_win_rate``,
    ``length_effect`` (log-odds), ``reward_difference`` and ``pass_at_K_difference``."""
    sources: Mapping[str, Figure] = field(default_factory=dict)
    """The win rate by source of the prompts, where there are several."""
    neither: int = 0
    """Rewards that are neither 0 nor 1, which pass@k counts as right from 1 on."""


def report_on(
    names: Sequence[str], answers: Sequence[Prompts], pass_at: Sequence[int] = (), seed: int = 0
) -> PolicyReport:
    """The figures of one or two policies; ``answers`` are those of each.

    Raises :class:`RequestError` for answers that cannot be compared, :class:`ScoringError` where no prompt counts.
    """
    kept, left_out = _that_count(names, answers)
    samples = _samples(names, kept)
    if wrong := [k for k in pass_at if not 1 <= k <= samples]:
        raise RequestError(
            f"pass@{wrong[0]} of {samples} answers to a prompt is undefined: raise --samples, or lower it"
        )
    scored = [Scored(prompts) for prompts in kept]
    figures = [_figures(one, pass_at, seed) for one in scored]
    rewards = [reward for one in scored for row in one.rewards for reward in row]
    neither = sum(reward not in (0.0, 1.0) for reward in rewards) if pass_at else 0
    report = PolicyReport(names, len(kept[0]), left_out, samples, figures, neither=neither)
    if len(scored) == 1:
        return report
    first, second = scored
    return PolicyReport(
        names, report.prompts, left_out, samples, figures, _comparison(first, second, pass_at, seed),
        _by_source(first, second, seed), neither,
    )  # fmt: skip


def _that_count(names: Sequence[str], answers: Sequence[Prompts]) -> tuple[list[list[AnsweredPrompt]], int]:
    """Of each policy the prompts all of whose answers have rewards by every policy, in one order; and how many others are."""
    by_id = [{one.prompt_id: one for one in prompts} for prompts in answers]
    everywhere = set.union(*map(set, by_id))
    for prompt_id in set.intersection(*map(set, by_id)):
        if len({str(prompts[prompt_id].prompt) for prompts in by_id}) > 1:
            raise RequestError(
                f"prompt {prompt_id} is another one in the answers of {names[1]} than in those of {names[0]}: sample both from "
                "the same file"
            )
    complete = [{number for number, one in prompts.items() if _is_scored(one)} for prompts in by_id]
    common = sorted(set.intersection(*complete))
    if not common:
        errors = [answer.error for prompts in answers for one in prompts for answer in one.answers if answer.error]
        because = f", such as: {errors[0]}" if errors else ""
        raise ScoringError(
            f"no prompt has rewards for all of its answers by {' and '.join(names)}{because}: mend the reward source"
        )
    return [[prompts[number] for number in common] for prompts in by_id], len(everywhere) - len(common)


def _is_scored(prompt: AnsweredPrompt) -> bool:
    return bool(prompt.answers) and all(answer.reward is not None for answer in prompt.answers)


def _samples(names: Sequence[str], kept: Sequence[Prompts]) -> int:
    counts = [{len(one.answers) for one in prompts} for prompts in kept]
    if any(len(count) > 1 for count in counts) or len({max(count) for count in counts}) > 1:
        each = " and ".join(f"{max(count)} of {name}" for name, count in zip(names, counts, strict=True))
        raise RequestError(f"the prompts have different numbers of answers ({each} at most): sample as many of each")
    return max(counts[0])


def _figures(scored: Scored, pass_at: Sequence[int], seed: int) -> dict[str, Figure]:
    rewards = list(map(_mean, scored.rewards))
    figures = {"reward": Figure(_mean(rewards), mean_interval(rewards, seed))}
    for k in pass_at:
        passes = scored.passes(k)
        figures[f"pass_at_{k}"] = Figure(_mean(passes), share_interval(passes, seed))
    measures: Mapping[str, Callable[[Answer], float]] = {
        "characters": lambda answer: float(len(answer.response)),
        "tokens": lambda answer: float(answer.tokens),
        "cut": lambda answer: float(not answer.finished),
    }
    return figures | {name: Figure(_mean(scored.means(measure))) for name, measure in measures.items()}


def _comparison(first: Scored, second: Scored, pass_at: Sequence[int], seed: int) -> dict[str, Figure]:
    meetings = _meetings(first, second)
    plain, controlled = paired_win_rate(meetings, seed), length_controlled_win_rate(meetings, seed)
    rewards, others = (list(map(_mean, one.rewards)) for one in (first, second))
    return {
        "win_rate": Figure(plain.rate, plain.interval),
        "wins": Figure(plain.wins),
        "ties": Figure(plain.ties),
        "losses": Figure(plain.losses),
        "length_controlled_win_rate": Figure(controlled.rate, controlled.interval),
        "length_effect": Figure(controlled.length_effect),
        "reward_difference": _difference(rewards, others, seed),
        **{f"pass_at_{k}_difference": _difference(first.passes(k), second.passes(k), seed) for k in pass_at},
    }


def _difference(one: Sequence[float], other: Sequence[float], seed: int) -> Figure:
    """The mean difference, with an interval over prompts: what is hard for both cancels out."""
    each = [left - right for left, right in zip(one, other, strict=True)]
    return Figure(_mean(each), mean_interval(each, seed))


def _by_source(first: Scored, second: Scored, seed: int) -> dict[str, Figure]:
    sources = sorted({one.source for one in first.prompts})
    figures = {}
    for source in sources if len(sources) > 1 else ():
        own = [Scored([one for one in scored.prompts if one.source == source]) for scored in (first, second)]
        rate = paired_win_rate(_meetings(*own), seed)
        figures[source] = Figure(rate.rate, rate.interval)
    return figures


def _meetings(first: Scored, second: Scored) -> Meetings:
    return meet(first.rewards, second.rewards, first.lengths, second.lengths)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
