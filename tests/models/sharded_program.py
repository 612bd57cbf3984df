"""One of two ranks that build models in shards and run them on ragged packs.

Usage: sharded_program.py RANK PORT DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_ray.config.schema import EngineConfig
from rlhf_ray.engine import Engine, destroy_process_group, init_process_group
from rlhf_ray.engine.settings import deepspeed_config
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models import log_probs
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.names import disk_names
from rlhf_ray.models.regression import PackedRegression, get_llm_for_sequence_regression
from rlhf_ray.models.report import describe
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.trajectories import TrajectoryBatch, pack

WORLD = 2


def share(module: nn.Module) -> float:
    """What part of its parameters this rank holds."""
    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_tensor")]
    return sum(p.ds_tensor.numel() for p in parameters) / sum(p.ds_numel for p in parameters)


def main(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    init_process_group(rank, WORLD, "127.0.0.1", port, timeout_s=60.0)
    engine_config = EngineConfig(zero=3)
    settings = deepspeed_config(engine_config, dtype="fp32", trainable=False, world_size=WORLD, whole_below=0)
    lengths = ((9, 4, 17), (2,))[rank]
    generator = torch.Generator().manual_seed(rank)
    batch = TrajectoryBatch.from_sequences([torch.randint(3, 48, (n,), generator=generator) for n in lengths])
    log_probs.LOGITS_AT_ONCE, log_probs.FEWEST_TOKENS_AT_ONCE = 1, 3  # ten chunks on one rank, one on the other
    found: dict[str, Any] = {"refused": []}

    def run(module: nn.Module, kind: str) -> Tensor:
        engine = Engine(module, engine_config, dtype="fp32", total_updates=None, trainable=False)
        out: Tensor = engine.evaluate(
            lambda inner: inner(pack(batch)).log_probs if kind == "log_probs" else inner(pack(batch), kind)
        )
        if kind == "log_probs":
            actor = module.actor
            state = {n: t for group in engine.full_state(actor.model) for n, t in disk_names(actor.model, group)}
            if rank == 0:
                save_pretrained(actor, None, directory / "saved", state=state)
        engine.close()
        return out

    for family in ("llama", "gemma2"):
        name = str(directory / family)
        actor = Actor(name, param_dtype="fp32", ds_config=settings)
        found[f"{family} share"], found[f"{family} report"] = share(actor), describe(actor)
        found[f"{family} log_probs"] = run(PackedPolicy(actor), "log_probs").tolist()
        reward = get_llm_for_sequence_regression(
            name, "reward", param_dtype="fp32", ds_config=settings, init_value_head=True, seed=3
        )
        found[f"{family} scores"] = run(PackedRegression(reward), "scores").tolist()
    for family in ("mixtral", "misshapen"):
        try:
            Actor(str(directory / family), param_dtype="fp32", ds_config=settings)
        except ModelLoadError as error:
            found["refused"].append(str(error))
    found["tokens"] = [batch["token_ids"].tolist(), batch.offsets.tolist()]
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
