"""Answers to held-out prompts with what they are worth, and the figures of two such sets side by side.

Always true: both sides answered the same prompts, equally often, and are compared answer by answer; ties count one half; a
figure of one source is the same figure over its prompts alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from rlhf_ray.evaluation import mean_pass_at_k, win_rate
from rlhf_ray.trainers.ppo.gold import Measures

RIGHT_AT = 1.0
"""The score from which on an answer counts as right."""


@dataclass(frozen=True)
class HeldOutAnswer:
    """One answer to a held-out prompt."""

    prompt_id: int
    prompt: str
    response: str
    finished: bool
    tokens: int
    """Of the answer."""
    reward: float
    gold: float | None
    source: str = ""

    @property
    def right(self) -> bool:
        """Whether it is right, by its gold where that is known and else by its reward."""
        return (self.reward if self.gold is None else self.gold) >= RIGHT_AT


Rows = Sequence[HeldOutAnswer]


def compare_answers(
    now: Rows, start: Rows, pass_at: Sequence[int] = (), measures: Measures | None = None
) -> dict[str, float]:
    """Figures by their metric names: over all prompts, and where there are several sources over those of each."""
    measures = measures or {}
    figures = _compare(now, start, pass_at, measures)
    sources = sorted({row.source for row in now})
    if len(sources) < 2:
        return figures
    for source in sources:
        of_source = [[row for row in rows if row.source == source] for rows in (now, start)]
        figures |= {
            f"{name}/{metric_name(source)}": value
            for name, value in _compare(of_source[0], of_source[1], pass_at, measures).items()
        }
    return figures


def metric_name(source: str) -> str:
    """A source's name as a part of a metric's."""
    return re.sub(r"\W", "_", source) or "unnamed"


def _compare(now: Rows, start: Rows, pass_at: Sequence[int], measures: Measures) -> dict[str, float]:
    figures: dict[str, float] = {}
    columns: Mapping[str, Callable[[HeldOutAnswer], float | None]] = {
        "reward": lambda row: row.reward,
        "gold": lambda row: row.gold,
        "length": lambda row: row.tokens,
        **{name: partial(_measured, measure) for name, measure in measures.items()},
    }
    for name, column in columns.items():
        ours, theirs = _values(now, column), _values(start, column)
        if not ours or not theirs:
            continue
        figures |= {f"evaluation/{name}": _mean(ours), f"evaluation/{name}_start": _mean(theirs)}
        if name in ("reward", "gold"):
            figures[f"evaluation/{name}_win_rate"] = win_rate(ours, theirs)
    figures["evaluation/truncated"] = _mean([float(not row.finished) for row in now])
    for k in pass_at:
        figures[f"evaluation/pass_at_{k}"] = mean_pass_at_k(_right_by_prompt(now), k)
        figures[f"evaluation/pass_at_{k}_start"] = mean_pass_at_k(_right_by_prompt(start), k)
    return figures


def _measured(measure: Callable[[str], float], row: HeldOutAnswer) -> float:
    return measure(row.response)


def _values(rows: Rows, column: Callable[[HeldOutAnswer], float | None]) -> list[float]:
    """The column's values; empty where they are not known."""
    values = [column(row) for row in rows]
    return [value for value in values if value is not None]


def _right_by_prompt(rows: Rows) -> list[list[bool]]:
    return [[row.right for row in samples] for _, samples in groupby(rows, key=lambda row: row.prompt_id)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
