"""A mixture is the weighted sum of its terms; a sample without a reward in one term has none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_ray.errors import GroupError, ScoringError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.mixture import EnsembleSource, MixedResult, MixtureSource, Part, Term, reduce
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from tests.rewards.answers import answer

SAMPLES = [answer("a", "x"), answer("b", "yy")]


class Fixed:
    """A source that answers what ``wait`` returns."""

    reads = "nothing"

    def __init__(self, wait: Callable[[], list[ScoreResult]]) -> None:
        self.wait = wait

    def score(self, samples: Sequence[TextSample]) -> Pending[list[ScoreResult]]:
        return Pending(self.wait)


def of(*scores: float) -> Fixed:
    return Fixed(lambda: [ScoreResult.of(score, 3) for score in scores])


def mixed(floor: float = 0.0, **terms: tuple[Any, float] | tuple[Any, float, float]) -> list[ScoreResult]:
    """The results of terms that are given as source, weight and gate."""
    parts = {name: Term(source, Part(*counts)) for name, (source, *counts) in terms.items()}
    return MixtureSource(parts, floor).score(SAMPLES).result()


def test_the_reward_is_the_weighted_sum_and_the_terms_stand_beside_it() -> None:
    results = mixed(good=(of(1.0, -2.0), 0.5), short=(of(10.0, 3.0), -0.1))
    assert [result.reward for result in results] == pytest.approx([-0.5, -1.3])
    assert all(isinstance(result, MixedResult) for result in results)
    assert [result.terms for result in results] == [{"good": 1.0, "short": 10.0}, {"good": -2.0, "short": 3.0}]


def test_a_gate_below_its_threshold_makes_the_whole_reward_the_floor() -> None:
    right, kind = of(0.5, 0.49), of(9.0, 9.0)
    results = mixed(-7.0, right=(right, 2.0, 0.5), kind=(kind, 1.0))
    assert [result.reward for result in results] == [10.0, -7.0]
    assert isinstance(results[1], MixedResult) and results[1].terms == {"right": 0.49, "kind": 9.0}
    assert [result.reward for result in mixed(0.0, kind=(kind, 1.0), right=(right, 0.0, 0.5))] == [9.0, 0.0]


def test_a_gate_without_a_reward_is_a_failure_and_not_the_floor() -> None:
    broken = Fixed(lambda: [ScoreResult.of(1.0), ScoreResult.failed("no")])
    assert mixed(-7.0, right=(broken, 1.0, 0.5), kind=(of(9.0, 9.0), 1.0))[1].error == "right: no"


def test_the_normalised_reward_of_a_term_counts() -> None:
    normalised = Fixed(lambda: [ScoreResult.of(4.0).normalised(1.0, 2.0)] * 2)
    assert [result.reward for result in mixed(good=(normalised, 2.0))] == [3.0, 3.0]


@pytest.mark.parametrize("fault", ["item", "model", "source"])
def test_a_failure_of_a_term_is_one_of_the_sample_and_says_whose(fault: Any) -> None:
    broken = Fixed(lambda: [ScoreResult.of(1.0), ScoreResult.failed("no", fault=fault)])
    results = mixed(good=(of(1.0, 1.0), 1.0), other=(broken, 1.0))
    assert results[0].reward == 2.0
    assert (results[1].error, results[1].fault, results[1].reward) == ("other: no", fault, None)


def test_a_failure_that_no_attempt_mends_comes_before_one_that_may_pass() -> None:
    late, never = (
        Fixed(lambda fault=fault: [ScoreResult.failed("no", fault=fault)] * 2) for fault in ("source", "model")
    )
    results = mixed(late=(late, 1.0), never=(never, 1.0))
    assert [(result.error, result.fault) for result in results] == [("never: no", "model")] * 2


def test_a_term_that_failed_as_a_whole_has_failed_at_every_sample() -> None:
    def down() -> list[ScoreResult]:
        raise ScoringError("down")

    results = mixed(good=(of(1.0, 1.0), 1.0), other=(Fixed(down), 1.0))
    assert [(result.error, result.fault) for result in results] == [("other: down", "source")] * 2


def test_what_is_no_failure_of_scoring_goes_through() -> None:
    def dead() -> list[ScoreResult]:
        raise GroupError("reward", 0, "score", "its process died")

    with pytest.raises(GroupError):
        mixed(good=(Fixed(dead), 1.0))


def test_a_sum_that_is_not_finite_is_an_error() -> None:
    results = mixed(large=(of(1e308, 1.0), 10.0))
    assert results[0].fault == "model" and results[1].reward == 10.0


def test_all_terms_are_waited_for_at_once() -> None:
    together = threading.Barrier(2, timeout=10)

    def wait() -> list[ScoreResult]:
        together.wait()
        return [ScoreResult.of(1.0)] * 2

    assert [result.reward for result in mixed(one=(Fixed(wait), 1.0), other=(Fixed(wait), 1.0))] == [2.0, 2.0]


def test_an_ensemble_is_reduced_by_closed_forms() -> None:
    assert reduce([1.0, 3.0], "mean", 9.0) == 2.0
    assert reduce([1.0, 3.0], "mean_minus_std", 0.5) == 1.5
    assert reduce([1.0, 3.0, -2.0], "minimum", 9.0) == -2.0
    assert reduce([4.0] * 3, "mean_minus_std", 9.0) == 4.0


@pytest.mark.parametrize(("high", "low"), [(5.0, 1.0), (0.5, -3.0), (2.0, 2.0)])
def test_two_models_against_two_have_the_reward_of_the_lower_two(high: float, low: float) -> None:
    """With k of 1 and the deviation of the population: that of a sample, with one less in its divisor, would go below both."""
    assert reduce([high, low, low, high], "mean_minus_std", 1.0) == pytest.approx(low)


def test_disagreement_costs_an_answer_its_lead() -> None:
    """Both answers have the same mean; the models agree about the second alone."""
    models = {"model_1": of(0.0, 1.0), "model_2": of(2.0, 1.0)}
    results = EnsembleSource(models, "mean_minus_std", 1.0).score(SAMPLES).result()
    assert [result.reward for result in results] == [0.0, 1.0]
    assert [result.terms for result in results] == [  # type: ignore[attr-defined]
        {"model_1": 0.0, "model_2": 2.0, "spread": 1.0}, {"model_1": 1.0, "model_2": 1.0, "spread": 0.0},
    ]  # fmt: skip


def test_no_reward_of_one_model_is_no_reward_of_the_ensemble() -> None:
    broken = Fixed(lambda: [ScoreResult.of(1.0), ScoreResult.failed("no", fault="source")])
    results = EnsembleSource({"model_1": of(1.0, 1.0), "model_2": broken}, "minimum", 1.0).score(SAMPLES).result()
    assert results[0].reward == 1.0
    assert (results[1].reward, results[1].error, results[1].fault) == (None, "model_2: no", "source")
