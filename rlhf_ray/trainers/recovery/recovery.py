"""Start groups that were lost again, in place, and bring a run back to where it can go on.

Invariants: the driver and every group that can go on keep their processes. A run goes on only once every group has its model,
all trained groups hold the weights of one step, and the driver's state is of the same step. What a group that was declared
lost still does changes nothing: it writes into directories that nobody commits, and nobody waits for its answers. A group is
started again at most ``run.max_group_restarts`` times between two commits; then the error that it failed with ends the run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from rlhf_ray.actors.groups import Group, RewardGroup
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import DeadlineError, DeadRankError, GroupError, StalledError
from rlhf_ray.monitoring import events
from rlhf_ray.pending import Pending
from rlhf_ray.runs.incidents import Action, Fault, Incident
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.recovery.decision import Plan, decide
from rlhf_ray.trainers.stopping import stop_requested, stopped

KEY = "run.max_group_restarts"
HEALTH_S = 30.0
"""How long a group may take to say that it lives, on a machine that may have much to do."""


class Recoverable(Protocol):
    """A trainer that can go back."""

    unit: str
    """What its steps are called."""
    touched: bool
    """Whether trained groups may hold something else than the weights of the last finished step."""

    @property
    def finished_step(self) -> int:
        """The last finished step; 0 before the first."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""

    def finished_state(self) -> Mapping[str, Any]:
        """The driver's part of a checkpoint of that step."""

    def come_back(self, plan: Plan, state: Mapping[str, Any] | None) -> None:
        """Go on from ``plan.back_to``, whose weights the groups hold; ``state`` is the driver's in the checkpoint.

        None where the driver's state stays, or where the run goes back to its beginning. An error of a group is raised.
        """


