"""Time the phases of a training step, such as rollout and update.

Invariants: the time of a phase is what passed inside it, summed over the step. Whoever is told of a phase and fails does not
keep it from beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.registry import REGISTRY


class PhaseClock:
    """A stopwatch for the phases of a step.

    ``on_enter`` is called with the name of every phase that begins, such as ``PhaseGauge.enter``.
    """

    def __init__(
        self, on_enter: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_enter = on_enter
        self._failed = False
        self._clock = clock
        self._started_at = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``time/<name>``; an unregistered name is an error."""
        metric = REGISTRY[f"time/{name}"].name
        self._tell(name)
        entered_at = self._clock()
        try:
            yield
        finally:
            self._seconds[metric] = self._seconds.get(metric, 0.0) + self._clock() - entered_at

    def _tell(self, name: str) -> None:
        if self._on_enter is None:
            return
        try:
            self._on_enter(name)
        except Exception as error:
            if not self._failed:
                get_logger("metrics").warning("the phase %s could not be shown (%r): training goes on", name, error)
            self._failed = True

    def take(self) -> dict[str, float]:
        """End the step: return its times in seconds by metric, ``time/step`` for all of it, and begin the next one."""
        now = self._clock()
        times = {**self._seconds, "time/step": now - self._started_at}
        self._started_at, self._seconds = now, {}
        return times
