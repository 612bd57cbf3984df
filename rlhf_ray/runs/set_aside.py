"""The prompts of a run that are answered no more, because rollout engines died while they answered them.

Invariant: a prompt is in the file before anything is generated without it, and a run that goes on does not try it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.storage.jsonl import JsonLines


class SetAsidePrompts:
    """The file ``set_aside.jsonl`` of a run: the id of each prompt, its text, and how each engine died."""

    def __init__(self, path: str | Path) -> None:
        self._lines = JsonLines(path, set_aside_problem)

    def add(self, prompt_id: int, text: str, causes: Sequence[str]) -> None:
        """Add a prompt; it is on disk when this returns."""
        self._lines.append({"prompt_id": prompt_id, "text": text, "causes": list(causes)})

    def ids(self) -> set[int]:
        """The prompts that were set aside in this run, before a resume too."""
        return {line["prompt_id"] for line in self._lines.read()}


def set_aside_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line; empty if nothing is."""
    prompt = line.get("prompt_id")
    return (
        ""
        if isinstance(prompt, int) and not isinstance(prompt, bool)
        else f"prompt_id is {prompt!r}, not a whole number"
    )
