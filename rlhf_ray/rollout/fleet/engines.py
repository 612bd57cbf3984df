"""The engines of a fleet, each kept alive: asked how it is, started again where it died, given the weights that it missed.

Invariants: :meth:`Engines.heal` waits for no engine. What is reported of a process that was replaced changes nothing. An engine
that was restarted serves once its new process has taken the published weights. Stopped engines are not restarted. The failure
of another role, which shares the GPUs and does not make room, is raised; no engine is taken for dead because of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.errors import DeadRankError, GroupError, RlhfRayError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.errors import EngineDeadError, WeightUpdateError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet.contract import Contract
from rlhf_ray.rollout.health import ALIVE, EngineState, FleetHealth, HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Probe
from rlhf_ray.rollout.wire import PublishedWeights

POLL_S = 0.02
"""How long the fleet waits for one thing before it looks after the others."""
LIVES_EVERY_S = 10.0
"""How often every live engine is asked whether its process answers at all, whatever it is doing."""
PROBE_EVERY_S = 1.0
"""How long after a probe that failed a suspect engine is asked again."""


class EngineHandle(Protocol):
    """How the fleet reaches an engine. Calls return at once; a result or a :class:`GroupError` follows in bounded time."""

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        """Start generating."""

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        """Give it requests on top of those that it has in work, and let it sample for ``seconds``.

        It returns what ended; an engine that has not come back after ``deadline_s`` hangs.
        """

    def receive(self, weights: PublishedWeights) -> Pending[Execution | None]:
        """Start an update by a publication, whose buckets the engine's side finds; the engine says how it computes then."""

    def execution(self) -> Pending[Execution | None]:
        """Ask the engine how it computes log-probs."""

    def probe(self) -> Pending[Probe]:
        """Ask the engine how it is."""


@dataclass(frozen=True)
class Asked:
    """A probe under way; without ``answer`` it has been answered."""

    incarnation: int
    again_at: float
    answer: Pending[Probe] | None


