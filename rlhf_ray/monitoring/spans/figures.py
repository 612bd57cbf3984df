"""The metrics of a step that come from spans: where its critical path ran, and how long each role had nothing to do.

Invariants: the seconds of all roles add up to the step. What cannot be read is missing, and stops nothing. Only the files of
one attempt are read, and of these no more is kept than a step needs.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.spans.critical_path import by_role, critical_path
from rlhf_ray.monitoring.spans.lanes import idle_shares
from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.spans.records import Attempt
from rlhf_ray.processes.clock import boot, now_us

MOST_OF_THE_TIME = 0.003
"""Reading takes no larger share of a run: where a step is short, some steps are left out."""


def step_figures(attempt: Attempt, begin: int, end: int) -> dict[str, float]:
    """The metrics of a step from ``begin`` to ``end``."""
    path, idle = by_role(critical_path(attempt, begin, end)), idle_shares(attempt, begin, end)
    return {
        **{f"critical_path/{_metric(role)}": seconds for role, seconds in path.items()},
        **{f"idle/{_metric(role)}": share for role, share in idle.items()},
    }


def _metric(role: str) -> str:
    return re.sub(r"\W", "_", role)


class StepFigures:
    """Measures the steps of a run under way, from the files that its processes write."""

    def __init__(self, directory: Path, driver: str) -> None:
        """``driver`` is the name of this process' own file."""
        self._files = SpanFiles(directory, driver)
        self._driver = driver
        self._next_look = 0.0
        self._failed = False

    def measure(self, begin: int, end: int) -> dict[str, float]:
        """The metrics of the step that ends now; none where the last one was measured just now."""
        began = time.monotonic()
        if began < self._next_look or self._failed:
            return {}
        try:
            figures = self._measure(begin, end)
        except Exception as error:  # figures are worth no run
            self._failed = True
            get_logger("spans").warning("the critical path is not measured any more: %r", error)
            return {}
        took = time.monotonic() - began
        self._next_look = began + took / MOST_OF_THE_TIME
        return figures

    def _measure(self, begin: int, end: int) -> dict[str, float]:
        own = next((one for one in self._files.read().attempts(until=end) if one.name == self._driver), None)
        unix_offset = time.time_ns() // 1000 - now_us() if own is None else own.unix_offset
        self._files.forget(begin, boot=boot(), unix_offset=unix_offset)
        return {} if own is None else step_figures(own, begin, end)
