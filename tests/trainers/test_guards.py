"""What stands out, and when too many updates were skipped: pure decisions, against numpy and by hand."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from rlhf_ray.config.sections.guards import GuardsConfig
from rlhf_ray.trainers.guards import Guards, upper_limit

NAME = "grad_norm/policy"


def guards(**settings: object) -> Guards:
    return Guards(GuardsConfig.model_validate({"gradient_norm": 6.0, "window": 8, **settings}))


def ordinary(guard: Guards, *values: float) -> Guards:
    for value in values:
        guard.applied({NAME: value})
    return guard


@pytest.mark.parametrize("seed", range(5))
def test_the_limit_is_so_many_robust_standard_deviations_above_the_median(seed: int) -> None:
    values = np.random.default_rng(seed).normal(3.0, 1.0, 4000)
    middle = np.median(values)
    assert upper_limit(values.tolist(), 6.0) == pytest.approx(middle + 6 * 1.4826 * np.median(np.abs(values - middle)))
    assert upper_limit(values.tolist(), 6.0) == pytest.approx(3.0 + 6.0, abs=0.5), (
        "of normal numbers, standard deviations"
    )
    spiked = [*values.tolist(), *[1e9] * 400]
    assert upper_limit(spiked, 6.0) < 11.0, "a tenth of the numbers does not move it"


def test_numbers_that_hardly_vary_may_move_by_a_share_of_their_median() -> None:
    assert upper_limit([2.0] * 10, 6.0) == pytest.approx(2.0 * 1.3)
    assert upper_limit([-2.0] * 10, 6.0) == pytest.approx(-2.0 * 0.7)


def test_nothing_is_compared_before_half_of_the_window_and_only_what_is_guarded() -> None:
    guard = ordinary(guards(), 1.0, 1.0, 1.0)
    assert guard.limit(NAME) == math.inf and guard.outliers({NAME: 1e30}) == []
    ordinary(guard, 1.0)
    assert guard.outliers({NAME: 1.31}) == ["grad_norm/policy 1.31 above 1.3"] and guard.outliers({NAME: 1.29}) == []
    assert guard.outliers({"loss/policy": 1e30, "kl/policy": 1e30}) == []
    assert guards(kl_above=0.1).outliers({"kl/policy": 0.2}) == ["kl/policy 0.2 above 0.1"], (
        "an absolute bound needs no past"
    )
    assert guard.outliers({NAME: math.nan}) == []


def test_skipped_updates_do_not_move_what_is_compared_with() -> None:
    guard = ordinary(guards(), *[1.0] * 8)
    for step in range(1, 50):
        assert guard.outliers({NAME: 50.0})
        guard.skip(step)
    assert guard.limit(NAME) == pytest.approx(1.3)


def test_the_window_slides() -> None:
    assert ordinary(guards(), *[1.0] * 8, *[5.0] * 8).limit(NAME) == pytest.approx(6.5)


def test_the_budget_is_of_the_last_updates_whatever_skipped_them() -> None:
    guard = guards(budget=2)
    for step, skipped in enumerate([1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], 1):
        guard.skip(step) if skipped else guard.applied({NAME: 1.0})
        assert not guard.spent
    assert guard.skipped == 2 and guard.first_skip == 10
    guard.skip(12)
    assert guard.spent and guard.first_skip == 10
    guard.forget_skips()
    assert not guard.spent and guard.first_skip == 0 and guard.went_back == 1
    assert not ordinary(guards(), 1.0).spent, "without a budget"


def test_within_the_budget_the_first_skip_is_that_of_the_last_ones_in_a_row() -> None:
    guard = guards()
    guard.skip(1)
    ordinary(guard, 1.0)
    guard.skip(3)
    guard.skip(4)
    assert guard.first_skip == 3


def test_a_run_may_go_back_before_the_oldest_skip_that_the_budget_counts() -> None:
    for budget, oldest in ((5, 2), (None, 4)):
        guard = guards(budget=budget, on_budget="go_back")
        assert ordinary(guard, 1.0).may_go_back_before == 0
        guard.skip(2)
        ordinary(guard, 1.0)
        guard.skip(4)
        assert guard.may_go_back_before == oldest
        guard.forget_skips()
        assert guard.may_go_back_before == 0
    stops = guards(budget=5)
    stops.skip(2)
    assert stops.may_go_back_before == 0


@pytest.mark.parametrize("seed", range(20))
def test_a_resumed_run_decides_as_the_run_would_have(seed: int) -> None:
    rng = random.Random(seed)
    whole, resumed = guards(budget=3, loss=4.0), guards(budget=3, loss=4.0)
    for step in range(1, 60):
        value = rng.lognormvariate(0.0, 1.0)
        decided = [guard.outliers({NAME: value, "loss/policy": -value}) for guard in (whole, resumed)]
        assert decided[0] == decided[1] and whole.spent == resumed.spent and whole.first_skip == resumed.first_skip
        for guard in (whole, resumed):
            guard.skip(step) if decided[0] else guard.applied({NAME: value, "loss/policy": -value})
        if rng.random() < 0.3:
            state = json.loads(json.dumps(resumed.state()))
            resumed = guards(budget=3, loss=4.0)
            resumed.restore(state)
    fresh = guards()
    fresh.restore(None)
    assert fresh.state() == guards().state(), "a checkpoint of a version without guards"
