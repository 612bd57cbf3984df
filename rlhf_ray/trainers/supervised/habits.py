"""Scores of a reward model for the probes of the generated world.

Always true: the two answers of a probe differ in one quality alone, in prompts that were not trained on.
"""

from __future__ import annotations

from typing import Any

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.schema import WorldConfig
from rlhf_ray.data.encode import Drops, encode_pairs
from rlhf_ray.evaluation.preferences import win_rate
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import deal_packs
from rlhf_ray.world.generate import World
from rlhf_ray.world.probes import LearnedQuality, learned_qualities, make_probes, probe_pairs


def measure_qualities(world: WorldConfig, reward: RewardGroup, tokenizer: Any, max_tokens: int) -> list[LearnedQuality]:
    """Score answers with and without each quality."""
    probes = make_probes(World(world.seed, world.raters))
    pairs = probe_pairs(probes)
    encoded = encode_pairs(tokenizer, pairs, max_tokens // 2, Drops())
    whole = [pair for pair in encoded if pair is not None]
    assert len(whole) == len(pairs), "answers of the world that differ have other tokens, and are short"
    batch = TrajectoryBatch.from_sequences([side for pair in whole for side in (pair.chosen, pair.rejected)])
    schedule = deal_packs(batch.lengths.tolist(), ranks=reward.size, max_tokens=max_tokens, unit=2)
    scores = reward.scores(reward.share(batch), schedule).result().tolist()
    return learned_qualities(probes, scores[0::2], scores[1::2], win_rate)
