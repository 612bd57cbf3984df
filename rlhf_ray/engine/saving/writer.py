"""A thread that does one piece of work while this process goes on with another.

Invariants: :meth:`Background.result` ends in the value or in the error of the work, however often it is asked. What the work
takes of a processor is known then; threads that it starts are not in it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from rlhf_ray.storage.manifest import FileRecord

Value = TypeVar("Value")
NICE = 10
"""How far the thread stands back behind those that train: it gets about a tenth of a core where all are busy."""


def behind(nice: int) -> int:
    """The priority of the thread, where that of the others is ``nice``; 19 is the lowest."""
    return min(19, nice + NICE)


@dataclass(frozen=True)
class Written:
    """What was written beside training: the records of the files, and the seconds of a processor that this took."""

    files: dict[str, FileRecord]
    seconds: float


class Background(Generic[Value]):
    """Runs ``work`` from now on, in a thread of low priority."""

    def __init__(self, work: Callable[[], Value], name: str) -> None:
        self._value: Value | None = None
        self._error: BaseException | None = None
        self.seconds = 0.0
        """What the work took of a processor, once it has ended."""
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Value]) -> None:
        try:
            thread = threading.get_native_id()  # on Linux each thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, thread, behind(os.getpriority(os.PRIO_PROCESS, thread)))
            self._value = work()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error
        self.seconds = time.thread_time()

    @property
    def ended(self) -> bool:
        """Whether :meth:`result` returns at once."""
        return not self._thread.is_alive()

    def result(self) -> Value:
        """Wait for the work; return its value or raise its error."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return cast(Value, self._value)
