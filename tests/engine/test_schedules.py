"""The learning rate as a pure function of the update's number."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.config.schema import OptimizerConfig
from rlhf_ray.engine import learning_rate
from rlhf_ray.errors import RequestError


def config(schedule: str, warmup: float = 0.0, final: float = 0.0) -> OptimizerConfig:
    return OptimizerConfig.model_validate(
        {"learning_rate": 0.5, "schedule": schedule, "warmup_fraction": warmup, "final_fraction": final}
    )


def test_constant_needs_no_end() -> None:
    assert [learning_rate(config("constant"), update, None) for update in (0, 7, 10**6)] == [0.5] * 3


def test_warm_up_rises_by_equal_steps_and_is_full_at_its_last_update() -> None:
    rates = [learning_rate(config("constant", warmup=0.3), update, 10) for update in range(10)]
    assert rates == pytest.approx([0.5 / 3, 1 / 3, *[0.5] * 8])


def test_linear_falls_by_equal_steps_to_its_share() -> None:
    rates = [learning_rate(config("linear", final=0.2), update, 5) for update in range(7)]
    assert rates == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1])


def test_cosine_is_half_way_in_the_middle() -> None:
    rates = [learning_rate(config("cosine", warmup=0.1, final=0.1), update, 10) for update in range(10)]
    expected = [0.05 + 0.45 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert rates == pytest.approx([0.5, *expected])
    assert rates[5] == pytest.approx(0.275)


@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]), warmup=st.floats(0, 1), final=st.floats(0, 1),
    total=st.integers(1, 50), update=st.integers(0, 80),
)  # fmt: skip
def test_every_rate_lies_between_nothing_and_the_peak(
    schedule: str, warmup: float, final: float, total: int, update: int
) -> None:
    final = 0.0 if schedule == "constant" else final
    assert 0.0 <= learning_rate(config(schedule, warmup, final), update, total) <= 0.5


def test_one_update_is_taken_at_the_peak() -> None:
    assert learning_rate(config("linear"), 0, 1) == 0.5


@pytest.mark.parametrize("options", [("linear", 0.0), ("cosine", 0.0), ("constant", 0.1)])
def test_a_schedule_with_an_end_is_refused_where_the_end_is_unknown(options: tuple[str, float]) -> None:
    with pytest.raises(RequestError, match="needs the number of updates"):
        learning_rate(config(*options), 0, None)


def test_a_run_of_no_updates_is_refused() -> None:
    with pytest.raises(RequestError, match="total_updates is 0"):
        learning_rate(config("constant"), 0, 0)
