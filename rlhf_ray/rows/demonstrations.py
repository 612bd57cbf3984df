"""Demonstrations: prompts with the answers that a model is to learn.

Invariant: one demonstration a row, in the order of the file, with neither side empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.rows.layouts import holds_messages
from rlhf_ray.rows.read import PlainReader, read_file
from rlhf_ray.rows.row import KeySets, LayoutError, Row
from rlhf_ray.rows.sources import AnySource


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class DemonstrationReader(PlainReader):
    """Reads a row with a text under each of two keys."""

    prompt_key: str = "prompt"
    answer_key: str = "answer"
    uniform: Sequence[str] = ()

    @property
    def needs(self) -> KeySets:
        """Both keys."""
        return [(self.prompt_key, self.answer_key)]

    def read(self, row: Row) -> Demonstration:
        """The demonstration of one row."""
        keys = (self.prompt_key, self.answer_key)
        texts = row.texts(keys)
        for key, text in zip(keys, texts, strict=True):
            if holds_messages(text):
                raise LayoutError(
                    f"{key!r} holds messages written as JSON, and a demonstration is made of texts",
                    "write the prompt as the chat template would, and the answer as a text",
                )
        return Demonstration(*texts)


def read_demonstrations(
    source: AnySource, prompt_key: str = "prompt", answer_key: str = "answer", *, max_rows: int | None = None
) -> list[Demonstration]:
    """Every demonstration of a data file or data set; the keys name its columns."""
    return list(read_file(source, DemonstrationReader(prompt_key, answer_key), max_rows=max_rows))
