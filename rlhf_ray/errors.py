"""The errors that this project raises on purpose, and the exit code of a command that ends in each.

Invariants: an error that a user can cause is a :class:`RequestError` or a :class:`CapacityError`. It is shown as one
message without a stack trace, and names the thing, the value and the way out. Every other failure keeps its trace.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_REQUEST = 2
EXIT_NO_CAPACITY = 3
EXIT_RESUMABLE = 75
SIGNALLED = 128
"""The exit code of a process that a signal stopped is this and the number of the signal, as shells have it."""


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to stop; it is no ``Exception``, so that nothing that handles failures takes it for one."""

    def __init__(self, number: int, message: str = "") -> None:
        self.number = number
        self.message = message
        """What the user should know besides, such as what goes on or how to go on."""
        super().__init__(number, message)

    @property
    def exit_code(self) -> int:
        """That of a process which the signal stopped."""
        return SIGNALLED + self.number

    def saying(self, message: str) -> Interrupted:
        """The same with a message."""
        return Interrupted(self.number, message)

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}" + (f": {self.message}" if self.message else "")


class RlhfRayError(Exception):
    """Base class of all errors that this project raises on purpose."""

    exit_code = EXIT_FAILED
    is_told = False
    """Whether the log holds its sentence already."""


class RequestError(RlhfRayError):
    """The request is wrong: a config, a path, a row of data or a value."""

    exit_code = EXIT_WRONG_REQUEST


class ConfigError(RequestError):
    """A config has problems; the message lists all of them. ``source`` is its file or recipe."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count} problem{'' if count == 1 else 's'}\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.source)


class DataError(RequestError):
    """A data file or one of its rows is wrong; the message starts with ``file:line``."""


class ModelLoadError(RequestError):
    """A model directory, its tokenizer or its head cannot be used the way the config says."""


class StorageError(RequestError):
    """A file cannot be read or written: the disk is full, read-only or out of reach. Earlier commits are intact."""


class DiskFullError(StorageError):
    """A disk or a quota is full. It is no mistake in the request: once there is space, the same goes on."""

    exit_code = EXIT_FAILED


class MissingColumnError(RlhfRayError):
    """A trajectory batch has no column that a function needs."""


class CapacityError(RlhfRayError):
    """The cluster is too small for the job; the message holds a table of needed and free resources."""

    exit_code = EXIT_NO_CAPACITY


class ResumableStop(RlhfRayError):
    """The run stopped on request after a commit; ``rlhf-ray resume`` continues it."""

    exit_code = EXIT_RESUMABLE


class ClosingError(RlhfRayError):
    """All steps of a run are committed and ``final/`` is written, but its last evaluation or its report failed."""


class ClusterLostError(ClosingError):
    """The same where the cluster has died: the run has its result, and nothing that the cluster did is missing from it."""

    exit_code = EXIT_DONE


class NumericalError(RlhfRayError):
    """More updates were skipped than ``run.max_consecutive_skips`` or ``guards.budget`` allows."""


class IntegrityError(RlhfRayError):
    """A stored file is damaged: its bytes are not those that were written."""


class StaleWeightsError(RlhfRayError):
    """Tokens were sampled by weights older than ``algorithm.max_staleness`` allows."""


class ScoringError(RlhfRayError):
    """An item could not be scored. It has no reward, rather than a reward of 0.

    ``may_pass`` says whether another attempt may end otherwise.
    """

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        self.may_pass = may_pass
        super().__init__(message)


class GroupError(RlhfRayError):
    """A call to a group of ranks failed; ``rank`` is None where no single rank is to blame."""

    def __init__(self, role: str, rank: int | None, phase: str, cause: str) -> None:
        self.role, self.rank, self.phase, self.cause = role, rank, phase, cause
        where = role if rank is None else f"{role} rank {rank}"
        super().__init__(f"{where} failed in {phase}: {cause}")

    def __reduce__(self) -> tuple[type[GroupError], tuple[str, int | None, str, str]]:
        return type(self), (self.role, self.rank, self.phase, self.cause)


class DeadRankError(GroupError):
    """The process of a rank died, or the node it ran on."""


class StalledError(DeadRankError):
    """A rank hung or was stopped, and the watchdog ended it; ``cause`` says what it did not answer, and for how long."""


class DeadlineError(GroupError):
    """A call to a group of ranks missed its deadline."""
