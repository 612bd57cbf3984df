"""Which rollout engines may generate, and why: a pure state machine with an injected clock.

Invariants: an engine is healthy or suspect only while its present process holds the weights of the last publication; the one
way from stale to healthy is a weight update that this process completed; an event that a state does not allow raises.

    started ──> stale ──update──> healthy <──answer── suspect        a publication makes healthy and suspect stale
                  ^                  └───failure──────^  │            died, failed update, too many failures, too long
              restarting <──restart── dead <─────────────┘            suspect or restarting: dead
    retired: for good; when the restarts are used up, or on request

A stale engine that took the weights but does not keep to the execution contract is in breach, until the next publication or a
restart.

Every restart raises the engine's *incarnation*. What is reported of an earlier incarnation changes nothing: an update that
completed for a process that has died does not make its successor healthy, and its failures are not counted against that one.

The caller sends probes and weights, starts new processes for the dead whose wait is over (:meth:`FleetHealth.due`), reports
what happened, and reads who may generate.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from rlhf_ray.console import table
from rlhf_ray.rollout.errors import ForbiddenTransitionError


class EngineState(StrEnum):
    """The life of one rollout engine."""

    HEALTHY = "healthy"
    """Has the current weights and generates."""
    SUSPECT = "suspect"
    """Has the current weights but failed to answer. Generates nothing until it answers a probe."""
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    """Alive, but with old weights: may not generate."""
    RETIRED = "retired"
    """Never comes back."""


ALIVE = frozenset({EngineState.HEALTHY, EngineState.SUSPECT, EngineState.STALE})
CURRENT = frozenset({EngineState.HEALTHY, EngineState.SUSPECT})
DOWN = frozenset({EngineState.DEAD, EngineState.RESTARTING, EngineState.RETIRED})
UPDATED = frozenset({EngineState.HEALTHY, EngineState.STALE})
"""Between these an engine goes with every publication."""


@dataclass(frozen=True)
class HealthPolicy:
    """How patient the fleet is."""

    failures_until_dead: int = 3
    """In a row, of probes and requests together."""
    suspect_s: float = 60.0
    """An engine that is suspect for longer is dead."""
    restart_s: float = 300.0
    """A restart that takes longer failed."""
    max_restarts: int = 5
    """Restarts of one engine in a row. The next death retires it."""
    lasting_s: float = 3600.0
    """A process that held weights when it died, and was up for as long, ends the row: so a run of weeks does not use it up."""
    backoff_s: float = 1.0
    """Wait before the second restart of an engine that took no weights in between; it doubles with each further one."""
    longest_backoff_s: float = 60.0


@dataclass(frozen=True)
class EngineHealth:
    """All that the fleet knows about one engine."""

    state: EngineState
    since: float
    """When it entered its state, in seconds of the clock."""
    weight_version: int | None = None
    """The version of its last completed update since it was last started."""
    failures: int = 0
    """In a row, of the present process."""
    incarnation: int = 0
    """How often it was restarted: which of its processes this is about."""
    in_a_row: int = 0
    """How often it was restarted since one of its processes lasted."""
    up_since: float = 0.0
    """When its present process was up, in seconds of the clock."""
    fruitless: int = 0
    """Restarts in a row after which it took no weights."""
    in_breach: bool = False
    """Whether it took the published weights, but does not keep to the execution contract."""
    cause: str = ""
    """Why it last left the healthy state."""


class FleetHealth:
    """The states of all engines of a fleet. Every engine begins as stale."""

    def __init__(
        self, engines: int, policy: HealthPolicy | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy or HealthPolicy()
        self._clock = clock
        self._version: int | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when an engine has died, is restarted or has come back; not when it took another weight version."""
        self.on_death: Callable[[], None] = lambda: None
        """Called when an engine has died, before anything is done about it."""
        self._engines = [EngineHealth(EngineState.STALE, clock(), up_since=clock()) for _ in range(engines)]

    # Reading

    @property
    def version(self) -> int | None:
        """The last published weight version."""
        return self._version

    @property
    def healthy(self) -> tuple[int, ...]:
        """Engines that may generate."""
        return self.in_state(EngineState.HEALTHY)

    def in_state(self, *states: EngineState) -> tuple[int, ...]:
        """Engines in one of ``states``, in order."""
        return tuple(index for index, engine in enumerate(self._engines) if engine.state in states)

    def __getitem__(self, engine: int) -> EngineHealth:
        return self._engines[engine]

    def __len__(self) -> int:
        return len(self._engines)

    def counts(self) -> dict[str, int]:
        """How many engines are in each state."""
        return {state.value: len(self.in_state(state)) for state in EngineState}

    def plain(self) -> list[dict[str, Any]]:
        """How each engine is, as plain JSON."""
        return [
            {"state": e.state.value, "weight_version": e.weight_version, "restarts": e.incarnation, "cause": e.cause}
            for e in self._engines
        ]

    def describe(self) -> str:
        """A table of all engines, for error messages."""
        rows = [
            (index, e.state.value, e.weight_version, e.incarnation, e.cause) for index, e in enumerate(self._engines)
        ]
        title = f"rollout engines (published weight version: {self._version})"
        return table(title, ("engine", "state", "weights", "restarts", "cause"), rows)

    def has_died(self, engine: int, incarnation: int) -> bool:
        """Whether the process ``incarnation`` of the engine was declared dead."""
        now = self._engines[engine]
        return now.incarnation > incarnation or now.state not in ALIVE | {EngineState.RESTARTING}

    def is_taking(self, engine: int, version: int, incarnation: int) -> bool:
        """Whether the process ``incarnation`` of the engine has yet to complete its update to ``version``, or to fail."""
        now = self._engines[engine]
        return self._awaits(now) and now.incarnation == incarnation and version == self._version

    def waiting(self) -> tuple[int, ...]:
        """Engines that are up and have yet to take the published weights."""
        return tuple(index for index, engine in enumerate(self._engines) if self._awaits(engine))

    def due(self) -> tuple[int, ...]:
        """Dead engines that may be restarted now; one that keeps dying before it takes weights waits longer each time."""
        return tuple(index for index in self.in_state(EngineState.DEAD) if self._age(index) >= self._backoff(index))

    # What happened. ``incarnation`` is that of the process it is about; of an earlier one than the present it changes nothing.

    def answered(self, engine: int, incarnation: int) -> None:
        """The engine answered a request or a probe. If it was suspect, it is healthy again."""
        if self._is_earlier(engine, incarnation):
            return
        state = self._expect(engine, "answered", ALIVE)
        new = EngineState.HEALTHY if state is EngineState.SUSPECT else state
        self._move(engine, new, failures=0)

    def failed(self, engine: int, cause: str, incarnation: int) -> None:
        """The engine did not answer a request or a probe, or not in time."""
        if self._is_earlier(engine, incarnation):
            return
        state = self._expect(engine, "failed", ALIVE)
        failures = self._engines[engine].failures + 1
        if failures >= self.policy.failures_until_dead:
            self._die(engine, cause)
        else:
            new = EngineState.STALE if state is EngineState.STALE else EngineState.SUSPECT
            self._move(engine, new, failures=failures, cause=cause)

    def died(self, engine: int, cause: str, incarnation: int) -> None:
        """The process is gone, the engine says that it is dead, or a weight update or a start failed."""
        if self._is_earlier(engine, incarnation):
            return
        self._expect(engine, "died", ALIVE | {EngineState.RESTARTING})
        self._die(engine, cause)

    def restart(self, engine: int) -> int:
        """A new process is being started in the place of a dead engine; returns its incarnation."""
        self._expect(engine, "restart", {EngineState.DEAD})
        before = self._engines[engine]
        incarnation = before.incarnation + 1
        counts = {"in_a_row": before.in_a_row + 1, "fruitless": before.fruitless + 1}
        self._move(engine, EngineState.RESTARTING, incarnation=incarnation, failures=0, **counts)
        return incarnation

    def started(self, engine: int, incarnation: int) -> None:
        """The new process is up. Whatever weights it has loaded, they count as old."""
        if self._is_earlier(engine, incarnation):
            return
        self._expect(engine, "started", {EngineState.RESTARTING})
        self._move(engine, EngineState.STALE, up_since=self._clock())

    def publish(self, version: int) -> tuple[int, ...]:
        """Weights of ``version`` are about to be sent; returns the engines that need them.

        If ``version`` is published already, those are only the engines that do not have it yet.
        """
        if version != self._version:
            self._version = version
            for engine in self.in_state(*CURRENT):
                self._move(engine, EngineState.STALE)
        for engine in self.in_state(EngineState.STALE):
            self._move(engine, EngineState.STALE, in_breach=False)
        return self.in_state(EngineState.STALE)

    def updated(self, engine: int, version: int, incarnation: int) -> None:
        """The process ``incarnation`` of the engine completed a weight update to ``version``."""
        if self._is_earlier(engine, incarnation):
            return
        self._expect(engine, "updated", {EngineState.STALE})
        if version != self._version:
            raise ForbiddenTransitionError(
                f"rollout engine {engine} was updated to weight version {version}, but {self._version} is published"
            )
        self._move(engine, EngineState.HEALTHY, weight_version=version, failures=0, fruitless=0, cause="")

    def breached(self, engine: int, cause: str, incarnation: int) -> None:
        """The engine took the published weights, but does not compute log-probs as the trainer does: it stays stale."""
        if self._is_earlier(engine, incarnation):
            return
        self._expect(engine, "breached", {EngineState.STALE})
        self._move(engine, EngineState.STALE, weight_version=None, cause=cause, in_breach=True)

    def outdated(self, engine: int, cause: str, incarnation: int) -> None:
        """The engine returned tokens of other weights than the published ones."""
        if self._is_earlier(engine, incarnation):
            return
        self._expect(engine, "outdated", CURRENT)
        self._move(engine, EngineState.STALE, weight_version=None, cause=cause)

    def retire(self, engine: int, cause: str) -> None:
        """The engine will not come back."""
        self._expect(engine, "retire", set(EngineState) - {EngineState.RETIRED})
        self._move(engine, EngineState.RETIRED, cause=cause)

    def tick(self) -> tuple[int, ...]:
        """Declare engines dead that were suspect or restarting for too long; returns them."""
        limits = {EngineState.SUSPECT: self.policy.suspect_s, EngineState.RESTARTING: self.policy.restart_s}
        late = [index for index in self.in_state(*limits) if self._age(index) > limits[self._engines[index].state]]
        for index in late:
            self._die(index, f"{self._engines[index].state.value} for {self._age(index):.0f} s")
        return tuple(late)

    # Inside

    def _awaits(self, engine: EngineHealth) -> bool:
        return engine.state is EngineState.STALE and not engine.in_breach

    def _age(self, engine: int) -> float:
        return self._clock() - self._engines[engine].since

    def _backoff(self, engine: int) -> float:
        fruitless = self._engines[engine].fruitless
        doubled = self.policy.backoff_s * 2.0 ** min(fruitless - 1, 30)
        return 0.0 if fruitless == 0 else min(doubled, self.policy.longest_backoff_s)

    def _is_earlier(self, engine: int, incarnation: int) -> bool:
        now = self._engines[engine].incarnation
        if incarnation > now:
            raise ForbiddenTransitionError(
                f"rollout engine {engine} is in its incarnation {now}: nothing can be known of incarnation {incarnation}"
            )
        return incarnation < now

    def _expect(self, engine: int, event: str, states: frozenset[EngineState] | set[EngineState]) -> EngineState:
        state = self._engines[engine].state
        if state not in states:
            allowed = ", ".join(sorted(state.value for state in states))
            raise ForbiddenTransitionError(
                f"rollout engine {engine} is {state.value}: '{event}' is for engines that are {allowed}"
            )
        return state

    def _die(self, engine: int, cause: str) -> None:
        now = self._engines[engine]
        lasted = now.weight_version is not None and self._clock() - now.up_since >= self.policy.lasting_s
        in_a_row = 0 if lasted else now.in_a_row
        state = EngineState.RETIRED if in_a_row >= self.policy.max_restarts else EngineState.DEAD
        self.on_death()
        self._move(engine, state, weight_version=None, cause=cause, in_a_row=in_a_row, in_breach=False)

    def _move(self, engine: int, state: EngineState, **changes: Any) -> None:
        before = self._engines[engine]
        since = before.since if state is before.state else self._clock()
        now = self._engines[engine] = replace(before, state=state, since=since, **changes)
        if state is not before.state and not (
            {state, before.state} <= UPDATED and None not in (before.weight_version, now.weight_version)
        ):
            self.on_change()
