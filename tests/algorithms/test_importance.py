"""Weights are bounded ratios of trainer to rollout: exactly 1 where both agree, 0 where nothing was chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.importance import ImportanceCorrection, divergence, trained_actions
from rlhf_ray.trajectories.batch import TrajectoryBatch

KINDS = [(level, rule) for level in ("token", "sequence") for rule in ("truncate", "mask")]
LOW, HIGH = 0.6, 1.7


def run(batch: TrajectoryBatch, level: str, rule: str = "truncate") -> tuple[torch.Tensor, dict[str, float]]:
    correction = ImportanceCorrection(level, rule, LOW, HIGH)
    return correction(batch["log_probs"], batch["rollout_log_probs"], batch["action_mask"], batch.offsets)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 2**31), kind=st.sampled_from(KINDS)
)
def test_a_weight_is_the_bounded_ratio_of_its_unit(ragged, lengths, seed, kind) -> None:
    batch, (level, rule) = ragged(lengths, seed), kind
    mask = batch["action_mask"]
    expected = torch.zeros(batch.num_tokens)
    outside = 0
    for start, stop in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        actions = [t for t in range(start, stop) if mask[t]]
        logs = {t: (batch["log_probs"][t] - batch["rollout_log_probs"][t]).item() for t in actions}
        for t in actions:
            weight = math.exp(logs[t] if level == "token" else sum(logs.values()))
            is_outside = not LOW <= weight <= HIGH
            outside += is_outside
            expected[t] = (0.0 if is_outside else weight) if rule == "mask" else min(max(weight, LOW), HIGH)
    weights, metrics = run(batch, level, rule)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    count = max(int(mask.sum()), 1)
    assert metrics["importance/limited_share"] == pytest.approx(outside / count)
    assert metrics["importance/mean"] == pytest.approx(expected.sum().item() / count, rel=1e-5)
    squares = expected.square().sum().item()
    effective = expected.sum().item() ** 2 / squares / count if squares else 0.0
    assert metrics["importance/effective_share"] == pytest.approx(effective, rel=1e-4)


@pytest.mark.parametrize("level", ["none", "token", "sequence"])
def test_equal_log_probs_weigh_exactly_one(ragged, level) -> None:
    batch = ragged([5, 9, 3], 2, poison=math.nan)
    batch = batch.with_columns(rollout_log_probs=batch["log_probs"])
    weights, metrics = run(batch, level)
    assert weights.tolist() == batch["action_mask"].float().tolist()
    assert metrics["importance/mean"] == metrics["importance/effective_share"] == metrics["importance/largest"] == 1.0
    assert metrics["rollout/kl"] == metrics["importance/limited_share"] == 0.0


def test_none_weighs_one_and_still_measures(ragged) -> None:
    batch = ragged([5, 9, 3], 2)
    weights, metrics = run(batch, "none")
    assert weights.tolist() == batch["action_mask"].float().tolist()
    log_ratio = (batch["log_probs"] - batch["rollout_log_probs"])[batch["action_mask"]]
    assert metrics["rollout/kl"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
    assert metrics["rollout/log_prob_difference_mean"] == pytest.approx(log_ratio.abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize(("level", "rule"), KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_have_no_influence(ragged, level, rule, poison) -> None:
    clean, expected = run(ragged([5, 1, 9], 7), level, rule)
    dirty, metrics = run(ragged([5, 1, 9], 7, poison=poison), level, rule)
    assert torch.equal(clean, dirty)
    assert metrics == expected


@pytest.mark.parametrize(("level", "rule"), KINDS)
def test_a_nan_at_an_action_stays(ragged, level, rule) -> None:
    batch = ragged([6, 6], 1)
    changed = batch["rollout_log_probs"].clone()
    changed[batch["action_mask"].nonzero()[0]] = math.nan
    assert run(batch.with_columns(rollout_log_probs=changed), level, rule)[0].isnan().any()


@pytest.mark.usefixtures("outside_pytest")
def test_sequences_that_are_left_out_have_no_actions() -> None:
    mask, offsets = torch.tensor([False, True, False, True, True]), torch.tensor([0, 2, 5])
    assert trained_actions(mask, offsets, torch.tensor([False, True])).tolist() == [False, False, False, True, True]
    with pytest.raises(ValueError, match=r"kept has shape \(1,\)"):
        trained_actions(mask, offsets, torch.tensor([True]))


@pytest.mark.usefixtures("outside_pytest")
def test_an_unknown_level_is_refused(ragged) -> None:
    with pytest.raises(ValueError, match="level 'word' is unknown: use none, token or sequence"):
        run(ragged([3], 0), "word")


GATINGS = [
    ("sequence", "geometric_mean"),
    *((level, kind) for level in ("token", "sequence") for kind in ("binary_kl", "tv")),
]
BOUNDS = {"geometric_mean": (0.9, 1.2), "binary_kl": (0.0, 0.05), "tv": (0.0, 0.1)}


def gated(batch: TrajectoryBatch, level: str, gating: str) -> tuple[torch.Tensor, dict[str, float]]:
    correction = ImportanceCorrection(level, "mask", *BOUNDS[gating], gating)
    return correction(batch["log_probs"], batch["rollout_log_probs"], batch["action_mask"], batch.offsets)


def slow_number(gating: str, trainer: float, rollout: float) -> float:
    """Of one action, in Python's floats."""
    if gating == "geometric_mean":
        return trainer - rollout
    p, q = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (rollout, trainer))
    return abs(p - q) if gating == "tv" else p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(GATINGS),
)
def test_a_gate_drops_what_is_outside_and_leaves_the_rest_its_own_ratio(ragged, lengths, seed, kind) -> None:
    batch, (level, gating) = ragged(lengths, seed), kind
    generator = torch.Generator().manual_seed(seed)
    rollout = -3.0 * torch.rand(batch.num_tokens, generator=generator)
    trainer = (rollout + 0.5 * torch.randn(batch.num_tokens, generator=generator)).clamp(max=-1e-3)
    batch = batch.with_columns(log_probs=trainer, rollout_log_probs=rollout)
    low, high = BOUNDS[gating]
    expected, near = torch.zeros(batch.num_tokens), False
    for start, stop in zip(batch.offsets[:-1].tolist(), batch.offsets[1:].tolist(), strict=True):
        actions = [t for t in range(start, stop) if batch["action_mask"][t]]
        each = {t: slow_number(gating, trainer[t].item(), rollout[t].item()) for t in actions}
        for t in actions:
            number = each[t] if level == "token" else sum(each.values()) / len(actions)
            number = math.exp(number) if gating == "geometric_mean" else number
            near = near or min(abs(number - low), abs(number - high)) < 1e-6 < number
            expected[t] = math.exp(trainer[t].item() - rollout[t].item()) if low <= number <= high else 0.0
    if not near:
        torch.testing.assert_close(gated(batch, level, gating)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("level", "gating"), GATINGS)
