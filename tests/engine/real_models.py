"""Scenarios with the project's own models: packs, ragged ranks, names on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from toy import distance, engine_config, make_batch

from rlhf_ray.algorithms.losses import LossOutput, NegativeLogLikelihood
from rlhf_ray.engine import Engine
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.weights.tiny_llama import make_model
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack

SEQUENCES = make_batch(5, count=9)
RAGGED = {1: [[(0, 1, 2, 3, 4, 5, 6, 7, 8)]], 2: [[(0, 1, 2, 3), (4,)], [(5, 6, 7, 8), ()]]}
"""Sequences by rank and micro-batch: the ranks hold other numbers of segments and tokens, one of them nothing."""


def batch_of(indices: tuple[int, ...]) -> TrajectoryBatch:
    """Sequences in which all tokens but the first are actions."""
    chosen = [SEQUENCES[index] for index in indices]
    masks = [[False] + [True] * (len(sequence) - 1) for sequence in chosen]
    return TrajectoryBatch.from_sequences(chosen, action_mask=masks)


def policy(*, lora: bool) -> Actor:
    """A tiny Llama."""
    options = {"lora_rank": 2, "target_modules": "all-linear"} if lora else {}
    torch.manual_seed(3)
    return Actor(make_model("llama-tiny", 48, seed=1), attn_implementation="sdpa", param_dtype="fp32", **options)


def policy_step(module: nn.Module, indices: tuple[int, ...]) -> LossOutput:
    """What a policy worker does with a micro-batch."""
    if not indices:
        return LossOutput(module(Packed.dummy()).log_probs.sum() * 0.0, {})
    batch = batch_of(indices)
    return NegativeLogLikelihood()(module(pack(batch)), batch)


def train_policy(
    rank: int, world: int, zero: int, dtype: str, *, lora: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Two updates on ragged ranks, then the weights by their names on disk."""
    actor = policy(lora=lora)
    engine = Engine(PackedPolicy(actor), engine_config(zero), dtype=dtype, total_updates=8, trainable=True)
    denominator = float(sum(len(sequence) - 1 for sequence in SEQUENCES))
    norms = []
    for _ in range(2):
        report = engine.accumulate(RAGGED[world][rank], policy_step, denominator)
        norms.append(engine.apply(skip=not report.finite).grad_norm)
    engine.evaluate(lambda module: module(pack(batch_of(RAGGED[world][rank][0])), with_entropy=True))
    groups = len(list(engine.full_state(actor.model)))
    disk, again = ({name: tensor.float() for name, tensor in engine.disk_weights(actor.model)} for _ in range(2))
    engine.close()
    return disk, {
        "norms": norms, "names": list(disk), "groups": groups,
        "again": all(disk[name].equal(again[name]) for name in disk),
    }  # fmt: skip


def policies(rank: int, world: int, dtype: str, *, lora: bool = False) -> dict[str, Any]:
    """ZeRO-3 on ragged ranks trains what ZeRO-0 trains."""
    whole, expected = train_policy(rank, world, 0, dtype, lora=lora)
    sharded, measured = train_policy(rank, world, 3, dtype, lora=lora)
    before = dict(policy(lora=lora).model.state_dict())
    measured |= {
        "expected_norms": expected["norms"],
        "expected_names": sorted(make_model("llama-tiny", 48).state_dict()),
    }
    if rank == 0:
        measured["weight_error"] = distance(sharded, whole)
        measured["moved"] = any(not whole[name].equal(before[name]) for name in whole if name in before) or lora
    return measured


def scenarios(rank: int, world: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every scenario by name."""
    yield "policy-fp32", lambda: policies(rank, world, "fp32")
    yield "policy-bf16", lambda: policies(rank, world, "bf16")
    yield "policy-fp32-lora", lambda: policies(rank, world, "fp32", lora=True)
