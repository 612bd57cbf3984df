"""What is wrong with a config, and the rules that find it.

Invariant: in a partial config a rule ends where it reads a value that is absent, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from rlhf_ray.config.sections.base import Absent

Problem = tuple[str, str]
"""A dotted key, and a sentence that says what is wrong with its value and what to do."""
Rule = Callable[[], Iterable[Problem]]
"""Yields the problems that it finds."""

Value = TypeVar("Value")


def attempt(rules: Iterable[Rule], *, partial: bool) -> list[Problem]:
    """Every problem that ``rules`` yield. In a partial config a rule ends where it reads an absent value.

    Only :class:`Absent` ends a rule quietly: a mistake in a rule itself is raised whatever else is wrong with the config.
    """
    problems: list[Problem] = []
    for rule in rules:
        try:
            for problem in rule():  # what came before an absent value counts
                problems.append(problem)
        except Absent:
            if not partial:
                raise
    return problems


def unless_absent(read: Callable[[], Value], default: Value) -> Value:
    """The value that ``read`` returns, or ``default`` where it reads an absent key."""
    try:
        return read()
    except Absent:
        return default
