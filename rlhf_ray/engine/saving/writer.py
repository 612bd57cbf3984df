"""A thread that does one piece of work while this process goes on with another.

Invariant: :meth:`Background.result` ends in the value or in the error of the work, however often it is asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

Value = TypeVar("Value")
NICE = 10
"""How far the thread stands back behind those that train: it gets about a tenth of a core where all are busy."""


def behind(nice: int) -> int:
    """The priority of the thread, where that of the others is ``nice``; 19 is the lowest."""
    return min(19, nice + NICE)


class Background(Generic[Value]):
    """Runs ``work`` from now on, in a thread of low priority."""

    def __init__(self, work: Callable[[], Value], name: str) -> None:
        self._value: Value | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Value]) -> None:
        try:
            thread = threading.get_native_id()  # on Linux each thread has a priority of its own
            os.setpriority(os.PRIO_PROCESS, thread, behind(os.getpriority(os.PRIO_PROCESS, thread)))
            self._value = work()
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

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
