"""Which experts the layers of a mixture of transformers are called with, whoever chose them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack
from rlhf_ray.trajectories.routed_experts import experts_dtype
from tests.architectures.configs import small_model


def policy_of(model_type: str, **more: Any) -> PackedPolicy:
    model, _ = small_model(model_type, policy=True, **more)
    return PackedPolicy(Actor(model, "sdpa", "fp32").eval())


def blocks_of(policy: PackedPolicy) -> list[nn.Module]:
    """What holds the experts of each layer that has some."""
    return [module for module in policy.modules() if isinstance(getattr(module, "experts", None), nn.Module)]


@contextmanager
def used(policy: PackedPolicy) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """For each layer the hidden states, experts and weights that its experts are called with, whoever chose them."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        block.experts.register_forward_pre_hook(lambda _, given: calls.append(given)) for block in blocks_of(policy)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def chosen(policy: PackedPolicy, batch: TrajectoryBatch) -> Tensor:
    """What the routers choose by themselves, as a column."""
    with torch.no_grad(), used(policy) as calls:
        policy(pack(batch, share_prefixes=False))
    return torch.stack([experts for _, experts, _ in calls], 1).to(dtype_of(policy))


def dtype_of(policy: PackedPolicy) -> torch.dtype:
    return experts_dtype(blocks_of(policy)[0].experts.num_experts)
