"""A loss is a sum over what counts: parts add up to the whole, order is nothing, masked tokens are nothing."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.denominators import denominator
from rlhf_ray.algorithms.losses import LossOutput, NegativeLogLikelihood, PolicyOutputs, ValueLoss
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, PolicyLoss
from rlhf_ray.algorithms.rankings import Ordinal
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.trajectories.batch import TrajectoryBatch

POLICY = PolicyLoss(Clipped(low=0.2, high=0.3, dual=2.0), entropy_coefficient=0.01)
TOKEN_LOSSES = {
    "policy": POLICY,
    "grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="sequences", kl=KlTerm(0.1, "k3", "plain")),
    "dr_grpo": PolicyLoss(Clipped(0.2, 0.2), aggregation="constant", constant_tokens=9),
    "gspo": PolicyLoss(Clipped(0.1, 0.2), ratio="sequence", aggregation="sequences"),
    "rloo": PolicyLoss(Clipped(0.2, 0.2), ratio="trajectory", aggregation="sequences", kl=KlTerm(0.1, "k2", "plain")),
    "cispo": PolicyLoss(Cispo(None, 0.5), kl=KlTerm(0.1, "k1")),
    "dppo": PolicyLoss(Dppo("tv", 0.05, 0.1, cap=2.0)),
    "value": ValueLoss(0.2),
    "sft": NegativeLogLikelihood(),
}
DIFFERENTIABLE = [name for name in TOKEN_LOSSES if name not in ("cispo", "dppo")]
"""The weights of CISPO, of DPPO and of the unbiased KL are numbers to the gradient, on purpose: test_policy_loss.py."""
POISONS = [math.nan, math.inf, -math.inf, 1e30]
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**31)


def outputs_for(name: str, x: Tensor) -> PolicyOutputs | Tensor:
    """What a model would return: a tensor of values, or log-probs with an entropy that depends on the same numbers.

    The entropy is linear in them, so that a NaN in a gradient is the loss's own.
    """
    return x if name == "value" else PolicyOutputs(x, 0.5 * x)


def current(batch: TrajectoryBatch, seed: int, poison: float = 0.0) -> Tensor:
    """Log-probs or values of the model now, not far from the column ``log_probs``; float64."""
    noise = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(batch["action_mask"], batch["log_probs"] + 0.6 * noise, poison)


def run(name: str, batch: TrajectoryBatch, x: Tensor) -> tuple[LossOutput, Tensor]:
    """The loss and its gradient."""
    x = x.detach().clone().requires_grad_()
    out = TOKEN_LOSSES[name](outputs_for(name, x), batch)
    (gradient,) = torch.autograd.grad(out.loss, x)
    return out, gradient


def one_sequence(**columns: list[float]) -> TrajectoryBatch:
    """One sequence: a prompt token, then actions with these columns."""
    count = len(next(iter(columns.values())))
    return TrajectoryBatch.from_sequences(
        [list(range(count + 1))],
        action_mask=[[False] + [True] * count],
        **{name: [[0.0, *column]] for name, column in columns.items()},
    )


def after_prompt(*numbers: float) -> Tensor:
    return torch.tensor([0.0, *numbers], dtype=torch.float64, requires_grad=True)


def assert_metrics_equal(a: LossOutput, b: LossOutput) -> None:
    assert a.metrics.keys() == b.metrics.keys()
    for name in a.metrics:
        torch.testing.assert_close(a.metrics[name], b.metrics[name], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- against slow references


def slow_policy(batch: TrajectoryBatch, log_probs: list[float], entropy: list[float]) -> dict[str, tuple[float, int]]:
    """PolicyLoss ``POLICY`` token by token, with the formulas as they stand in the papers."""
    names = ("action_mask", "log_probs", "advantages", "importance_weights")
    mask, old, advantages, weights = (batch[name].tolist() for name in names)
    sums = dict.fromkeys(["total", "loss/policy", "ratio/mean", "clip_fraction", "approximate_kl", "entropy"], 0.0)
    actions = [t for t in range(batch.num_tokens) if mask[t]]
    for t in actions:
        ratio, advantage = math.exp(log_probs[t] - old[t]), advantages[t]
        weight = weights[t]
        objective = min(ratio * advantage, min(max(ratio, 0.8), 1.3) * advantage)
        if advantage < 0:
            objective = max(objective, 2.0 * advantage)
        sums["loss/policy"] -= weight * objective
        sums["total"] += -weight * objective - 0.01 * entropy[t]
        sums["ratio/mean"] += ratio
        sums["clip_fraction"] += (ratio > 1.3 and advantage > 0) or (ratio < 0.8 and advantage < 0)
        sums["approximate_kl"] += ratio - 1 - math.log(ratio)
        sums["entropy"] += entropy[t]
    return {name: (total, len(actions)) for name, total in sums.items()}


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS)
def test_policy_loss_is_the_formula_token_by_token(ragged, lengths, seed) -> None:
    batch = ragged(lengths, seed)
    x = current(batch, seed)
    expected = slow_policy(batch, x.tolist(), (0.5 * x).tolist())
    out, _ = run("policy", batch, x)
    assert out.loss.item() == pytest.approx(expected.pop("total")[0], abs=1e-9)
    assert out.metrics.keys() == expected.keys()
    for name, (total, count) in out.metrics.items():
        assert (total.item(), count.item()) == (pytest.approx(expected[name][0], abs=1e-9), expected[name][1]), name


@settings(deadline=None, max_examples=40)
@given(lengths=LENGTHS, seed=SEEDS, clip=st.sampled_from([None, 0.05, 0.5]))
def test_value_loss_is_the_formula_token_by_token(ragged, lengths, seed, clip) -> None:
    batch = ragged(lengths, seed)
    x = current(batch, seed)
    total, clipped = 0.0, 0
    for t in range(batch.num_tokens):
        if batch["action_mask"][t]:
            value, old, target = x[t].item(), batch["values"][t].item(), batch["returns"][t].item()
            plain = (value - target) ** 2
            bounded = plain if clip is None else (min(max(value, old - clip), old + clip) - target) ** 2
            total += 0.5 * max(plain, bounded)
            clipped += bounded > plain
    out = ValueLoss(clip)(x, batch)
    assert out.loss.item() == pytest.approx(total, abs=1e-6)  # the bounds old +- clip are float32
    assert out.metrics["loss/value"][0].item() == out.loss.item()
    assert out.metrics["clip_fraction/value"][0].item() == clipped
    assert out.metrics["clip_fraction/value"][1].item() == int(batch["action_mask"].sum())


@settings(deadline=None, max_examples=20)
@given(lengths=LENGTHS, seed=SEEDS)
def test_negative_log_likelihood_sums_the_actions(ragged, lengths, seed) -> None:
    batch = ragged(lengths, seed)
    x = current(batch, seed)
    out = NegativeLogLikelihood()(PolicyOutputs(x), batch)
    expected = -sum(value for value, action in zip(x.tolist(), batch["action_mask"].tolist(), strict=True) if action)
    assert out.loss.item() == pytest.approx(expected, abs=1e-9)
    assert out.metrics["loss/sft"][1].item() == int(batch["action_mask"].sum())


# ------------------------------------------------------------------------------ sums: parts, order, masked tokens


@settings(deadline=None, max_examples=40)
@given(data=st.data(), lengths=LENGTHS, seed=SEEDS, name=st.sampled_from(list(TOKEN_LOSSES)))
def test_parts_in_any_order_add_up_to_the_whole(ragged, data, lengths, seed, name) -> None:
    """Loss, gradient and metrics of any split into micro-batches, and the denominator that they share."""
    batch = ragged(lengths, seed)
    x = current(batch, seed)
    order = data.draw(st.permutations(range(len(lengths))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    parts = [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(lengths)], strict=True) if a < b]
    whole, gradient = run(name, batch, x)
    tokens = [torch.cat([torch.arange(batch.offsets[i], batch.offsets[i + 1]) for i in part]) for part in parts]
    results = [run(name, batch.select(part), x[rows]) for part, rows in zip(parts, tokens, strict=True)]
    torch.testing.assert_close(sum(out.loss for out, _ in results), whole.loss, rtol=1e-9, atol=1e-9)
    scattered = torch.zeros_like(x)
    for rows, (_, part_gradient) in zip(tokens, results, strict=True):
        scattered[rows] = part_gradient
    assert torch.equal(scattered, gradient)
    summed = {key: tuple(sum(out.metrics[key][i] for out, _ in results) for i in (0, 1)) for key in whole.metrics}
    assert_metrics_equal(LossOutput(whole.loss, summed), whole)
    kind = TOKEN_LOSSES[name].denominator
    if batch["action_mask"].any():
        counts = [denominator(kind, batch, part) for part in parts if batch.select(part)["action_mask"].any()]
        assert sum(counts) == denominator(kind, batch, order)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_masked_tokens_have_no_influence(ragged, name, poison) -> None:
    clean, dirty = ragged([5, 1, 9, 2], 7), ragged([5, 1, 9, 2], 7, poison=poison)
    expected, expected_gradient = run(name, clean, current(clean, 3))
    out, gradient = run(name, dirty, current(dirty, 3, poison))
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)
    assert (gradient[~dirty["action_mask"]] == 0).all()
    assert (gradient[dirty["action_mask"]] != 0).any()
    assert_metrics_equal(out, expected)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_nothing_to_learn_from_is_zero_with_a_graph(ragged, name) -> None:
    batch = ragged([1, 1], 0, poison=math.nan)
    out, gradient = run(name, batch, torch.full((2,), math.nan, dtype=torch.float64))
    assert out.loss.item() == 0.0
    assert gradient.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_nan_at_an_action_reaches_the_loss(ragged, name) -> None:
    """The vote must see it: a loss that hides NaN would train on."""
    batch = ragged([6, 6], 1)
    x = current(batch, 1)
    x[batch["action_mask"].nonzero()[0]] = math.nan
    assert run(name, batch, x)[0].loss.isnan()


@pytest.mark.parametrize(("name", "column"), [("policy", "log_probs"), ("policy", "advantages"), ("gspo", "log_probs"),
                                              ("policy", "importance_weights"), ("grpo", "reference_log_probs"),
                                              ("value", "values"), ("value", "returns")])  # fmt: skip
def test_nan_in_a_column_at_an_action_reaches_the_loss(ragged, name, column) -> None:
    batch = ragged([6, 6], 1)
    changed = batch[column].clone()
    changed[batch["action_mask"].nonzero()[0]] = math.nan
    assert run(name, batch.with_columns(**{column: changed}), current(batch, 1))[0].loss.isnan()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_that_of_finite_differences(ragged, name) -> None:
    batch = ragged([5, 4], 11)
    x = current(batch, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: TOKEN_LOSSES[name](outputs_for(name, y), batch).loss, (x,))


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_inputs_stay_as_they_were_and_metrics_have_no_graph(ragged, name) -> None:
    batch, twin = ragged([5, 4], 11), ragged([5, 4], 11)
    x = current(batch, 5)
    before = x.clone()
    out, _ = run(name, batch, x)
    assert torch.equal(x, before)
    assert all(torch.equal(batch[column], twin[column]) for column in batch.columns)
    assert not any(tensor.requires_grad for metric in out.metrics.values() for tensor in metric)


# ------------------------------------------------------------------------------------------------ closed forms


def test_first_value_update_clips_nothing_and_is_the_plain_error(ragged) -> None:
    batch = ragged([5, 9, 3], 2, poison=math.nan)
    x = batch["values"].clone().requires_grad_()
    out = ValueLoss(0.2)(x, batch)
    assert out.metrics["clip_fraction/value"][0].item() == 0
    (gradient,) = torch.autograd.grad(out.loss, x)
    expected = (batch["values"] - batch["returns"])[batch["action_mask"]]
    torch.testing.assert_close(gradient[batch["action_mask"]], expected)


def test_rounding_inside_the_value_clip_is_not_counted_as_clipping() -> None:
    """``old + (new - old)`` is not ``new`` in floating point."""
    old, new = torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)) * 0.1
    batch = one_sequence(values=old.tolist(), returns=[3.0] * 1000)
    out = ValueLoss(0.2)(torch.cat([torch.zeros(1), new]), batch)
    assert out.metrics["clip_fraction/value"][0].item() == 0


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient"),
    [
        (1.0, 0.9, 3.0, 2.0, -2.0),  # inside the clip
        (2.0, 0.0, 3.0, 0.5 * 2.8**2, 0.0),  # moved too far towards the target: no further
        (2.0, 0.0, -3.0, 0.5 * 5.0**2, 5.0),  # moved too far the wrong way: full gradient back
    ],
)
def test_the_sides_of_the_value_clip(value, old, target, loss, gradient) -> None:
    x = after_prompt(value)
    out = ValueLoss(0.2)(x, one_sequence(values=[old], returns=[target]))
    assert out.loss.item() == pytest.approx(loss)
    assert torch.autograd.grad(out.loss, x)[0][1].item() == pytest.approx(gradient)


def test_low_precision_outputs_are_summed_in_float32() -> None:
    """4096 ones in bfloat16 would add up to 256."""
    batch = one_sequence(values=[0.0] * 4096)
    out = NegativeLogLikelihood()(PolicyOutputs(-torch.ones(4097, dtype=torch.bfloat16)), batch)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == 4096.0


# ------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize("loss", [*TOKEN_LOSSES.values(), RewardLoss(Ordinal((0.5, 1.5)), centering=0.01)])
def test_a_loss_travels_between_processes(loss) -> None:
    twin = pickle.loads(pickle.dumps(loss))
    assert twin == loss
    assert twin.denominator == loss.denominator in {"tokens", "answers", "pairs"}


@pytest.mark.usefixtures("outside_pytest")
@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_shape_that_would_broadcast_is_refused(ragged, name) -> None:
    batch = ragged([5, 4], 0)
    for shape in [(9, 1), (1,), (8,)]:
        with pytest.raises(ValueError, match=r"shape .* but \(9,\) is needed"):
            TOKEN_LOSSES[name](outputs_for(name, torch.zeros(shape)), batch)
    with pytest.raises(ValueError, match="entropy of the policy"):
        POLICY(PolicyOutputs(torch.zeros(9), torch.zeros(1)), batch)
