"""Reward functions of this project that compare an answer with the label of its prompt.

Invariants: a right answer gets 1.0 and any other 0.0; an answer that was cut off is never right; a prompt without a label is
an error that says what is missing, never a 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from rlhf_ray.errors import ScoringError

FINAL = "####"
"""The mark before the final number of a worked answer (GSM8K, Cobbe et al. 2021, section 2)."""
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def gsm8k(responses: Sequence[str], labels: Sequence[str | None], finished: Sequence[bool]) -> list[float]:
    """Whether the final number of the answer is that of the label.

    It is the number after the last ``####``; where the answer has none, its last number.
    """
    return [
        float(ended and final_number(response) is not None and final_number(response) == _wanted(label))
        for response, label, ended in zip(responses, labels, finished, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    """The number that a worked answer ends with; none where it holds none. ``1,000``, ``$1000`` and ``1000.0`` are equal."""
    _, mark, after = text.rpartition(FINAL)
    numbers = NUMBER.findall(after if mark else text)
    if not numbers:
        return None
    written = numbers[0] if mark else numbers[-1]
    try:
        return Decimal(written.replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


def exact_match(responses: Sequence[str], labels: Sequence[str | None], finished: Sequence[bool]) -> list[float]:
    """Whether the answer equals the label, apart from space around both."""
    return [
        float(ended and response.strip() == _label(label).strip())
        for response, label, ended in zip(responses, labels, finished, strict=True)
    ]


def _wanted(label: str | None) -> Decimal:
    number = final_number(_label(label))
    if number is None:
        raise ScoringError(f"the label {_label(label)[-40:]!r} holds no number: give the number, or a worked answer")
    return number


def _label(label: str | None) -> str:
    if label is None:
        raise ScoringError("the prompt has no label to compare with: give rows a column label or answer")
    return label
