"""What is where while a fleet samples without a pause: which engine has which prompt, what is finished, and what is lost.

A pure state machine. Its unit is a prompt with all its samples, which are given to one engine together.

Invariants:

- Every prompt that is given ends once: with one generation for each of its requests, in their order, or set aside.
- What a process had in work when it died is sampled again from the start, elsewhere; what it had finished is kept.
- A generation is by weights that were published between its begin and now, never by older ones after newer ones.
- A prompt goes to the engine with the fewest samples in work, the earliest prompt first, and to none that has ``at_once``.
- A prompt at which two processes died is tried alone on an engine, so that it is known whose work the third death is: then it
  is set aside. A process that dies while it does not sample is nobody's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Key

ATTEMPTS = 3
"""How many engines a prompt may kill."""
Process = tuple[int, int]
"""An engine and its incarnation."""


@dataclass
class _Prompt:
    number: int
    requests: tuple[GenerationRequest, ...]
    process: Process | None = None
    """Which process has it in work."""
    version: int = 0
    """The version of the weights when it was given to that process."""
    done: dict[Key, Generation] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)
    """Why processes died at it."""

    @property
    def left(self) -> list[GenerationRequest]:
        return [request for request in self.requests if request.key not in self.done]

    @property
    def alone(self) -> bool:
        """Whether it is tried alone."""
        return len(self.causes) >= ATTEMPTS - 1


@dataclass(frozen=True)
class Answered:
    """A prompt that has ended."""

    number: int
    requests: tuple[GenerationRequest, ...]
    generations: tuple[Generation, ...]
    """One for each request, in their order; none of a prompt that was set aside."""
    causes: tuple[str, ...] = ()
    """Of a prompt that was set aside: why processes died at it."""


class Stream:
    """Prompts in work on the engines of a fleet, and those that wait for one."""

    def __init__(self, at_once: int | None = None) -> None:
        """``at_once`` samples are in work on one engine at most, rounded up to whole prompts; None: as many as there are."""
        if at_once is not None and at_once < 1:
            raise ValueError(f"at_once is {at_once}, but an engine needs 1 sample in work at least")
        self._at_once = at_once
        self._prompts: dict[int, _Prompt] = {}
        self._keys: set[Key] = set()
        self._unsent: dict[Process, list[GenerationRequest]] = {}

    def give(self, number: int, requests: Sequence[GenerationRequest]) -> None:
        """Add a prompt, which is called ``number`` here; lower numbers are begun first."""
        keys = {request.key for request in requests}
        if number in self._prompts or keys & self._keys or len(keys) != len(requests):
            raise RequestError(f"prompt {number} or one of its samples is in work already: name each of them once")
        self._prompts[number] = _Prompt(number, tuple(requests))
        self._keys |= keys

    def assign(self, processes: Sequence[Process], version: int) -> None:
        """Give prompts that wait to ``processes``, which hold the weights of ``version``."""
        waiting = sorted((one for one in self._prompts.values() if one.process is None), key=lambda one: one.number)
        load = {process: self.held(process) for process in processes}
        closed = {one.process for one in self._prompts.values() if one.alone and one.process is not None}
        for prompt in [one for one in waiting if one.alone]:
            free = [process for process in load if process not in closed]
            if not free:
                break
            chosen = min(free, key=lambda process: (load[process], process))
            closed.add(
                chosen
            )  # it gets no more work: now, or once it has done what it has, the prompt has it for itself
            if load[chosen] == 0:
                self._begin(prompt, chosen, version)
        for prompt in [one for one in waiting if not one.alone]:
            free = [process for process in load if process not in closed and self._has_room(load[process])]
            if not free:
                break
            chosen = min(free, key=lambda process: (load[process], process))
            load[chosen] += len(prompt.left)
            self._begin(prompt, chosen, version)

    def send(self, process: Process) -> list[GenerationRequest]:
        """The requests that were assigned to a process and not yet sent to it: they are sent now."""
        return self._unsent.pop(process, [])

    def take(self, process: Process, generations: Sequence[Generation], version: int) -> list[Answered]:
        """Note what a process finished, whose weights are of ``version`` now; returns the prompts that are answered with it.

        Raises ``ValueError``, and notes nothing, where these are not generations of what it has in work, by weights that it
        held since.
        """
        mine = {
            request.key: prompt
            for prompt in self._prompts.values()
            if prompt.process == process
            for request in prompt.left
        }
        unsent = {request.key for request in self._unsent.get(process, ())}
        keys = [generation.key for generation in generations]
        if len(set(keys)) != len(keys) or not set(keys) <= mine.keys() - unsent:
            raise ValueError("it answered with other samples than were requested")
        for generation in generations:
            versions = (mine[generation.key].version, *generation.weight_versions, version)
            if any(later < earlier for earlier, later in pairwise(versions)):
                raise ValueError(
                    f"it sampled with weight versions {sorted(set(generation.weight_versions))}, one after the other not in "
                    f"order or not among the published ones of that time, {versions[0]} to {version}"
                )
        for generation in generations:
            mine[generation.key].done[generation.key] = generation
        ended = {prompt.number: prompt for prompt in map(mine.__getitem__, keys) if not prompt.left}
        return [self._end(prompt, tuple(prompt.done[one.key] for one in prompt.requests)) for prompt in ended.values()]

    def lose(self, process: Process, cause: str, *, sampling: bool) -> list[Answered]:
        """A process died; ``sampling`` says whether it was at work on its samples. Returns the prompts that are set aside."""
        self._unsent.pop(process, None)
        aside = []
        for prompt in [one for one in self._prompts.values() if one.process == process]:
            prompt.process = None
            if sampling:
                prompt.causes.append(cause)
            if len(prompt.causes) >= ATTEMPTS:
                aside.append(self._end(prompt, ()))
        return aside

    def held(self, process: Process) -> int:
        """How many samples a process has in work."""
        mine = (prompt for prompt in self._prompts.values() if prompt.process == process)
        return sum(len(prompt.requests) - len(prompt.done) for prompt in mine)

    @property
    def processes(self) -> set[Process]:
        """Processes that have samples in work."""
        return {prompt.process for prompt in self._prompts.values() if prompt.process is not None}

    @property
    def waiting(self) -> int:
        """How many prompts no process has."""
        return sum(prompt.process is None for prompt in self._prompts.values())

    def _has_room(self, load: int) -> bool:
        return self._at_once is None or load < self._at_once

    def _begin(self, prompt: _Prompt, process: Process, version: int) -> None:
        prompt.process, prompt.version = process, version
        self._unsent.setdefault(process, []).extend(prompt.left)

    def _end(self, prompt: _Prompt, generations: tuple[Generation, ...]) -> Answered:
        del self._prompts[prompt.number]
        self._keys -= {request.key for request in prompt.requests}
        return Answered(prompt.number, prompt.requests, generations, tuple(prompt.causes) if not generations else ())
