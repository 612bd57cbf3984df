"""Healthy means the current weights, taken since the last start; only a completed update leads out of stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rlhf_ray.rollout.errors import ForbiddenTransitionError
from rlhf_ray.rollout.health import EngineState, FleetHealth, HealthPolicy

HEALTHY, SUSPECT, DEAD, RESTARTING, STALE, RETIRED = (
    EngineState.HEALTHY,
    EngineState.SUSPECT,
    EngineState.DEAD,
    EngineState.RESTARTING,
    EngineState.STALE,
    EngineState.RETIRED,
)
POLICY = HealthPolicy(failures_until_dead=3, suspect_s=10.0, restart_s=20.0, max_restarts=2)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def in_state(state: EngineState, clock: Clock | None = None) -> FleetHealth:
    """A fleet of one engine, brought to ``state``, with weight version 1 published."""
    health = FleetHealth(1, POLICY, clock or Clock())
    health.publish(1)
    steps: dict[EngineState, list[Callable[[], object]]] = {
        STALE: [],
        HEALTHY: [lambda: health.updated(0, 1)],
        SUSPECT: [lambda: health.updated(0, 1), lambda: health.failed(0, "x")],
        DEAD: [lambda: health.died(0, "x")],
        RESTARTING: [lambda: health.died(0, "x"), lambda: health.restart(0)],
        RETIRED: [lambda: health.retire(0, "x")],
    }
    for step in steps[state]:
        step()
    assert health[0].state is state
    return health


EVENTS: dict[str, tuple[Callable[[FleetHealth], object], dict[EngineState, EngineState]]] = {
    "answered": (lambda health: health.answered(0), {HEALTHY: HEALTHY, SUSPECT: HEALTHY, STALE: STALE}),
    "failed": (lambda health: health.failed(0, "x"), {HEALTHY: SUSPECT, SUSPECT: SUSPECT, STALE: STALE}),
    "died": (lambda health: health.died(0, "x"), dict.fromkeys((HEALTHY, SUSPECT, STALE, RESTARTING), DEAD)),
    "restart": (lambda health: health.restart(0), {DEAD: RESTARTING}),
    "started": (lambda health: health.started(0), {RESTARTING: STALE}),
    "updated": (lambda health: health.updated(0, 1), {STALE: HEALTHY}),
    "updated to another version": (lambda health: health.updated(0, 2), {}),
    "outdated": (lambda health: health.outdated(0, "x"), {HEALTHY: STALE, SUSPECT: STALE}),
    "retire": (lambda health: health.retire(0, "x"), dict.fromkeys(set(EngineState) - {RETIRED}, RETIRED)),
    "publish": (lambda health: health.publish(2), {s: s for s in EngineState} | {HEALTHY: STALE, SUSPECT: STALE}),
    "publish again": (lambda health: health.publish(1), {s: s for s in EngineState}),
}


@pytest.mark.parametrize("state", list(EngineState))
@pytest.mark.parametrize("event", list(EVENTS))
def test_every_event_in_every_state(event: str, state: EngineState) -> None:
    happen, leads_to = EVENTS[event]
    health = in_state(state)
    if state in leads_to:
        happen(health)
        assert health[0].state is leads_to[state]
    else:
        with pytest.raises(ForbiddenTransitionError, match="engine 0"):
            happen(health)
        assert health[0].state is state


def test_failures_in_a_row_kill_and_an_answer_forgives() -> None:
    health = in_state(HEALTHY)
    for _ in range(5):
        health.failed(0, "late")
        health.failed(0, "late")
        assert health[0].state is SUSPECT
        health.answered(0)
        assert health[0].state is HEALTHY
    for _ in range(3):
        health.failed(0, "late")
    assert (health[0].state, health[0].cause) == (DEAD, "late")


@pytest.mark.parametrize(("state", "limit"), [(SUSPECT, 10.0), (RESTARTING, 20.0)])
def test_patience_ends_by_the_clock(state: EngineState, limit: float) -> None:
    clock = Clock()
    health = in_state(state, clock)
    clock.now += limit
    assert health.tick() == ()
    clock.now += 0.1
    assert health.tick() == (0,)
    assert health[0].state is DEAD
    assert health.tick() == ()


def test_more_failures_do_not_make_a_suspect_younger() -> None:
    clock = Clock()
    health = in_state(SUSPECT, clock)
    clock.now += 9
    health.failed(0, "x")
    clock.now += 2
    assert health.tick() == (0,)


def test_an_engine_that_used_up_its_restarts_retires() -> None:
    health = in_state(HEALTHY)
    for _ in range(POLICY.max_restarts):
        health.died(0, "crash")
        assert health[0].state is DEAD
        health.restart(0)
        health.started(0)
    health.died(0, "crash")
    assert health[0].state is RETIRED


def test_a_publication_names_who_needs_it() -> None:
    health = FleetHealth(4, POLICY, Clock())
    assert health.publish(5) == (0, 1, 2, 3)
    for engine in (0, 1, 2):
        health.updated(engine, 5)
    health.died(2, "crash")
    assert health.publish(5) == (3,)
    assert health.healthy == (0, 1)
    health.failed(1, "slow")
    assert health.publish(6) == (0, 1, 3)
    assert health.counts() == {"healthy": 0, "suspect": 0, "dead": 1, "restarting": 0, "stale": 3, "retired": 0}
    assert "crash" in health.describe()


class FleetUnderFire(RuleBasedStateMachine):
    """Any events in any order; beside it, what the engines really hold."""

    ENGINES = 3
    engines = st.integers(0, ENGINES - 1)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.health = FleetHealth(self.ENGINES, POLICY, self.clock)
        self.holds: list[int | None] = [None] * self.ENGINES
        self.published: int | None = None

    def attempt(self, engine: int, event: Callable[[], object]) -> bool:
        """Whether the event was allowed; a forbidden one must change nothing."""
        before = [self.health[index] for index in range(self.ENGINES)]
        try:
            event()
        except ForbiddenTransitionError:
            assert before == [self.health[index] for index in range(self.ENGINES)]
            return False
        assert all(self.health[index] == before[index] for index in range(self.ENGINES) if index != engine)
        return True

    @rule(engine=engines)
    def answers(self, engine: int) -> None:
        was = self.health[engine].state
        if self.attempt(engine, lambda: self.health.answered(engine)):
            assert was is not STALE or self.health[engine].state is STALE

    @rule(engine=engines)
    def fails(self, engine: int) -> None:
        self.attempt(engine, lambda: self.health.failed(engine, "x"))

    @rule(engine=engines)
    def dies(self, engine: int) -> None:
        if self.attempt(engine, lambda: self.health.died(engine, "x")):
            self.holds[engine] = None

    @rule(engine=engines)
    def restarts(self, engine: int) -> None:
        if self.attempt(engine, lambda: self.health.restart(engine)):
            self.holds[engine] = None

    @rule(engine=engines)
    def starts(self, engine: int) -> None:
        self.attempt(engine, lambda: self.health.started(engine))

    @rule(engine=engines)
    def turns_out_to_be_old(self, engine: int) -> None:
        if self.attempt(engine, lambda: self.health.outdated(engine, "x")):
            self.holds[engine] = None

    @rule(engine=engines)
    def retires(self, engine: int) -> None:
        self.attempt(engine, lambda: self.health.retire(engine, "x"))

    @rule(version=st.integers(0, 3))
    def publish(self, version: int) -> None:
        self.published = version
        assert all(self.health[engine].state is STALE for engine in self.health.publish(version))

    @rule(engine=engines, version=st.integers(0, 3))
    def updates(self, engine: int, version: int) -> None:
        was = self.health[engine].state
        if self.attempt(engine, lambda: self.health.updated(engine, version)):
            assert (was, version) == (STALE, self.published)
            self.holds[engine] = version

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for engine in self.health.tick():
            self.holds[engine] = None

    @invariant()
    def who_may_serve_has_the_current_weights(self) -> None:
        for engine in range(self.ENGINES):
            if self.health[engine].state in (HEALTHY, SUSPECT):
                assert self.holds[engine] == self.published == self.health[engine].weight_version is not None
        assert set(self.health.healthy) == {e for e in range(self.ENGINES) if self.health[e].state is HEALTHY}

    @invariant()
    def restarts_are_bounded(self) -> None:
        assert all(self.health[engine].restarts <= POLICY.max_restarts for engine in range(self.ENGINES))


FleetUnderFire.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFleetUnderFire = FleetUnderFire.TestCase
