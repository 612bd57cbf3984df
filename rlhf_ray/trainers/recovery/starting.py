"""Load all that a run needs, and keep its start going over the loss of some of it.

Invariants: models load side by side, and what is lost is started again while the others load. What has its model keeps its
processes. An error of the request itself, which a rank found out, ends the start at once; every other one ends it once the
same group or engine has failed too often, or twice with the same error that is no death (``decision.py``). Each loss is an
incident, which is on disk before anything else is asked of what was lost.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, TypeVar, cast

from rlhf_ray.actors.loading import Loading
from rlhf_ray.actors.place import AnyGroup, PlacedGroup
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.console import get_logger
from rlhf_ray.errors import GroupError
from rlhf_ray.monitoring import events
from rlhf_ray.rollout.engine import ROLE as ENGINES
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import START, Action, Incident
from rlhf_ray.trainers.recovery.decision import loads_again
from rlhf_ray.trainers.recovery.recovery import KEY, fault_of, only_logged

ENGINES_KEY = "rollout.max_restarts"
LOOK_EVERY_S = 1.0

Result = TypeVar("Result")
Answer = tuple[str, Any, BaseException | None]
"""The name of what was loading, its value, and the error in its place."""


class Starting:
    """The start of an attempt of a run, which goes on from ``checkpoint``."""

    def __init__(self, run: RunDirectory, config: TrainingJob, checkpoint: Checkpoint | None) -> None:
        self._run = run
        self._step = 0 if checkpoint is None else checkpoint.step
        rollout = getattr(config, "rollout", None)
        self._most = {ENGINES: 0 if rollout is None else rollout.max_restarts}
        self._most_of_groups = config.run.max_group_restarts
        self._parts: dict[str, Loading] = {}
        self._errors: defaultdict[str, list[GroupError]] = defaultdict(list)
        self._lost: defaultdict[str, list[tuple[float, GroupError]]] = defaultdict(list)
        """Losses that are not overcome yet, and when each was noticed (seconds since 1970)."""
        self.losses: Counter[str] = Counter()
        """How often groups were started again, by role: the budget is that of the whole run."""

    def groups(self, placed: Mapping[str, PlacedGroup[Any]]) -> dict[str, Any]:
        """Load the models of all groups; they are ready then."""
        return self.load({name: one.loading for name, one in placed.items()})

    def group(self, placed: PlacedGroup[AnyGroup]) -> AnyGroup:
        """Load the model of one group."""
        role = placed.group.role
        return cast(AnyGroup, self.groups({role: placed})[role])

    def surviving(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, which asks loaded groups something and is done again where one is lost meanwhile."""
        while True:
            try:
                return work()
            except GroupError as error:
                name = next((name for name, one in self._parts.items() if one.role == error.role != ENGINES), None)
                if name is None:
                    raise
                self._load([name], lost={name: error})

    def load(self, parts: Mapping[str, Loading]) -> dict[str, Any]:
        """Load all of them side by side; the values by their names, once every one is there."""
        self._parts.update(parts)
        return self._load(parts)

    def _load(self, names: Iterable[str], lost: Mapping[str, GroupError] | None = None) -> dict[str, Any]:
        values, names = dict[str, Any](), list(names)
        answers = queue.SimpleQueue[Answer]()
        with ExitStack() as held:
            try:
                for name in names:
                    if lost is not None and name in lost:
                        self._again(name, lost[name], answers, held)
                    else:
                        _load_beside(name, self._parts[name], answers)
                while len(values) < len(names):
                    name, value, error = _next(answers)
                    if isinstance(error, GroupError):
                        self._again(name, error, answers, held)
                    elif error is not None:
                        raise error
                    else:
                        values[name] = value
                        self._record(name, "restarted")
            except BaseException:
                for name in list(self._lost):
                    with only_logged(name):
                        self._record(name, "stopped")
                raise
        return {name: values[name] for name in names}

    def _again(self, name: str, error: GroupError, answers: queue.SimpleQueue[Answer], held: ExitStack) -> None:
        """Start again what was lost, and begin to load it; raises ``error`` where that has no point."""
        part, before = self._parts[name], self._errors[name]
        self._lost[name].append((time.time(), error))
        is_engine = part.role == ENGINES
        most, key = (self._most[ENGINES], ENGINES_KEY) if is_engine else (self._most_of_groups, KEY)
        if error.role != part.role or not loads_again(error, before, most=most):
            if before:
                how = "once more" if len(before) >= most else "with the same error"
                if error.role != part.role:
                    how = f"with an error of {error.role}"
                get_logger().error(
                    "%s was started again while the run starts, %d of %d times (%s), and fails %s: the run ends",
                    name, len(before), most, key, how,
                )  # fmt: skip
            raise error
        before.append(error)
        events.count("rollout/engine_deaths" if is_engine else "groups/lost")
        if not is_engine:
            self.losses[part.role] += 1
        get_logger().warning(
            "%s: it is started again, %d of %d (%s)", str(error).partition("\n")[0], len(before), most, key
        )
        held.enter_context(part.held)
        try:
            part.restart()
        except GroupError as another:
            answers.put((name, None, another))
            return
        _load_beside(name, part, answers)

    def _record(self, name: str, action: Action) -> None:
        """Write the incidents of what is back, or will not come."""
        part, now = self._parts[name], time.time()
        for at, error in self._lost.pop(name, []):
            rank = error.rank if part.rank is None else part.rank
            self._run.incidents.add(
                Incident(
                    at=at, step=self._step, phase=START, role=error.role, rank=rank, fault=fault_of(error), cause=error.cause,
                    action=action, back_to=self._step, lost_steps=0, seconds=now - at,
                )
            )  # fmt: skip
            if action == "restarted":
                get_logger().warning("%s: back after %.1f s, and the run goes on with its start", name, now - at)


def _load_beside(name: str, part: Loading, answers: queue.SimpleQueue[Answer]) -> None:
    """Load a part, and put the outcome into ``answers`` when it is there; this waits for nothing."""
    begun = None if part.waits else part.begin()

    def load() -> None:
        try:
            answers.put((name, (begun or part.begin()).result(), None))
        except BaseException as error:  # raised again where the answers are read
            answers.put((name, None, error))

    within = contextvars.copy_context()  # so that the calls of this thread belong to the span that this is in
    threading.Thread(target=within.run, args=(load,), name=f"loading {name}", daemon=True).start()


def _next(answers: queue.SimpleQueue[Answer]) -> Answer:
    """The next answer; every call that is waited for has a deadline."""
    while True:
        try:
            return answers.get(timeout=LOOK_EVERY_S)
        except queue.Empty:
            continue