def test_a_gate_keeps_equal_log_probs_and_shows_a_nan(ragged, level, gating) -> None:
    batch = ragged([5, 9, 3], 2, poison=math.nan)
    batch = batch.with_columns(rollout_log_probs=batch["log_probs"])
    weights, metrics = gated(batch, level, gating)
    assert weights.tolist() == batch["action_mask"].float().tolist()
    assert metrics["importance/limited_share"] == 0.0
    changed = batch["rollout_log_probs"].clone()
    changed[batch["action_mask"].nonzero()[0]] = math.nan
    assert gated(batch.with_columns(rollout_log_probs=changed), level, gating)[0].isnan().any()


@pytest.mark.parametrize("difference", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize(("level", "gating"), GATINGS)
def test_a_gate_drops_nothing_for_a_difference_that_is_rounding(ragged, level, gating, difference) -> None:
    batch = ragged([400, 300], 3)
    generator = torch.Generator().manual_seed(3)
    rollout = -3.0 * torch.rand(batch.num_tokens, generator=generator)
    trainer = (rollout + difference * torch.randn(batch.num_tokens, generator=generator)).clamp(max=0.0)
    batch = batch.with_columns(log_probs=trainer, rollout_log_probs=rollout)
    assert gated(batch, level, gating)[1]["importance/limited_share"] == 0.0


def test_a_divergence_is_that_of_two_coins() -> None:
    p, q = torch.tensor([0.5, 0.9, 1e-4]), torch.tensor([0.25, 0.9, 1e-3])
    coins = torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q))
    torch.testing.assert_close(divergence("binary_kl", q.log(), p.log()), coins, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        divergence("tv", q.log(), p.log()), torch.tensor([0.25, 0.0, 9e-4]), rtol=1e-4, atol=1e-7
    )


def test_a_gate_that_cannot_be_is_refused(ragged) -> None:
    with pytest.raises(ValueError, match="gating tv drops actions: use rule mask, not truncate"):
        ImportanceCorrection("token", "truncate", 0.0, 0.1, "tv")
    with pytest.raises(ValueError, match="gating geometric_mean is of an answer: use level sequence"):
        ImportanceCorrection("token", "mask", 0.5, 2.0, "geometric_mean")
    batch = ragged([3], 0)
    with pytest.raises(ValueError, match="gating 'kl' is unknown: use ratio, geometric_mean, binary_kl or tv"):
        divergence("kl", batch["log_probs"], batch["log_probs"])
