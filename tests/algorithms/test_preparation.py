"""The preparation of a batch: its steps in their order, its columns, its metrics."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlhf_ray.algorithms.advantages import AgainstGroup, Gae, RewardToGo, gae
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.kl import kl_k3
from rlhf_ray.algorithms.masked import whiten
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.algorithms.shaping import MissingEos, RewardShaping
from rlhf_ray.errors import MissingColumnError
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason

PPO = Preparation(RewardShaping(), Gae(1.0, 0.95), ImportanceCorrection("token"), kl_penalty="k1")
COMPUTED = ("token_rewards", "advantages", "returns", "importance_weights")


def prepare(
    batch: TrajectoryBatch, *, kl_coefficient: float = 0.1, **changes: Any
) -> tuple[TrajectoryBatch, dict[str, float]]:
    """PPO's preparation with some parts changed."""
    return replace(PPO, **changes)(batch, kl_coefficient=kl_coefficient, moments=RunningMoments())


def by_hand() -> TrajectoryBatch:
    """Two answers: one of two tokens that ends by itself, one of one token that was cut."""
    return TrajectoryBatch.from_sequences(
        [[1, 2, 3], [1, 2]],
        action_mask=[[False, True, True], [False, True]],
        log_probs=[[math.nan, -1.0, -2.0], [math.nan, -1.0]],
        rollout_log_probs=[[math.nan, -1.0, -2.0], [math.nan, -1.0]],
        reference_log_probs=[[math.nan, -1.5, -1.0], [math.nan, -1.0]],
        values=[[math.nan, 0.5, 1.0], [math.nan, 2.0]],
        score=[3.0, 9.0],
        finish_reason=[FinishReason.STOP, FinishReason.LENGTH],
    )


def test_two_answers_by_hand() -> None:
    batch, metrics = prepare(
        by_hand(),
        estimator=Gae(1.0, 0.5),
        shaping=RewardShaping(clip=4.0, missing_eos=MissingEos("subtract", 1.5)),
    )
    # KL of the actions: 0.5, -1.0 | 0.0; scores after clip and penalty: 3.0 | 4.0 - 1.5
    assert batch["token_rewards"].tolist() == pytest.approx([0, -0.05, 3.1, 0, 2.5])
    # deltas: -0.05 + 1.0 - 0.5, 3.1 - 1.0 | 2.5 - 2.0
    assert batch["advantages"].tolist() == pytest.approx([0, 0.45 + 0.5 * 2.1, 2.1, 0, 0.5])
    assert batch["returns"].tolist() == pytest.approx([0, 2.0, 3.1, 0, 2.5])
    mean, returns_mean = (1.5 + 2.1 + 0.5) / 3, (2.0 + 3.1 + 2.5) / 3
    returns_variance = sum((x - returns_mean) ** 2 for x in (2.0, 3.1, 2.5)) / 3
    errors_variance = sum((x - mean) ** 2 for x in (1.5, 2.1, 0.5)) / 3
    assert metrics == pytest.approx(
        {
            "reward/mean": 2.75,
            "reward/std": 0.25,
            "reward/after_kl": (3.05 + 2.5) / 2,
            "kl/k1": (-0.5 + 0.0) / 2,
            "kl/k3": (math.exp(-0.5) - 0.5 + math.e - 2.0) / 2,
            "advantages/mean": mean,
            "advantages/std": math.sqrt(errors_variance),
            "returns/mean": returns_mean,
            "values/mean": 3.5 / 3,
            "explained_variance": 1 - errors_variance / returns_variance,
            "length/response": 1.5,
            "truncated/share": 0.5,
            "rollout/kl": 0.0,
            "rollout/log_prob_difference_mean": 0.0,
            "importance/mean": 1.0,
            "importance/largest": 1.0,
            "importance/limited_share": 0.0,
            "importance/effective_share": 1.0,
        },
        rel=1e-5,
    )


def test_without_a_correction_nothing_is_weighed_or_compared() -> None:
    (plain, before), (batch, metrics) = prepare(by_hand()), prepare(by_hand(), importance=None)
    assert set(plain.columns) - set(batch.columns) == {"importance_weights"}
    assert torch.equal(batch["advantages"], plain["advantages"])
    assert {name for name in before if name not in metrics} == {
        "rollout/kl", "rollout/log_prob_difference_mean", "importance/mean", "importance/largest",
        "importance/limited_share", "importance/effective_share",
    }  # fmt: skip


