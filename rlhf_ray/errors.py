"""Typed errors and the exit codes they map to.

Always true: every error a user can cause is a :class:`RequestError` or a :class:`CapacityError`, is shown as one message
without a stack trace, and names the thing, the value and the way out; every other failure keeps its trace.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_REQUEST = 2
EXIT_NO_CAPACITY = 3
EXIT_RESUMABLE = 75


class RlhfRayError(Exception):
    """Base of everything this project raises on purpose."""

    exit_code = EXIT_FAILED


class RequestError(RlhfRayError):
    """What was asked for is wrong: a config, a path, a row, a value."""

    exit_code = EXIT_WRONG_REQUEST


class ConfigError(RequestError):
    """Every problem of a config at once."""

    def __init__(self, problems: Sequence[str], source: str = "config") -> None:
        self.problems = tuple(problems)
        self.source = source
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count} problem{'' if count == 1 else 's'}\n{lines}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[tuple[str, ...], str]]:
        return type(self), (self.problems, self.source)


class DataError(RequestError):
    """A data file or one of its rows: the message starts with ``file:line``."""


class ModelLoadError(RequestError):
    """A model directory, its tokenizer or its head cannot be used as asked."""


class StorageError(RequestError):
    """A disk refuses: it is full, read-only or out of reach. What was committed before is intact."""


class MissingColumnError(RlhfRayError):
    """A trajectory batch lacks a column that a function needs."""


class CapacityError(RlhfRayError):
    """The cluster cannot hold what was asked for; the message carries a table of needed and free."""

    exit_code = EXIT_NO_CAPACITY


class ResumableStop(RlhfRayError):
    """The run stopped on request after a commit: the same command with ``resume`` goes on."""

    exit_code = EXIT_RESUMABLE


class NumericalError(RlhfRayError):
    """NaN or Inf persisted beyond what a run may skip."""


class IntegrityError(RlhfRayError):
    """Stored bytes are not the bytes that were committed."""


class StaleWeightsError(RlhfRayError):
    """Tokens were sampled by weights older than training accepts."""


class ScoringError(RlhfRayError):
    """One item could not be scored; never a reward of 0."""


class GroupError(RlhfRayError):
    """A call to a group of ranks failed: says role, rank, phase and cause."""

    def __init__(self, role: str, rank: int | None, phase: str, cause: str) -> None:
        self.role, self.rank, self.phase, self.cause = role, rank, phase, cause
        where = role if rank is None else f"{role} rank {rank}"
        super().__init__(f"{where} failed in {phase}: {cause}")

    def __reduce__(self) -> tuple[type[GroupError], tuple[str, int | None, str, str]]:
        return type(self), (self.role, self.rank, self.phase, self.cause)


class DeadlineError(GroupError):
    """A call to a group did not end in time."""
