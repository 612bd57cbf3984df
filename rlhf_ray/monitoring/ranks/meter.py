"""Measure one rank from inside, every few seconds, and tell Ray.

Invariants: the thread ends with the process and never keeps it alive; what fails in it costs the rank nothing. Reading the
proportional memory takes at most a thousandth of the time of a core, however large the rank is: it is read the more rarely.
What Ray is told is told again before Ray forgets it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.memory import GB, TreeMemory, resident_bytes, tree_memory
from rlhf_ray.monitoring.ranks.busy import BusyTime

EVERY_S = 5.0
"""Four times before Ray forgets a gauge."""
SHARE = 0.001
"""Of a core, which reading the page tables of the rank's processes may take."""


class Exporter(Protocol):
    """Where the metrics of a rank go."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take values."""


class RankMeter:
    """A thread that measures the process it is in, and those that this one has started.

    ``gpu`` gives what the process holds of its GPUs now and the most so far, in GB; None without one. ``exporter`` is called in
    the thread.
    """

    def __init__(
        self,
        busy: BusyTime,
        gpu: Callable[[], tuple[float, float] | None],
        exporter: Callable[[], Exporter] | None = None,
    ) -> None:
        self.held: TreeMemory | None = None
        """What the processes held when that was read last; None before."""
        self._busy, self._gpu, self._make = busy, gpu, exporter
        self._exporter: Exporter | None = None
        self._reads_at = 0.0
        self._said = False

    def start(self) -> RankMeter:
        """Begin, for as long as the process lives."""
        threading.Thread(target=self._run, name="rank meter", daemon=True).start()
        return self

    def look(self) -> dict[str, float]:
        """Measure once, and tell it."""
        now = time.monotonic()
        if self.held is None or now >= self._reads_at:
            before = time.thread_time()
            self.held = tree_memory([os.getpid()])
            self._reads_at = now + max(EVERY_S, (time.thread_time() - before) / SHARE)
        values = {
            "rank/resident_gb": resident_bytes(self.held.pss) / GB,
            "rank/pss_gb": sum(self.held.pss.values()) / GB,
            "rank/busy_share": self._busy.share(),
        }
        gpu = self._gpu()
        if gpu is not None:
            values |= {"rank/gpu_held_gb": gpu[0], "rank/gpu_peak_gb": gpu[1]}
        if self._make is not None:
            self._exporter = self._exporter or self._make()
            self._exporter.log(0, values)
        return values

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:  # the rank goes on
                if not self._said:
                    get_logger("rank").warning("the rank does not say how it is any more (%r): it goes on", error)
                self._said = True
            time.sleep(EVERY_S)