def test_the_clip_cannot_take_back_the_penalty() -> None:
    batch, _ = prepare(
        by_hand(), kl_coefficient=0.0, shaping=RewardShaping(clip=1.0, missing_eos=MissingEos("subtract", 5.0))
    )
    assert batch["token_rewards"].tolist() == [0, 0, 1.0, 0, -4.0]


def test_without_a_penalty_a_cut_answer_keeps_its_score() -> None:
    batch, _ = prepare(by_hand(), kl_coefficient=0.0)
    assert batch["token_rewards"].tolist() == [0, 0, 3.0, 0, 9.0]


def test_the_pieces_are_put_together_as_named(ragged) -> None:
    """Estimator, gamma, lambda, bootstrap and whitening all reach their functions."""
    batch = ragged([5, 9, 3, 1], 3, poison=math.nan)
    mask = batch["action_mask"]
    prepared, _ = prepare(
        batch, kl_penalty="k3", kl_coefficient=0.5, estimator=Gae(0.9, 0.7), whiten_advantages="population"
    )
    kl = kl_k3(batch["log_probs"], batch["reference_log_probs"])
    rewards = torch.where(mask, -0.5 * kl, 0.0)
    for row in range(len(batch)):
        actions = mask[int(batch.offsets[row]) : int(batch.offsets[row + 1])].nonzero()[:, 0]
        if len(actions):
            turns = batch["turn_rewards"][batch.offsets[row] + actions]
            rewards[batch.offsets[row] + actions] += turns
            rewards[batch.offsets[row] + actions[-1]] += batch["score"][row] - turns.sum()
    advantages, returns = gae(rewards, batch["values"], mask, batch.offsets, gamma=0.9, lam=0.7,
                              bootstrap_value=batch["bootstrap_value"])  # fmt: skip
    torch.testing.assert_close(prepared["token_rewards"], rewards)
    torch.testing.assert_close(prepared["returns"], returns)
    torch.testing.assert_close(prepared["advantages"], whiten(advantages, mask))
    assert not torch.allclose(returns, gae(rewards, batch["values"], mask, batch.offsets, gamma=0.9, lam=0.7)[1])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_tokens_have_no_influence(ragged, poison) -> None:
    clean, expected_metrics = prepare(ragged([5, 1, 9], 7), whiten_advantages="population")
    dirty, metrics = prepare(ragged([5, 1, 9], 7, poison=poison), whiten_advantages="population")
    assert all(torch.equal(clean[name], dirty[name]) for name in COMPUTED)
    assert metrics == expected_metrics


def test_the_order_of_sequences_is_nothing(ragged) -> None:
    batch, order = ragged([5, 1, 9, 4], 7), [2, 0, 3, 1]
    expected, expected_metrics = prepare(batch, whiten_advantages="population")
    permuted, metrics = prepare(batch.select(order), whiten_advantages="population")
    for name in COMPUTED:
        torch.testing.assert_close(permuted[name], expected.select(order)[name])
    assert metrics == pytest.approx(expected_metrics, rel=1e-5)


def test_whitening_covers_the_batch_and_leaves_returns_and_metrics(ragged) -> None:
    batch = ragged([5, 9, 3], 3)
    plain, plain_metrics = prepare(batch)
    whitened, metrics = prepare(batch, whiten_advantages="population")
    actions = whitened["advantages"][batch["action_mask"]]
    assert actions.mean().item() == pytest.approx(0, abs=1e-6)
    assert actions.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.equal(whitened["returns"], plain["returns"])
    assert metrics == plain_metrics


def test_the_batch_given_stays_as_it_was_and_arrays_may_be_read_only(ragged) -> None:
    arrays = ragged([5, 9, 3], 3).without(*COMPUTED).to_arrays()
    for array in arrays.values():
        array.setflags(write=False)
    batch, twin = TrajectoryBatch.from_arrays(arrays), ragged([5, 9, 3], 3)
    prepared, metrics = prepare(batch, whiten_advantages="population", shaping=RewardShaping(clip=1.0))
    assert all(torch.equal(batch[column], twin[column]) for column in batch.columns)
    assert not any(name in batch for name in COMPUTED)
    assert set(prepared.columns) == {*batch.columns, *COMPUTED}
    assert set(metrics) == set(prepare(twin)[1])


