"""Prompts to sample answers to, with the labels that a reward function may compare answers with.

Always true: one prompt a row, numbered from 0 in the order of the file, none empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.pairs import Keys, PairParts
from rlhf_ray.data.preferences import ANSWER_BEGINS, implicit_prompt
from rlhf_ray.data.rows import Row, is_in_all, read_rows

LABEL_KEYS = ("label", "answer")
"""Columns of labels; the first that is there counts."""


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what a good answer to it is judged by."""

    prompt_id: int
    text: str
    label: str | None = None
    source: str = ""


def read_prompts(
    path: str | Path,
    prompt_key: str = "prompt",
    *,
    chosen_key: str = "chosen",
    rejected_key: str = "rejected",
    max_rows: int | None = None,
) -> list[Prompt]:
    """Every prompt of a data file: under ``prompt_key``, or where there is none what both sides of a pair begin with."""
    rows = read_rows(path, [(prompt_key,), (chosen_key, rejected_key)], max_rows=max_rows)
    explicit = is_in_all(rows, prompt_key)
    return [
        Prompt(
            number,
            row.text(prompt_key) if explicit else _prompt_of_pair(row, chosen_key, rejected_key),
            _label(row, prompt_key),
            row.short_text("source") or "",
        )
        for number, row in enumerate(rows)
    ]


def _prompt_of_pair(row: Row, chosen_key: str, rejected_key: str) -> str:
    sides = PairParts("", row.text(chosen_key), row.text(rejected_key))
    prompt = str(implicit_prompt(row, Keys("prompt", chosen_key, rejected_key), sides))
    if ANSWER_BEGINS not in prompt and ANSWER_BEGINS in row.text(chosen_key):
        raise row.error("its two dialogues part before the first answer, so they have no prompt: leave the row out")
    return prompt


def _label(row: Row, prompt_key: str) -> str | None:
    return next((row.short_text(key) for key in LABEL_KEYS if key != prompt_key and key in row), None)
