"""One sample token by token, as a terminal and the report show it.

Invariants: a number that was not kept is an empty text and never 0. A row has a text for every column of its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLUMNS: Mapping[str, str] = {
    "log_probs": "log-prob",
    "rollout_log_probs": "rollout",
    "reference_log_probs": "reference",
    "values": "value",
    "token_rewards": "reward",
    "returns": "return",
    "advantages": "advantage",
}
"""What is kept of each token, and its heading; the columns of a batch (``trajectories/columns.py``)."""
SampleRow = Mapping[str, Any]
"""A line of a step's samples."""


@dataclass(frozen=True)
class TokenRow:
    """One token of an answer."""

    number: int
    """Its place in the answer, from 1."""
    text: str
    numbers: Mapping[str, str]
    """By column."""
    tone: int
    """Above 0 where the token was better than expected, below where it was worse; 2 or -2 where it mattered most."""


@dataclass(frozen=True)
class TokenTable:
    """The tokens of one sample."""

    about: str
    """How the whole answer did."""
    columns: Sequence[str]
    """The names of what is kept, in the order of ``COLUMNS``."""
    rows: Sequence[TokenRow]
    left_out: str
    """What is not kept, in a sentence; empty where nothing is missing."""


def token_table(row: SampleRow) -> TokenTable | None:
    """The tokens of a sample; None where nothing is kept of them."""
    kept = row.get("tokens")
    if not kept:
        return None
    columns = [name for name in COLUMNS if name in kept]
    largest = max((abs(value) for value in kept.get("advantages", ()) if value is not None), default=0.0)
    rows = [
        TokenRow(
            number + 1,
            text,
            {name: _text(_at(kept, name, number)) for name in columns},
            _tone(_at(kept, "advantages", number), largest),
        )
        for number, text in enumerate(kept["text"])
    ]
    left_out = f"{row['left_out']} more tokens are not kept" if row.get("left_out") else ""
    return TokenTable(about(row), columns, rows, left_out)


def about(row: SampleRow) -> str:
    """The score of an answer, and whether it came to its end."""
    return f"score {row['score']:.4g}, {'finished' if row.get('finished', True) else 'cut off'}"


def _at(kept: Mapping[str, Sequence[Any]], name: str, position: int) -> float | None:
    values = kept.get(name, ())
    return values[position] if position < len(values) else None


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _tone(advantage: float | None, largest: float) -> int:
    if not advantage or not largest:
        return 0
    strength = 2 if abs(advantage) > largest / 2 else 1
    return strength if advantage > 0 else -strength
