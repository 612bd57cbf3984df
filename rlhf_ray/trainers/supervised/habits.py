"""What a reward model of the generated world learned besides the rule: each quality of an answer by itself.

Always true: the two answers of a probe differ in one quality alone, in prompts that were not trained on; what gold says of
it is known, so that a habit (worth nothing) and the rule stand in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.schema import WorldConfig
from rlhf_ray.data.encode import Drops, encode_pairs
from rlhf_ray.evaluation.preferences import win_rate
from rlhf_ray.monitoring.report.summary import Table
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import deal_packs
from rlhf_ray.world.generate import World
from rlhf_ray.world.probes import probes

PROBES = 200
"""Of each quality."""


@dataclass(frozen=True)
class Habit:
    """A quality, what it is worth in gold, by how many deviations of the scores it moves a score, and how often it wins."""

    name: str
    gold: float
    shift: float
    preferred: float


def measure_habits(world: WorldConfig, reward: RewardGroup, tokenizer: Any, max_tokens: int) -> list[Habit]:
    """Score answers with and without each quality."""
    groups = probes(World(world.seed, world.raters), PROBES)
    pairs = [PreferencePair(probe.prompt, probe.having, probe.lacking) for group in groups.values() for probe in group]
    encoded = encode_pairs(tokenizer, pairs, max_tokens // 2, Drops())
    whole = [pair for pair in encoded if pair is not None]
    assert len(whole) == len(pairs), "answers of the world that differ have other tokens, and are short"
    batch = TrajectoryBatch.from_sequences([side for pair in whole for side in (pair.chosen, pair.rejected)])
    schedule = deal_packs(batch.lengths.tolist(), ranks=reward.size, max_tokens=max_tokens, unit=2)
    scores = reward.scores(reward.share(batch), schedule).result().double()
    deviation = float(scores.std(unbiased=False)) or 1.0
    having, lacking = scores[0::2].numpy(), scores[1::2].numpy()
    habits, start = [], 0
    for name, group in groups.items():
        part = slice(start, start + len(group))
        shift = float((having[part] - lacking[part]).mean()) / deviation
        habits.append(Habit(name, group[0].gold, shift, win_rate(having[part], lacking[part])))
        start += len(group)
    return habits


def habit_figures(habits: Sequence[Habit]) -> dict[str, float]:
    """By the names under which they are logged."""
    return {f"evaluation/habit/{habit.name.replace(' ', '_')}": habit.shift for habit in habits}


def habit_table(habits: Sequence[Habit]) -> Table:
    """For the report."""
    headers = ("an answer that", "gold", "score, in deviations", "preferred")
    rows = [(habit.name, f"{habit.gold:+.1f}", f"{habit.shift:+.2f}", f"{habit.preferred:.1%}") for habit in habits]
    return Table(headers, tuple(rows))
