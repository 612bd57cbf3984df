"""One rank of this project's supervised fine-tuning, which runs some updates a turn and waits in between.

    python -m benchmarks.peers.sft_rank

Invariants: a turn does all that training does: batch, schedule, accumulate, vote, apply. All ranks make the same batches and
schedules and meet in every update. Ray is left out.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.algorithms.losses import NegativeLogLikelihood
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.data.batches import DemonstrationExample, make_demonstration_batch
from rlhf_ray.network import LOOPBACK
from rlhf_ray.trainers.supervised.loop import schedule_update

ROWS_PER_UPDATE = 8


class Rank:
    """A worker and the demonstrations of one epoch."""

    def __init__(
        self, rank: int, ranks: int, model: str, rows: Sequence[DemonstrationExample], port: int | None
    ) -> None:
        self.rows, self.loss = rows, NegativeLogLikelihood()
        self.budget = max(len(row.token_ids) for row in rows) * ROWS_PER_UPDATE
        optimizer = OptimizerConfig(learning_rate=1e-5)
        role = RoleConfig(model=ModelConfig(path=model, dtype="bf16"), engine=EngineConfig(optimizer=optimizer))
        self.worker = PolicyWorker(rank, ranks)
        rendezvous = None if port is None else (LOOPBACK, port)
        if rendezvous is not None:
            self.worker.hold_rendezvous(*rendezvous)
        self.worker.setup(LanguageSetup(role, seed=0, total_updates=1_000_000, rendezvous=rendezvous))

    def turn(self, first: int, updates: int, *, packed: bool = True) -> dict[str, Any]:
        """Run ``updates`` updates of the epoch from number ``first`` on; returns the seconds and this rank's losses.

        Unless it is ``packed``, a micro-batch holds no more tokens than the longest sequence.
        """
        started_at = time.perf_counter()
        losses = [
            self._update(self.rows[update * ROWS_PER_UPDATE : (update + 1) * ROWS_PER_UPDATE], packed=packed)
            for update in range(first, first + updates)
        ]
        return {"seconds": time.perf_counter() - started_at, "losses": losses}

    def _update(self, rows: Sequence[DemonstrationExample], *, packed: bool) -> float:
        batch = make_demonstration_batch(rows)
        budget = self.budget if packed else self.budget // ROWS_PER_UPDATE
        schedule = schedule_update(batch, ranks=self.worker.world_size, max_tokens=budget)
        share = schedule.updates[0].rank(self.worker.rank)
        learned = int(batch["action_mask"].sum())
        report = self.worker.accumulate(batch, share, self.loss, learned)
        applied = self.worker.apply(not report.finite)
        assert not applied.skipped
        return report.loss


def as_row(prompt: list[int], answer: list[int]) -> DemonstrationExample:
    """A demonstration from the token ids of a prompt and its answer."""
    return DemonstrationExample(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def main() -> None:
    """Load once, then answer every order on standard input."""
    print(json.dumps({"imported": True}), flush=True)
    order = json.loads(sys.stdin.readline())
    rows = [as_row(*row) for row in order["pairs"]]
    rank = Rank(order["rank"], order["ranks"], order["model"], rows, order["port"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(rank.turn(order["first"], order["updates"], packed=order["packed"])), flush=True)


if __name__ == "__main__":
    main()
