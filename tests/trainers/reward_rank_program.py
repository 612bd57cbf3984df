"""One of several ranks that train a reward model at every ZeRO stage, and score held-out pairs before: no Ray.

Usage: reward_rank_program.py RANK WORLD_SIZE PORT DIRECTORY
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_ray import environment

UPDATES, PAIRS, HELD_OUT, BUDGET = 8, 8, 24, 160
STAGES = (0, 1, 2, 3)
HALF = ((3, "bf16"),)
"""Stages in half precision, where a head that is not in shards stands beside parameters that are."""


def measure(
    rank: int,
    world: int,
    directory: Path,
    stages: tuple[tuple[int, str], ...],
    rendezvous: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """This rank's share of the losses of every update and of the held-out scores, by stage and dtype."""
    from rlhf_ray.actors.workers.trained_reward import TrainedRewardSetup, TrainedRewardWorker
    from rlhf_ray.algorithms.reward_losses import RewardLoss
    from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
    from rlhf_ray.config.sections.models import ModelConfig
    from rlhf_ray.config.sections.roles import RoleConfig
    from rlhf_ray.data.batches import make_pair_batch
    from rlhf_ray.data.chat import ChatFormat
    from rlhf_ray.data.encode import Drops, encode_pairs
    from rlhf_ray.data.encoded_pairs import PairExample
    from rlhf_ray.data.tokenizers import make_tokenizer
    from rlhf_ray.trainers.supervised.loop import schedule_update
    from rlhf_ray.trajectories.schedule import deal_packs
    from rlhf_ray.world.generate import World

    class Rank(TrainedRewardWorker):
        """A worker that meets its group once, for all stages."""

        def _meet(self, rendezvous: tuple[str, int] | None, timeout_s: float) -> None:
            import torch.distributed as dist

            if not dist.is_initialized():
                if rendezvous is not None:
                    self.hold_rendezvous(*rendezvous)
                super()._meet(rendezvous, timeout_s)

    rows = World(5).preferences(UPDATES * PAIRS + HELD_OUT)
    encoded = encode_pairs(ChatFormat(make_tokenizer("world")), rows, 80, Drops())
    pairs = [PairExample(pair.chosen, pair.rejected) for pair in encoded if pair is not None]
    held_out, loss = make_pair_batch(pairs[UPDATES * PAIRS :]), RewardLoss(centering=0.01)
    measured: dict[str, Any] = {}
    for zero, dtype in stages:
        optimizer = OptimizerConfig(learning_rate=3e-3, eps=1e-6)
        role = RoleConfig(
            model=ModelConfig(path=str(directory / "model"), dtype=dtype),
            engine=EngineConfig(zero=zero, optimizer=optimizer),
        )
        worker = Rank(rank, world)
        worker.setup(TrainedRewardSetup(role, seed=1, total_updates=UPDATES, rendezvous=rendezvous))
        packs = deal_packs(held_out.lengths.tolist(), ranks=world, max_tokens=BUDGET, unit=2).rank(rank)
        scores = {
            str(i): float(s) for ids, part in worker.scores(held_out, packs) for i, s in zip(ids, part, strict=True)
        }
        losses = []
        for update in range(UPDATES):
            batch = make_pair_batch(pairs[update * PAIRS : (update + 1) * PAIRS])
            share = schedule_update(batch, ranks=world, max_tokens=BUDGET, unit=2).updates[0].rank(rank)
            losses.append(worker.accumulate(batch, share, loss, PAIRS).loss)
            worker.apply(False)
        measured[f"{zero} {dtype}"] = {"scores": scores, "losses": losses}
        worker.engine.close()
    return measured


def main(rank: int, world: int, port: int, directory: Path) -> None:
    from rlhf_ray.engine import destroy_process_group

    whole = tuple((zero, "fp32") for zero in STAGES)
    measured = measure(rank, world, directory, whole + HALF, ("127.0.0.1", port))
    (directory / f"measured-{rank}.json").write_text(json.dumps(measured))
    destroy_process_group()  # a thread of gloo that still runs when Python ends would abort the process


if __name__ == "__main__":
    environment.prepare()
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    sys.stderr.flush()
    os._exit(0)  # all is written; while Python ends, a thread of gloo may still abort the process
