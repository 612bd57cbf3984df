"""Compare two policies by their answers to the same held-out prompts.

Invariants: both policies answered the same prompts, equally often, and are compared answer by answer; a tie counts as half a
win. The figure of one data source is the same figure over its prompts alone.
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
    """Length of the answer, without its prompt."""
    reward: float
    """Its score by the reward source, before shaping."""
    gold: float | None
    """Its score by the ground truth; none where that is not known."""
    source: str = ""

    @property
    def right(self) -> bool:
        """Whether the answer counts as right: by its gold score, or by its reward where gold is not known."""
        return (self.reward if self.gold is None else self.gold) >= RIGHT_AT


Rows = Sequence[HeldOutAnswer]


def compare_answers(
    now: Rows, start: Rows, pass_at: Sequence[int] = (), measures: Measures | None = None
) -> dict[str, float]:
    """The figures of ``now`` against ``start`` by their metric names: over all prompts, and then over those of each source.

    ``pass_at`` names the k of the pass@k to report; ``measures`` are taken of the text of each answer.
    """
    measures = measures or {}
    figures = _compare(now, start, pass_at, measures)
    sources = sorted({row.source for row in now})
    if len(sources) < 2:
        return figures
    for source in sources:
        now_of_source, start_of_source = ([row for row in rows if row.source == source] for rows in (now, start))
        figures |= {
            f"{name}/{metric_name(source)}": value
            for name, value in _compare(now_of_source, start_of_source, pass_at, measures).items()
        }
    return figures


def metric_name(source: str) -> str:
    """The name of a source in the form that metric names allow."""
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
        now_values, start_values = _values(now, column), _values(start, column)
        if not now_values or not start_values:
            continue
        figures |= {f"evaluation/{name}": _mean(now_values), f"evaluation/{name}_start": _mean(start_values)}
        if name in ("reward", "gold"):
            figures[f"evaluation/{name}_win_rate"] = win_rate(now_values, start_values)
    figures["evaluation/truncated"] = _mean([float(not row.finished) for row in now])
    for k in pass_at:
        figures[f"evaluation/pass_at_{k}"] = mean_pass_at_k(_right_by_prompt(now), k)
        figures[f"evaluation/pass_at_{k}_start"] = mean_pass_at_k(_right_by_prompt(start), k)
    return figures


def _measured(measure: Callable[[str], float], row: HeldOutAnswer) -> float:
    return measure(row.response)


def _values(rows: Rows, column: Callable[[HeldOutAnswer], float | None]) -> list[float]:
    """The values of a column that are known."""
    values = [column(row) for row in rows]
    return [value for value in values if value is not None]


def _right_by_prompt(rows: Rows) -> list[list[bool]]:
    return [[row.right for row in samples] for _, samples in groupby(rows, key=lambda row: row.prompt_id)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
