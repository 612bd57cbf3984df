"""The log that trainers write their metrics to: one call a step, to a file and to all sinks.

Invariants: every logged name is in the registry. The file holds valid JSON only, with ``null`` for a number that is not
finite. The line of a step is on disk before the call returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.storage.jsonl import JsonLines


class Sink(Protocol):
    """A further place for metrics; called from one thread, in the order of steps, with finite values only."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write out whatever is still held back."""


class MetricsLog:
    """Writes a step's metrics to ``metrics.jsonl`` and hands the finite ones to the other sinks."""

    def __init__(self, lines: JsonLines, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.time) -> None:
        self._lines = lines
        self._sinks = tuple(sinks)
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

    def close(self) -> None:
        """Close the sinks; the file is closed after every line."""
        for sink in self._sinks:
            sink.close()
