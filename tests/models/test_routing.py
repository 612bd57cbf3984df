"""A mixture of experts replays what it is given, in every architecture that a config accepts, with gradients to its routers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.config.files.sampled import REPLAYED
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.actor import PackedPolicy
from rlhf_ray.models.forward.routing import watch
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import SHORTEST_SHARED, pack
from tests.architectures.configs import VOCABULARY
from tests.models.routers import blocks_of, chosen, policy_of, used

LENGTHS = (7, 4, 12)
QUICK = ("afmoe", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "granitemoe", "hunyuan_v1_moe", "mixtral", "qwen3_moe")
"""Routers of every kind; others are much like these."""


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> TrajectoryBatch:
    generator = torch.Generator().manual_seed(0)
    return TrajectoryBatch.from_sequences(
        [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    )


def elsewhere(policy: PackedPolicy, column: Tensor) -> Tensor:
    """Other experts for every token and router: the next of each."""
    return ((column.long() + 1) % blocks_of(policy)[0].experts.num_experts).to(column.dtype)


def routers_of(policy: PackedPolicy) -> list[nn.Parameter]:
    return [
        parameter
        for block in blocks_of(policy)
        for name, parameter in block.named_parameters()
        if parameter.dim() == 2 and len(parameter) == block.experts.num_experts and "shared" not in name
    ]


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in REPLAYED]
)
def test_each_layer_uses_the_experts_it_is_told_and_its_router_learns_from_them(model_type: str) -> None:
    policy, batch = policy_of(model_type), batch_of()
    own = chosen(policy, batch)
    with torch.no_grad():
        plain = policy(pack(batch)).log_probs
        same = policy(pack(batch.with_columns(routed_experts=own), with_routed=True)).log_probs
    assert torch.equal(same, plain), "what a router chose itself changes nothing"

    other = batch.with_columns(routed_experts=elsewhere(policy, own))
    with used(policy) as calls:
        log_probs = policy(pack(other, with_routed=True)).log_probs
    assert torch.equal(torch.stack([experts for _, experts, _ in calls], 1), other["routed_experts"].long())
    assert float((log_probs - plain).detach().abs().max()) > 1e-3
    routers = routers_of(policy)
    assert len(routers) == len(blocks_of(policy)) == own.shape[1]
    for gradient in torch.autograd.grad(log_probs.sum(), routers):
        assert float(gradient.abs().max()) > 0
    assert torch.equal(chosen(policy, other), own), "a pack without the column is routed as ever"


def of_softmax(logits: Tensor, told: Tensor) -> Tensor:
    weights = logits.softmax(-1).gather(1, told)
    return weights / weights.sum(1, keepdim=True)


def of_softmax_as_it_is(logits: Tensor, told: Tensor) -> Tensor:
    return logits.softmax(-1).gather(1, told)


def of_sigmoid(logits: Tensor, told: Tensor) -> Tensor:
    weights = logits.sigmoid().gather(1, told)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("model_type", "more", "formula"),
    [
        ("deepseek_v2", {"n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"}, of_softmax_as_it_is),
        ("mixtral", {}, of_softmax),
        ("granitemoe", {}, of_softmax),
        ("glm4_moe", {}, of_sigmoid),
        ("deepseek_v3", {"n_group": 2, "topk_group": 1}, of_sigmoid),
    ],
)
def test_experts_that_are_replayed_are_weighed_by_the_trainers_own_scores(
    model_type: str, more: dict[str, Any], formula: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Against the formula of each architecture's paper, from the hidden states that came in."""
    policy, batch = policy_of(model_type, **more), batch_of()
    other = batch.with_columns(routed_experts=elsewhere(policy, chosen(policy, batch)))
    with torch.no_grad(), used(policy) as calls:
        policy(pack(other, with_routed=True))
    for block, router, (hidden, told, weights) in zip(blocks_of(policy), routers_of(policy), calls, strict=True):
        scale = getattr(getattr(block, "gate", None), "routed_scaling_factor", 1.0)
        expected = scale * formula(hidden.flatten(0, -2) @ router.T, told)
        torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


def test_a_token_that_no_engine_has_read_goes_where_the_router_sends_it() -> None:
    policy, batch = policy_of("mixtral"), batch_of()
    own = chosen(policy, batch)
    column = elsewhere(policy, own)
    column[batch.offsets[1:] - 1] = 255
    with torch.no_grad(), used(policy) as calls:
        policy(pack(batch.with_columns(routed_experts=column), with_routed=True))
        first = calls[0][1]
    last = batch.offsets[1:] - 1
    assert torch.equal(first[last], own[last, 0].long())
    read = torch.ones(batch.num_tokens, dtype=torch.bool).index_fill(0, last, False)
    assert torch.equal(first[read], column[read, 0].long())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probs_and_gradients_are_the_same_where_layers_are_computed_again_and_where_prompts_are_shared(
    checkpointing: bool,
) -> None:
    """A layer that is computed again for the backward pass, outside of the forward's own call, replays again."""
    policy = policy_of("qwen3_moe")
    prompt = list(range(3, 3 + SHORTEST_SHARED))
    batch = TrajectoryBatch.from_sequences([[*prompt, 5, 6, 9], [*prompt, 7, 8]])
    column = elsewhere(policy, chosen(policy, batch))
    column[len(prompt) + 3 :][: len(prompt)] = column[: len(prompt)]
    batch = batch.with_columns(routed_experts=column)
    apart = policy(pack(batch, share_prefixes=False, with_routed=True)).log_probs
    expected = torch.autograd.grad(apart.sum(), routers_of(policy))

    if checkpointing:
        policy.actor.gradient_checkpointing_enable()
        policy.train()
    packed = pack(batch, with_routed=True)
    assert packed.parent is not None
    log_probs = policy(packed).log_probs
    assert torch.allclose(log_probs, apart, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(log_probs.sum(), routers_of(policy)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_experts_of_another_model_and_models_that_choose_otherwise_are_refused_by_name() -> None:
    policy, batch = policy_of("mixtral"), batch_of()
    own = chosen(policy, batch)
    with pytest.raises(RequestError, match="are those of 1 routers, but MixtralModel has 2"):
        policy(pack(batch.with_columns(routed_experts=own[:, :1]), with_routed=True))
    with pytest.raises(RequestError, match=r"chose experts of \(23, 2\).*but those of \(23, 1\)"):
        policy(pack(batch.with_columns(routed_experts=own[:, :, :1]), with_routed=True))
    with pytest.raises(RequestError, match="LlamaModel is no mixture of experts"):
        watch(policy_of("llama").actor.backbone)
    other = policy_of("mixtral")
    experts = blocks_of(other)[0].experts
    count, experts.num_experts = experts.num_experts, 3  # as of a router that scores others than there are
    watch(other.actor.backbone)
    experts.num_experts = count
    with pytest.raises(ModelLoadError, match="a MixtralDecoderLayer chose experts 0 times in one pass"):
        other(pack(batch.with_columns(routed_experts=own), with_routed=True))


def test_the_page_lists_the_architectures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rollout.md").read_text()
    (listed,) = re.findall(
        r"can be replayed, and `check` refuses others by their names: ([^.]*)\.", page.replace("\n", " ")
    )
    assert listed == ", ".join(f"`{name}`" for name in REPLAYED)
