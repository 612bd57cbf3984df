"""What a training run does after its last step is committed: the last evaluation and the report.

Invariant: a failure there costs nothing that was trained. It ends the run with an error that says what failed, that the
result is there, and how to do only what is missing. A cluster that has died is no failure of the run any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.actors.connection import lost_cluster
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ClosingError, ClusterLostError, ResumableStop, RlhfRayError, ScoringError
from rlhf_ray.processes import lifeline
from rlhf_ray.runs.directory import RunDirectory


@contextmanager
def closing(run: RunDirectory, step: int, what: str) -> Iterator[None]:
    """Do a part of the closing, called ``what``, of a run whose last step is ``step``.

    An error in the ``with`` block becomes a :class:`ClosingError`, and that of a reward source a :class:`ResumableStop`.
    Where the cluster has died, it is a :class:`ClusterLostError`.
    """
    lifeline.result_is_there()  # Ray may end this process with its cluster
    done = f"all {step} steps are done and committed, and {run.final} is written"
    way_on = f"rlhf-ray resume {run.path} does only what is missing"
    try:
        yield
    except ScoringError as error:
        raise ResumableStop(f"{what} failed: {error}. But {done}; {way_on}") from error
    except Exception as error:
        lost = lost_cluster()
        if lost is not None:
            raise ClusterLostError(f"{what} could not be made: {lost}. But {done}; {way_on}") from error
        if not isinstance(error, RlhfRayError):  # the message of any other does not say where it comes from
            get_logger().error("%s failed", what, exc_info=error)
        raise ClosingError(f"{what} failed: {error or repr(error)}. But {done}; {way_on}") from error
