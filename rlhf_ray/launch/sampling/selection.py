"""Which answers become rows, and how the rows are written that ``rlhf-ray train`` reads.

Pure. Invariants: a row is chosen by the answers of its prompt alone, the first of equal ones; whatever is left out is counted
with its reason; every row that is written can be read: none has an empty answer, and no pair has two equal answers or rewards.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config.jobs.generate import Selection
from rlhf_ray.launch.sampling.answers import Answer, AnsweredPrompt

CUT, EMPTY, UNSCORED = "cut off", "empty", "without a reward"
ALIKE = "prompts whose answers are all alike"
"""Reasons to leave answers, or a whole prompt, out."""
DECILES = 10
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """How rows are made; the keys of ``GenerateConfig`` with these names."""

    select: Selection = "all"
    top: int = 1
    keep_cut: bool = False
    condition: str | None = None
    scored: bool = False
    """Whether rewards were asked for."""


def choose(prompts: Sequence[AnsweredPrompt], choice: Choice) -> tuple[list[Row], Counter[str]]:
    """The rows of all prompts, in their order, and how many answers (or prompts) were left out, by reason."""
    left_out = Counter[str]()
    possible = [(prompt, _possible(prompt, choice, left_out)) for prompt in prompts]
    if choice.select == "worst-best":
        pairs = [(prompt, *ends) for prompt, answers in possible if (ends := _ends(answers))]
        left_out[ALIKE] += len(prompts) - len(pairs)
        return [_pair(*pair) for pair in pairs], +left_out
    chosen = [(prompt, answer) for prompt, answers in possible for answer in _best(answers, choice)]
    rewards = sorted(answer.reward for _, answer in chosen if answer.reward is not None)
    return [_demonstration(prompt, answer, choice.condition, rewards) for prompt, answer in chosen], +left_out


def _possible(prompt: AnsweredPrompt, choice: Choice, left_out: Counter[str]) -> list[Answer]:
    kept = []
    for answer in prompt.answers:
        reason = why_not(answer, choice)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(answer)
    return kept


def why_not(answer: Answer, choice: Choice) -> str:
    """Why an answer becomes no row; empty where it may."""
    if not answer.response.strip():
        return EMPTY
    if not answer.finished and not choice.keep_cut:
        return CUT
    return UNSCORED if choice.scored and answer.reward is None else ""


def _best(answers: Sequence[Answer], choice: Choice) -> Sequence[Answer]:
    """The answers that are taken of one prompt, the best first where they are chosen by their rewards."""
    if choice.select == "all":
        return answers
    return sorted(answers, key=_reward, reverse=True)[: choice.top if choice.select == "top-k" else 1]


def _ends(answers: Sequence[Answer]) -> tuple[Answer, Answer] | None:
    """The best and the worst answer; none where they are equal, or worth the same."""
    if not answers:
        return None
    best, worst = max(answers, key=_reward), min(answers, key=_reward)
    return None if _reward(best) == _reward(worst) or best.response == worst.response else (best, worst)


def _reward(answer: Answer) -> float:
    assert answer.reward is not None, "answers without one were left out"
    return answer.reward


def _demonstration(prompt: AnsweredPrompt, answer: Answer, condition: str | None, rewards: Sequence[float]) -> Row:
    """A row for ``rlhf-ray train sft``; ``rewards`` are those of all rows, sorted."""
    asked = prompt.prompt if condition is None else _conditioned(prompt.prompt, _label(answer, condition, rewards))
    row = {"prompt": asked, "answer": answer.response, "prompt_id": prompt.prompt_id}
    return row | _beside(prompt) | ({} if answer.reward is None else {"reward": answer.reward})


def _pair(prompt: AnsweredPrompt, best: Answer, worst: Answer) -> Row:
    """A row for ``rlhf-ray train rm`` and for training on preferences.

    Rewards stand under names that its reader takes for no ratings, of which a loss would make grades.
    """
    chosen, rejected = (
        one.response if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": one.response}]
        for one in (best, worst)
    )
    row = {"prompt": prompt.prompt, "chosen": chosen, "rejected": rejected, "prompt_id": prompt.prompt_id}
    return row | _beside(prompt) | {"chosen_value": best.reward, "rejected_value": worst.reward}


def _beside(prompt: AnsweredPrompt) -> Row:
    columns = {
        "source": prompt.source or None,
        "tools": prompt.tools,
        "chat_template_kwargs": prompt.template_variables,
    }
    return {name: value for name, value in columns.items() if value is not None}


def _label(answer: Answer, condition: str, rewards: Sequence[float]) -> str:
    reward = _reward(answer)
    # Those that are no better, equal ones included: the best are in the last decile, however many they are.
    others = bisect.bisect_right(rewards, reward) - 1
    return condition.format(reward=reward, decile=1 + others * DECILES // len(rewards))


def _conditioned(prompt: str | Sequence[Mapping[str, Any]], label: str) -> str | list[Mapping[str, Any]]:
    """The prompt after its label: before a text, or at the beginning of a conversation's message of the system."""
    if isinstance(prompt, str):
        return label + prompt
    first = prompt[0]
    if first["role"] in ("system", "developer"):
        return [{**first, "content": label + first["content"]}, *prompt[1:]]
    return [{"role": "system", "content": label.strip()}, *prompt]
