"""The learning rate as a pure function of the update's number."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import optimization

from rlhf_ray.config.sections.engine import OptimizerConfig, Schedule
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
    schedule=st.sampled_from(list(get_args(Schedule))), warmup=st.floats(0, 1), final=st.floats(0, 1),
    total=st.integers(1, 50), update=st.integers(0, 80),
)  # fmt: skip
def test_every_rate_lies_between_nothing_and_the_peak(
    schedule: str, warmup: float, final: float, total: int, update: int
) -> None:
    final = 0.0 if schedule in ("constant", "inverse_sqrt") else final
    warmup = warmup * 0.8 if schedule == "warmup_stable_decay" else warmup
    assert 0.0 <= learning_rate(config(schedule, warmup, final), update, total) <= 0.5


STEPS = 20
OF_TRANSFORMERS = {
    "linear": ({}, lambda o: optimization.get_linear_schedule_with_warmup(o, 0, STEPS)),
    "cosine": ({}, lambda o: optimization.get_cosine_schedule_with_warmup(o, 0, STEPS)),
    "cosine_with_restarts": (
        {"restarts": 3},
        lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(o, 0, STEPS, num_cycles=3),
    ),
    "polynomial": (
        {"power": 2.0, "final_fraction": 0.1},
        lambda o: optimization.get_polynomial_decay_schedule_with_warmup(o, 0, STEPS, lr_end=0.05, power=2.0),
    ),
    "inverse_sqrt": ({}, lambda o: optimization.get_inverse_sqrt_schedule(o, 0)),
    "warmup_stable_decay": (
        {"decay_fraction": 0.25, "final_fraction": 0.1},
        lambda o: optimization.get_wsd_schedule(o, 0, 5, num_stable_steps=15, min_lr_ratio=0.1),
    ),
}


@pytest.mark.parametrize("schedule", OF_TRANSFORMERS)
def test_schedules_have_the_form_of_transformers(schedule: str) -> None:
    """Its schedules end one update after the last, ours at it."""
    options, make = OF_TRANSFORMERS[schedule]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, theirs = make(optimizer), []
    for _ in range(STEPS + 1):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    settings = OptimizerConfig.model_validate({"learning_rate": 0.5, "schedule": schedule, **options})
    ours = [learning_rate(settings, update, STEPS + 1) for update in range(STEPS + 1)]
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert len(set(ours)) > 2


def test_inverse_sqrt_falls_by_the_length_of_its_warm_up() -> None:
    rates = [learning_rate(config("inverse_sqrt", warmup=0.25), update, 16) for update in range(16)]
    assert rates[3] == rates[4] == 0.5 and rates[4 + 12 - 1] == pytest.approx(0.5 * math.sqrt(4 / 15))


def test_one_update_is_taken_at_the_peak() -> None:
    assert learning_rate(config("linear"), 0, 1) == 0.5


@pytest.mark.parametrize("options", [("linear", 0.0), ("cosine", 0.0), ("constant", 0.1)])
def test_a_schedule_with_an_end_is_refused_where_the_end_is_unknown(options: tuple[str, float]) -> None:
    with pytest.raises(RequestError, match="needs the number of updates"):
        learning_rate(config(*options), 0, None)


def test_a_run_of_no_updates_is_refused() -> None:
    with pytest.raises(RequestError, match="total_updates is 0"):
        learning_rate(config("constant"), 0, 0)
