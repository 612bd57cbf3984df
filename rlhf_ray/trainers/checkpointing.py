"""Save everything that a training run needs to go on after a kill, and load it again.

Invariants: a checkpoint holds the driver's state and the shards of every trained group, or it does not exist. That is so
even where a rank wrote to a disk that the driver does not see: the checkpoint is then refused. Restoring returns the
driver's state only after every group has loaded its own. A step is committed once. Steps that are finished are committed
before an error that came after them ends the run. With ``checkpoint.background`` a checkpoint holds what was there when it was
saved, whatever has trained since; ranks write it and a thread commits it while training goes on. An error of that is raised at
the next step, and then the commit before it stays.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray import storage
from rlhf_ray.actors.groups import Group
from rlhf_ray.config.sections.run import CheckpointConfig
from rlhf_ray.console import get_logger
from rlhf_ray.engine.saving.room import shortage
from rlhf_ray.engine.saving.writer import Background, Written
from rlhf_ray.errors import GroupError, NumericalError, ResumableStop, ScoringError, StorageError
from rlhf_ray.pending import Pending
from rlhf_ray.runs.checkpoints import SKIPPED_SINCE, Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage import PendingDirectory
from rlhf_ray.storage.manifest import FileRecord
from rlhf_ray.trainers.commit_schedule import CommitSchedule

Answer = TypeVar("Answer")
Writing = Callable[[str, Group], Pending[Written]]
"""The files of a group, by its name, once they are written."""


class Checkpointer:
    """Writes the checkpoints and the final models of a run of ``total`` steps.

    ``checkpoint`` is the one that the run goes on from.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: CheckpointConfig,
        groups: Mapping[str, Group],
        checkpoint: Checkpoint | None,
        total: int,
    ) -> None:
        self.run = run
        self.groups = dict(groups)
        self.checkpoint = checkpoint
        self.committed = None if checkpoint is None else checkpoint.step
        """The step of the newest commit; none before the first. A step that is being written is not committed yet."""
        self.schedule = CommitSchedule(config.every_steps, total, self.committed or 0, busy=lambda: self._busy)
        self._background, self._said_short = config.background, False
        self._under_way: tuple[int, Background[None]] | None = None
        """The step that is being written, and the thread that commits it; it stays here until its outcome is known."""
        self._aborted: list[PendingDirectory] = []
        """Saves that failed, since the last that began."""
        self._also: list[Callable[[Path, int], None]] = []
        self._applied = 0
        """The newest step of this attempt whose last update was applied; 0 before the first."""
        self.skipped_since = 0
        """The first skipped step that the run may go back before, so that a commit is kept; 0 where there is none."""

    @property
    def path(self) -> Path:
        """Where the checkpoint lies that the run goes on from; only where there is one."""
        assert self.checkpoint is not None, "asked for after restore has found a checkpoint"
        return self.checkpoint.path

    def also(self, write: Callable[[Path, int], None]) -> None:
        """Have ``write`` put files of the driver's own into the directory of each checkpoint, whose step it is given too."""
        self._also.append(write)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Save ``state``, which is plain JSON, and the shards of every group as the checkpoint of ``step``.

        They are as they are now, though they may be written, and the step committed, after this returns: see :meth:`settle`.
        An error of the save before is raised. Nothing happens where the step is committed already or being written: a stop may
        meet a checkpoint that was due.
        """
        if step == self.committed or (self._under_way is not None and self._under_way[0] == step):
            return
        began = time.monotonic()
        self.settle()
        while self._aborted:
            self._aborted.pop().abort()
        pending = self.run.checkpoints.begin(step)
        about = {
            "state": copy.deepcopy(dict(state)),
            **({SKIPPED_SINCE: self.skipped_since} if self.skipped_since else {}),
        }
        background = self._background and self._has_room()
        places = {name: str(pending.path / name) for name in self.groups}
        try:
            for write in self._also:
                write(pending.path, step)
            if background:
                self._all(lambda name, group: group.begin_save(places[name]))
        except BaseException:
            self._abort(pending)
            raise
        if background:
            self.schedule.saved(step, time.monotonic() - began)
            self._under_way = step, Background(partial(self._commit_beside, pending, step, about), "commit")
        else:
            self._commit(pending, step, about, lambda name, group: group.save(places[name]).then(_while_training_waits))
            self.schedule.saved(step, time.monotonic() - began)

    def _commit_beside(self, pending: PendingDirectory, step: int, about: Mapping[str, Any]) -> None:
        """Commit ``pending`` in a thread, and tell the schedule what that took of the processors."""
        began = time.thread_time()
        ranks_s = self._commit(pending, step, about, lambda name, group: group.saved())
        self.schedule.wrote(ranks_s + time.thread_time() - began)

    def _commit(self, pending: PendingDirectory, step: int, about: Mapping[str, Any], write: Writing) -> float:
        """Commit ``pending`` once every group has written its part; if anything fails, nothing is left of it.

        Returns the processor seconds that writing took of the ranks beside training.
        """
        hashed: dict[str, FileRecord] = {}
        seconds = 0.0
        try:
            for name, written in self._all(write).items():
                hashed |= below(name, written.files)
                seconds += written.seconds
        except BaseException:
            self._abort(pending)
            raise
        self.run.checkpoints.commit(pending, about=about, hashed=hashed)
        self.committed = step
        return seconds

    def _all(self, call: Callable[[str, Group], Pending[Answer]]) -> dict[str, Answer]:
        """What a call of each group returns, by its name. The first error is raised once all have ended: none still writes."""
        pending, answers, errors = dict[str, Pending[Answer]](), dict[str, Answer](), list[Exception]()
        for name, group in self.groups.items():
            try:
                pending[name] = call(name, group)
            except GroupError as error:
                errors.append(error)
        for name, one in pending.items():
            try:
                answers[name] = one.result()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return answers

    def _abort(self, pending: PendingDirectory) -> None:
        """Remove what was written. Other ranks of a group that failed may still write: the next save removes that."""
        pending.abort()
        self._aborted.append(pending)

    def _has_room(self) -> bool:
        """Whether the memory holds copies of what all ranks would write; where it does not, that is said once."""
        asked = [group.room_to_save() for group in self.groups.values()]
        short = shortage(room for rooms in asked for room in rooms.result())
        if short is not None and not self._said_short:
            get_logger("runs").warning(
                "checkpoints are written while training waits: copies of the state would take %s. Free memory, or set "
                "checkpoint.background: false",
                short,
            )
            self._said_short = True
        return short is None

    @property
    def _busy(self) -> bool:
        """Whether a step is still being written."""
        return self._under_way is not None and not self._under_way[1].ended

    def settle(self) -> None:
        """Return once nothing is being written: what was saved last is committed, or its error is raised, once."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way[1].result()

    def raise_failure(self) -> None:
        """Raise the error of what was being written if it is known by now, once."""
        if not self._busy:
            self.settle()

    def close(self) -> None:
        """Wait for what is being written, as :meth:`settle` does; an error of it is logged."""
        under_way = self._under_way
        try:
            self.settle()
        except Exception as error:
            assert under_way is not None, "what fails was under way"
            get_logger("runs").error("the checkpoint of step %d could not be written: %s", under_way[0], error)

    @contextmanager
    def committing_on_failure(
        self, step: int, state: Mapping[str, Any], *, unless: Callable[[Exception], bool] = lambda error: False
    ) -> Iterator[None]:
        """Commit ``step``, whose driver's state is ``state``, before an error leaves the ``with`` block.

        The groups must hold the weights of ``step``; where ``unless`` says of the error that they may not, nothing is saved.
        A reward source that failed then ends the run with :class:`ResumableStop`; every other error is raised as it is.
        """
        try:
            yield
        except Exception as error:
            if not unless(error) and self.commit_before(error, step, state) and isinstance(error, ScoringError):
                raise ResumableStop(
                    f"{error}. Everything up to step {step} is committed; when the source works again, go on with: "
                    f"rlhf-ray resume {self.run.path}"
                ) from error
            raise

    def commit_before(self, error: Exception, step: int, state: Mapping[str, Any]) -> bool:
        """Try to commit ``step`` before ``error`` is raised; returns whether it is committed."""
        self.close()
        if step == self.committed:
            return True
        # The other ranks of a group that failed may sit in a collective for ever.
        together = {group.role for group in self.groups.values() if group.size > 1}
        if step == 0 or (isinstance(error, GroupError) and error.role in together):
            return False
        try:
            self.save(step, state)
            self.settle()
        except Exception as second:
            get_logger("runs").error("step %d could not be committed before the run ended: %s", step, second)
            return False
        get_logger("runs").info("step %d is committed, since the run ends with an error", step)
        return True

    def refuse_skips(
        self, skips: int, most: int, step: int, state: Mapping[str, Any], advice: str, too_many: str = ""
    ) -> None:
        """Raise :class:`NumericalError` if ``most`` or more updates in a row, the last ``skips`` up to ``step``, were skipped.

        So it does if it is told that there were ``too_many`` in all.

        What was learned before the first of them is committed. Where it is already, nothing is: so a run that is resumed again
        and again, and fails each time, keeps its earlier checkpoints.
        """
        if skips == 0:
            self._applied = step
        if skips < most and not too_many:
            return
        reason = too_many or f"{skips} updates in a row had NaN or Inf, or stood out, and were skipped"
        error = NumericalError(f"{reason}: {advice}")
        self.close()
        if (self.committed or 0) < self._applied:
            self.commit_before(error, step, state)
        raise error

    def keep_result(self, step: int, state: Mapping[str, Any], write_final: Callable[[], None]) -> None:
        """Commit ``step``, the last one, and have ``final/`` written; what is there already stays.

        One that fails does not keep the other from being written. Where the config wants no commits, there need not be space
        for one.
        """
        try:
            self.save(step, state)
            self.settle()
        except StorageError as error:
            if self.schedule.commits_on_the_way:
                raise
            get_logger("runs").warning(
                "the last step could not be committed, so an evaluation that fails now cannot be made again: %s", error
            )
        finally:
            if self.run.final_step(whole=True) != step:
                write_final()

    def save_final(self, step: int, parts: Mapping[str, tuple[Group, Mapping[str, Any]]]) -> None:
        """Write ``final/``, whole or not at all, as the weights of ``step``.

        ``parts`` maps a directory below ``final/`` (``""`` is ``final/`` itself) to the group whose model is written there
        as a Hugging Face directory, and to facts that its ``config.json`` gets besides.
        """
        pending = self.run.begin_final()
        hashed: dict[str, FileRecord] = {}
        try:
            for place, (group, metadata) in parts.items():
                directory = str(pending.path / place)
                group.save_pretrained(directory, dict(metadata)).result()
                hashed |= below(place, group.hash_files(directory).result())
        except BaseException:
            pending.abort()
            raise
        expected = [str(Path(place) / "config.json") for place in parts]
        storage.commit(pending, {"step": step}, expected, hashed)

    def find_newest(self) -> int | None:
        """Have :meth:`restore` go on from the newest commit that is whole, and return its step; none where there is none."""
        self.close()
        self.checkpoint = self.run.checkpoints.latest_valid()
        self.committed = None if self.checkpoint is None else self.checkpoint.step
        self.schedule.last = self.committed or 0
        self._applied = min(self._applied, self.committed or 0)
        return self.committed

    def restore(self) -> dict[str, Any] | None:
        """Load the checkpoint into every group and return the driver's state; none where the run starts from the beginning."""
        if self.checkpoint is None:
            return None
        for loading in [group.load(str(self.checkpoint.path / name)) for name, group in self.groups.items()]:
            loading.result()
        get_logger("runs").info("going on after step %d", self.checkpoint.step)
        state: dict[str, Any] = self.checkpoint.manifest.about["state"]
        return state


def _while_training_waits(files: dict[str, FileRecord]) -> Written:
    return Written(files, 0.0)  # the time for which it waits is counted


def below(place: str, records: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """The records of the files in the directory ``place`` (``""``: this one) by their paths from here."""
    return {str(Path(place) / name): record for name, record in records.items()}
