"""One rank of this project's reward training, which runs some updates a turn and waits in between.

    python -m benchmarks.peers.reward_training_rank

Invariants: a turn does all that training does: batch, schedule, accumulate, vote, apply. All ranks make the same batches
and schedules and meet in every update. Ray is left out.
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
from rlhf_ray.actors.workers.trained_reward import TrainedRewardSetup, TrainedRewardWorker
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.network import LOOPBACK
from rlhf_ray.trainers.supervised.loop import schedule_update

PAIRS_PER_UPDATE = 8


class Rank:
    """A worker and the pairs of one epoch."""

    def __init__(self, rank: int, ranks: int, model: str, pairs: Sequence[PairExample], port: int | None) -> None:
        self.pairs, self.loss = pairs, RewardLoss()
        self.budget = 2 * max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected)) * PAIRS_PER_UPDATE
        optimizer = OptimizerConfig(learning_rate=1e-5)
        role = RoleConfig(model=ModelConfig(path=model, dtype="bf16"), engine=EngineConfig(optimizer=optimizer))
        self.worker = TrainedRewardWorker(rank, ranks)
        rendezvous = None if port is None else (LOOPBACK, port)
        if rendezvous is not None:
            self.worker.hold_rendezvous(*rendezvous)
        self.worker.setup(TrainedRewardSetup(role, seed=0, total_updates=1_000_000, rendezvous=rendezvous))

    def turn(self, first: int, updates: int, *, share: bool) -> dict[str, Any]:
        """Run ``updates`` updates of the epoch from number ``first`` on; returns the seconds and this rank's losses.

        ``share`` says whether sequences share the prefixes that they have in common.
        """
        started_at = time.perf_counter()
        with nullcontext() if share else nothing_shared():
            losses = [
                self._update(self.pairs[update * PAIRS_PER_UPDATE : (update + 1) * PAIRS_PER_UPDATE])
                for update in range(first, first + updates)
            ]
        return {"seconds": time.perf_counter() - started_at, "losses": losses}

    def _update(self, pairs: Sequence[PairExample]) -> float:
        batch = make_pair_batch(pairs)
        schedule = schedule_update(batch, ranks=self.worker.world_size, max_tokens=self.budget, unit=2)
        share = schedule.updates[0].rank(self.worker.rank)
        report = self.worker.accumulate(batch, share, self.loss, len(pairs))
        applied = self.worker.apply(not report.finite)
        assert not applied.skipped
        return report.loss


def main() -> None:
    """Load once, then answer every order on standard input."""
    _answer(imported=True)
    order = json.loads(sys.stdin.readline())
    pairs = [PairExample(chosen, rejected) for chosen, rejected in order["pairs"]]
    rank = Rank(order["rank"], order["ranks"], order["model"], pairs, order["port"])
    _answer(shape=asdict(rank.worker.compute_shape()))
    for line in sys.stdin:
        order = json.loads(line)
        if "updates" in order:
            _answer(**rank.turn(order["first"], order["updates"], share=order["share"]))
        else:
            _answer(rate=rank.worker.matmul_rate())


def _answer(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
