"""Preference pairs: two answers to one prompt, the better one first.

Always true: one pair a row, in the order of the file; where a row does not say its prompt, the prompt and each answer joined
are its two texts; either all pairs of a file have a margin, a finite number, or none has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.data.rows import Row, is_in_all, read_rows

ANSWER_BEGINS = "\n\nAssistant:"
"""What stands before each answer in a dialogue of the HH data."""
SOURCE_KEYS = ("source", "subset")
"""Columns that name where a row comes from (``subset`` is RewardBench's); the first that is there counts."""


@dataclass(frozen=True)
class PreferencePair:
    """A prompt, the better and the worse answer."""

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None
    source: str = ""
    grade: float | None = None
    """By how much the chosen side is better: 0 is a tie."""


def read_preferences(
    path: str | Path, prompt_key: str = "prompt", chosen_key: str = "chosen", rejected_key: str = "rejected"
) -> list[PreferencePair]:
    """Every pair of a data file; where its rows have no ``prompt_key``, the prompt is what both texts begin with.

    Columns ``margin`` and ``grade`` are read where they are there, and as the source the first of ``SOURCE_KEYS``.
    """
    rows = read_rows(path, [(chosen_key, rejected_key)])
    explicit = is_in_all(rows, prompt_key)
    for key in ("margin", "grade"):
        is_in_all(rows, key)
    pairs = []
    for row in rows:
        chosen, rejected = row.text(chosen_key), row.text(rejected_key)
        if explicit:
            prompt = row.text(prompt_key)
        else:
            prompt = implicit_prompt(row, chosen_key, rejected_key)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        pairs.append(
            PreferencePair(prompt, chosen, rejected, row.number("margin"), source_of(row), row.number("grade"))
        )
    return pairs


def source_of(row: Row) -> str:
    """Where a row comes from, for tables by source; empty where it does not say."""
    return next((row.short_text(key) or "" for key in SOURCE_KEYS if key in row), "")


def implicit_prompt(row: Row, chosen_key: str, rejected_key: str) -> str:
    """The prompt of a row whose two texts hold it; an error where they have nothing in common."""
    prompt = shared_prompt(row.text(chosen_key), row.text(rejected_key))
    if not prompt:
        keys = ", ".join(map(repr, row.values))
        raise row.error(
            f"{chosen_key!r} and {rejected_key!r} begin differently, so they do not hold the prompt: set data.prompt_key "
            f"to the key that does; its keys are {keys}"
        )
    return prompt


def shared_prompt(chosen: str, rejected: str) -> str:
    """What both texts begin with, up to where an answer begins in a dialogue, else to the end of a word."""
    end = _shared_length(chosen, rejected)
    dialogue = chosen.rfind(ANSWER_BEGINS, 0, end)
    if dialogue >= 0:
        return chosen[: dialogue + len(ANSWER_BEGINS)]
    while _cuts_a_word(chosen, end) or _cuts_a_word(rejected, end):
        end -= 1
    return chosen[:end]


def _shared_length(one: str, other: str) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cuts_a_word(text: str, end: int) -> bool:
    """Whether ``end`` lies inside a word of ``text``; the space before a word belongs to it, as in most tokenizers."""
    if end in (0, len(text)) or text[end].isspace():
        return False
    return text[end - 1] in " \t" or (text[end - 1].isalnum() and text[end].isalnum())
