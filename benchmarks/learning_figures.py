"""What the finished runs of the part ``learning`` measure, seed by seed.

Invariant: a figure is taken on held-out prompts, sampled at temperature 1 on both sides, ties counting one half, unless
its method says otherwise; its value is that of the worst seed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure, Figures
from benchmarks.learning_runs import BEST_OF_N, RECIPES, SEEDS, directory_name, evaluations

METHOD = (
    "Llama of 0.5M parameters, reward model trained on 19,200 pairs, transformers as sampler, plain classes in one "
    "process, 300 held-out prompts at temperature 1"
)
WITHOUT_KL = "PPO without the KL term, against a reward model from raters whom flattery wins over"


def figures(root: Path, seeds: Sequence[int] = SEEDS) -> Figures:
    """All figures, from the finished runs below ``root``."""
    homes = [root / f"seed-{seed}" for seed in seeds]
    measured: Figures = {"ppo.reward_model_accuracy": _accuracy(homes, "rm", "pairs without noise")}
    for name in RECIPES:
        last = [evaluations(home / directory_name(name))[-1] for home in homes]
        measured[f"ppo.{name}.gold_win_rate"] = Figure.worst(
            [line["evaluation/gold_win_rate"] for line in last], "share", f"{name} over SFT by gold: {METHOD}"
        )
        measured[f"ppo.{name}.kl"] = _least(
            [line["evaluation/kl"] for line in last], "nats", f"{name}: KL from SFT (k1, a sequence) of the same runs"
        )
    for name in BEST_OF_N:
        measured |= _best_of_n(name, homes)
    return measured | _without_kl(homes) | _sums([evaluations(home / "sums")[-1] for home in homes])


def _accuracy(homes: Sequence[Path], piece: str, pairs: str) -> Figure:
    """The accuracy of a reward model at its end."""
    runs = [[line for line in evaluations(home / piece) if "evaluation/accuracy" in line] for home in homes]
    seeds = [run[-1]["evaluation/accuracy"] for run in runs]
    return Figure.worst(seeds, "share", f"reward model on 1,000 held-out {pairs}")


def _best_of_n(name: str, homes: Sequence[Path]) -> Figures:
    best = [_largest_best_of_n(home / name) for home in homes]
    judge = "rewards of PPO" if name == "best_of_n" else "scores of the reward model alone"
    method = f"best of n samples of SFT by the {judge}, the fewest samples that cost PPO's KL"
    measured = {
        f"ppo.{name}.gold_win_rate": Figure.worst([row["win_rate"] for row in best], "share", f"{method}; {METHOD}")
    }
    if name == "best_of_n":
        measured[f"ppo.{name}.kl"] = _least([row["kl"] for row in best], "nats", f"log n - (n - 1) / n, {method}")
        measured[f"ppo.{name}.samples"] = _least([row["n"] for row in best], "samples", f"n, {method}")
    return measured


def _largest_best_of_n(directory: Path) -> dict[str, float]:
    """The best of all samples that a run drew of each held-out prompt before it began."""
    stored = json.loads((directory / "evaluation" / "start.json").read_text())["best_of"]
    return {name: float(value) for name, value in stored[-1].items()}


def _sums(last: Sequence[Mapping[str, float]]) -> Figures:
    task = "sums of the generated world in a wording that was held out, pass@1 at temperature 1"
    ends, starts = ([line[f"evaluation/pass_at_1{when}"] for line in last] for when in ("", "_start"))
    return {
        "ppo.grpo.pass_rate": Figure.worst(ends, "share", f"GRPO on {task}"),
        "ppo.grpo.pass_rate_start": _least(starts, "share", f"the policy that GRPO starts from on {task}"),
    }


def _without_kl(homes: Sequence[Path]) -> Figures:
    """How PPO over-optimises a reward model that likes flattery when nothing holds it back."""
    runs = [evaluations(home / "without_kl") for home in homes]
    peaks, ends = [gold_peak(run) for run in runs], [run[-1] for run in runs]
    falls, rises = zip(*map(over_optimised, runs), strict=True)
    measured = {
        "reward_model_accuracy": _accuracy(homes, "flattered_rm", "pairs labelled by gold"),
        "gold_fall": Figure.worst(falls, "share", f"{WITHOUT_KL}: share of its peak that gold loses by the end"),
        "reward_rise": Figure.worst(
            rises, "score", f"{WITHOUT_KL}: gain of the learned reward from that peak to the end"
        ),
    }
    for name, unit, higher_is_better in (("gold", "score", True), ("reward", "score", False), ("kl", "nats", False)):
        for moment, lines in (("peak", peaks), ("end", ends)):
            seeds = [line[f"evaluation/{name}"] for line in lines]
            method = f"{WITHOUT_KL}: {name} {'at the peak of gold' if moment == 'peak' else 'at the end'}"
            measured[f"{name}_{moment}"] = Figure.worst(seeds, unit, method, higher_is_better=higher_is_better)
    for name, unit, what in (
        ("habit_rate", "share", "answers that flatter"),
        ("habits_per_answer", "phrases", "flattering phrases in an answer"),
    ):
        for suffix in ("", "_start"):
            seeds = [line[f"evaluation/{name}{suffix}"] for line in ends]
            words = "at the start" if suffix else "at the end"
            measured[f"{name}{suffix}"] = _least(seeds, unit, f"{WITHOUT_KL}: {what} {words}")
    for quality, words in (("in_time", "end in time"), ("polite", "are polite at both ends")):
        for suffix, place in (("", -1), ("_start", 0)):
            seeds = [quality_share(home / "without_kl", quality, place) for home in homes]
            step = "first" if suffix else "last"
            measured[f"{quality}{suffix}"] = Figure.worst(
                seeds, "share", f"{WITHOUT_KL}: training answers of the {step} step that {words}"
            )
    return {f"ppo.without_kl.{name}": figure for name, figure in measured.items()}


def gold_peak(lines: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The evaluation with the highest gold."""
    return max(lines, key=lambda line: line["evaluation/gold"])


def over_optimised(lines: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """From the peak of gold to the end: the share of gold that is lost, and what the learned reward gained."""
    peak = gold_peak(lines)
    fall = 1.0 - lines[-1]["evaluation/gold"] / peak["evaluation/gold"]
    return fall, lines[-1]["evaluation/reward"] - peak["evaluation/reward"]


def quality_share(directory: Path, quality: str, place: int) -> float:
    """The share of a step's answers that have a quality of the gold score; the first step is at ``place`` 0, the last at -1."""
    from rlhf_ray.world.gold import gold_parts

    file = sorted((directory / "samples").glob("step-*.jsonl"))[place]
    rows: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    parts = [gold_parts(row["prompt"], row["response"], row["finished"]) for row in rows]
    worth = [{"in_time": part.in_time, "polite": part.polite}[quality] for part in parts]
    return sum(value > 0 for value in worth) / len(worth)


def _least(seeds: Sequence[float], unit: str, method: str) -> Figure:
    """A figure of which less is better."""
    return Figure.worst(seeds, unit, method, higher_is_better=False)
