"""Demonstrations: prompts with the answers to learn.

Always true: one demonstration a row, in the order of the file, with neither side empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.rows.read import read_rows


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to it."""

    prompt: str
    answer: str


def read_demonstrations(
    path: str | Path, prompt_key: str = "prompt", answer_key: str = "answer", *, max_rows: int | None = None
) -> list[Demonstration]:
    """Every demonstration of a data file; the keys name its columns."""
    rows = read_rows(path, [(prompt_key, answer_key)], max_rows=max_rows)
    return [Demonstration(row.text(prompt_key), row.text(answer_key)) for row in rows]
