"""How the driver calls the ranks of one role, in this process or as Ray actors.

Invariants:

- A call reaches every rank, has a deadline, and ends in one value per rank (in rank order) or in one typed error that names
  role, rank, phase and cause.
- The first rank that fails ends the call, because its peers may be waiting in a collective that never completes. Where a rank
  died, the error is about that rank and its node, whichever peer noticed first. A refusal on another node names it.
- Calls from several threads reach all ranks in the same order. Otherwise ranks would meet in different collectives.
- Nothing here knows what the ranks compute.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rlhf_ray.actors.answers import are_there, unanswered, why_late
from rlhf_ray.errors import DeadlineError, DeadRankError, GroupError, RlhfRayError, StalledError
from rlhf_ray.monitoring.stalls import CallBook, OpenCall
from rlhf_ray.pending import Pending
from rlhf_ray.processes import progress, spans

CALL_TIMEOUT = "cluster.call_timeout_s"
START_TIMEOUT = "cluster.start_timeout_s"
"""Keys of how long a call may take, and how long loading a model may."""
UNPLACED = "unknown"
"""The node of a rank for which Ray still looks for a place."""
DEATH_SHOWS_S = 4.0
"""How long after a node was killed Ray may take to say so of its actors: it needs about two seconds."""


BESIDE = frozenset({"saved"})
"""Methods that wait for work of a thread, and so run beside whatever else a rank is called for."""
BY_THE_DISK = frozenset({"save", "saved", "save_pretrained", "hash_files", "load"})
"""Methods whose time follows the disk, which other jobs may slow down: how long one took says nothing of the next."""


class Ranks(Protocol):
    """What a group needs to reach its ranks."""

    role: str
    size: int

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        """Run ``method`` on every rank, with its own arguments; results in rank order.

        ``timeout_s`` is by default that of all calls (``cluster.call_timeout_s``); ``key`` names the key of another one.
        """

    def reached(self) -> list[Any]:
        """What a rank of another group reaches these ranks by, in rank order; it can be an argument of calls."""

    def share(self, value: Any) -> Any:
        """Put ``value`` where every rank can read it; the handle can be an argument of calls."""

    def restart(self) -> None:
        """End the ranks and start new ones in their places, which have no model yet; this waits for neither.

        Calls that are on their way to the old ones fail.
        """

    def end(self) -> None:
        """End the processes of the ranks, and return when they have ended; calls fail until they are started again."""

    def stop(self) -> None:
        """End the ranks, for good."""


class InProcessRanks:
    """One rank in this process, so that the same groups run without Ray."""

    size = 1

    def __init__(self, role: str, worker: Any, make: Callable[[], Any] | None = None) -> None:
        """``make`` gives another worker in the place of ``worker``, by default one as it was without a model."""
        self.role = role
        self.worker = worker
        self._make = make or (lambda: type(worker)())
        self._one_at_a_time = threading.RLock()

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        if self.worker is None:
            raise DeadRankError(self.role, 0, phase or method, "it was ended")
        try:
            with nullcontext() if method in BESIDE else self._one_at_a_time, self._recorded(method):
                value = getattr(self.worker, method)(*arguments[0])
        except RlhfRayError:
            raise
        except Exception as error:
            raise GroupError(self.role, 0, phase or method, f"{error!r}\n{traceback.format_exc()}") from error
        return Pending.done([value])

    def _recorded(self, method: str) -> AbstractContextManager[None]:
        sent = spans.sending(self.role, method, beside=method in BESIDE)
        return nullcontext() if sent is None else spans.answering(sent.context, self.worker.rank, method)

    def reached(self) -> list[Any]:
        return [self.worker]

    def share(self, value: Any) -> Any:
        return value

    def restart(self) -> None:
        with self._one_at_a_time:
            self.worker = self._make()

    def end(self) -> None:
        self.worker = None

    def stop(self) -> None:
        self.worker = None


class RayRanks:
    """Ray actors, one per rank.

    ``nodes`` says of each rank where it runs, for errors. ``start_again`` starts actors in the places of the first ones, or in
    others: its argument says how many times it was called before, and one. ``where`` then says on which nodes they are, as
    far as Ray has placed them.
    """

    def __init__(
        self,
        role: str,
        actors: Sequence[Any],
        *,
        timeout_s: float,
        on_stop: Callable[[], None],
        nodes: Sequence[str] = (),
        start_again: Callable[[int], Sequence[Any]] | None = None,
        where: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self.role = role
        self.actors = list(actors)
        self.nodes = list(nodes)
        self._where = where
        self._moved = False
        """Whether the actors were started again since ``nodes`` was read."""
        self.size = len(self.actors)
        self.timeout_s = timeout_s
        self._on_stop = on_stop
        self._start_again = start_again
        self._restarts = 0
        self._one_order = threading.Lock()
        self.book = CallBook(role)
        self._stalled: dict[int, str] = {}
        """Ranks that were ended since the last start because they did not answer, and what is said of them."""

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        sent = spans.sending(self.role, method, beside=method in (*BESIDE, "health"))
        references = self._submit(method, arguments, sent)
        limit, name = (self.timeout_s, CALL_TIMEOUT) if timeout_s is None else (timeout_s, key)
        began = time.monotonic()
        # It lives as long as somebody may ask for the values. A process that starts anew has to import everything first.
        usual = key != START_TIMEOUT and method not in BY_THE_DISK
        entry = self.book.begin(method, references, began, usual=usual)

        def gather() -> list[Any]:
            try:
                with spans.waiting(sent, for_all=True):
                    values = self._gather(references, phase or method, began, limit, name)
            except BaseException:
                self.book.fail(entry)
                raise
            self.book.end(entry, time.monotonic())
            return values

        def ready(timeout_s: float) -> bool:
            with spans.waiting(sent):
                return are_there(references, timeout_s) or time.monotonic() >= began + limit

        return Pending(gather, ready)

    def open_calls(self) -> list[OpenCall]:
        """The calls that somebody may wait for and that not every rank has answered."""
        return self.book.open(unanswered, time.monotonic())

    def silent(self, ranks: Sequence[int], timeout_s: float) -> dict[int, bool]:
        """Which of ``ranks`` do not even say how they are, beside what they do: these are stopped or cut off."""
        import ray

        asked = {rank: self.actors[rank].health.remote() for rank in ranks if rank < len(self.actors)}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        return {rank: reference not in answered for rank, reference in asked.items()}

    def stacks_elsewhere(self, timeout_s: float) -> str:
        """What the ranks on other nodes do, as far as they say so in time; nothing where all are on this one."""
        import ray
        from ray.exceptions import RayError

        away = [rank for rank in range(len(self.actors)) if self._is_elsewhere(rank)]
        asked = {rank: self.actors[rank].stacks.remote() for rank in away}
        answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s) if asked else ([], [])
        parts = []
        for rank, reference in asked.items():
            try:
                text = ray.get(reference, timeout=timeout_s) if reference in answered else "   it does not answer"
            except RayError as error:
                text = f"   {error!r}"
            parts.append(f"== {self.role} rank {rank} on node {self.nodes[rank]}\n{text}")
        return "\n".join(parts)

    def end_stalled(self, causes: Mapping[int, str]) -> None:
        """End the processes of ranks that do not answer: what is asked of them fails at once with :class:`StalledError`."""
        import ray

        for rank, cause in causes.items():
            if rank < len(self.actors):
                self._stalled[rank] = cause
                ray.kill(self.actors[rank], no_restart=True)

    def reached(self) -> list[Any]:
        return list(self.actors)

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def restart(self) -> None:
        import ray
        from ray.exceptions import RayError

        with self._one_order:
            if not self.actors or self._start_again is None:
                raise GroupError(
                    self.role, None, "restart", "its processes have been stopped, or have no place to restart in"
                )
            for actor in self.actors:
                ray.kill(actor, no_restart=True)
            self._restarts += 1
            self._stalled = {}
            try:
                self.actors = list(self._start_again(self._restarts))
            except RayError as error:
                raise GroupError(self.role, None, "restart", repr(error)) from error
            self._moved = self._where is not None

    def end(self) -> None:
        import ray

        actors = list(self.actors)
        for actor in actors:
            ray.kill(actor, no_restart=True)
        ray.wait([actor.__ray_ready__.remote() for actor in actors], num_returns=len(actors), timeout=DEATH_SHOWS_S)

    def stop(self) -> None:
        import ray

        with self._one_order:  # a call under way reaches all actors or none
            actors, self.actors = self.actors, []
        for actor in actors:
            ray.kill(actor, no_restart=True)
        self._on_stop()

    def _submit(self, method: str, arguments: Sequence[tuple[Any, ...]], sent: spans.Sent | None) -> list[Any]:
        context = spans.carried(sent)
        with self._one_order:
            if not self.actors:
                raise GroupError(self.role, None, method, "its processes have been stopped")
            actors = zip(self.actors, arguments, strict=True)
            return [getattr(actor, method).remote(*own, **context) for actor, own in actors]

    def _gather(self, references: Sequence[Any], phase: str, began: float, limit: float, key: str | None) -> list[Any]:
        """The values of ``references`` in order, or the failure of the group as a typed error as soon as it is known.

        They were asked for at ``began`` (monotonic seconds) and have ``limit`` seconds, which the config has under ``key``.
        """
        import ray

        ranks = {reference: rank for rank, reference in enumerate(references)}
        values: dict[int, Any] = {}
        waiting = list(references)
        last_answer: float | None = None
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(began + limit - time.monotonic(), 0.0))
            if not ready:
                late = sorted(ranks[reference] for reference in waiting)
                raise DeadlineError(self.role, late[0], phase, why_late(late, limit, key, last_answer))
            progress.made()
            last_answer = time.monotonic() - began
            for reference in ready:
                values[ranks[reference]] = self._value(reference, ranks[reference], phase)
        self._look_where()
        return [values[rank] for rank in range(len(references))]

    def _look_where(self) -> None:
        """Read on which nodes actors are that were started again; they are there once they have answered."""
        if self._moved and self._where is not None:
            nodes = list(self._where())
            self._moved, self.nodes = UNPLACED in nodes, nodes

    def _value(self, reference: Any, rank: int, phase: str) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

        try:
            return ray.get(reference, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, RlhfRayError):
                raise self._with_its_node(error.cause, rank) from None
            failure = GroupError(self.role, rank, phase, f"{error.cause!r}\n{error}")
            raise self._dead_peer(failure) or failure from error
        except RayActorError as error:
            raise self._death(rank, phase, error) from error
        except GetTimeoutError as error:
            raise DeadlineError(self.role, rank, phase, "its result could not be fetched within 60 s") from error
        except RayError as error:
            raise GroupError(self.role, rank, phase, repr(error)) from error

    def _with_its_node(self, error: RlhfRayError, rank: int) -> RlhfRayError:
        """``error``, which names the node where that is not this one: a path may be missing there alone."""
        if self._is_elsewhere(rank) and self.nodes[rank] not in str(error):
            error.args = (f"{error} ({self.role} rank {rank} on node {self.nodes[rank]})",)
        return error

    def _is_elsewhere(self, rank: int) -> bool:
        import ray

        node = self.nodes[rank] if self.nodes else ""
        return bool(node) and not node.startswith(f"{ray.util.get_node_ip_address()} ")

    def _death(self, rank: int, phase: str, error: Exception) -> DeadRankError:
        where = f" on node {self.nodes[rank]}" if self.nodes else ""
        if rank in self._stalled:
            return StalledError(self.role, rank, phase, f"{self._stalled[rank]}; its process{where} was ended")
        return DeadRankError(self.role, rank, phase, f"its process{where} died: {error}")

    def _dead_peer(self, failure: GroupError) -> DeadRankError | None:
        """The death that ``failure`` is a consequence of, if there is one: a peer notices before Ray does, in a collective.

        A peer that lives and is busy does not answer, so this waits ``DEATH_SHOWS_S`` where no rank has died.
        """
        import ray
        from ray.exceptions import RayActorError, RayError

        peers = {actor.__ray_ready__.remote(): rank for rank, actor in enumerate(self.actors) if rank != failure.rank}
        waiting, deadline = list(peers), time.monotonic() + DEATH_SHOWS_S
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                break
            try:
                ray.get(ready, timeout=DEATH_SHOWS_S)
            except RayActorError as error:
                noticed = f"{error}\nRank {failure.rank} noticed: {failure.cause.partition(chr(10))[0]}"
                return self._death(peers[ready[0]], failure.phase, RuntimeError(noticed))
            except RayError:
                continue
        return None