class Recovery:
    """Keeps a run going over the loss of its ``groups``; ``checkpoints`` holds those that learn.

    ``losses`` says how often groups were started again since the last commit, by role, while the run started.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        checkpoints: Checkpointer,
        config: RunConfig,
        losses: Mapping[str, int] | None = None,
    ) -> None:
        self.groups = {group.role: group for group in groups}
        self.checkpoints = checkpoints
        self.most = config.max_group_restarts
        self._losses: Counter[str] = Counter(losses)
        self._counted_at = checkpoints.committed
        """The newest commit when losses were counted last."""

    def survive(self, error: GroupError, trainer: Recoverable) -> None:
        """Bring the run back after ``error``; raises it, or another one, where the run has to end.

        A run that was asked to stop is not brought back: it ends with :class:`ResumableStop`.
        """
        # While a resumed run loads its commit, the trainer has counted no step of it yet.
        began, step = time.time(), max(trainer.finished_step, self.checkpoints.committed or 0)
        first, lost, plan = error, frozenset[str](), None
        try:
            while True:
                self._count(error)
                if stop_requested():
                    self._commit_what_is_finished(error, trainer)
                    run = self.checkpoints.run.path
                    raise stopped(trainer.unit, self.checkpoints.committed or 0, trainer.total_steps, run) from error
                lost |= self._lost(error)
                self._commit_what_is_finished(error, trainer)
                try:
                    plan = self._bring_back(lost, error, trainer)
                except GroupError as another:
                    error = another
                else:
                    break
        except BaseException:
            with only_logged(first.role):
                self._record(first, began, step, None)
            raise
        self._record(first, began, step, plan)
        get_logger().warning(
            "%s: back after %.1f s, the run goes on after step %d", first.role, time.time() - began, plan.back_to
        )

    def mends(self, error: Exception) -> bool:
        """Whether ``error`` is the loss of a group that may be started again, be it for the first time or once too often."""
        return isinstance(error, GroupError) and error.role in self.groups and self.most > 0

    def _count(self, error: GroupError) -> None:
        """Count a loss; raises ``error`` where it is not one that can be mended, or was one too many."""
        if self.checkpoints.committed != self._counted_at:
            self._losses.clear()
            self._counted_at = self.checkpoints.committed
        if not self.mends(error):
            raise error
        events.count("groups/lost")
        self._losses[error.role] += 1
        if self._losses[error.role] > self.most:
            get_logger().error(
                "%s was started again %d times since the last commit, and is lost once more: the run ends (%s)",
                error.role, self.most, KEY,
            )  # fmt: skip
            raise error

    def _lost(self, error: GroupError) -> frozenset[str]:
        """The groups that are lost with that of ``error``: those that were on the same node, say."""
        lost, asked = {error.role}, dict[str, Pending[Any]]()
        for role, group in self.groups.items():
            try:
                asked[role] = group.health(HEALTH_S)
            except GroupError:  # there is nobody to ask
                lost.add(role)
        for role, answer in asked.items():
            try:
                answer.result()
            except GroupError:
                lost.add(role)
        return frozenset(lost)

    def _commit_what_is_finished(self, error: GroupError, trainer: Recoverable) -> None:
        """Commit the finished steps where the groups that learn may still write them, and a loss or a stop may cost them."""
        learns = error.role in self._trained()
        silent = learns and isinstance(error, DeadRankError | DeadlineError)
        if (learns or stop_requested()) and not trainer.touched and not silent:
            self.checkpoints.commit_before(error, trainer.finished_step, trainer.finished_state())

    def _trained(self) -> frozenset[str]:
        return frozenset(group.role for group in self.checkpoints.groups.values())

    def _bring_back(self, lost: frozenset[str], error: GroupError, trainer: Recoverable) -> Plan:
        trained = self._trained()
        goes_back = trainer.touched or bool(lost & trained)
        committed = self.checkpoints.find_newest() if goes_back else self.checkpoints.committed
        plan = decide(lost, trained, step=trainer.finished_step, touched=trainer.touched, committed=committed)
        get_logger().warning(
            "%s: %s is started again%s", str(error).partition("\n")[0], " and ".join(sorted(plan.restart)) or "nothing",
            f", and the run goes back to step {plan.back_to}" if goes_back else "",
        )  # fmt: skip
        trainer.touched |= goes_back
        self._start_again(plan, probe=isinstance(error, DeadRankError | DeadlineError))
        state = self.checkpoints.restore() if plan.load else None
        trainer.come_back(plan, state)
        trainer.touched = False
        return plan

    def _start_again(self, plan: Plan, *, probe: bool) -> None:
        """Start the groups of ``plan`` side by side, and load their models; ``probe`` spares one that is back already.

        One that learns is not spared: where nothing is committed it has to begin anew.
        """
        trained = self._trained()
        with ExitStack() as held:
            groups = []
            for role in sorted(plan.restart):
                group = self.groups[role]
                held.enter_context(group.restarting)
                spared = probe and role not in trained and isinstance(group, RewardGroup) and group.answers()
                if not spared:
                    group.restart()
                    groups.append(group)
            for loading in [group.setup_again() for group in groups]:
                loading.result()

    def _record(self, error: GroupError, began: float, step: int, plan: Plan | None) -> None:
        """Write the incident; ``plan`` is what brought the run back, and none where it ends."""
        back_to = (self.checkpoints.committed or 0) if plan is None else plan.back_to
        action: Action = "stopped" if plan is None else "rolled_back" if plan.back_to < step else "restarted"
        self.checkpoints.run.incidents.add(
            Incident(
                at=began, step=step, phase=error.phase, role=error.role, rank=error.rank, fault=fault_of(error),
                cause=error.cause, action=action, back_to=back_to, lost_steps=max(step - back_to, 0),
                seconds=time.time() - began,
            )
        )  # fmt: skip


@contextmanager
def only_logged(role: str) -> Iterator[None]:
    """Around the writing of a loss that ends a run: an error of that is logged, since the loss itself is raised."""
    try:
        yield
    except Exception as error:
        get_logger().error("%s: its loss could not be written to the incidents: %s", role, error or repr(error))


def fault_of(error: GroupError) -> Fault:
    """What kind of failure it was."""
    if isinstance(error, DeadRankError):
        return "stalled" if isinstance(error, StalledError) else "died"
    return "deadline" if isinstance(error, DeadlineError) else "error"
