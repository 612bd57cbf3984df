"""The time of a step, phase by phase.

Always true: a phase's time is what passed inside it, summed over the step, and every phase that was entered is told to
whoever shows what the run is doing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_ray.monitoring.registry import REGISTRY


class PhaseClock:
    """Times the phases of a step. ``on_enter`` hears of every phase that begins, such as ``PhaseGauge.enter``."""

    def __init__(
        self, on_enter: Callable[[str], None] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_enter = on_enter
        self._clock = clock
        self._begin = clock()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside as ``time/<name>``."""
        metric = REGISTRY[f"time/{name}"].name
        if self._on_enter is not None:
            self._on_enter(name)
        begin = self._clock()
        try:
            yield
        finally:
            self._seconds[metric] = self._seconds.get(metric, 0.0) + self._clock() - begin

    def take(self) -> dict[str, float]:
        """The metrics of the step that ends now, ``time/step`` among them; the next step begins."""
        now = self._clock()
        taken = {**self._seconds, "time/step": now - self._begin}
        self._begin, self._seconds = now, {}
        return taken
