"""Ranks of all roles on the same GPUs: each call waits until what it needs is on them, and nothing else is.

Invariants: the order is that of ``planning/colocation/phases.py``. No phase is left while a call that needs it is under way.
A rollout engine that cannot be moved is ended, so that its memory comes free, and its fleet finds it dead; anybody else's
error is raised, and the next call tries again. What needs no memory of the GPUs, such as a health check, waits for nothing.

vLLM's sleep mode and a GPU's memory have not been seen at work here yet: none of this has run on a GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rlhf_ray.actors.place import Place, RankSpec
from rlhf_ray.actors.ranks import CALL_TIMEOUT, Ranks
from rlhf_ray.console import get_logger
from rlhf_ray.errors import DeadlineError, RlhfRayError
from rlhf_ray.pending import Pending
from rlhf_ray.planning.colocation.phases import Kind, Move, Phase, Residents, Stage

GENERATE, SCORE, LEARN, PUBLISH = Phase.GENERATE, Phase.SCORE, Phase.LEARN, Phase.PUBLISH
NOTHING: tuple[Phase, ...] = ()
SETUP = "setup"
NEEDS: Mapping[str, tuple[Phase, ...]] = {
    # of a model
    "accumulate": (LEARN,),
    "apply": (LEARN,),
    "save": (LEARN,),
    "begin_save": (LEARN,),
    "load": (LEARN,),
    "save_pretrained": (LEARN,),
    "log_probs": (SCORE,),
    "divergences": (SCORE,),
    "values": (SCORE,),
    "scores": (SCORE,),
    "score": (SCORE,),
    "publish_weights": (PUBLISH,),
    "connect_engines": (PUBLISH,),
    "send_weights": (PUBLISH,),
    # of an engine; those that take weights once more, after a restart, may do so while others generate
    "generate": (GENERATE,),
    "advance": (GENERATE,),
    "receive": (GENERATE, PUBLISH),
    # of both
    **dict.fromkeys(
        (
            "health",
            "adapter_rank",
            "node_address",
            "hold_rendezvous",
            "hash_files",
            "saved",
            "room_to_save",
            "vocabulary",
            "execution",
            "describe",
            "gpu",
            "gpus",
            "probe",
            "warm_up",
        ),
        NOTHING,
    ),
    "save_without_weights": NOTHING,  # it reads names and shapes
}
"""The phases in which a call may run, the one that is entered for it first; all other calls are refused."""
KINDS: Mapping[str, Kind] = {"policy": Kind.POLICY, "critic": Kind.CRITIC, "rollout": Kind.ENGINE}
"""What each worker is; the others are frozen models."""
POLL_S = 0.05


class Turns:
    """Who is on the shared GPUs now, and who is next."""

    def __init__(self, timeout_s: float) -> None:
        """``timeout_s`` is how long what is under way may keep a phase from ending."""
        self._timeout_s = timeout_s
        self._residents = Residents()
        self._ranks: dict[str, Ranks] = {}
        self._phase: Phase | None = None
        """The phase that everything is in; None in the middle of a change."""
        self._under_way: list[Pending[Any]] = []
        """Calls that need the present phase."""
        self._one_at_a_time = threading.RLock()

    def share(self, name: str, kind: Kind, ranks: Ranks) -> TurnRanks:
        """``ranks`` on the shared GPUs, under a name of their own."""
        self._ranks[name] = ranks
        return TurnRanks(self, name, kind, ranks)

    def run(self, phases: tuple[Phase, ...], call: Callable[[], Pending[Any]]) -> Pending[Any]:
        """Begin a call in one of ``phases``."""
        with self._one_at_a_time:
            self._enter(phases)
            pending = call()
            self._under_way = [one for one in self._under_way if not one.ready()] + [pending]
            return pending

    def load(self, name: str, kind: Kind, call: Callable[[], Pending[Any]]) -> Pending[Any]:
        """Begin a call that loads a model."""
        phase = GENERATE if kind is Kind.ENGINE else SCORE

        def begin() -> Pending[Any]:
            self._residents.came(name, kind)
            return call()

        with self._one_at_a_time:
            self._residents.gone(name)
            return self.run((phase,), begin)

    def start_again(self, name: str, kind: Kind, restart: Callable[[], None]) -> None:
        """Start processes again: of an engine in a phase in which the new one may load its model.

        Those of a model are ended first, whatever the phase: what they had under way would keep it from ending.
        """
        with self._one_at_a_time:
            self._residents.gone(name)
            if kind is Kind.ENGINE:
                self._enter((GENERATE,))
            restart()

    def gone(self, name: str) -> None:
        """The processes of ``name`` have ended."""
        with self._one_at_a_time:
            self._residents.gone(name)

    def _enter(self, phases: tuple[Phase, ...]) -> None:
        if self._phase in phases:
            return
        goal = phases[0]
        self._wait_for_calls(goal)
        self._phase = None
        for stage in self._residents.changes(goal):
            self._make(stage)
        self._phase = goal

    def _wait_for_calls(self, goal: Phase) -> None:
        end = time.monotonic() + self._timeout_s
        for one in self._under_way:
            while not one.ready(POLL_S):
                if time.monotonic() > end:
                    raise DeadlineError("all", None, goal.value, f"the GPUs were still in use for {self._phase} after "
                                        f"{self._timeout_s:g} s ({CALL_TIMEOUT}): raise that")  # fmt: skip
        self._under_way = []

    def _make(self, stage: Stage) -> None:
        """Make all moves of a stage side by side; raises the first error of anybody but an engine."""
        for move in stage:
            self._residents.begin(move)
        pending = [(move, _begin(self._ranks[move.who], move)) for move in stage]
        errors = []
        for move, one in pending:
            try:
                one.result()
            except RlhfRayError as error:
                if move.who.startswith("rollout"):
                    self._lose(move, error)
                else:
                    errors.append(error)
            else:
                self._residents.done(move)
        if errors:
            raise errors[0]

    def _lose(self, move: Move, error: RlhfRayError) -> None:
        get_logger("rollout").warning(
            "%s is ended, since it did not go to %s: %s", move.who, move.goal.name.lower(), error
        )
        self._ranks[move.who].end()
        self._residents.gone(move.who)


class TurnRanks:
    """Ranks whose calls wait for their turn on the GPUs."""

    def __init__(self, turns: Turns, name: str, kind: Kind, ranks: Ranks) -> None:
        self._turns, self._name, self._kind, self._ranks = turns, name, kind, ranks
        self.role, self.size = ranks.role, ranks.size

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        def call() -> Pending[list[Any]]:
            return self._ranks.call(method, arguments, phase=phase, timeout_s=timeout_s, key=key)

        if method == SETUP:
            return self._turns.load(self._name, self._kind, call)
        needs = NEEDS[method]
        return self._turns.run(needs, call) if needs else call()

    def reached(self) -> list[Any]:
        return self._ranks.reached()

    def share(self, value: Any) -> Any:
        return self._ranks.share(value)

    def restart(self) -> None:
        self._turns.start_again(self._name, self._kind, self._ranks.restart)

    def end(self) -> None:
        self._ranks.end()
        self._turns.gone(self._name)

    def stop(self) -> None:
        self._ranks.stop()
        self._turns.gone(self._name)


class SharedPlace:
    """A place whose ranks on GPUs are all on the same ones."""

    def __init__(self, place: Place, share: float) -> None:
        """``share`` is what Ray counts each rank as of its GPU."""
        self.config = place.config
        self._place, self._share = place, share
        self._turns = Turns(place.config.call_timeout_s)

    def start(self, spec: RankSpec) -> Ranks:
        """Start the ranks of ``spec``; those without a GPU wait for nobody."""
        if not spec.resources.gpus_per_rank:
            return self._place.start(spec)
        resources = spec.resources.model_copy(update={"gpus_per_rank": self._share})
        return self.take_turns(spec, self._place.start(replace(spec, resources=resources)))

    def take_turns(self, spec: RankSpec, ranks: Ranks) -> Ranks:
        """``ranks``, which were started by ``spec``, as ranks that take turns with all others."""
        kind = KINDS.get(spec.worker, Kind.FROZEN)
        name = f"{spec.group_name}/{spec.first_rank}" if kind is Kind.ENGINE else spec.group_name
        return self._turns.share(name, kind, ranks)


def _begin(ranks: Ranks, move: Move) -> Pending[list[Any]]:
    """Ask ``ranks`` to go to a level; an error of asking is an error of the answer."""
    try:
        return ranks.call("go_to", [(int(move.goal),)] * ranks.size)
    except RlhfRayError as error:
        failure = error

    def fail() -> list[Any]:
        raise failure

    return Pending(fail)
