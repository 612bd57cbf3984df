"""The rollout engines of a run, used as one: prompts in, one batch out, whichever engines are alive.

Invariants:

- Prompts are cut into as many shares as the fleet has engines, by their order alone, and a share is generated whole, by one
  engine, in one call. In deterministic mode the batch therefore has the same bits, whichever engine generated a share.
- Only after two deaths at a share its prompts are tried one by one: tokens are drawn by the same seeds, but log-probs may then
  differ in their last bits.
- Only healthy engines generate. A share whose engine failed is generated again, from the start, on a healthy one. One that took
  too long is generated again only if another share was in time: else it would take as long again.
- An engine that does not compute log-probs as the trainer does (``rollout/execution.py``) is stale, whatever weights it has.
- Tokens that were sampled with other weights than the published ones are refused.
- An engine that died is started again in its place, at most ``max_restarts`` times in a row, while others work. It serves once
  its new process holds the published weights. Nothing waits for it while another engine is healthy.

One thread at a time calls a fleet; it need not always be the same. Only :meth:`Fleet.stop` is for any thread at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError, StaleWeightsError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet.engines import POLL_S, Engines
from rlhf_ray.rollout.fleet.shares import SetAside, Share, Work, cut_shares
from rlhf_ray.rollout.health import ALIVE
from rlhf_ray.rollout.requests import Generation, Key, gather
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.trajectories.batch import TrajectoryBatch

MAX_ATTEMPTS = 3
"""How often the fleet tries to generate one share before it gives up, and how many engines a prompt may kill."""


class Fleet:
    """The engines of a run. They generate nothing before the first :meth:`update_weights`."""

    def __init__(self, engines: Engines) -> None:
        self.engines = engines
        self.health = self.engines.health
        self.set_aside: set[int] = set()
        """The ids of prompts that are answered no more."""
        self.on_set_aside: Callable[[SetAside], None] = lambda aside: None
        """Called when a prompt is set aside."""
        self._log = get_logger("rollout.fleet")

    # Weights

    def forget_weights(self) -> None:
        """Keep the last publication no longer, so that its memory is free for the next one."""
        self.engines.last = None

    def update_weights(self, version: int, weights: PublishedWeights) -> None:
        """Send weights to every live engine; an engine that fails to take them is dead.

        If ``version`` is published already, only engines that do not have it get the weights. The fleet keeps them for engines
        that are restarted before the next publication. Where no engine is left, it waits for one that is being restarted.
        """
        self.engines.last = None
        self.engines.heal()
        targets = self.engines.publish(version, weights.execution)
        updates = [(engine, *self.engines.start(engine, lambda handle: handle.receive(weights))) for engine in targets]
        while updates:
            self.engines.refuse_if_stopped("update_weights")
            for engine, incarnation, update in updates:
                if update.ready(POLL_S):
                    self.engines.take(engine, incarnation, version, update)
            updates = [one for one in updates if self.health.is_taking(one[0], version, one[1])]
            self.engines.heal()
        self.engines.last = weights
        self.engines.await_healthy("update_weights", "no engine has the weights")

    def update_by(self, version: int, send: Callable[[tuple[int, ...]], Execution | None]) -> None:
        """Have ``send`` give ``version`` to every live engine at once; where it fails, no engine has it.

        It returns how the trainer computes log-probs, and the engines are asked for the same. Before that they are asked how
        they are, since one that died unnoticed would fail the update of all. One that is restarted later gets its weights by
        the next update.
        """
        self.engines.last = None
        self.engines.heal()
        self.engines.probe()
        if not self.health.in_state(*ALIVE):
            self.engines.await_state("update_weights", "no engine is alive", lambda: bool(self.health.in_state(*ALIVE)))
        targets = self.engines.publish(version)
        incarnations = {engine: self.health[engine].incarnation for engine in targets}
        if targets:
            self.engines.contract.policy = send(targets)
        asked = {engine: self.engines.start(engine, lambda handle: handle.execution()) for engine in targets}
        for engine, (_, answer) in asked.items():
            self.engines.take(engine, incarnations[engine], version, answer)
        self.engines.await_healthy("update_weights", "no engine has the weights")

    def require_agreement(self, policy: Execution) -> Execution:
        """How the engines compute log-probs; raises :class:`RequestError` where one does not keep to the execution contract.

        One that cannot say it, because it has died since it was loaded, is asked again with the weights that it takes.
        """
        asked = {
            engine: self.engines.start(engine, lambda handle: handle.execution()) for engine in range(len(self.health))
        }
        records, failures = dict[int, Execution](), list[GroupError]()
        for engine, (incarnation, answer) in asked.items():
            try:
                records[engine] = answer.result()
            except GroupError as error:
                self.engines.lose(engine, incarnation, error)
                failures.append(error)
        if not records:
            raise failures[0]
        return self.engines.contract.require(policy, records)

    # Life

    def figures(self) -> dict[str, float]:
        """How the engines are, as metrics of a step."""
        restarts = sum(self.health[engine].incarnation for engine in range(len(self.health)))
        return {
            "rollout/engines_healthy": float(len(self.health.healthy)),
            "rollout/restarts": float(restarts),
            "prompts/set_aside": float(len(self.set_aside)),
        }

    def heal(self) -> None:
        """Restart engines that have died, and give those that are up the last publication. This never waits for them."""
        self.engines.heal()

    def stop(self) -> None:
        """Restart no engine any more, and end what another thread has under way with an error at once.

        Call it before the engines are stopped: else their deaths are taken for failures.
        """
        self.engines.stopped = True

    def probe(self, engines: Iterable[int] | None = None) -> None:
        """Ask engines how they are (by default all live ones), wait for the answers, and update their health."""
        self.engines.probe(engines)

    # Generating

    def generate(self, requests: Share, deadline_s: float) -> TrajectoryBatch:
        """Generate all requests and return them as one batch, in their order; each try of a share has ``deadline_s``.

        Prompts that were set aside are not in it; where all were, it is empty and has no columns of kept sets.
        """
        requests = [request for request in requests if request.prompt_id not in self.set_aside]
        waiting = [Work(share, home) for home, share in enumerate(cut_shares(requests, len(self.health))) if share]
        running: dict[int, tuple[Work, int, Pending[list[Generation]]]] = {}
        slow: list[tuple[Work, TooSlowError]] = []
        done: dict[Key, Generation] = {}
        while waiting or running or slow:
            self.engines.refuse_if_stopped("generate")
            self.engines.heal()
            if not (waiting or running):
                if not done:
                    raise slow[0][1]
                waiting, slow = [again for work, error in slow for again in self._again(work, error)], []
            if not running:
                self.engines.await_healthy("generate", "no engine is healthy")
            for engine, work in self._place(waiting, set(self.health.healthy) - set(running)).items():
                waiting.remove(work)
                running[engine] = work, *self._begin(engine, work.requests, deadline_s)
            ready = self._ready(running)
            self.engines.refuse_if_stopped("generate")
            for engine in ready:
                work, incarnation, pending = running.pop(engine)
                try:
                    done |= {one.key: one for one in self._collect(engine, incarnation, work.requests, pending)}
                except TooSlowError as error:
                    slow.append((self._count(work, engine, incarnation, error), error))
                except (GroupError, StaleWeightsError) as error:
                    waiting += self._again(self._count(work, engine, incarnation, error), error)
        kept = [request for request in requests if request.prompt_id not in self.set_aside]
        return gather(kept, [done[request.key] for request in kept])

    def refuse_empty(self, batch: TrajectoryBatch) -> None:
        """Raise :class:`GroupError` where nothing is left of a whole step, because all its prompts were set aside."""
        if len(batch) == 0:
            cause = (
                f"there is no answer: each prompt killed {MAX_ATTEMPTS} engines, and was set aside (set_aside.jsonl)"
            )
            raise GroupError(ROLE, None, "generate", f"{cause}\n{self.health.describe()}")

    def put_aside(self, aside: SetAside) -> None:
        """Answer a prompt no more."""
        self.set_aside.add(aside.prompt_id)
        self.on_set_aside(aside)
        self._log.error(
            "prompt %d is set aside, because three engines died while they answered it; nothing is learned from it. It "
            "begins with tokens %s; the last death: %s",
            aside.prompt_id, list(aside.token_ids[:16]), aside.causes[-1],
        )  # fmt: skip

    def _begin(self, engine: int, share: Share, deadline_s: float) -> tuple[int, Pending[list[Generation]]]:
        return self.engines.start(engine, lambda handle: handle.generate(share, deadline_s))

    def _place(self, waiting: Sequence[Work], free: set[int]) -> dict[int, Work]:
        """Give each free engine one waiting share: its own if that is waiting, otherwise any whose engine is not free."""
        placed = {work.home: work for work in waiting if work.home in free}
        homeless = [work for work in waiting if work.home not in free]
        return placed | dict(zip(sorted(free - set(placed)), homeless, strict=False))

    def _ready(self, running: Mapping[int, tuple[Work, int, Pending[list[Generation]]]]) -> list[int]:
        """The engines whose answer is there, or will not come because they are dead.

        It waits for that of the first one, but not long: others may need something.
        """
        wait_s = POLL_S
        ready = []
        for engine, (_, incarnation, pending) in running.items():
            if pending.ready(wait_s) or self.health.has_died(engine, incarnation):
                ready.append(engine)
            wait_s = 0.0
        return ready

    def _collect(
        self, engine: int, incarnation: int, share: Share, pending: Pending[list[Generation]]
    ) -> list[Generation]:
        """Return a share's generations if all are there and all were sampled with the published weights.

        Either way the engine's health is updated.
        """
        try:
            if not pending.ready():
                raise EngineDeadError(ROLE, engine, "generate", "it was given up before it answered")
            generations = pending.result()
        except GroupError as error:
            self.engines.lose(engine, incarnation, error)
            raise
        if [generation.key for generation in generations] != [request.key for request in share]:
            wrong = EngineDeadError(ROLE, engine, "generate", "it answered with other samples than were requested")
            self.engines.lose(engine, incarnation, wrong)
            raise wrong
        versions = {version for generation in generations for version in generation.weight_versions}
        alive = not self.health.has_died(engine, incarnation)
        if versions - {self.health.version}:
            cause = f"it sampled with weight versions {sorted(versions)}, published is {self.health.version}"
            if alive:
                self.health.outdated(engine, cause, incarnation)
            raise StaleWeightsError(f"rollout engine {engine}: {cause}")
        if alive:
            self.health.answered(engine, incarnation)
        return generations

    def _count(self, work: Work, engine: int, incarnation: int, error: Exception) -> Work:
        """``work`` after one more failure; raises where it has failed often enough without killing its engines."""
        work = replace(work, lost=(*work.lost, (engine, incarnation)), causes=(*work.causes, str(error)))
        if len(work.lost) >= MAX_ATTEMPTS and not (self._killed_all(work) and len(work.prompts) == 1):
            cause = f"share {work.home} failed {MAX_ATTEMPTS} times, last: {error}\n{self.health.describe()}"
            raise GroupError(ROLE, None, "generate", cause) from error
        return work

    def _again(self, work: Work, error: Exception) -> list[Work]:
        """What of a share that failed is to be generated again, and in which pieces.

        The second death may be the work of one of its prompts, so each of them is then tried alone: the one with which a third
        engine dies is set aside.
        """
        engine = work.lost[-1][0]
        if len(work.lost) >= MAX_ATTEMPTS:
            (prompt,) = work.prompts
            self.put_aside(SetAside(prompt, work.requests[0].token_ids, work.causes))
            return []
        if len(work.lost) == MAX_ATTEMPTS - 1 and len(work.prompts) > 1 and self._killed_all(work):
            self._log.warning("engine %d died at share %d too, whose prompts are now tried one by one: %s",
                              engine, work.home, error)  # fmt: skip
            return work.prompt_by_prompt()
        self._log.warning("engine %d lost share %d, which is generated again: %s", engine, work.home, error)
        return [work]

    def _killed_all(self, work: Work) -> bool:
        return all(self.health.has_died(engine, incarnation) for engine, incarnation in work.lost)
