"""Prompts to sample answers to, with the labels that a reward function may compare answers with.

Invariants: one prompt a row, numbered from 0 in the order of the file, none empty; a prompt is a text, or a conversation
that the assistant is to answer next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_ray.rows.labels import Label, LabelReader
from rlhf_ray.rows.layouts import (
    Keys,
    as_prompt,
    check_answer_follows,
    holds_messages,
    read_pair,
    read_prompt_messages,
    read_prompt_text,
    read_tools,
    read_variables,
)
from rlhf_ray.rows.preferences import ANSWER_BEGINS, Messages, find_prompt, read_source
from rlhf_ray.rows.read import PlainReader, read_file
from rlhf_ray.rows.row import KeySets, LayoutError, Row
from rlhf_ray.rows.sources import AnySource


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a good answer to it is judged by."""

    prompt_id: int
    """The number of its row, from 0."""
    text: str
    """Empty where the prompt is a conversation."""
    label: Label | None = None
    """What a reward function may compare answers with: a text, or what else its row holds."""
    source: str = ""
    """Where the prompt comes from, for figures by source; empty where its row does not say."""
    messages: Messages | None = None
    """The conversation that the assistant is to answer next; none where the prompt is a text."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that a conversation may call."""
    where: str = field(default="", compare=False)
    """File and line."""
    template_variables: Mapping[str, Any] | None = None
    """Variables that the chat template is given for this prompt alone."""

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is a list of messages."""
        return self.messages is not None


@dataclass(frozen=True)
class PromptReader(PlainReader):
    """Reads the prompt under a key of its own, or else what both sides of a pair begin with.

    With ``turns`` a text becomes what the user says.
    """

    keys: Keys = Keys()  # noqa: RUF009 (a NamedTuple cannot change)
    turns: bool = False
    labels: LabelReader = LabelReader()  # noqa: RUF009 (it is frozen)

    @property
    def needs(self) -> KeySets:
        """The prompt, or the two sides of a pair."""
        return [(self.keys.prompt,), (self.keys.chosen, self.keys.rejected)]

    @property
    def uniform(self) -> Sequence[str]:
        """The prompt."""
        return (self.keys.prompt,)

    def read(self, row: Row) -> Prompt:
        """The prompt of one row."""
        key = self.keys.prompt
        if key not in row.values:
            prompt, tools = _read_prompt_of_pair(row, self.keys)
        elif self.turns or holds_messages(row.values[key]):
            prompt, tools = read_prompt_messages(row.values, key), read_tools(row.values)
        else:
            prompt, tools = read_prompt_text(row.values, key), None
        if isinstance(prompt, str) and self.turns:
            prompt = as_prompt(prompt)
        label, source = self.labels.read(row, self.keys), read_source(row)
        if isinstance(prompt, str):
            return Prompt(row.number, prompt, label, source, where=row.where)
        return Prompt(row.number, "", label, source, prompt, tools, row.where, read_variables(row.values))


def read_prompts(
    source: AnySource,
    prompt_key: str = "prompt",
    *,
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    label_key: str | None = None,
    turns: bool = False,
    max_rows: int | None = None,
) -> list[Prompt]:
    """Every prompt of a data file or data set, as :class:`PromptReader` reads it."""
    reader = PromptReader(Keys(prompt_key, chosen_key, rejected_key), turns, LabelReader(label_key))
    return list(read_file(source, reader, max_rows=max_rows))


def _read_prompt_of_pair(row: Row, keys: Keys) -> tuple[str | Messages, Sequence[Mapping[str, Any]] | None]:
    """What both sides of a pair begin with, and its tools."""
    parts = read_pair(row.values, keys)
    prompt = find_prompt(row, keys, parts)
    if not isinstance(prompt, str):
        check_answer_follows(keys.prompt, prompt)
        return list(prompt), parts.tools
    if ANSWER_BEGINS not in prompt and ANSWER_BEGINS in parts.chosen:
        raise LayoutError("its two dialogues part before the first answer, so they have no prompt", "leave the row out")
    return prompt, None
