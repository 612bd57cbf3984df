"""One rank of this project's reward training, waiting between turns: ``python -m benchmarks.reward_training_rank``.

Always true: a turn is what training does for as many updates: batch, schedule, accumulate, vote, apply; both ranks make
the same batch and schedule and meet in every update; Ray is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from benchmarks.whole_packs import nothing_shared
from rlhf_ray.actors.trained_reward_worker import TrainedRewardSetup, TrainedRewardWorker
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.trainers.supervised.loop import cut

PAIRS_PER_UPDATE = 8


class Rank:
    """A worker and the pairs of an epoch."""

    def __init__(self, rank: int, ranks: int, model: str, pairs: Sequence[PairExample], address: str | None) -> None:
        self.pairs, self.loss = pairs, RewardLoss()
        self.budget = 2 * max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected)) * PAIRS_PER_UPDATE
        optimizer = OptimizerConfig(learning_rate=1e-5)
        role = RoleConfig(model=ModelConfig(path=model, dtype="bf16"), engine=EngineConfig(optimizer=optimizer))
        self.worker = TrainedRewardWorker(rank, ranks)
        self.worker.setup(TrainedRewardSetup(role, seed=0, total_updates=1_000_000, address=address))

    def turn(self, first: int, updates: int, *, share: bool) -> dict[str, Any]:
        """Seconds and this rank's losses of ``updates`` updates from number ``first`` of the epoch on."""
        began = time.perf_counter()
        with nullcontext() if share else nothing_shared():
            losses = [
                self._update(self.pairs[update * PAIRS_PER_UPDATE : (update + 1) * PAIRS_PER_UPDATE])
                for update in range(first, first + updates)
            ]
        return {"seconds": time.perf_counter() - began, "losses": losses}

    def _update(self, pairs: Sequence[PairExample]) -> float:
        batch = make_pair_batch(pairs)
        schedule = cut(batch, ranks=self.worker.world_size, max_tokens=self.budget, unit=2)
        share = schedule.updates[0].rank(self.worker.rank)
        report = self.worker.accumulate(batch, share, self.loss, len(pairs))
        applied = self.worker.apply(not report.finite)
        assert not applied.skipped
        return report.loss


def main() -> None:
    """Load once; then an answer for every line."""
    _answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = [PairExample(chosen, rejected) for chosen, rejected in order["pairs"]]
    rank = Rank(order["rank"], order["ranks"], order["model"], pairs, order["address"])
    _answer(shape=asdict(rank.worker.compute_shape()))
    for line in sys.stdin:
        asked = json.loads(line)
        if "updates" in asked:
            _answer(**rank.turn(asked["first"], asked["updates"], share=asked["share"]))
        else:
            _answer(rate=rank.worker.matmul_rate())


def _answer(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
