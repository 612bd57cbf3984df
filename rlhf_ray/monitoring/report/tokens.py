"""Samples of the last step token by token: the best, the middle and the worst one, as a text with marks and as a table.

Invariants: no more than ``SHOWN_TOKENS`` of a sample are shown, and how many are left out is said. A mark tells better from
worse by its line as well as by its colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.console import on_one_line, printable
from rlhf_ray.monitoring.tokens import COLUMNS, SampleRow, TokenTable, token_table

SHOWN_TOKENS = 512
MARKS = {2: "up strong", 1: "up", 0: "", -1: "down", -2: "down strong"}
"""The style of a token, by how much better or worse it was than expected."""


@dataclass(frozen=True)
class ShownToken:
    """A token in the text of its answer."""

    text: str
    mark: str
    numbers: str
    """What a pointer over it shows."""


@dataclass(frozen=True)
class ShownSample:
    """One sample of the token view."""

    title: str
    prompt: str
    tokens: Sequence[ShownToken]
    headers: Sequence[str]
    rows: Sequence[tuple[str, ...]]
    notes: Sequence[str]


def token_samples(step: int, samples: Sequence[SampleRow]) -> list[ShownSample]:
    """The best, the middle and the worst of a step's samples of whose tokens anything is kept."""
    kept = [(row["score"], number, row) for number, row in enumerate(samples, 1)]
    tables = {number: table for _, number, row in kept if (table := token_table(row)) is not None and table.rows}
    by_score = sorted((one for one in kept if one[1] in tables), key=lambda one: (-one[0], one[1]))
    chosen = dict.fromkeys(sorted({0, len(by_score) // 2, len(by_score) - 1})) if by_score else {}
    names = {0: "the best", len(by_score) - 1: "the worst"} if len(by_score) > 1 else {}
    shown = []
    for place in chosen:
        _, number, row = by_score[place]
        which = names.get(place, "the middle one" if len(by_score) > 1 else "the only one")
        title = f"Sample {number} of step {step}, {which}: {tables[number].about}"
        shown.append(_shown(title, str(row["prompt"]), tables[number], f"--step {step} --tokens {number}"))
    return shown


def _shown(title: str, prompt: str, table: TokenTable, options: str) -> ShownSample:
    rows, names = table.rows[:SHOWN_TOKENS], table.columns[::-1]  # the most telling first, for a phone
    more = len(table.rows) - len(rows)
    return ShownSample(
        title=title,
        prompt=printable(prompt),
        tokens=[
            ShownToken(
                printable(row.text).replace("\n", "↵\n"),
                MARKS[row.tone],
                ", ".join(f"{COLUMNS[name]} {row.numbers[name]}" for name in names if row.numbers[name]),
            )
            for row in rows
        ],
        headers=("", "token", *(COLUMNS[name] for name in names)),
        rows=[(str(row.number), on_one_line(row.text), *(row.numbers[name] for name in names)) for row in rows],
        notes=[
            *([f"{more} more tokens: rlhf-ray samples RUN_DIR {options} shows all that are kept"] if more else []),
            *([table.left_out] if table.left_out else []),
        ],
    )
