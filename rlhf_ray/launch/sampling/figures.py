"""What is said of sampled answers: their rewards and lengths, and what the best of n of them is worth at which KL.

Invariant: best of n is the exact mean over all subsets of n answers (:func:`rlhf_ray.evaluation.best_of_n`), of the prompts all
of whose answers have a reward. Its KL is that formula's, exact where no two answers can be worth the same and else a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rlhf_ray.console import say, table
from rlhf_ray.evaluation import best_of_n, best_of_n_kl, top_k_of_n_kl
from rlhf_ray.launch.sampling.answers import AnsweredPrompt
from rlhf_ray.launch.sampling.selection import Choice, why_not

KL_SAYS = "KL is log n - (n - 1) / n nats: exact where all answers are worth different rewards, else an upper bound"


class BestOf(NamedTuple):
    """What the best of ``n`` answers is worth."""

    n: int
    reward: float
    """The mean over prompts."""
    kl: float
    """Nats from one answer, at most."""


@dataclass(frozen=True)
class GenerationReport:
    """What was sampled, and what became of it."""

    output: Path
    """The rows that were chosen."""
    answers: Path
    """All answers."""
    figures: Mapping[str, float]
    """``prompts``, ``answers``, ``rows``, ``tokens`` (the mean of an answer) and ``cut`` (the share that a limit cut off); with
    rewards also ``reward`` (the mean), ``without_reward``, ``chosen_reward`` (the mean of the rows) and ``kl`` (of the choice).
    """
    best_of: Sequence[BestOf]
    """Of every power of two, and of all answers."""
    left_out: Mapping[str, int]
    """Answers, or prompts, that became no rows, by reason."""


def answer_figures(prompts: Sequence[AnsweredPrompt], *, scored: bool) -> dict[str, float]:
    """The figures of all answers."""
    answers = [answer for prompt in prompts for answer in prompt.answers]
    figures = {
        "prompts": float(len(prompts)),
        "answers": float(len(answers)),
        "tokens": _mean([float(answer.tokens) for answer in answers]),
        "cut": _mean([float(not answer.finished) for answer in answers]),
    }
    rewards = [answer.reward for answer in answers if answer.reward is not None]
    if scored:
        figures["without_reward"] = float(len(answers) - len(rewards))
    if rewards:
        figures["reward"] = _mean(rewards)
    return figures


def best_of(prompts: Sequence[AnsweredPrompt]) -> list[BestOf]:
    """Best of n for every n that the answers allow; nothing where no prompt has two answers with rewards."""
    rewards = complete_rewards(prompts)
    most = min(map(len, rewards), default=0)
    if most < 2:
        return []
    sizes = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    return [BestOf(n, best_of_n(rewards, rewards, n), best_of_n_kl(n)) for n in sizes]


def complete_rewards(prompts: Sequence[AnsweredPrompt]) -> list[list[float]]:
    """The rewards of the prompts all of whose answers have one."""
    rewards = [[answer.reward for answer in prompt.answers] for prompt in prompts]
    return [[one for one in row if one is not None] for row in rewards if row and None not in row]


def kl_of_choice(prompts: Sequence[AnsweredPrompt], choice: Choice) -> float | None:
    """How far the choice moves from one answer, in nats, at most; none of what is no policy.

    The mean over the prompts that have a row. A choice by rewards takes an answer that is left out for worse than all others,
    but one whose reward is missing for one that was never sampled. Of ``all`` answers those that are not left out are answers
    of another policy, whose distance is not known.
    """
    if choice.select == "worst-best":
        return None
    kept = [(prompt, [answer for answer in prompt.answers if not why_not(answer, choice)]) for prompt in prompts]
    if choice.select == "all":
        return 0.0 if all(len(answers) == len(prompt.answers) for prompt, answers in kept) else None
    top = choice.top if choice.select == "top-k" else 1
    each = [
        float(top_k_of_n_kl(min(top, len(answers)), len([one for one in prompt.answers if one.reward is not None])))
        for prompt, answers in kept
        if answers
    ]
    return _mean(each) if each else None


def print_report(report: GenerationReport) -> None:
    """Show the figures, best of n, and what was left out."""
    say(table("answers", ("figure", "value"), [(name, f"{value:.6g}") for name, value in report.figures.items()]))
    if report.best_of:
        rows = [(one.n, f"{one.reward:.4g}", f"{one.kl:.3f}") for one in report.best_of]
        say(table("best of n", ("n", "mean reward", "KL"), rows))
        say(KL_SAYS)
    if report.left_out:
        say("left out: " + ", ".join(f"{count} {reason}" for reason, count in report.left_out.items()))
    say(f"{report.output} holds the rows, {report.answers} all answers")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
