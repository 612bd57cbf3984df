"""A result that may still be on its way, in this process or on a cluster.

Invariant: ``result`` ends in the value or in one typed error, and a second call gives the same without computing again.

Modules that must not know Ray pass these around; only ``actors`` makes ones that wait for a cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar, cast

Value = TypeVar("Value")
Other = TypeVar("Other")


class Pending(Generic[Value]):
    """A value obtained by calling ``wait`` once.

    ``poll`` takes seconds and says whether the value, or its error, was there within them.
    """

    def __init__(self, wait: Callable[[], Value], poll: Callable[[float], bool] | None = None) -> None:
        self._wait: Callable[[], Value] | None = wait
        self._poll = poll
        self._value: Value | None = None
        self._error: Exception | None = None

    @classmethod
    def done(cls, value: Value) -> Pending[Value]:
        """A result that is there already."""
        return cls(lambda: value)

    def result(self) -> Value:
        """Wait for the value; raises the typed error that computing it ended in."""
        if self._wait is not None:
            wait, self._wait = self._wait, None
            try:
                self._value = wait()
            except Exception as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return cast(Value, self._value)

    def ready(self, timeout_s: float = 0.0) -> bool:
        """Whether ``result`` returns without waiting, now or after at most ``timeout_s`` seconds.

        One without ``poll`` is always ready: calling ``result`` is what computes it.
        """
        return self._wait is None or self._poll is None or self._poll(timeout_s)

    def then(self, finish: Callable[[Value], Other]) -> Pending[Other]:
        """The value after ``finish``, which runs when the result is read."""
        return Pending(lambda: finish(self.result()), self.ready)
