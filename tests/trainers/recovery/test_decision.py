"""The plan after a loss, over every combination of lost groups and states of a run."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from rlhf_ray.trainers.recovery import Plan, decide

TRAINED = frozenset({"policy", "critic"})
ROLES = sorted(TRAINED | {"reference", "reward"})
LOSSES = [frozenset(some) for some in chain.from_iterable(combinations(ROLES, count) for count in range(1, 5))]
NAMES = ["+".join(sorted(some)) for some in LOSSES]
"""The order of a set differs from process to process, and processes that run tests side by side must name them alike."""
STATES = [(step, touched, committed) for step in (0, 3) for touched in (False, True) for committed in (None, 0, 3)]
POSSIBLE = [(step, touched, committed) for step, touched, committed in STATES if (committed or 0) <= step]


def plan_of(lost: set[str], step: int, touched: bool, committed: int | None) -> Plan:
    return decide(lost, TRAINED, step=step, touched=touched, committed=committed)


@pytest.mark.parametrize("lost", LOSSES, ids=NAMES)
def test_all_trained_groups_hold_the_weights_of_the_step_that_the_run_goes_back_to(lost: frozenset[str]) -> None:
    for step, touched, committed in POSSIBLE:
        plan = decide(lost, TRAINED, step=step, touched=touched, committed=committed)
        # What each trained group holds after the plan, step by step: None is not known.
        holds: dict[str, int | None] = dict.fromkeys(TRAINED, None if touched else step)
        holds |= dict.fromkeys(plan.restart & TRAINED, 0)
        holds |= dict.fromkeys(plan.load, committed)
        assert set(holds.values()) == {plan.back_to}, (step, touched, committed)
        assert lost <= plan.restart


@pytest.mark.parametrize("lost", LOSSES, ids=NAMES)
def test_what_lives_keeps_its_processes_where_its_state_is_right_or_committed(lost: frozenset[str]) -> None:
    for step, touched, committed in POSSIBLE:
        plan = decide(lost, TRAINED, step=step, touched=touched, committed=committed)
        moved_without_a_commit = committed is None and (touched or step > 0) and (touched or lost & TRAINED)
        assert plan.restart == (lost | TRAINED if moved_without_a_commit else lost), (step, touched, committed)


def test_no_more_is_lost_than_came_after_the_last_commit() -> None:
    assert plan_of({"reference", "reward"}, 7, False, 5) == Plan(frozenset({"reference", "reward"}), frozenset(), 7)
    assert plan_of({"reference"}, 7, True, 5) == Plan(frozenset({"reference"}), TRAINED, 5)
    assert plan_of({"critic"}, 7, False, 5) == Plan(frozenset({"critic"}), TRAINED, 5)
    assert plan_of({"critic"}, 7, False, None) == Plan(TRAINED, frozenset(), 0)
    assert plan_of({"critic"}, 0, False, None) == Plan(frozenset({"critic"}), frozenset(), 0)
