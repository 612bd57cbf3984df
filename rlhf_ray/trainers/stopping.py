"""Stop a training run when it gets SIGTERM, SIGINT or SIGHUP.

Invariant: before the first step the signal raises :class:`Interrupted` at once, since nothing can be lost yet. From then on the
handler only sets a flag, which the training loop reads after each step: nothing is interrupted in the middle.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType

from rlhf_ray.errors import Interrupted, ResumableStop
from rlhf_ray.processes import interrupts

_stop = threading.Event()
_received: list[int] = []
_training = threading.Event()


def listen() -> None:
    """Turn the signals into a request to stop. The run that begins now has made no step yet: an earlier request is raised."""
    _training.clear()
    interrupts.listen(_request_stop)
    if stop_requested():
        raise interrupted()


def steps_begin() -> None:
    """From now on no step is interrupted: a request to stop is obeyed after one."""
    _training.set()


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _stop.is_set()


def interrupted() -> Interrupted:
    """The request to stop as the error that it raises before the first step."""
    return Interrupted(_received[0] if _received else signal.SIGINT)


def stopped(unit: str, done: int, total: int, run: Path) -> ResumableStop:
    """What a run ends with that was asked to stop after ``done`` of ``total`` steps, each called a ``unit``."""
    last = ", before its last evaluation and its report" if done == total else ""
    return ResumableStop(f"stopped on request after {unit} {done} of {total}{last}; go on with: rlhf-ray resume {run}")


def _request_stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    _stop.set()
    if len(_received) == 1 and not _training.is_set():
        raise Interrupted(number)
