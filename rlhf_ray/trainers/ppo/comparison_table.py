"""Tables of an evaluation: the starting policy, the trained one and best-of-n, and answers side by side.

Invariants: every number comes from the comparison on held-out prompts. A number that was not measured is a dash.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.console import say, table
from rlhf_ray.monitoring.report.summary import Answer, BestOf, Sample, Table
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer, metric_name
from rlhf_ray.trainers.ppo.evaluation import Comparison, best_within_kl

PROMPTS_IN_REPORT = 6
CHARACTERS_IN_LOG = 160
"""Longest text in a table on the log; the rest is cut off."""
START = "start"


def summarize_comparison(
    comparison: Comparison, trained: str, pass_at: Sequence[int] = ()
) -> tuple[Table, list[Sample], list[BestOf]]:
    """The table, answers side by side and the best-of-n points for the report; the table is printed as well.

    ``trained`` is the label of the trained policy.
    """
    headers = ("", "learned reward", "gold", "gold win rate", *(f"pass@{k}" for k in pass_at), "KL, nats", "tokens",
               *(name.replace("_", " ") for name in comparison.measures))  # fmt: skip
    rows = comparison_rows(comparison, trained, pass_at)
    say(table("on held-out prompts", headers, rows))
    samples = [
        Sample(before.prompt, (_answer(START, before), _answer(trained, after)))
        for before, after in first_answers(comparison)[:PROMPTS_IN_REPORT]
    ]
    return Table(headers, tuple(rows)), samples, list(comparison.best_of)


def comparison_rows(comparison: Comparison, trained: str, pass_at: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """Rows for the start, the trained policy and best-of-n at no more KL; then start and trained policy for each source."""
    rows = [*_start_and_trained(comparison, trained, pass_at), *_best_of_rows(comparison, len(pass_at))]
    sources = sorted({row.source for row in comparison.now})
    if len(sources) > 1:
        for source in sources:
            rows += _start_and_trained(comparison, trained, pass_at, source)
    return rows


def _start_and_trained(
    comparison: Comparison, trained: str, pass_at: Sequence[int], source: str | None = None
) -> list[tuple[str, ...]]:
    suffix, label = ("", "") if source is None else (f"/{metric_name(source)}", f", {source or 'unnamed'}")

    def cell(name: str) -> str:
        value = comparison.figures.get(f"evaluation/{name}{suffix}")
        return "-" if value is None else f"{value:.3f}"

    # Against itself the start wins half the time, at no KL; from another reference it has the one that was measured.
    start_win_rate, start_kl = ("0.500" if cell("gold") != "-" else "-"), ("0.000" if cell("kl") != "-" else "-")
    if cell("kl_start") != "-":
        start_kl = cell("kl_start")
    return [
        (
            f"{START} (SFT){label}",
            cell("reward_start"),
            cell("gold_start"),
            start_win_rate,
            *(cell(f"pass_at_{k}_start") for k in pass_at),
            start_kl,
            cell("length_start"),
            *(cell(f"{name}_start") for name in comparison.measures),
        ),
        (
            f"{trained}{label}",
            cell("reward"),
            cell("gold"),
            cell("gold_win_rate"),
            *(cell(f"pass_at_{k}") for k in pass_at),
            cell("kl"),
            cell("length"),
            *(cell(name) for name in comparison.measures),
        ),
    ]


def _best_of_rows(comparison: Comparison, passes: int) -> list[tuple[str, ...]]:
    best = best_within_kl(comparison.best_of, comparison.figures.get("evaluation/kl", 0.0))
    if best is None:
        return []
    return [
        (
            f"best of {best.n} of SFT",
            "-",
            f"{best.gold:.3f}",
            "-" if best.win_rate is None else f"{best.win_rate:.3f}",
            *(("-",) * passes),
            f"{best.kl:.3f}",
            "-",
            *(("-",) * len(comparison.measures)),
        )
    ]


def first_answers(comparison: Comparison) -> list[tuple[HeldOutAnswer, HeldOutAnswer]]:
    """The first answers of both policies to every prompt: of the start, and of the trained one."""
    pairs: dict[int, tuple[HeldOutAnswer, HeldOutAnswer]] = {}
    for before, after in zip(comparison.start, comparison.now, strict=True):
        pairs.setdefault(after.prompt_id, (before, after))
    return list(pairs.values())


def show_samples(comparison: Comparison, trained: str, count: int) -> None:
    """Print the first ``count`` prompts with both answers and their rewards."""
    rows = [
        (
            _cut(before.prompt),
            f"{_cut(before.response)} ({before.reward:.2f})",
            f"{_cut(after.response)} ({after.reward:.2f})",
        )
        for before, after in first_answers(comparison)[:count]
    ]
    if rows:
        say(table("answers to held-out prompts (reward)", ("prompt", START, trained), rows))


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= CHARACTERS_IN_LOG else f"{text[:CHARACTERS_IN_LOG]}..."


def _answer(label: str, row: HeldOutAnswer) -> Answer:
    scores = {"reward": row.reward} | ({} if row.gold is None else {"gold": row.gold})
    return Answer(label, row.response, scores, row.finished)
