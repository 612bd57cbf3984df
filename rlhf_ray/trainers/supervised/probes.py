"""What a reward model learned about single qualities of an answer, where the data is the generated world.

Invariants: the two answers of a probe differ in one quality alone, in prompts that were not trained on. This is the only
place of reward-model training that asks the generated world about answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import Drops, encode_pairs
from rlhf_ray.evaluation.preferences import win_rate
from rlhf_ray.monitoring.report.summary import Table
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import deal_packs
from rlhf_ray.world.generate import World
from rlhf_ray.world.probes import (
    QUALITY_HEADERS,
    learned_qualities,
    make_probes,
    probe_pairs,
    quality_figures,
    quality_rows,
)


@dataclass(frozen=True)
class ProbeResults:
    """What the report shows: figures by their metric names, and one table with a row for each quality."""

    figures: dict[str, float]
    table: Table


def measure_probes(data: DataConfig, reward: RewardGroup, tokenizer: Any, max_tokens: int) -> ProbeResults | None:
    """Score answers with and without each quality; nothing where the data is not the generated world.

    ``max_tokens`` bounds a pack, and half of it each answer with its prompt.
    """
    if data.world is None:
        return None
    probes = make_probes(World(data.world.seed, data.world.raters))
    pairs = probe_pairs(probes)
    encoded = encode_pairs(ChatFormat(tokenizer), pairs, max_tokens // 2, Drops())
    whole = [pair for pair in encoded if pair is not None]
    assert len(whole) == len(pairs), "answers of the world that differ have other tokens, and are short"
    batch = TrajectoryBatch.from_sequences([side for pair in whole for side in (pair.chosen, pair.rejected)])
    schedule = deal_packs(batch.lengths.tolist(), ranks=reward.size, max_tokens=max_tokens, unit=2)
    scores = reward.scores(reward.share(batch), schedule).result().tolist()
    qualities = learned_qualities(probes, scores[0::2], scores[1::2], win_rate)
    figures = {f"evaluation/{name}": value for name, value in quality_figures(qualities).items()}
    return ProbeResults(figures, Table(QUALITY_HEADERS, tuple(quality_rows(qualities))))
