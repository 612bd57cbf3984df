"""Choosing the rows that are held out to evaluate on: whole prompts, never single rows.

Invariants: rows with the same prompt are all held out or all trained on; no more rows are held out than were asked for;
the choice depends on the seed and the prompts in their order alone.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence


def hold_out(prompts: Sequence[Hashable], fraction: float, seed: int) -> set[int]:
    """Numbers of the rows that are held out, given the prompt of each row; ``fraction`` of all rows are wanted.

    Prompts are drawn one after the other; one with more rows than are still wanted is passed over.
    """
    rows_by_prompt: dict[Hashable, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        rows_by_prompt[prompt].append(row)
    groups = list(rows_by_prompt.values())
    random.Random(f"{seed}/held-out").shuffle(groups)
    wanted, held_out = round(fraction * len(prompts)), set[int]()
    for rows in groups:
        if len(held_out) + len(rows) <= wanted:
            held_out.update(rows)
    return held_out
