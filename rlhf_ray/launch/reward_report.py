"""What an evaluation of a reward model found, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.console import get_logger, say, table
from rlhf_ray.monitoring.report.summary import Table


@dataclass(frozen=True)
class RewardReport:
    """What a reward model makes of a file of preferences."""

    figures: Mapping[str, float]
    """Over all pairs: accuracy, loss, calibration and the others of ``docs/reward_training.md``."""
    sources: Mapping[str, Mapping[str, float]]
    """The same figures for each source of pairs."""
    rewardbench: Mapping[str, float]
    """The scores of RewardBench's sections, where the sources are its subsets; otherwise empty."""
    calibration: Sequence[Any]
    """Predicted against actual preference, by bins of the predicted one."""
    worst: Table
    """The pairs that the model gets most wrong."""
    source_table: Table
    missing: Sequence[str] = ()
    """Subsets of the benchmark that the rows lack."""
    unit: str = "pairs"
    """What is counted: pairs, or prompts with several answers."""
    benchmark: str = "RewardBench"
    """The benchmark that ``rewardbench`` is of."""


def print_report(report: RewardReport) -> None:
    """Print the figures of everything, of each source and of the benchmark."""
    figures = [(name, f"{value:.4g}") for name, value in report.figures.items()]
    say(table(f"all {report.unit}", ("figure", "value"), figures))
    say(table("by source", report.source_table.headers, report.source_table.rows))
    if report.rewardbench:
        rows = [(name, f"{score:.4f}") for name, score in report.rewardbench.items()]
        say(table(report.benchmark, ("section", "score"), rows))
        if report.missing:
            get_logger().warning("these are not the leaderboard's scores: %s are missing", ", ".join(report.missing))
