"""The rollout engines of a run, used as one: prompts in, one batch out, whichever engines are alive.

Invariants:

- Prompts are cut into as many shares as the fleet has engines, by their order alone, and a share is generated whole, by one
  engine, in one call. In deterministic mode the batch therefore has the same bits, whichever engine generated a share and
  however often.
- Only healthy engines generate. A share whose engine failed is generated again, from the start, on a healthy one. One that took
  too long is generated again only if another share was in time: else it would take as long again.
- Tokens that were sampled with other weights than the published ones are refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise
from typing import Any, Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError, StaleWeightsError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError, WeightUpdateError
from rlhf_ray.rollout.health import ALIVE, EngineState, FleetHealth, HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Probe, gather
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.trajectories.batch import TrajectoryBatch

Share = Sequence[GenerationRequest]
MAX_ATTEMPTS = 3
"""How often the fleet tries to generate one share before it gives up."""


class EngineHandle(Protocol):
    """How the fleet reaches an engine. Calls return at once; a result or a :class:`GroupError` follows in bounded time."""

    def generate(self, requests: Share, deadline_s: float) -> Pending[list[Generation]]:
        """Start generating."""

    def receive(self, weights: PublishedWeights) -> Pending[None]:
        """Start an update by a publication, whose buckets the engine's side finds."""

    def probe(self) -> Pending[Probe]:
        """Ask the engine how it is."""


