"""Keeps the engines of a fleet sampling: each is asked, again and again, to take on what is new and to sample for a moment.

Invariants: what is where is :class:`~rlhf_ray.rollout.fleet.stream.Stream`'s to say. No turn waits for an engine while
another is healthy; where none is, it waits for one, for as long as a restart may take (``cluster.start_timeout_s``). An engine
whose call failed or did not come back in time is dead, whatever else it says, because nobody knows what it has in work; it is
restarted. Between two turns without a call under way the engines stand still, and weights may change.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlhf_ray.errors import GroupError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import ROLE
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError
from rlhf_ray.rollout.fleet.engines import POLL_S
from rlhf_ray.rollout.fleet.fleet import Fleet
from rlhf_ray.rollout.fleet.shares import SetAside
from rlhf_ray.rollout.fleet.stream import Answered, Process, Stream
from rlhf_ray.rollout.requests import Generation, GenerationRequest

MOMENT_S = 0.2
"""How long an engine samples before it looks for new requests: a hundred times what a call costs."""


class Pump:
    """One stream on the engines of a fleet, driven by one thread."""

    def __init__(
        self, fleet: Fleet, *, timeout_s: float, at_once: int | None = None, moment_s: float = MOMENT_S
    ) -> None:
        """An engine that finishes nothing in ``timeout_s`` seconds of sampling is too slow; ``at_once`` as in the stream."""
        self.fleet = fleet
        self._stream = Stream(at_once)
        self._timeout_s, self._moment_s = timeout_s, moment_s
        self._calls: dict[int, tuple[Process, Pending[list[Generation]], float]] = {}
        self._barren: dict[Process, float] = {}
        """Seconds that a process with samples in work has sampled since it finished one."""
        self._never_begun: list[Answered] = []
        """Prompts that were set aside before they were given."""
        self.sampled_s = 0.0
        """Seconds for which engines have sampled, all together; of calls that are back."""

    def give(self, number: int, requests: Sequence[GenerationRequest]) -> None:
        """Add a prompt, all of whose samples are ``requests``; one that was set aside before ends without any."""
        if requests and requests[0].prompt_id in self.fleet.set_aside:
            self._never_begun.append(Answered(number, tuple(requests), ()))
        else:
            self._stream.give(number, requests)

    @property
    def calling(self) -> bool:
        """Whether an engine is sampling now."""
        return bool(self._calls)

    @property
    def holding(self) -> bool:
        """Whether engines have samples in work."""
        return bool(self._stream.processes)

    @property
    def working(self) -> bool:
        """Whether there is a prompt that has not ended."""
        return bool(self._stream.processes or self._stream.waiting or self._never_begun)

    def turn(self, *, begin: bool = True, sample: bool = True) -> list[Answered]:
        """Look after every engine once; returns the prompts that ended.

        It takes a few hundredths of a second, or until an engine is healthy. Where none will be, that is an error.

        Without ``begin`` no further prompt is begun, and without ``sample`` no engine is asked to sample on.
        """
        engines = self.fleet.engines
        engines.refuse_if_stopped("generate")
        engines.heal()
        ended, self._never_begun = self._never_begun, []
        ended += self._lose_dead()
        if sample and (self._stream.processes or (begin and self._stream.waiting)):
            if not self._calls:
                engines.await_healthy("generate", "no engine is healthy")
            self._call(begin)
        ended += self._collect()
        for one in ended:
            if one.causes:
                self.fleet.put_aside(SetAside(one.requests[0].prompt_id, one.requests[0].token_ids, one.causes))
        return ended

    def _call(self, begin: bool) -> None:
        health = self.fleet.health
        healthy = [(engine, health[engine].incarnation) for engine in health.healthy]
        if begin:
            assert health.version is not None, "an engine is healthy only with published weights"
            self._stream.assign(healthy, health.version)
        for process in healthy:
            if process[0] not in self._calls and self._stream.held(process):
                self._sample(process)

    def _sample(self, process: Process) -> None:
        new = self._stream.send(process)
        began = time.monotonic()
        _, call = self.fleet.engines.start(
            process[0], lambda handle: handle.advance(new, self._moment_s, self._timeout_s)
        )
        self._calls[process[0]] = process, call, began

    def _collect(self) -> list[Answered]:
        """What the calls that are back have brought; it waits a little for the first."""
        ended, wait_s = list[Answered](), POLL_S
        for engine, (process, call, began) in list(self._calls.items()):
            if call.ready(wait_s) and not self.fleet.health.has_died(*process):
                del self._calls[engine]
                ended += self._take(process, call, time.monotonic() - began)
            wait_s = 0.0
        if wait_s:
            time.sleep(POLL_S)
        return ended

    def _take(self, process: Process, call: Pending[list[Generation]], seconds: float) -> list[Answered]:
        engines, (engine, incarnation) = self.fleet.engines, process
        self.sampled_s += seconds
        engines.refuse_if_stopped("generate")  # the end of a call is then no news
        try:
            generations = call.result()
            assert engines.health.version is not None, "an engine samples only with published weights"
            ended = self._stream.take(process, generations, engines.health.version)
        except (GroupError, ValueError) as error:
            cause = error.cause if isinstance(error, GroupError) else str(error)
            engines.lose(engine, incarnation, EngineDeadError(ROLE, engine, "generate", cause))
            return self._stream.lose(process, cause, sampling=True)
        engines.health.answered(engine, incarnation)
        self._barren[process] = 0.0 if generations else self._barren.get(process, 0.0) + seconds
        if self._barren[process] > self._timeout_s:
            cause = (
                f"it has {self._stream.held(process)} samples in work, and finished none in {self._timeout_s:g} s "
                "(rollout.timeout_s): raise that, lower rollout.max_new_tokens or rollout.max_num_seqs, or add engines "
                "(rollout.engines)"
            )
            raise TooSlowError(ROLE, engine, "generate", cause)
        return ended

    def _lose_dead(self) -> list[Answered]:
        """Take back what dead processes had in work."""
        ended = list[Answered]()
        for process in sorted(self._stream.processes):
            if self.fleet.health.has_died(*process):
                called = self._calls.get(process[0])
                sampling = called is not None and called[0] == process
                if sampling:
                    del self._calls[process[0]]
                self._barren.pop(process, None)
                ended += self._stream.lose(process, self.fleet.health[process[0]].cause, sampling=sampling)
        return ended
