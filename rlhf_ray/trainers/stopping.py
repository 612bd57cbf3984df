"""Stop a training run when it gets SIGTERM, SIGINT or SIGHUP.

Invariants: before the first step the signal raises :class:`Interrupted` at once, since nothing can be lost yet. From then on
the handler only sets a flag, which the training loop reads after each step: nothing is interrupted in the middle. The one
exception is a part of a step that changes no weight (:func:`breaking_off`), where the step would not end within the grace: then
the signal breaks it off, and the step before is what is committed.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from types import FrameType

from rlhf_ray.console import get_logger
from rlhf_ray.errors import Interrupted, ResumableStop
from rlhf_ray.processes import interrupts, spans

_stop = threading.Event()
_received: list[int] = []
_training = threading.Event()
_too_late: list[Callable[[], bool]] = []
"""Says, while a step may be broken off, whether it would take too long to end."""


def listen() -> None:
    """Turn the signals into a request to stop. The run that begins now has made no step yet: an earlier request is raised."""
    _training.clear()
    interrupts.listen(_request_stop)
    if stop_requested():
        raise interrupted()


def steps_begin() -> None:
    """From now on no step is interrupted: a request to stop is obeyed after one."""
    _training.set()
    spans.started()


@contextmanager
def breaking_off(too_late: Callable[[], bool]) -> Iterator[None]:
    """In the block, which changes no weight, a request to stop raises :class:`Interrupted` if the step ends ``too_late``."""
    _too_late.append(too_late)
    try:
        if stop_requested() and too_late():
            raise interrupted()
        yield
    finally:
        _too_late.clear()


class Grace:
    """Whether a step still ends in time after a request to stop, by how long the last ones took.

    ``seconds`` is how long the run has then; without, no step is broken off. ``waits`` says that ranks are other processes, so
    that waiting for them may be broken off, and not only what comes after a part that changes no weight.
    """

    def __init__(self, seconds: float | None = None, *, waits: bool = False) -> None:
        self.seconds = math.inf if seconds is None else seconds
        self.waits = waits
        self.step_times: deque[float] = deque(maxlen=5)
        self._began = 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around a step; one that is broken off ends here, and a request to stop is there."""
        self._began = time.monotonic()
        try:
            yield
        except KeyboardInterrupt:
            if not stop_requested():
                raise
            get_logger().info("step %d is broken off: it would not end within %g s", number, self.seconds)
        self.step_times.append(time.monotonic() - self._began)

    @contextmanager
    def part_without_learning(self) -> Iterator[None]:
        """Around the part of a step that changes no weight."""
        with breaking_off(self.too_late) if self.waits else nullcontext():
            yield
        if stop_requested() and self.too_late():
            raise interrupted()

    def too_late(self) -> bool:
        """Whether the step that is under way would not end in time after a request that comes now."""
        left = median(self.step_times or [0.0]) - (time.monotonic() - self._began)
        return left > self.seconds


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
    if len(_received) == 1 and (not _training.is_set() or any(too_late() for too_late in _too_late)):
        raise Interrupted(number)