def cut_shares(requests: Share, places: int) -> list[list[GenerationRequest]]:
    """Cut into ``places`` shares of neighbouring prompts, of sizes that differ by at most one prompt.

    All samples of a prompt are in the same share.
    """
    prompts = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt_id)]
    bounds = [len(prompts) * place // places for place in range(places + 1)]
    return [[request for prompt in prompts[start:stop] for request in prompt] for start, stop in pairwise(bounds)]


class Fleet:
    """The engines of a run. They generate nothing before the first :meth:`update_weights`."""

    def __init__(
        self,
        handles: Sequence[EngineHandle],
        *,
        policy: HealthPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._handles = list(handles)
        self.health = FleetHealth(len(self._handles), policy, clock)
        self._log = get_logger("rollout.fleet")

    # Weights

    def update_weights(self, version: int, weights: PublishedWeights) -> None:
        """Send weights to every live engine; an engine that fails to take them is dead.

        If ``version`` is published already, only engines that do not have it get the weights.
        """
        targets = self.health.publish(version)
        updates = [(engine, self._start(engine, lambda handle: handle.receive(weights))) for engine in targets]
        for engine, update in updates:
            try:
                update.result()
            except GroupError as error:
                self.health.died(engine, error.cause)
                self._log.warning("engine %d did not take weight version %d: %s", engine, version, error)
            else:
                self.health.updated(engine, version)
        if not self.health.healthy:
            raise GroupError(ROLE, None, "update_weights", f"no engine has the weights\n{self.health.describe()}")

    def update_by(self, version: int, send: Callable[[tuple[int, ...]], None]) -> None:
        """Have ``send`` give ``version`` to every live engine at once; where it fails, no engine has it.

        Engines are asked first, since one that died unnoticed would fail the update of all.
        """
        self.probe()
        targets = self.health.publish(version)
        if targets:
            send(targets)
        for engine in targets:
            self.health.updated(engine, version)
        if not self.health.healthy:
            raise GroupError(ROLE, None, "update_weights", f"no engine has the weights\n{self.health.describe()}")

    # Generating

    def generate(self, requests: Share, deadline_s: float) -> TrajectoryBatch:
        """Generate all requests and return them as one batch, in their order; each try of a share has ``deadline_s``."""
        shares = dict(enumerate(cut_shares(requests, len(self._handles))))
        waiting = [share for share, content in shares.items() if content]
        attempts = dict.fromkeys(waiting, 0)
        done: dict[int, list[Generation]] = {share: [] for share, content in shares.items() if not content}
        while waiting:
            self.probe(self.health.in_state(EngineState.SUSPECT))
            placed = self._place(waiting)
            started = {share: self._begin(engine, shares[share], deadline_s) for share, engine in placed.items()}
            failures: dict[int, Exception] = {}
            for share, pending in started.items():
                attempts[share] += 1
                try:
                    done[share] = self._collect(placed[share], shares[share], pending)
                except (GroupError, StaleWeightsError) as error:
                    failures[share] = error
            in_time = any(done.values())
            for share, failure in failures.items():
                self._report(share, placed[share], failure, tries=attempts[share], in_time=in_time)
            waiting = [share for share in waiting if share not in done]
        return gather(requests, [generation for share in shares for generation in done[share]])

    def _begin(self, engine: int, share: Share, deadline_s: float) -> Pending[list[Generation]]:
        return self._start(engine, lambda handle: handle.generate(share, deadline_s))

    def _place(self, waiting: Sequence[int]) -> dict[int, int]:
        """Give each healthy engine one waiting share: its own share if that is waiting, otherwise any other."""
        free = list(self.health.healthy)
        if not free:
            raise GroupError(ROLE, None, "generate", f"no engine is healthy\n{self.health.describe()}")
        placed = {share: share for share in waiting if share in free}
        free = [engine for engine in free if engine not in placed]
        homeless = [share for share in waiting if share not in placed]
        return placed | dict(zip(homeless, free, strict=False))

    def _collect(self, engine: int, share: Share, pending: Pending[list[Generation]]) -> list[Generation]:
        """Return a share's generations if all are there and all were sampled with the published weights.

        Either way the engine's health is updated.
        """
        try:
            generations = pending.result()
        except GroupError as error:
            self._lose(engine, error)
            raise
        if [generation.key for generation in generations] != [request.key for request in share]:
            wrong = EngineDeadError(ROLE, engine, "generate", "it answered with other samples than were requested")
            self._lose(engine, wrong)
            raise wrong
        versions = {version for generation in generations for version in generation.weight_versions}
        if versions - {self.health.version}:
            cause = f"it sampled with weight versions {sorted(versions)}, published is {self.health.version}"
            self.health.outdated(engine, cause)
            raise StaleWeightsError(f"rollout engine {engine}: {cause}")
        self.health.answered(engine)
        return generations

    def _report(self, share: int, engine: int, error: Exception, *, tries: int, in_time: bool) -> None:
        """Warn that a share is generated again, or raise ``error`` where that was done often enough or would not help."""
        if isinstance(error, TooSlowError) and not in_time:
            raise error
        if tries == MAX_ATTEMPTS:
            cause = f"share {share} failed {MAX_ATTEMPTS} times, last: {error}\n{self.health.describe()}"
            raise GroupError(ROLE, None, "generate", cause) from error
        self._log.warning("engine %d lost share %d, which is generated again: %s", engine, share, error)

    # Health

    def probe(self, engines: Iterable[int] | None = None) -> None:
        """Ask engines how they are (by default all live ones) and update their health."""
        targets = self.health.in_state(*ALIVE) if engines is None else engines
        probes = [(engine, self._start(engine, lambda handle: handle.probe())) for engine in targets]
        for engine, pending in probes:
            try:
                probe: Probe = pending.result()
            except GroupError as error:
                self._lose(engine, error)
                continue
            if probe.dead is None:
                self.health.answered(engine)
            else:
                self.health.died(engine, probe.dead)
        self.health.tick()

    def _start(self, engine: int, call: Callable[[EngineHandle], Pending[Any]]) -> Pending[Any]:
        """Start a call. If it cannot even be started, its result raises the error, as if it had failed later."""
        try:
            return call(self._handles[engine])
        except GroupError as error:
            return _failed(error)

    def _lose(self, engine: int, error: GroupError) -> None:
        """Record a failure: an engine that reports its own death is dead, one that only failed to answer is suspect."""
        if isinstance(error, EngineDeadError | WeightUpdateError):
            self.health.died(engine, error.cause)
        else:
            self.health.failed(engine, error.cause)
        self._log.warning("engine %d is %s: %s", engine, self.health[engine].state.value, error)


def _failed(error: GroupError) -> Pending[Any]:
    def wait() -> Any:
        raise error

    return Pending(wait)
