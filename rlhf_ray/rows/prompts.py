"""Prompts to sample answers to, with the labels that a reward function may compare answers with.

Always true: one prompt a row, numbered from 0 in the order of the file, none empty; a prompt is a text, or a conversation
that the assistant is to answer next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray.rows.checks import prompt_problem
from rlhf_ray.rows.conversations import is_conversation
from rlhf_ray.rows.layouts import Keys, read_pair, read_prompt_messages, read_tools
from rlhf_ray.rows.preferences import ANSWER_BEGINS, Messages, implicit_prompt, source_of
from rlhf_ray.rows.read import Row, is_in_all, read_rows

LABEL_KEYS = ("label", "answer")
"""Columns of labels; the first that is there counts."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a good answer to it is judged by."""

    prompt_id: int
    text: str
    """Empty where the prompt is a conversation."""
    label: str | None = None
    source: str = ""
    messages: Messages | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that a conversation may call."""
    where: str = field(default="", compare=False)
    """File and line."""


def read_prompts(
    path: str | Path,
    prompt_key: str = "prompt",
    *,
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    turns: bool = False,
    max_rows: int | None = None,
) -> list[Prompt]:
    """Every prompt of a data file: under ``prompt_key``, or where there is none what both sides of a pair begin with.

    With ``turns`` a text becomes what the user says.
    """
    keys = Keys(prompt_key, chosen_key, rejected_key)
    rows = read_rows(path, problem_of=lambda row: prompt_problem(row, keys, turns=turns), max_rows=max_rows)
    explicit = is_in_all(rows, prompt_key)
    return [_prompt(number, row, keys, explicit=explicit, turns=turns) for number, row in enumerate(rows)]


def _prompt(number: int, row: Row, keys: Keys, *, explicit: bool, turns: bool) -> Prompt:
    cell: Any = row.values[keys.prompt] if explicit else _prompt_of_pair(row, keys)
    label, source = _label(row, keys.prompt), source_of(row)
    if is_conversation(cell) or turns:
        messages = read_prompt_messages({**row.values, keys.prompt: cell}, keys.prompt)
        return Prompt(number, "", label, source, messages, read_tools(row.values), row.where)
    return Prompt(number, cell, label, source, where=row.where)


def _prompt_of_pair(row: Row, keys: Keys) -> str | list[Mapping[str, Any]]:
    """What both sides of a pair begin with."""
    parts = read_pair(row.values, keys)
    prompt = implicit_prompt(row, keys, parts)
    if not isinstance(prompt, str):
        return list(prompt)
    if ANSWER_BEGINS not in prompt and ANSWER_BEGINS in parts.chosen:
        raise row.error("its two dialogues part before the first answer, so they have no prompt: leave the row out")
    return prompt


def _label(row: Row, prompt_key: str) -> str | None:
    return next((row.short_text(key) for key in LABEL_KEYS if key != prompt_key and key in row), None)
