"""Healthy means that the present process took the current weights; what an earlier process did or failed at changes nothing."""

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
        HEALTHY: [lambda: health.updated(0, 1, 0)],
        SUSPECT: [lambda: health.updated(0, 1, 0), lambda: health.failed(0, "x", 0)],
        DEAD: [lambda: health.died(0, "x", 0)],
        RESTARTING: [lambda: health.died(0, "x", 0), lambda: health.restart(0)],
        RETIRED: [lambda: health.retire(0, "x")],
    }
    for step in steps[state]:
        step()
    assert health[0].state is state
    return health


def now(health: FleetHealth) -> int:
    return health[0].incarnation


EVENTS: dict[str, tuple[Callable[[FleetHealth], object], dict[EngineState, EngineState]]] = {
    "answered": (lambda health: health.answered(0, now(health)), {HEALTHY: HEALTHY, SUSPECT: HEALTHY, STALE: STALE}),
    "failed": (lambda health: health.failed(0, "x", now(health)), {HEALTHY: SUSPECT, SUSPECT: SUSPECT, STALE: STALE}),
    "died": (
        lambda health: health.died(0, "x", now(health)),
        dict.fromkeys((HEALTHY, SUSPECT, STALE, RESTARTING), DEAD),
    ),
    "restart": (lambda health: health.restart(0), {DEAD: RESTARTING}),
    "started": (lambda health: health.started(0, now(health)), {RESTARTING: STALE}),
    "updated": (lambda health: health.updated(0, 1, now(health)), {STALE: HEALTHY}),
    "updated to another version": (lambda health: health.updated(0, 2, now(health)), {}),
    "outdated": (lambda health: health.outdated(0, "x", now(health)), {HEALTHY: STALE, SUSPECT: STALE}),
    "breached": (lambda health: health.breached(0, "x", now(health)), {STALE: STALE}),
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
        health.failed(0, "late", 0)
        health.failed(0, "late", 0)
        assert health[0].state is SUSPECT
        health.answered(0, 0)
        assert health[0].state is HEALTHY
    for _ in range(3):
        health.failed(0, "late", 0)
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
    health.failed(0, "x", 0)
    clock.now += 2
    assert health.tick() == (0,)


def test_an_engine_that_used_up_its_restarts_retires() -> None:
    health = in_state(HEALTHY)
    for incarnation in range(POLICY.max_restarts):
        health.died(0, "crash", incarnation)
        assert health[0].state is DEAD
        assert health.restart(0) == incarnation + 1
        health.started(0, incarnation + 1)
    health.died(0, "crash", POLICY.max_restarts)
    assert health[0].state is RETIRED


@pytest.mark.parametrize("takes_weights", [True, False])
@pytest.mark.parametrize("seconds", [3599.0, 3600.0])
def test_restarts_before_a_process_that_lasted_with_weights_do_not_count(seconds: float, takes_weights: bool) -> None:
    clock = Clock()
    health = in_state(HEALTHY, clock)
    lasting = takes_weights and seconds >= POLICY.lasting_s
    for incarnation in range(4 if lasting else POLICY.max_restarts):
        health.died(0, "crash", incarnation)
        assert health[0].state is DEAD
        health.restart(0)
        clock.now += 9000  # starting is not lasting
        health.started(0, incarnation + 1)
        if takes_weights:
            health.updated(0, 1, incarnation + 1)
        clock.now += seconds
    health.died(0, "crash", now(health))
    assert health[0].state is (DEAD if lasting else RETIRED)


def test_a_publication_names_who_needs_it() -> None:
    health = FleetHealth(4, POLICY, Clock())
    assert health.publish(5) == (0, 1, 2, 3)
    for engine in (0, 1, 2):
        health.updated(engine, 5, 0)
    health.died(2, "crash", 0)
    assert health.publish(5) == (3,)
    assert health.healthy == (0, 1)
    health.failed(1, "slow", 0)
    assert health.publish(6) == (0, 1, 3)
    assert health.counts() == {"healthy": 0, "suspect": 0, "dead": 1, "restarting": 0, "stale": 3, "retired": 0}
    assert "crash" in health.describe()


@pytest.mark.parametrize("state", [RESTARTING, STALE, HEALTHY, SUSPECT])
@pytest.mark.parametrize("event", ["answered", "failed", "died", "updated", "breached", "outdated", "started"])
def test_what_a_dead_process_did_changes_nothing_of_its_successor(event: str, state: EngineState) -> None:
    health = in_state(DEAD)
    health.restart(0)
    for reached, step in (
        (STALE, lambda: health.started(0, 1)),
        (HEALTHY, lambda: health.updated(0, 1, 1)),
        (SUSPECT, lambda: health.failed(0, "x", 1)),
    ):
        if health[0].state is state:
            break
        step()
        assert health[0].state is reached
    before = health[0]
    arguments = {
        "failed": ("late",),
        "died": ("gone",),
        "updated": (1,),
        "outdated": ("old",),
        "breached": ("other",),
    }.get(event, ())
    getattr(health, event)(0, *arguments, 0)
    assert health[0] == before
    with pytest.raises(ForbiddenTransitionError, match="nothing can be known of incarnation 2"):
        getattr(health, event)(0, *arguments, 2)


def test_a_successor_begins_without_the_failures_of_the_dead() -> None:
    health = in_state(HEALTHY)
    for _ in range(3):
        health.failed(0, "late", 0)
    health.restart(0)
    health.started(0, 1)
    for _ in range(2):
        health.failed(0, "late", 1)
        assert health[0].state is STALE, "it has failed twice at most, its predecessor three times"
    health.updated(0, 1, 1)
    for _ in range(2):
        health.failed(0, "late", 1)
    assert health[0].state is SUSPECT, "it has failed twice, its predecessor three times"


def test_an_engine_that_keeps_dying_before_it_takes_weights_waits_twice_as_long_each_time() -> None:
    clock = Clock()
    health = FleetHealth(1, HealthPolicy(max_restarts=99, backoff_s=1.0, longest_backoff_s=3.0), clock)
    health.publish(1)
    waits = []
    for incarnation in range(6):
        health.died(0, "crash", incarnation)
        began = clock.now
        while health.due() != (0,):
            clock.now += 0.5
        waits.append(clock.now - began)
        health.restart(0)
        health.started(0, incarnation + 1)
        if incarnation == 3:
            health.updated(0, 1, incarnation + 1)
    assert waits == [0.0, 1.0, 2.0, 3.0, 0.0, 1.0]


def test_an_engine_is_due_only_while_it_is_dead_and_has_restarts_left() -> None:
    for state in EngineState:
        assert in_state(state).due() == ((0,) if state is DEAD else ())


class FleetUnderFire(RuleBasedStateMachine):
    """Any events in any order; beside it, what the engines really hold."""

    ENGINES = 3
    engines = st.integers(0, ENGINES - 1)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.health = FleetHealth(self.ENGINES, POLICY, self.clock)
        self.holds: dict[tuple[int, int], int | None] = {}
        """The weights of each process that ever was, by engine and incarnation."""
        self.failures: dict[tuple[int, int], int] = {}
        """In a row, as each process knows them."""
        self.published: int | None = None

    def processes(self) -> st.SearchStrategy[tuple[int, int]]:
        """Any process that is or was."""
        every = [(e, i) for e in range(self.ENGINES) for i in range(self.health[e].incarnation + 1)]
        return st.sampled_from(every)

    def now(self, engine: int) -> tuple[int, int]:
        return engine, self.health[engine].incarnation

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

    @rule(data=st.data())
    def answers(self, data: st.DataObject) -> None:
        engine, incarnation = process = data.draw(self.processes())
        was = self.health[engine].state
        if self.attempt(engine, lambda: self.health.answered(engine, incarnation)) and process == self.now(engine):
            assert was is not STALE or self.health[engine].state is STALE
            self.failures[process] = 0

    @rule(data=st.data())
    def fails(self, data: st.DataObject) -> None:
        engine, incarnation = process = data.draw(self.processes())
        if self.attempt(engine, lambda: self.health.failed(engine, "x", incarnation)):
            self.failures[process] = self.failures.get(process, 0) + 1

    @rule(data=st.data())
    def dies(self, data: st.DataObject) -> None:
        engine, incarnation = data.draw(self.processes())
        self.attempt(engine, lambda: self.health.died(engine, "x", incarnation))

    @rule(engine=engines)
    def restarts(self, engine: int) -> None:
        if self.attempt(engine, lambda: self.health.restart(engine)):
            assert self.now(engine) not in self.holds and self.now(engine) not in self.failures

    @rule(data=st.data())
    def starts(self, data: st.DataObject) -> None:
        engine, incarnation = data.draw(self.processes())
        self.attempt(engine, lambda: self.health.started(engine, incarnation))

    @rule(data=st.data())
    def turns_out_to_be_old(self, data: st.DataObject) -> None:
        engine, incarnation = process = data.draw(self.processes())
        if self.attempt(engine, lambda: self.health.outdated(engine, "x", incarnation)):
            self.holds[process] = None

    @rule(data=st.data())
    def breaks_the_contract(self, data: st.DataObject) -> None:
        engine, incarnation = process = data.draw(self.processes())
        if self.attempt(engine, lambda: self.health.breached(engine, "x", incarnation)) and process == self.now(engine):
            assert engine not in self.health.healthy and engine not in self.health.waiting()
            self.holds[process] = None

    @rule(engine=engines)
    def retires(self, engine: int) -> None:
        self.attempt(engine, lambda: self.health.retire(engine, "x"))

    @rule(version=st.integers(0, 3))
    def publish(self, version: int) -> None:
        self.published = version
        assert all(self.health[engine].state is STALE for engine in self.health.publish(version))

    @rule(data=st.data(), version=st.integers(0, 3))
    def updates(self, data: st.DataObject, version: int) -> None:
        """A process completes an update, perhaps after it was replaced: then that is known too late to matter."""
        engine, incarnation = process = data.draw(self.processes())
        before = self.health[engine]
        if self.attempt(engine, lambda: self.health.updated(engine, version, incarnation)):
            if process == self.now(engine):
                assert (before.state, version) == (STALE, self.published)
                self.failures[process] = 0
            else:
                assert self.health[engine] == before
            self.holds[process] = version

    @rule(seconds=st.floats(0, 30))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.health.tick()

    @invariant()
    def who_may_serve_has_the_current_weights(self) -> None:
        for engine in range(self.ENGINES):
            if self.health[engine].state in (HEALTHY, SUSPECT):
                held = self.holds.get(self.now(engine))
                assert held == self.published == self.health[engine].weight_version is not None
        assert set(self.health.healthy) == {e for e in range(self.ENGINES) if self.health[e].state is HEALTHY}

    @invariant()
    def failures_are_those_of_the_present_process(self) -> None:
        for engine in range(self.ENGINES):
            if self.health[engine].state in (HEALTHY, SUSPECT, STALE):
                assert self.health[engine].failures == self.failures.get(self.now(engine), 0)

    @invariant()
    def restarts_are_bounded(self) -> None:
        """Here no process lasts an hour."""
        assert all(self.health[engine].incarnation <= POLICY.max_restarts for engine in range(self.ENGINES))


FleetUnderFire.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestFleetUnderFire = FleetUnderFire.TestCase
