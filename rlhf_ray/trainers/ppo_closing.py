"""The closing table of a PPO run: the starting policy against the trained one, and best-of-n beside them.

Always true: every number comes from the comparison on held-out prompts; a column that was not measured says so with a dash.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.console import say, table
from rlhf_ray.monitoring.summary import Answer, BestOf, Sample, Table
from rlhf_ray.trainers.ppo_evaluation import BestOf as BestOfRow
from rlhf_ray.trainers.ppo_evaluation import Comparison, Judged, best_at

SAMPLES_SHOWN = 6
HEADERS = ("", "learned reward", "gold", "gold win rate", "KL, nats", "tokens")


def closing(comparison: Comparison) -> tuple[Table, list[Sample], list[BestOf]]:
    """The table (which is also shown), samples side by side, and the best-of-n points."""
    rows = closing_rows(comparison)
    say(table("on held-out prompts", HEADERS, rows))
    samples = [
        Sample(before.prompt, (_answer("start", before), _answer("PPO", after)))
        for before, after in list(zip(comparison.start, comparison.now, strict=True))[:SAMPLES_SHOWN]
    ]
    return Table(HEADERS, tuple(rows)), samples, [BestOf(row.n, row.kl, row.gold) for row in comparison.best_of]


def closing_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """Start, PPO, and best-of-n at about PPO's KL."""
    figures = comparison.figures

    def cell(name: str) -> str:
        return f"{figures[f'evaluation/{name}']:.3f}" if f"evaluation/{name}" in figures else "-"

    half = "0.500" if "evaluation/gold" in figures else "-"
    rows = [
        ("start (SFT)", cell("reward_start"), cell("gold_start"), half, "0.000", cell("length_start")),
        ("PPO", cell("reward"), cell("gold"), cell("gold_win_rate"), cell("kl"), cell("length")),
    ]
    return rows + _best_of_rows(comparison.best_of, figures["evaluation/kl"])


def _best_of_rows(best_of: Sequence[BestOfRow], kl: float) -> list[tuple[str, ...]]:
    best = best_at(best_of, kl)
    if best is None:
        return []
    return [(f"best of {best.n} of SFT", "-", f"{best.gold:.3f}", f"{best.win_rate:.3f}", f"{best.kl:.3f}", "-")]


def _answer(label: str, row: Judged) -> Answer:
    scores = {"reward": row.reward} | ({} if row.gold is None else {"gold": row.gold})
    return Answer(label, row.response, scores, row.finished)
