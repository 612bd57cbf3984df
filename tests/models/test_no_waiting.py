"""A micro-batch never asks the device for a number: nothing of its forward, loss and backward waits for a GPU.

The device 'meta' stands for the GPU: whatever reads a value there (``item``, ``tolist``, ``nonzero``, a mask as an index, a
``repeat_interleave`` of unknown length) raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.algorithms.losses import LossOutput, NegativeLogLikelihood, ValueLoss
from rlhf_ray.algorithms.policy_loss import Clipped, KlTerm, PolicyLoss
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.forward.attention_backends import REGISTERED
from rlhf_ray.models.forward.packed import NARROWS, try_narrowing
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed
from tests.models.test_shared_prefix import batch_of, both

Make = Callable[..., PreTrainedModel]
SHAPE = [(6, [5, 9]), (12, [3, 20])]
"""Two pairs, of which each shares a prefix."""


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.autocast knows no 'meta'; the head switches it off, and it is off."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.fixture(params=[True, False], ids=["shared", "repeated"])
def packed(request: pytest.FixtureRequest) -> Packed:
    shared, repeated = both(batch_of(SHAPE))
    assert shared.parent is not None and repeated.parent is None
    return shared if request.param else repeated


def batch() -> TrajectoryBatch:
    """The sequences with every column that a loss reads."""
    made = batch_of(SHAPE)
    actions = torch.ones(made.num_tokens, dtype=torch.bool).index_fill(0, made.offsets[:-1], False)
    names = ("log_probs", "reference_log_probs", "advantages", "importance_weights", "values", "returns")
    return made.with_columns(
        action_mask=actions,
        prompt_id=torch.arange(4) // 2,
        grade=torch.ones(4),
        **{name: torch.zeros(made.num_tokens) for name in names},
    )


@contextmanager
def without_waiting() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(f"the device was asked for a number: {error}") from error


def train(
    module: nn.Module, packed: Packed, run: Callable[[Packed], object], *losses: Callable[..., LossOutput]
) -> None:
    """Do what a worker does with a micro-batch, on the device."""
    module.to("meta")
    micro_batch = batch().to("meta")
    for loss in losses:
        with without_waiting():
            loss(run(packed.to("meta")), micro_batch).loss.backward()
    assert all(parameter.grad is not None for parameter in module.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, "sdpa") for family in ("llama", "qwen3", "gemma2")]
    + [(family, "varlen") for family in ("llama", "gemma3")],
)
def test_policy_and_reference_wait_for_nothing(causal: Make, packed: Packed, family: str, attention: str) -> None:
    policy = PackedPolicy(Actor(causal(family), param_dtype="fp32"))
    policy.actor.model.set_attn_implementation(REGISTERED[attention])
    kl = KlTerm(0.1, "k3")
    losses = [
        PolicyLoss(Clipped(0.2, 0.2), ratio="sequence", aggregation="sequences", entropy_coefficient=0.01, kl=kl),
        PolicyLoss(Clipped(0.2, 0.2)),
        NegativeLogLikelihood(),
    ]
    train(policy, packed, lambda some: policy(some, temperature=0.7, with_entropy=True), *losses)
    with torch.no_grad(), without_waiting():
        assert policy(packed.to("meta")).log_probs.device.type == "meta"


@pytest.mark.parametrize("attention", ["sdpa", "varlen"])
def test_critic_and_reward_model_wait_for_nothing(causal: Make, packed: Packed, attention: str) -> None:
    backbone = causal("qwen3").base_model
    head = make_head(backbone, "inv_sqrt", 0)
    module = PackedRegression(
        wrap_backbone(backbone, head, "reward", attention="sdpa", strict_attention=True, head_origin="")
    )
    try_narrowing(backbone, packed)
    assert vars(backbone)[NARROWS]
    backbone.set_attn_implementation(REGISTERED[attention])
    train(module, packed, lambda some: module(some, kind="values"), ValueLoss(0.2))
    train(module, packed, lambda some: module(some, kind="scores"), RewardLoss(label_smoothing=0.1, centering=0.01))
    with torch.no_grad(), without_waiting():
        assert module(packed.to("meta"), kind="scores").device.type == "meta"


def test_what_the_device_is_asked_for_raises() -> None:
    """The stand-in sees the faults that it is there for."""
    there = torch.arange(3, device="meta")
    for ask in (Tensor.tolist, Tensor.nonzero, lambda x: x.max().item(), lambda x: x[x > 1], lambda x: int(x[0])):
        with pytest.raises(AssertionError, match="asked for a number"), without_waiting():
            ask(there)
