"""The log that trainers write their metrics to: one call a step, to a file and to all sinks.

Invariants: every logged name is in the registry. The file holds valid JSON only, with ``null`` for a number that is not
finite. The line of a step is on disk before the call returns. A sink that fails costs no step, and keeps no other sink from
its values or its end: it is named once, counted, and tried again.
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.storage.jsonl import JsonLines


class Sink(Protocol):
    """A further place for metrics; called from one thread, in the order of steps, with finite values only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write out whatever is still held back."""


TRIED_EVERY_TIME = 3
"""A sink that has failed so often in a row is from then on tried again only after a while."""
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0


class GuardedSink:
    """A sink whose failures reach nobody but the log."""

    def __init__(self, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = type(sink).__name__
        self.lost = 0
        """Calls of ``log`` whose values the sink does not have."""
        self._sink = sink
        self._clock = clock
        self._in_a_row = 0
        self._next_try = -math.inf

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values on; what the sink has missed is not sent again."""
        began = self._clock()
        if began < self._next_try:
            self.lost += 1
            return
        try:
            self._sink.log(step, values)
        except (Exception, SystemExit) as error:  # whatever a tracker raises, the run is worth more
            self.lost += 1
            self._in_a_row += 1
            if self._in_a_row >= TRIED_EVERY_TIME:
                waits = min(FIRST_WAIT_S * 2.0 ** min(self._in_a_row - TRIED_EVERY_TIME, 30), LONGEST_WAIT_S)
                now = self._clock()
                self._next_try = now + max(waits, 10.0 * (now - began))  # one that hangs takes a tenth of the time
            if self.lost == 1:
                get_logger("metrics").warning(
                    "%s failed at step %d (%s): training goes on, metrics.jsonl has everything, and it is tried again",
                    self.name, step, _last_line(error),
                )  # fmt: skip
        else:
            self._in_a_row = 0

    def close(self) -> None:
        """Close the sink, and say how much it has missed."""
        try:
            self._sink.close()
        except (Exception, SystemExit) as error:
            get_logger("metrics").warning("%s failed when it was closed: %s", self.name, _last_line(error))
        if self.lost:
            get_logger("metrics").warning("%s has missed %d lines of metrics.jsonl", self.name, self.lost)


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


class MetricsLog:
    """Writes a step's metrics to ``metrics.jsonl`` and hands the finite ones to the other sinks."""

    def __init__(self, lines: JsonLines, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.time) -> None:
        self._lines = lines
        self._sinks = tuple(map(GuardedSink, sinks))
        self._clock = clock

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step, by metric; raises ``UnknownMetricError`` for a name that is not registered.

        ``values`` need not hold ``step`` itself.
        """
        for name in values:
            REGISTRY[name]  # raises where the name is unknown
        numbers = {name: float(value) for name, value in values.items() if name != "step"}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._lines.append({"step": step, "timestamp": self._clock(), **{name: finite.get(name) for name in numbers}})
        for sink in self._sinks:
            sink.log(step, {"step": float(step), **finite})

    @property
    def lost(self) -> dict[str, int]:
        """By the name of each sink that has failed, how many lines it has missed."""
        return {sink.name: sink.lost for sink in self._sinks if sink.lost}

    def close(self) -> None:
        """Close the sinks; the file is closed after every line."""
        for sink in self._sinks:
            sink.close()
