"""Reward functions of this project that compare an answer with the label of its prompt, and one that looks at nothing.

Invariants of those that compare: a right answer gets 1.0 and any other 0.0; an answer that was cut off is never right; a label
that is missing, or that answers cannot be compared with, is an error that says what is wrong, never a 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from rlhf_ray.errors import ScoringError
from rlhf_ray.rows.labels import KEY, final_number, number_label_problem, text_label_problem


def gsm8k(responses: Sequence[str], labels: Sequence[Any], finished: Sequence[bool]) -> list[float]:
    """Whether the final number of the answer is that of the label.

    It is the number after the last ``####``; where the answer has none, its last number.
    """
    return [
        float(ended and final_number(response) is not None and final_number(response) == _wanted(label))
        for response, label, ended in zip(responses, labels, finished, strict=True)
    ]


def exact_match(responses: Sequence[str], labels: Sequence[Any], finished: Sequence[bool]) -> list[float]:
    """Whether the answer equals the label, apart from space around both."""
    return [
        float(ended and response.strip() == _compared(label, text_label_problem).strip())
        for response, label, ended in zip(responses, labels, finished, strict=True)
    ]


def none(responses: Sequence[str]) -> list[float]:
    """0 for every answer: for a policy that learns from a teacher alone."""
    return [0.0] * len(responses)


def _wanted(label: Any) -> Decimal:
    number = final_number(_compared(label, number_label_problem))
    assert number is not None, "a label without a number is a problem"
    return number


def _compared(label: Any, problem_of: Callable[[Any], str]) -> str:
    """A label that answers can be compared with."""
    if label is None:
        raise ScoringError(f"the prompt has no label to compare with: {KEY}")
    if problem := problem_of(label):
        raise ScoringError(f"the label {str(label)[-40:]!r} {problem}")
    return str(label)
