"""Time the phases of a training step, such as rollout and update.

Invariants: the time of a phase is what passed inside it, summed over the step. Whoever is told of a phase and fails does not
keep it from beginning. At any moment something is open: a phase, or the time between two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.stalls import Durations, OpenPhase
from rlhf_ray.processes import spans

BETWEEN = "between phases"
"""The name of what is open while no phase is."""


class PhaseClock:
    """A stopwatch for the phases of a step.

    ``on_enter`` is called with the name of every phase that begins, such as ``PhaseGauge.enter``.
    """

    def __init__(
        self, on_enter: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._on_enter = on_enter
        self._failed = False
        self._clock = clock
        self.step_began = clock()
        """When the present step began."""
        self._seconds: dict[str, float] = {}
        self.durations = Durations()
        """How long each phase took whenever it was entered."""
        self._open: tuple[tuple[str, float], ...] = ((BETWEEN, self.step_began),)
        """Replaced as a whole, so that another thread may read it."""

    @contextmanager
    def phase(self, name: str, work: str | None = None) -> Iterator[None]:
        """Count the time inside the ``with`` block as ``time/<name>``; an unregistered name is an error.

        ``work`` is what is done in it where that is not what usually is, and so takes another time.
        """
        metric = REGISTRY[f"time/{name}"].name
        self._tell(name)
        with self.part(work or name) as entered_at:
            try:
                yield
            finally:
                self._seconds[metric] = self._seconds.get(metric, 0.0) + self._clock() - entered_at

    @contextmanager
    def part(self, name: str) -> Iterator[float]:
        """Have the ``with`` block known by a name, without a metric; gives when it began."""
        before, now = self._open, self._clock()
        (outer, since), is_first = before[-1], before[0][0] == BETWEEN
        if is_first:
            self.durations.add(outer, now - since)
        self._open = (*(() if is_first else before), (name, now))
        try:
            with spans.span(name):
                yield now
            self.durations.add(name, self._clock() - now)  # of one that fails the time says nothing
        finally:
            ended = self._clock()
            self._open = ((BETWEEN, ended),) if is_first else before

    def open(self) -> list[OpenPhase]:
        """What the run is in now, the outermost first, and how long each usually takes; for any thread."""
        return [OpenPhase(name, since, self.durations.median(name)) for name, since in self._open]

    def _tell(self, name: str) -> None:
        if self._on_enter is None:
            return
        try:
            self._on_enter(name)
        except Exception as error:
            if not self._failed:
                get_logger("metrics").warning("the phase %s could not be shown (%r): training goes on", name, error)
            self._failed = True

    def take(self, step: int | None = None) -> dict[str, float]:
        """End a step: return its times in seconds by metric, ``time/step`` for all of it, and begin the next one.

        With its number it is recorded as a span.
        """
        now = self._clock()
        if step is not None:
            spans.end_step(step, self.step_began, now)
        times = {**self._seconds, "time/step": now - self.step_began}
        self.step_began, self._seconds = now, {}
        return times
