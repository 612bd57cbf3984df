"""Scores are shaped in one order, and each step is its formula."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.shaping import MissingEos, Overlong, RewardShaping, TooShort
from rlhf_ray.trajectories.columns import FinishReason

STOP, LENGTH, ABORT = (torch.tensor([reason], dtype=torch.int8) for reason in FinishReason)
ALL = RewardShaping(
    normalize="running", scale=3.0, clip=2.0, overlong=Overlong(limit=10, buffer=4, penalty=1.0),
    too_short=TooShort(tokens=9, penalty=0.5), missing_eos=MissingEos("subtract", 0.25),
)  # fmt: skip
MOMENTS = RunningMoments(count=4.0, mean=1.0, scatter=16.0)


def shape(shaping: RewardShaping, score: float, reason: torch.Tensor = STOP, tokens: int = 5) -> float:
    return shaping(torch.tensor([score]), reason, torch.tensor([tokens]), MOMENTS).item()


def test_without_steps_a_score_stays_bit_for_bit() -> None:
    scores = torch.randn(50)
    reasons, tokens = torch.zeros(50, dtype=torch.int8), torch.ones(50, dtype=torch.int64)
    assert torch.equal(RewardShaping()(scores, reasons, tokens, MOMENTS), scores)


def test_all_steps_in_their_order_by_hand() -> None:
    # (9 - 1) / 2 = 4; 4 * 3 = 12; clip 2; overlong 8 of 10 with a buffer of 4: -0.5; too short: -0.5; cut: -0.25
    assert shape(ALL, 9.0, LENGTH, tokens=8) == pytest.approx(2.0 - 0.5 - 0.5 - 0.25)
    assert shape(ALL, 9.0, STOP, tokens=9) == pytest.approx(2.0 - 0.75)
    assert shape(ALL, 1.5, STOP, tokens=10) == pytest.approx(0.75 - 1.0)


def test_the_order_is_told_by_every_pair_of_steps() -> None:
    """Any two steps swapped would give another number somewhere, so that the order is not an accident of one case."""
    steps = {
        "normalise": lambda s: (s - 1.0) / 2.0,
        "scale": lambda s: 3.0 * s,
        "clip": lambda s: min(max(s, -2.0), 2.0),
        "penalties": lambda s: s - 0.5 - 0.5 - 0.25,
    }
    scores = [9.0, 1.4, -3.0]
    shaped = [shape(ALL, score, LENGTH, tokens=8) for score in scores]
    for order in itertools.permutations(steps):
        wanted = []
        for score in scores:
            for name in order:
                score = steps[name](score)
            wanted.append(score)
        assert (shaped == pytest.approx(wanted)) == (order == tuple(steps))


def test_replacing_is_final() -> None:
    shaping = RewardShaping(scale=3.0, overlong=Overlong(10, 4, 1.0), missing_eos=MissingEos("replace", -1.0))
    assert shape(shaping, 9.0, LENGTH, tokens=10) == -1.0
    assert shape(shaping, math.nan, ABORT) == -1.0
    assert math.isnan(shape(shaping, math.nan, STOP))


@pytest.mark.parametrize(("rule", "changed"), [("subtract", [1.0, 0.25, -1.75]), ("replace", [1.0, 0.75, 0.75]),
                                               ("scale", [1.0, 0.75, -0.75])])  # fmt: skip
def test_only_an_answer_that_ended_by_itself_is_spared(rule, changed) -> None:
    score = torch.tensor([1.0, 1.0, -1.0])
    assert MissingEos(rule, 0.75)(score, torch.cat([STOP, LENGTH, ABORT])).tolist() == changed
    assert score.tolist() == [1.0, 1.0, -1.0]


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    """DAPO eq. 13: nothing up to limit - buffer, linear inside, all of it at the limit and beyond."""
    tokens = torch.tensor([1, 12, 13, 14, 16, 20])
    shaped = Overlong(limit=16, buffer=4, penalty=2.0)(torch.zeros(6), tokens)
    assert shaped.tolist() == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]


def test_too_short_is_below_the_bound() -> None:
    assert TooShort(3, 1.5)(torch.zeros(3), torch.tensor([2, 3, 4])).tolist() == [-1.5, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "expected"), [("none", 5.0), ("running", 2.0), ("running_scale", 2.5)])
def test_running_normalisation_uses_the_moments_of_the_run(kind, expected) -> None:
    assert shape(RewardShaping(normalize=kind), 5.0) == pytest.approx(expected)


@pytest.mark.usefixtures("outside_pytest")
def test_wrong_shapes_and_an_unknown_rule_are_refused() -> None:
    with pytest.raises(ValueError, match=r"finish_reason has shape \(1,\)"):
        MissingEos("replace", 1.0)(torch.zeros(2), STOP)
    with pytest.raises(ValueError, match=r"tokens has shape \(1,\)"):
        TooShort(1, 1.0)(torch.zeros(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"tokens has shape \(1,\)"):
        Overlong(2, 1, 1.0)(torch.zeros(2), torch.ones(1))
    with pytest.raises(ValueError, match="rule 'drop' is unknown: use subtract, replace or scale"):
        MissingEos("drop", 1.0)(torch.zeros(1), STOP)
