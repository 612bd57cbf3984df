"""Answers that are judged one by one: a prompt, an answer, and whether the answer is desirable.

Invariants: one answer a row, in the order of the file; prompt and answer are both texts or both lists of messages; a label that
is not certainly true or false is refused with its row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.rows.layouts import Keys, read_pair, read_variables
from rlhf_ray.rows.preferences import Messages, PreferencePair, find_prompt, read_source
from rlhf_ray.rows.read import PlainReader
from rlhf_ray.rows.row import KeySets, LayoutError, Row, is_filled

LABEL = "label"
ANSWERS = ("completion", "response")
"""What published data call the answer; it is read where the row has nothing under the configured name."""
MEANINGS: Mapping[str, bool] = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""What tables write for a truth value, in small letters."""


@dataclass(frozen=True)
class JudgedAnswer:
    """A prompt, an answer to it, and whether that is desirable."""

    prompt: str | Messages
    answer: str | Messages
    """Without the prompt."""
    desirable: bool
    source: str = ""
    """Where the row comes from; empty where it does not say."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that a conversation may call."""
    where: str = field(default="", compare=False)
    """File and line."""
    template_variables: Mapping[str, Any] | None = None
    """Variables that the chat template is given for this row alone."""

    @property
    def is_conversation(self) -> bool:
        """Whether prompt and answer are lists of messages."""
        return not isinstance(self.prompt, str)

    def as_pair(self) -> PreferencePair:
        """The row as a pair whose two sides are this answer, for what treats answers of pairs and single ones alike."""
        return PreferencePair(
            self.prompt, self.answer, self.answer, source=self.source, tools=self.tools, where=self.where,
            template_variables=self.template_variables,
        )  # fmt: skip


def both_sides(pair: PreferencePair) -> list[JudgedAnswer]:
    """The two answers of a pair, judged: the chosen one is desirable and the rejected one is not."""
    return [
        JudgedAnswer(pair.prompt, answer, desirable, pair.source, pair.tools, pair.where, pair.template_variables)
        for answer, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


@dataclass(frozen=True)
class JudgedReader(PlainReader):
    """Reads a prompt, an answer and a label; with ``turns`` texts become messages."""

    prompt_key: str = "prompt"
    answer_key: str = "answer"
    label_key: str = LABEL
    turns: bool = False
    prompt_in_sides: bool | None = None
    """Whether a text beside a prompt begins with it; none: that is told from the row, or refused."""

    @property
    def needs(self) -> KeySets:
        """All three."""
        answers = dict.fromkeys((self.answer_key, *ANSWERS))
        return [(self.prompt_key, answer, self.label_key) for answer in answers]

    @property
    def uniform(self) -> Sequence[str]:
        """Nothing: a row without a prompt is refused."""
        return ()

    def read(self, row: Row) -> JudgedAnswer:
        """The judged answer of one row."""
        names = [key for key in (self.answer_key, *ANSWERS) if key in row.values]
        key = next(
            (key for key in names if is_filled(row.values, key)), names[0]
        )  # tables have columns that a row leaves empty
        if not is_filled(row.values, self.prompt_key):
            raise LayoutError(f"nothing under {self.prompt_key!r}, which must hold the prompt of the answer")
        keys = Keys(self.prompt_key, key, key)
        parts = read_pair(row.values, keys, turns=self.turns, prompt_in_sides=self.prompt_in_sides)
        prompt = parts.prompt or find_prompt(row, keys, parts)
        answer = parts.chosen if parts.prompt else parts.chosen[len(prompt) :]
        return JudgedAnswer(
            prompt, answer, self._desirable(row), read_source(row), parts.tools, row.where, read_variables(row.values)
        )

    def _desirable(self, row: Row) -> bool:
        value = row.values[self.label_key]
        meaning = MEANINGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
        if meaning is None:
            shown = repr(value) if isinstance(value, int | float) else f"a {type(value).__name__} that is neither"
            raise LayoutError(
                f"the label under {self.label_key!r} must be true or false (or 1 or 0), this is {shown}",
                "name the column that says whether the answer is desirable in data.label_key, or mend the row",
            )
        return meaning
