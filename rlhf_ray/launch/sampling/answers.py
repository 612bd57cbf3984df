"""What ``rlhf-ray generate`` keeps: a line for each prompt with all of its answers, after one that says what made them.

Invariants: a line that was read gives back the prompt and the answers that were written. An answer has a reward, or the reason
why it has none, where rewards were asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import RequestError
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rollout.requests import Generation
from rlhf_ray.storage.jsonl import JsonLines, as_json

MADE_OF = "made_of"
"""The only key of the first line."""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    response: str
    finished: bool
    """Whether the model ended it itself."""
    tokens: int
    log_prob: float
    """Of all its tokens together, in nats, at the temperature of sampling."""
    reward: float | None = None
    error: str | None = None
    """Why there is no reward, where one was asked for."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with all of its answers, in the order of their numbers."""

    prompt_id: int
    """The number of its row among all rows, from 0."""
    prompt: str | Sequence[Mapping[str, Any]]
    """A text, or the messages of a conversation."""
    answers: tuple[Answer, ...]
    source: str = ""
    tools: Sequence[Mapping[str, Any]] | None = None
    template_variables: Mapping[str, Any] | None = None
    label: Any = None
    """What its row holds for judging answers, where JSON can hold it too."""

    def line(self) -> str:
        """Itself as one line of JSON, without what is not there."""
        fields = {**asdict(self), "answers": [_filled(asdict(answer)) for answer in self.answers]}
        return json.dumps(_filled(fields), ensure_ascii=False, allow_nan=False)

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> AnsweredPrompt:
        """The same from the object that a line holds."""
        return cls(**{**line, "answers": tuple(Answer(**answer) for answer in line["answers"])})


def answered_prompt(
    prompt: TokenizedPrompt,
    generations: Sequence[Generation],
    samples: Sequence[TextSample],
    results: Sequence[ScoreResult] | None,
) -> AnsweredPrompt:
    """A prompt with what was sampled for it; without ``results`` no rewards were asked for."""
    outcomes = [(None, None)] * len(samples) if results is None else [(one.reward, one.error) for one in results]
    answers = tuple(
        Answer(sample.response, sample.finished, len(one.token_ids), sum(one.log_probs), reward, error)
        for one, sample, (reward, error) in zip(generations, samples, outcomes, strict=True)
    )
    shown = prompt.text if prompt.messages is None else [*prompt.messages]
    return AnsweredPrompt(
        prompt.prompt_id, shown, answers, prompt.source, prompt.tools, prompt.template_variables, as_json(prompt.label)
    )


def first_line(made_of: Mapping[str, Any]) -> str:
    """The line before those of the prompts."""
    return json.dumps({MADE_OF: made_of}, ensure_ascii=False, sort_keys=True)


def read_answers(path: Path) -> tuple[Mapping[str, Any], list[AnsweredPrompt]]:
    """What made the answers at ``path``, and all whole lines of prompts; nothing of a file that is empty or not there.

    Raises :class:`RequestError` for a file with other lines.
    """
    lines = JsonLines(path).read()
    if not lines:
        return {}, []
    try:
        (made_of,) = (lines[0][key] for key in [MADE_OF])
        return made_of, [AnsweredPrompt.of_line(line) for line in lines[1:]]
    except (KeyError, TypeError) as error:
        raise RequestError(f"{path} was not written by rlhf-ray generate: name a file of answers of it") from error


def _filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None and value != ""} | {
        name: value for name, value in fields.items() if name in ("response", "prompt")
    }
