"""Sampled answers for tests of reward sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One sampled answer, with all that a source may look at."""

    prompt_id: int
    sample_index: int
    prompt: str
    response: str
    label: str | None
    finished: bool
    source: str
    token_ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] | None


def answer(
    prompt: str,
    response: str,
    label: str | None = None,
    *,
    finished: bool = True,
    token_ids: tuple[int, ...] = (),
    messages: tuple[Mapping[str, str], ...] | None = None,
) -> Answer:
    """An answer to prompt 7, from source ``test``."""
    return Answer(7, 0, prompt, response, label, finished, "test", token_ids, messages)
