"""The training loop that supervised fine-tuning and reward-model training share.

Invariants: every example is used exactly once an epoch, in an order that depends on the seed alone and that a resumed run
continues. The loss of an update is divided by its own count over all ranks. An update with NaN or Inf changes no weight. What
fails after an update does not cost it: it is committed before the run ends, and the last one before anything else is done. A
group that is lost is started again in place, and goes on from the last commit (``trainers/recovery``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from rlhf_ray.actors.groups import Group, SharedBatch
from rlhf_ray.algorithms.denominators import DenominatorKind, denominator
from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.jobs.sizes import training_items, updates
from rlhf_ray.console import progress
from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.errors import GroupError, RequestError, ResumableStop, RlhfRayError
from rlhf_ray.processes import spans
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.guards import GRADIENT_NORM, LOSS, Guards
from rlhf_ray.trainers.journal import Journal
from rlhf_ray.trainers.recovery import Plan, Recovery
from rlhf_ray.trainers.rollback import SkipPolicy
from rlhf_ray.trainers.stopping import steps_begin, stop_requested, stopped
from rlhf_ray.trainers.supervised.best import Best
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import Schedule, make_schedule

Result = TypeVar("Result")


class SummedLoss(Protocol):
    """A loss that is summed over a micro-batch, and says what the sum over an update is divided by."""

    @property
    def denominator(self) -> DenominatorKind:
        """What the sum over an update is divided by."""

    def __call__(self, outputs: Any, micro_batch: TrajectoryBatch) -> Any: ...


@dataclass(frozen=True)
class Task:
    """What a job trains on: its examples, of one sequence or more each, and the loss over them."""

    examples: Sequence[Any]
    make_batch: Callable[[Sequence[Any]], TrajectoryBatch]
    loss: SummedLoss
    per_update: int
    """Examples of one optimizer update, on all ranks together."""
    parts: Sequence[Part]
    """For each file of examples, how many it has and how many of them an epoch takes."""
    epochs: float
    """Passes over the examples; the last one may be a part of one."""
    unit: int = 1
    """Sequences of one example, which stay in one micro-batch: 2 for a preference pair."""
    loss_now: Callable[[Sequence[Any]], SummedLoss] | None = None
    """The loss over the examples of an update, where it depends on the weights that the update starts from."""

    @property
    def total_examples(self) -> int:
        """How many examples all epochs take; raises :class:`RequestError` if that is none."""
        size = sum(part.per_epoch for part in self.parts)
        total = training_items(size, self.epochs)
        if total < 1:
            raise RequestError(f"epochs {self.epochs:g} of {size} examples is less than one example: raise epochs")
        return total

    def total_updates(self, checkpoint: Checkpoint | None) -> int:
        """The number of optimizer updates of a run that goes on from ``checkpoint``; the last may have fewer examples.

        So may the one at which the checkpoint was made, if that ended a shorter run, and those before it may have had
        another size.
        """
        done = SupervisedProgress.at(checkpoint)
        return done.update + updates(self.total_examples - done.examples, self.per_update)


@dataclass
class SupervisedProgress:
    """The counters that a resumed run needs."""

    update: int = 0
    examples: int = 0
    consecutive_skips: int = 0

    @classmethod
    def at(cls, checkpoint: Checkpoint | None) -> SupervisedProgress:
        """The counters in a checkpoint, or those of a new run."""
        return cls() if checkpoint is None else cls(**checkpoint.manifest.about["state"]["progress"])


class SupervisedTrainer:
    """Runs the remaining updates of a job.

    ``evaluate`` returns figures by their metric names, ``write_final`` writes ``final/``, and ``max_tokens`` bounds a training
    micro-batch.
    """

    def __init__(
        self,
        config: TrainingJob,
        task: Task,
        group: Group,
        *,
        checkpoints: Checkpointer,
        journal: Journal,
        evaluate: Callable[[], dict[str, float]],
        write_final: Callable[[], None],
        max_tokens: int,
        best: Best | None = None,
        losses: Mapping[str, int] | None = None,
    ) -> None:
        """``losses`` as of :class:`Recovery`."""
        self.config = config
        self.task = task
        self.group = group
        self.checkpoints = checkpoints
        self.journal = journal
        self.evaluate = evaluate
        self.write_final = write_final
        self.max_tokens = max_tokens
        self.best = best
        self.order = ShuffledOrder(config.run.seed, task.parts)
        self.progress = SupervisedProgress()
        self.guards = Guards(config.guards)
        advice = "lower the learning rate, or look for a bad example"
        self.skips = SkipPolicy(checkpoints, config.run.max_consecutive_skips, advice)
        self.total_examples = task.total_examples
        self.total = task.total_updates(checkpoints.checkpoint)
        self.recovery = Recovery([group], checkpoints, config.run, losses)
        self.touched = True
        """Whether the group may hold something else than the weights of the last finished update."""
        self.to_do: deque[Callable[[], None]] = deque()
        """What is left of an update that is learned. What is done goes, so that a loss of the group repeats nothing of it."""
        self._improved = False
        """Whether the evaluation of this update was the best so far."""
        self._closing = False

    def run(self) -> None:
        """Run all remaining updates, and see to it that the last one is committed and ``final/`` is written.

        Raises :class:`ResumableStop` if the process is asked to stop, and :class:`NumericalError` if too many updates in a row
        were skipped.
        """
        self.surviving(self.restore)
        steps_begin()
        self.journal.clock.take()  # the time that starting took belongs to no update
        self.stop_if_asked()
        for _ in progress(self.remaining(), self.config.kind, total=self.total - self.progress.update):
            self.surviving(self.advance)
            self.stop_if_asked()
        self._closing = True
        self.surviving(self.commit)  # a run that was killed after its last update may lack final/

    def remaining(self) -> Iterator[int]:
        """The updates that are left, by their numbers from 0; some again where the run went back."""
        while self.progress.update < self.total:
            yield self.progress.update

    def advance(self) -> None:
        """Make one update and do what is due after it, or what is left of that where the group was lost meanwhile."""
        mends = self.recovery.mends
        if not self.to_do and self.progress.update < self.total:
            with self.checkpoints.committing_on_failure(self.progress.update, self.state(), unless=mends):
                self.checkpoints.raise_failure()
                batch, schedule, loss = self.next_batch()
            self.touched = True
            with self.journal.phase("update"):
                report, applied, stood_out = self.update(batch, schedule, loss)
            with self.checkpoints.committing_on_failure(self.progress.update, self.state(), unless=mends):
                went_back = self.go_back_if_needed()
            self.touched = False
            self.to_do += self.after_update(report, applied, stood_out, batch.batch, went_back)
        with self.checkpoints.committing_on_failure(self.progress.update, self.state(), unless=mends):
            while self.to_do:
                self.to_do[0]()
                self.to_do.popleft()
        self.skips.refuse(self.guards, self.progress.consecutive_skips, self.progress.update, self.state())

    def surviving(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, which is done again where the group is lost meanwhile.

        Where it is lost for good, what is finished is committed.
        """
        while True:
            try:
                return work()
            except GroupError as error:
                with self.checkpoints.committing_on_failure(
                    self.progress.update, self.state(), unless=self.commits_nothing
                ):
                    self.recovery.survive(error, self)

    def commits_nothing(self, error: Exception) -> bool:
        """Whether ``error``, with which the group is lost for good, commits nothing: a stop has, and half an update is none."""
        return self.touched or isinstance(error, ResumableStop)

    # What recovery asks of a trainer

    unit = "update"

    @property
    def finished_step(self) -> int:
        """The last update that was made."""
        return self.progress.update

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.total

    def finished_state(self) -> Mapping[str, Any]:
        """The driver's part of a checkpoint."""
        return self.state()

    def come_back(self, plan: Plan, state: Mapping[str, Any] | None) -> None:
        """Go on from the commit that the group has loaded, or from the beginning."""
        if self._closing and plan.back_to < self.total:
            raise RlhfRayError(f"the last update is not committed, and only update {plan.back_to} could be evaluated")
        if plan.back_to < self.progress.update:
            self.to_do.clear()
        self.checkpoints.run.go_back(plan.back_to)
        self.take_up(state)

    def evaluation(self) -> dict[str, float]:
        """Evaluate and log the model as it is now."""
        with self.journal.phase("evaluation"):
            figures = self.evaluate()
        self.journal.log_evaluation(self.progress.update, figures)
        return figures

    @spans.span("the next batch")
    def next_batch(self) -> tuple[SharedBatch, Schedule, SummedLoss]:
        """The examples of the next update and the loss over them; this changes no weight, and where it fails nothing."""
        taken = self.order.taken
        try:
            return self._take_batch()
        except BaseException:
            self.order.taken = taken  # what is committed now must not leave these examples out
            raise

    def _take_batch(self) -> tuple[SharedBatch, Schedule, SummedLoss]:
        count = min(self.task.per_update, self.total_examples - self.progress.examples)
        chosen = [self.task.examples[index] for index in self.order.take(count)]
        batch = self.task.make_batch(chosen)
        schedule = schedule_update(batch, ranks=self.group.size, max_tokens=self.max_tokens, unit=self.task.unit)
        loss = self.task.loss
        if self.task.loss_now is not None:
            with self.journal.phase("log_probs"):
                loss = self.task.loss_now(chosen)
        return self.group.share(batch), schedule, loss

    def update(self, batch: SharedBatch, schedule: Schedule, loss: SummedLoss) -> tuple[Report, Applied, list[str]]:
        """Run and count one optimizer update; what is returned is that of :func:`run_update`."""
        report, applied, stood_out = run_update(self.group, batch, schedule, loss, self.guards)
        self.progress.update += 1
        if applied.skipped:
            self.guards.skip(self.progress.update)
        self.skips.report(self.guards, self.group.role, self.progress.update, int(applied.skipped), stood_out)
        self.progress.examples = self.order.taken
        self.progress.consecutive_skips = self.progress.consecutive_skips + 1 if applied.skipped else 0
        return report, applied, stood_out

    def go_back_if_needed(self) -> bool:
        """Whether the group took up earlier weights after this update, since too many were skipped."""
        progress = self.progress
        went_back = self.skips.go_back(self.guards, progress.consecutive_skips, self.group.role, progress.update)
        if went_back:
            progress.consecutive_skips = 0
        return went_back

    def after_update(
        self, report: Report, applied: Applied, stood_out: Sequence[str], batch: TrajectoryBatch, went_back: bool
    ) -> list[Callable[[], None]]:
        """What is to be done once an update is learned: log it; evaluate and commit if they are due.

        After the last one the commit comes before anything else. On the way it comes after the evaluation, whose figures it
        holds, and before ``best/``, so that after a kill between the two the state says what is missing.
        """
        update = self.progress.update
        log = partial(self.journal.log_update, update, self.total, report, applied, batch, stood_out=bool(stood_out))
        committing = [self.commit] if went_back or update == self.total else []
        settling = [self.checkpoints.settle] if went_back else []
        on_the_way = [self.evaluate_if_due, self.commit_if_due, self.keep_best] if update < self.total else []
        return [*committing, *settling, log, *on_the_way]

    def evaluate_if_due(self) -> None:
        """Evaluate the model on the way."""
        update, every = self.progress.update, self.config.evaluation.every_steps
        self._improved = False
        if every and update % every == 0:
            figures = self.evaluation()
            self._improved = self.best is not None and self.best.improves(update, figures)

    def commit_if_due(self) -> None:
        """Commit the update on the way; one that is the best so far too, unless nothing is to be committed on the way."""
        schedule = self.checkpoints.schedule
        if schedule.is_due(self.progress.update) or (self._improved and schedule.commits_on_the_way):
            self.commit()

    def keep_best(self) -> None:
        """Write ``best/`` where the update is the best so far."""
        if self._improved and self.best is not None:
            with self.journal.phase("checkpoint"):
                self.checkpoints.settle()
                self.best.keep()

    def commit(self) -> None:
        """Commit the last update; if it is that of the whole run, write ``final/`` too."""
        update = self.progress.update
        with self.journal.phase("checkpoint"):
            if update < self.total:
                self.checkpoints.save(update, self.state())
            else:
                self.checkpoints.keep_result(update, self.state(), self.write_final)

    def stop_if_asked(self) -> None:
        """Commit and raise :class:`ResumableStop` if the process was asked to stop; before the first update nothing is lost."""
        if not stop_requested():
            return
        if self.progress.update > 0:
            self.checkpoints.close()  # a commit that fails now is made up for by that of the last finished one
            self.commit()
            self.checkpoints.settle()
        raise stopped("update", self.progress.update, self.total, self.checkpoints.run.path)

    def state(self) -> dict[str, Any]:
        """The driver's part of a checkpoint, as plain JSON."""
        best = None if self.best is None else self.best.state()
        guards = self.guards.state()
        return {"progress": vars(self.progress), "order": self.order.state(), "best": best, "guards": guards}

    def restore(self) -> None:
        """Load the checkpoint that the run goes on from, if there is one."""
        self.take_up(self.checkpoints.restore())

    def take_up(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the driver's part of a checkpoint, or from the beginning of the run."""
        self.progress = SupervisedProgress.at(self.checkpoints.checkpoint)
        if state is None:
            self.order = ShuffledOrder(self.config.run.seed, self.task.parts)
            self.guards = Guards(self.config.guards)
        else:
            self.order = ShuffledOrder.from_state(state["order"], self.task.parts)
            self.guards.restore(state.get("guards"))
        if self.best is not None:
            update = self.progress.update
            self.best.restore(None if state is None else state["best"], update, self.journal.evaluated(update))


def run_update(
    group: Group, shared: SharedBatch, schedule: Schedule, loss: SummedLoss, guards: Guards
) -> tuple[Report, Applied, list[str]]:
    """Accumulate gradients on all ranks, then apply them; skip the update if any rank saw NaN or Inf, or if it stands out.

    The last part of what is returned is what stood out.
    """
    update = schedule.updates[0]
    count = denominator(loss.denominator, shared.batch, update.sequences)
    report = group.accumulate(shared, update, loss, count).result()
    name = GRADIENT_NORM + group.role
    numbers = {LOSS + group.role: report.loss}
    stood_out = guards.outliers(numbers)
    applied = group.apply(not report.finite or bool(stood_out), guards.limit(name)).result()
    if applied.refused_norm is not None:
        stood_out = guards.outliers({name: applied.refused_norm})
    if applied.grad_norm is not None:
        guards.applied({**numbers, name: applied.grad_norm})
    return report, applied, stood_out


def schedule_update(batch: TrajectoryBatch, *, ranks: int, max_tokens: int, unit: int = 1) -> Schedule:
    """A schedule that makes one update of the whole batch; ``unit`` sequences in a row stay in one micro-batch."""
    return make_schedule(batch.lengths.tolist(), ranks=ranks, max_tokens=max_tokens, unit=unit)
