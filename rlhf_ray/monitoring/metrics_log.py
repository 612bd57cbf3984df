"""Where trainers log: one call a step, every value checked, then to all sinks.

Always true: every logged name is registered; the metrics file holds valid JSON only, with ``null`` where a number was
not finite; a step's line is on disk before the call returns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.storage.jsonl import JsonLines


class Sink(Protocol):
    """Takes the finite values of a step; called from one thread, in the order of steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Bring everything out."""


class MetricsLog:
    """Writes a step's metrics to ``metrics.jsonl`` and hands the finite ones to the other sinks."""

    def __init__(self, lines: JsonLines, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.time) -> None:
        self._lines = lines
        self._sinks = tuple(sinks)
        self._clock = clock

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one step. ``step`` itself need not be among the values."""
        for name in values:
            REGISTRY[name]
        numbers = {name: float(value) for name, value in values.items() if name != "step"}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        self._lines.append({"step": step, "timestamp": self._clock(), **{name: finite.get(name) for name in numbers}})
        for sink in self._sinks:
            sink.log(step, {"step": float(step), **finite})

    def close(self) -> None:
        """Close the other sinks; the file needs none of it."""
        for sink in self._sinks:
            sink.close()
