"""What an evaluation shows: the starting policy against the trained one, best-of-n beside them, and answers side by side.

Always true: every number comes from the comparison on held-out prompts; a column that was not measured says so with a dash.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_ray.console import say, table
from rlhf_ray.monitoring.report.summary import Answer, BestOf, Sample, Table
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer, metric_name
from rlhf_ray.trainers.ppo.evaluation import Comparison, best_within_kl

SAMPLES_SHOWN = 6
"""Prompts in the report."""
LONGEST_SHOWN = 160
"""Characters of a text in the log."""
START = "start"


def summarize_comparison(
    comparison: Comparison, trained: str, pass_at: Sequence[int] = ()
) -> tuple[Table, list[Sample], list[BestOf]]:
    """The table (which is also shown), samples side by side, and the best-of-n points; ``trained`` names the policy."""
    headers = ("", "learned reward", "gold", "gold win rate", *(f"pass@{k}" for k in pass_at), "KL, nats", "tokens",
               *(name.replace("_", " ") for name in comparison.measures))  # fmt: skip
    rows = comparison_rows(comparison, trained, pass_at)
    say(table("on held-out prompts", headers, rows))
    samples = [
        Sample(before.prompt, (_answer(START, before), _answer(trained, after)))
        for before, after in first_answers(comparison)[:SAMPLES_SHOWN]
    ]
    return Table(headers, tuple(rows)), samples, list(comparison.best_of)


def comparison_rows(comparison: Comparison, trained: str, pass_at: Sequence[int] = ()) -> list[tuple[str, ...]]:
    """Start, the trained policy, best-of-n at about its KL, and where there are several sources both for each."""
    rows = [*_pair(comparison, trained, pass_at), *_best_of_rows(comparison, len(pass_at))]
    sources = sorted({row.source for row in comparison.now})
    if len(sources) > 1:
        for source in sources:
            rows += _pair(comparison, trained, pass_at, source)
    return rows


def _pair(
    comparison: Comparison, trained: str, pass_at: Sequence[int], source: str | None = None
) -> list[tuple[str, ...]]:
    end, label = ("", "") if source is None else (f"/{metric_name(source)}", f", {source or 'unnamed'}")

    def cell(name: str) -> str:
        value = comparison.figures.get(f"evaluation/{name}{end}")
        return "-" if value is None else f"{value:.3f}"

    half, zero = ("0.500" if cell("gold") != "-" else "-"), ("0.000" if cell("kl") != "-" else "-")
    passes = [[cell(f"pass_at_{k}{when}") for k in pass_at] for when in ("_start", "")]
    return [
        (
            f"{START} (SFT){label}",
            cell("reward_start"),
            cell("gold_start"),
            half,
            *passes[0],
            zero,
            cell("length_start"),
            *(cell(f"{name}_start") for name in comparison.measures),
        ),
        (
            f"{trained}{label}",
            cell("reward"),
            cell("gold"),
            cell("gold_win_rate"),
            *passes[1],
            cell("kl"),
            cell("length"),
            *(cell(name) for name in comparison.measures),
        ),
    ]


def _best_of_rows(comparison: Comparison, passes: int) -> list[tuple[str, ...]]:
    best = best_within_kl(comparison.best_of, comparison.figures.get("evaluation/kl", 0.0))
    if best is None:
        return []
    passed, measured = ("-",) * passes, ("-",) * len(comparison.measures)
    return [
        (
            f"best of {best.n} of SFT",
            "-",
            f"{best.gold:.3f}",
            "-" if best.win_rate is None else f"{best.win_rate:.3f}",
            *passed,
            f"{best.kl:.3f}",
            "-",
            *measured,
        )
    ]


def first_answers(comparison: Comparison) -> list[tuple[HeldOutAnswer, HeldOutAnswer]]:
    """The first answer of both sides to every prompt."""
    pairs: dict[int, tuple[HeldOutAnswer, HeldOutAnswer]] = {}
    for before, after in zip(comparison.start, comparison.now, strict=True):
        pairs.setdefault(after.prompt_id, (before, after))
    return list(pairs.values())


def show_samples(comparison: Comparison, trained: str, count: int) -> None:
    """Some prompts with both answers and their rewards, on the log."""
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
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def _answer(label: str, row: HeldOutAnswer) -> Answer:
    scores = {"reward": row.reward} | ({} if row.gold is None else {"gold": row.gold})
    return Answer(label, row.response, scores, row.finished)
