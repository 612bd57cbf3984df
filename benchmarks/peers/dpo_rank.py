"""One rank of this project's DPO, which runs some updates a turn and waits in between.

    python -m benchmarks.peers.dpo_rank

Invariants: a turn does all that training does, and asks for the reference of its pairs first, although a run does that once and
not once an epoch. All ranks make the same batches and schedules and meet in every update. Ray is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.preferences.pairs import Logistic, PolicyPairLoss
from rlhf_ray.algorithms.preferences.rewards import ImplicitReward, answer_log_probs
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import make_policy_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.network import LOOPBACK
from rlhf_ray.trainers.supervised.loop import schedule_update
from rlhf_ray.trajectories.batch import TrajectoryBatch

PAIRS_PER_UPDATE = 8


class Rank:
    """A worker and the pairs of one epoch."""

    def __init__(self, rank: int, ranks: int, model: str, pairs: Sequence[PairExample], port: int | None) -> None:
        self.pairs, self.loss = pairs, PolicyPairLoss(Logistic(), ImplicitReward(0.1))
        self.budget = 2 * max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected)) * PAIRS_PER_UPDATE
        optimizer = OptimizerConfig(learning_rate=1e-5)
        role = RoleConfig(model=ModelConfig(path=model, dtype="bf16"), engine=EngineConfig(optimizer=optimizer))
        self.worker = PolicyWorker(rank, ranks)
        rendezvous = None if port is None else (LOOPBACK, port)
        if rendezvous is not None:
            self.worker.hold_rendezvous(*rendezvous)
        self.worker.setup(LanguageSetup(role, seed=0, total_updates=1_000_000, rendezvous=rendezvous))
        self.known: dict[int, torch.Tensor] = {}
        """The reference of each update, as it was before the first one."""

    def turn(self, first: int, updates: int) -> dict[str, Any]:
        """Run ``updates`` updates of the epoch from number ``first`` on.

        Returns the seconds, also those of the reference alone, and this rank's losses.
        """
        started_at = time.perf_counter()
        for update in range(first, first + updates):
            self._ask_reference(update)
        reference = time.perf_counter() - started_at
        losses = [self._update(update) for update in range(first, first + updates)]
        return {"seconds": time.perf_counter() - started_at, "reference": reference, "losses": losses}

    def _batch(self, update: int) -> TrajectoryBatch:
        return make_policy_pair_batch(self.pairs[update * PAIRS_PER_UPDATE : (update + 1) * PAIRS_PER_UPDATE])

    def _ask_reference(self, update: int) -> None:
        """Its own sequences alone are right; those of other ranks, which this one never trains on, have 0."""
        batch = self._batch(update)
        schedule = schedule_update(batch, ranks=self.worker.world_size, max_tokens=self.budget, unit=2)
        sums = torch.zeros(len(batch))
        for rows, log_probs in self.worker.log_probs(batch, schedule.updates[0].rank(self.worker.rank)):
            part = batch.select(rows)
            sums[list(rows)] = answer_log_probs(torch.from_numpy(log_probs), part)
        self.known.setdefault(update, sums)

    def _update(self, update: int) -> float:
        batch = self._batch(update).with_columns(reference_log_prob=self.known[update])
        schedule = schedule_update(batch, ranks=self.worker.world_size, max_tokens=self.budget, unit=2)
        share = schedule.updates[0].rank(self.worker.rank)
        report = self.worker.accumulate(batch, share, self.loss, len(batch) // 2)
        applied = self.worker.apply(not report.finite)
        assert not applied.skipped
        return report.loss


def as_pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> PairExample:
    """A pair from the token ids of a prompt and both answers."""
    return PairExample(
        prompt + chosen, prompt + rejected, prompt_length=len(prompt), chosen_answer=len(chosen),
        rejected_answer=len(rejected),
    )  # fmt: skip


def main() -> None:
    """Load once, then answer every order on standard input."""
    print(json.dumps({"imported": True}), flush=True)
    order = json.loads(sys.stdin.readline())
    pairs = [as_pair(*pair) for pair in order["pairs"]]
    rank = Rank(order["rank"], order["ranks"], order["model"], pairs, order["port"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(rank.turn(order["first"], order["updates"])), flush=True)


if __name__ == "__main__":
    main()
