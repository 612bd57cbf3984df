"""Prompts with several right and several wrong answers, as RewardBench 2 has them.

Invariants: a prompt has at least one right and one wrong answer, each a text; their numbers are those that the row states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.rows.conversations import is_conversation
from rlhf_ray.rows.layouts import Keys, read_prompt_messages
from rlhf_ray.rows.preferences import Messages, read_source
from rlhf_ray.rows.read import PlainReader
from rlhf_ray.rows.row import KeySets, LayoutError, Row

COUNTS = {"num_correct": "chosen", "num_incorrect": "rejected"}
"""Columns that state how many answers the lists hold."""


@dataclass(frozen=True)
class Candidates:
    """A prompt with its answers."""

    prompt: str | Messages
    right: Sequence[str]
    wrong: Sequence[str]
    source: str = ""
    """The subset, for figures by source; empty where the row does not say."""
    row_id: str = ""
    """The row's own ``id``; empty where it has none."""
    where: str = field(default="", compare=False)
    """File and line."""


@dataclass(frozen=True)
class CandidateReader(PlainReader):
    """Reads rows whose two sides are lists of texts."""

    keys: Keys = Keys()  # noqa: RUF009 (a NamedTuple cannot change)

    @property
    def needs(self) -> KeySets:
        """The prompt and both lists."""
        return [tuple(self.keys)]

    @property
    def uniform(self) -> Sequence[str]:
        """No column."""
        return ()

    def read(self, row: Row) -> Candidates:
        """The prompt and the answers of one row."""
        key = self.keys.prompt
        talks = is_conversation(row.values[key])
        prompt = read_prompt_messages(row.values, key) if talks else row.text(key)
        right, wrong = (_answers(row, side) for side in (self.keys.chosen, self.keys.rejected))
        for column, answers in zip(COUNTS, (right, wrong), strict=True):
            stated = row.values.get(column)
            if stated is not None and stated != len(answers):
                raise LayoutError(f"{column!r} is {stated!r}, but there are {len(answers)} answers")
        return Candidates(prompt, right, wrong, read_source(row), row.short_text("id") or "", row.where)


def _answers(row: Row, key: str) -> list[str]:
    answers = row.values[key]
    if not isinstance(answers, list) or not answers:
        raise LayoutError(f"{key!r} must hold a list of answers, this is {_kind(answers)}")
    wrong = next((number for number, answer in enumerate(answers, 1) if not isinstance(answer, str)), None)
    if wrong is not None:
        raise LayoutError(f"answer {wrong} of {key!r} must be a text, this is {_kind(answers[wrong - 1])}")
    return answers


def _kind(value: Any) -> str:
    return "empty" if value in (None, []) else f"of type {type(value).__name__}"