class Engines:
    """All engines of a fleet, and what is under way with each besides its work."""

    def __init__(
        self,
        handles: Sequence[EngineHandle],
        *,
        restart: Callable[[int, int], Pending[None]] | None = None,
        lives: Callable[[int], Pending[Any]] | None = None,
        policy: HealthPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``restart`` starts a new process for an engine, by its number and incarnation, in the place of the old one.

        It returns at once; its value comes when the engine is set up. The engine's handle then reaches the new process. Without
        it a dead engine stays dead. ``lives`` asks a process, beside whatever it is doing, whether it answers; an error says
        that it does not, and then it is dead.
        """
        self.handles = list(handles)
        self._restart = restart
        self._lives = lives
        self._clock = clock
        self.health = FleetHealth(len(self.handles), policy, clock)
        self._starting: dict[int, tuple[int, Pending[None]]] = {}
        """Engines that are being restarted: their incarnations, and when they are up."""
        self._taking: dict[int, tuple[int, int, Pending[Any]]] = {}
        """Engines that take the last publication again: their incarnations, its version, and when they have it."""
        self._asked: dict[int, Asked] = {}
        """Suspect engines that were asked how they are."""
        self._called: dict[int, Asked] = {}
        """Engines that were asked whether they live."""
        self.contract = Contract()
        self.last: PublishedWeights | None = None
        """The last publication, for engines that are restarted before the next one."""
        self.stopped = False
        """Whether the run ends its engines, so that their deaths are no news."""
        self._log = get_logger("rollout.fleet")

    # Weights

    def publish(self, version: int, policy: Execution | None = None) -> tuple[int, ...]:
        """Publish ``version`` of the weights of a trainer that computes as ``policy`` says.

        What engines still take of an earlier publication no longer matters.
        """
        targets = self.health.publish(version)
        self._taking = {}
        self.contract.policy = policy
        return targets

    def take(self, engine: int, incarnation: int, version: int, update: Pending[Execution | None]) -> None:
        """Wait until an engine has taken weights; it is healthy, in breach of the execution contract, or dead."""
        try:
            record = update.result()
        except GroupError as error:
            if self._died(engine, error.cause, incarnation):
                self._log.warning("engine %d did not take weight version %d: %s", engine, version, error)
            return
        self.adopt(engine, incarnation, version, record)

    def adopt(self, engine: int, incarnation: int, version: int, record: Execution | None) -> None:
        """Let an engine serve that has taken ``version``, if it keeps to the execution contract."""
        if self.health.has_died(engine, incarnation):
            return
        if breach := self.contract.breach(engine, record):
            self.health.breached(engine, breach, incarnation)
            self._log.error("engine %d took weight version %d and may not serve: %s", engine, version, breach)
        else:
            self.health.updated(engine, version, incarnation)

    # Restarting

    def heal(self) -> None:
        """Restart engines that have died, and give those that are up the last publication. This never waits for them."""
        if self.stopped:
            return
        self._probe_suspects()
        self._ask_who_lives()
        self.health.tick()
        if self._restart is None:
            return
        for engine in self.health.due():
            incarnation = self.health.restart(engine)
            cause = self.health[engine].cause.partition("\n")[0]
            self._log.warning(
                "engine %d is restarted, restart %d of %d (rollout.max_restarts); it died because: %s",
                engine, self.health[engine].in_a_row, self.health.policy.max_restarts, cause,
            )  # fmt: skip
            self._starting[engine] = incarnation, _begin(partial(self._restart, engine, incarnation))
        for engine, (incarnation, start) in list(self._starting.items()):
            if start.ready():
                del self._starting[engine]
                self._note_start(engine, incarnation, start)
        if self.last is not None:
            for engine in self.health.waiting():
                self._give_again(engine, self.last)
        for engine, (incarnation, version, update) in list(self._taking.items()):
            if update.ready():
                del self._taking[engine]
                self.take(engine, incarnation, version, update)

    def _note_start(self, engine: int, incarnation: int, start: Pending[None]) -> None:
        """Note how a restart ended; one that took too long has been given up before."""
        if self.health.has_died(engine, incarnation):
            return
        try:
            start.result()
        except RlhfRayError as error:
            self._died(engine, str(error), incarnation)
            self._log.warning("engine %d could not be restarted: %s", engine, error)
        else:
            self.health.started(engine, incarnation)
            self._log.warning("engine %d is up again and takes the weights", engine)

    def _give_again(self, engine: int, weights: PublishedWeights) -> None:
        incarnation = self.health[engine].incarnation
        if engine in self._taking and self._taking[engine][0] == incarnation:
            return
        _, update = self.start(engine, lambda handle: handle.receive(weights))
        self._taking[engine] = incarnation, weights.version, update

    def refuse_if_stopped(self, phase: str) -> None:
        """Raise :class:`GroupError` once the engines were stopped: no answer comes any more."""
        if self.stopped:
            raise GroupError(ROLE, None, phase, "the engines were stopped, because the run ends")

    def await_healthy(self, phase: str, what: str) -> None:
        """Return when an engine is healthy. Where none is and none will be, that is an error which begins with ``what``."""
        if not self.health.healthy:
            self.await_state(phase, what, lambda: bool(self.health.healthy))

    def await_state(self, phase: str, what: str, reached: Callable[[], bool]) -> None:
        """Heal until ``reached``; an error where no engine can come, or none did within the time of a restart."""
        limit_s = self.health.policy.restart_s
        end = self._clock() + limit_s
        while True:
            self.refuse_if_stopped(phase)
            self.heal()
            if reached():
                return
            if not self._coming():
                raise GroupError(ROLE, None, phase, f"{what}\n{self.health.describe()}")
            if self._clock() >= end:
                late = f"{what}, and none came within {limit_s:g} s (cluster.start_timeout_s)"
                raise GroupError(ROLE, None, phase, f"{late}\n{self.health.describe()}")
            time.sleep(POLL_S)

    def _coming(self) -> bool:
        """Whether an engine may yet become healthy without another publication."""
        if any(asked.answer is not None for asked in self._asked.values()):
            return True
        if self._restart is None:
            return False
        dead = (EngineState.DEAD, EngineState.RESTARTING, EngineState.SUSPECT)
        return bool(self._taking or self._starting or self.health.in_state(*dead))

    # Health

    def probe(self, engines: Iterable[int] | None = None) -> None:
        """Ask engines how they are (by default all live ones), wait for the answers, and update their health."""
        targets = self.health.in_state(*ALIVE) if engines is None else engines
        probes = [(engine, *self.start(engine, lambda handle: handle.probe())) for engine in targets]
        for engine, incarnation, pending in probes:
            self._heed(engine, incarnation, pending)
        self.health.tick()

    def _heed(self, engine: int, incarnation: int, pending: Pending[Probe]) -> None:
        """Update the health of an engine by its answer to a probe."""
        try:
            probe = pending.result()
        except GroupError as error:
            self.lose(engine, incarnation, error)
            return
        if self.health.has_died(engine, incarnation):
            return
        if probe.dead is None:
            self.health.answered(engine, incarnation)
        else:
            self.health.died(engine, probe.dead, incarnation)

    def _probe_suspects(self) -> None:
        """Ask suspect engines how they are, again after a while, without waiting for their answers."""
        now = self._clock()
        for engine in self.health.in_state(EngineState.SUSPECT):
            incarnation = self.health[engine].incarnation
            asked = self._asked.get(engine)
            if asked is None or asked.incarnation != incarnation or (asked.answer is None and now >= asked.again_at):
                _, pending = self.start(engine, lambda handle: handle.probe())
                self._asked[engine] = Asked(incarnation, now + PROBE_EVERY_S, pending)
        for engine, asked in list(self._asked.items()):
            if asked.answer is not None and asked.answer.ready():
                self._asked[engine] = replace(asked, answer=None)
                self._heed(engine, asked.incarnation, asked.answer)
                if self.health[engine].state is not EngineState.SUSPECT:
                    del self._asked[engine]

    def _ask_who_lives(self) -> None:
        """Ask the processes of all live engines, from time to time, whether they answer; one that does not is dead."""
        if self._lives is None:
            return
        now = self._clock()
        for engine in self.health.in_state(*ALIVE):
            incarnation = self.health[engine].incarnation
            asked = self._called.get(engine)
            if asked is None or asked.incarnation != incarnation:  # a new process is asked after a while
                self._called[engine] = Asked(incarnation, now + LIVES_EVERY_S, None)
            elif asked.answer is None and now >= asked.again_at:
                self._called[engine] = Asked(incarnation, now + LIVES_EVERY_S, _begin(partial(self._lives, engine)))
        for engine, asked in list(self._called.items()):
            if asked.answer is not None and asked.answer.ready():
                self._called[engine] = replace(asked, answer=None)
                try:
                    asked.answer.result()
                except GroupError as error:
                    if self._died(engine, error.cause, asked.incarnation):
                        self._log.warning("engine %d does not answer: %s", engine, error)

    def start(self, engine: int, call: Callable[[EngineHandle], Pending[Any]]) -> tuple[int, Pending[Any]]:
        """The incarnation that is called, and its answer; a call that cannot even be started fails as if it had later."""
        return self.health[engine].incarnation, _begin(partial(call, self.handles[engine]))

    def lose(self, engine: int, incarnation: int, error: GroupError) -> None:
        """Record a failure: an engine that is known to be dead is dead, one that only failed to answer is suspect."""
        if self.health.has_died(engine, incarnation):
            return
        if isinstance(error, EngineDeadError | WeightUpdateError | DeadRankError):
            self.health.died(engine, error.cause, incarnation)
        else:
            self.health.failed(engine, error.cause, incarnation)
        self._log.warning("engine %d is %s: %s", engine, self.health[engine].state.value, error)

    def _died(self, engine: int, cause: str, incarnation: int) -> bool:
        """Record a death; whether it was news."""
        news = not self.health.has_died(engine, incarnation)
        if news:
            self.health.died(engine, cause, incarnation)
        return news


def _begin(call: Callable[[], Pending[Any]]) -> Pending[Any]:
    """What ``call`` returns, or its error as a failed answer of the engine; an error of another role is raised."""
    try:
        return call()
    except RlhfRayError as error:
        # With cluster.colocate a training role has to make room first. Where it does not, no engine is to blame.
        if isinstance(error, GroupError) and error.role != ROLE:
            raise
        failure = error

    def wait() -> Any:
        raise failure

    return Pending(wait)