def test_a_nan_score_reaches_the_advantages(ragged) -> None:
    batch = ragged([5, 9, 3], 3)
    score = batch["score"].clone()
    score[1] = math.nan
    prepared, _ = prepare(
        batch.with_columns(score=score), whiten_advantages="population", shaping=RewardShaping(clip=1.0)
    )
    assert prepared["advantages"][batch["action_mask"]].isnan().all()


def test_a_batch_without_variation_or_without_sequences_has_finite_metrics(ragged) -> None:
    for batch in (ragged([1, 1], 0, poison=math.nan), ragged([5], 0).select([])):
        prepared, metrics = prepare(batch, whiten_advantages="population")
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["explained_variance"] == 0.0
        assert (prepared["advantages"] == 0).all()


def test_everything_that_is_missing_is_named(ragged) -> None:
    with pytest.raises(MissingColumnError, match=r"'score', 'values'"):
        prepare(ragged([5], 0).without("score", "values"))


@pytest.mark.parametrize("estimator", [Gae(1.0, 0.95), RewardToGo(0.9), AgainstGroup("leave_one_out")])
def test_every_estimator_gets_the_same_token_rewards_and_only_gae_makes_returns(ragged, estimator) -> None:
    batch = ragged([5, 9, 3, 4], 3, poison=math.nan).with_columns(prompt_id=torch.tensor([1, 2, 1, 2]))
    prepared, metrics = prepare(batch, estimator=estimator)
    expected, _ = prepare(batch)
    assert torch.equal(prepared["token_rewards"], expected["token_rewards"])
    assert torch.equal(prepared["advantages"], estimator(batch, expected["token_rewards"])[0])
    has_critic = isinstance(estimator, Gae)
    assert ("explained_variance" in metrics) == has_critic
    if not has_critic:  # what is in the batch are the random returns of the fixture
        assert torch.equal(prepared["returns"][batch["action_mask"]], batch["returns"][batch["action_mask"]])


def test_without_a_critic_and_a_reference_nothing_asks_for_them(ragged) -> None:
    batch = ragged([5, 9], 3).without("values", "returns", "reference_log_probs")
    prepared, metrics = prepare(batch, estimator=RewardToGo(1.0), kl_penalty=None)
    assert "returns" not in prepared
    assert not {"kl/k1", "kl/k3", "values/mean"} & set(metrics)


def test_whitened_rewards_keep_their_mean(ragged) -> None:
    """N+'s detail 26, before the advantages are estimated; the metrics are those of the rewards as they were."""
    batch = ragged([5, 9, 3], 3)
    plain, plain_metrics = prepare(batch)
    prepared, metrics = prepare(batch, whiten_rewards="unbiased")
    mask = batch["action_mask"]
    before, after = plain["token_rewards"][mask], prepared["token_rewards"][mask]
    torch.testing.assert_close(after.mean(), before.mean())
    torch.testing.assert_close(after.std(), torch.tensor(1.0))
    torch.testing.assert_close(prepared["advantages"], gae(prepared["token_rewards"], batch["values"], mask, batch.offsets,
                               gamma=1.0, lam=0.95, bootstrap_value=batch["bootstrap_value"])[0])  # fmt: skip
    assert metrics["reward/after_kl"] == plain_metrics["reward/after_kl"]


def test_answers_that_were_cut_can_be_left_out_of_the_losses(ragged) -> None:
    batch = ragged([5, 9, 3, 4], 3)
    ended = batch["finish_reason"] == FinishReason.STOP
    assert 0 < int(ended.sum()) < len(batch)
    parts = replace(PPO, leave_out_truncated=True)
    trained = parts.trained(batch)
    assert torch.equal(trained["action_mask"], batch["action_mask"] & ended[batch.sequence_ids])
    assert PPO.trained(batch) is batch
    prepared, _ = parts(batch, kl_coefficient=0.1, moments=RunningMoments())
    assert torch.equal(prepared["action_mask"], batch["action_mask"])


def test_running_moments_reach_the_scores(ragged) -> None:
    batch = ragged([5, 9, 3], 3)
    parts = replace(PPO, shaping=RewardShaping(normalize="running"))
    moments = RunningMoments().update(batch["score"])
    _, metrics = parts(batch, kl_coefficient=0.0, moments=moments)
    assert metrics["reward/mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["reward/std"] == pytest.approx(1.0, abs=1e-6)
