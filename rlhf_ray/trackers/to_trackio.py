"""Send rows to trackio's database on this machine; ``trackio show`` shows it.

Invariants: a curve is one run of trackio, whose name no other run has. A row counts as kept once it is in the database: trackio
itself says nothing of rows that it could not write. Nothing asks the Hugging Face Hub.
"""

from __future__ import annotations

import time
from typing import Any

import trackio
from trackio.sqlite_storage import SQLiteStorage
from trackio.utils import get_storage_mode

from rlhf_ray.trackers.base import Curve
from rlhf_ray.trackers.rows import Row

WRITTEN_S = 30.0
"""How long trackio may take to write what it was given."""
LOOK_S = 0.1


class TrackioTracker:
    """A project of the name of ``monitoring.project``; ``place`` is the directory of its database (``TRACKIO_DIR``)."""

    def __init__(self, place: str) -> None:
        self._project = self._name = ""
        self._run: Any = None
        self._last = -1

    def open(self, curve: Curve) -> int:
        self._project, self._name = curve.project, curve.unique
        self._run = trackio.init(
            project=self._project,
            name=self._name,
            group=curve.group,
            config=dict(curve.config),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        if get_storage_mode() != "sqlite":
            raise RuntimeError(
                "trackio keeps its rows in fragments here, as on a file system of a network, so nobody can tell which ones it "
                "has: name a local directory, as in trackio:DIRECTORY"
            )
        self._last = self._written()
        return self._last

    def _written(self) -> int:
        step = SQLiteStorage.get_last_step(self._project, self._name)
        return -1 if step is None else int(step)

    def log(self, row: Row) -> None:
        self._run.log(dict(row.values), step=row.step)
        self._last = row.step

    def flush(self) -> None:
        by = time.monotonic() + WRITTEN_S
        while self._written() < self._last:
            if time.monotonic() > by:
                raise RuntimeError(f"trackio has not written step {self._last} within {WRITTEN_S:g} s")
            time.sleep(LOOK_S)

    def close(self, *, finished: bool) -> None:
        self._run.finish()
