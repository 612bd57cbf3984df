"""How a run is at the moment, for others to read.

Invariants: the file of the heartbeat is whole at every moment, and its time is that at which the driver read its values. One
that cannot be written ends no run, and is said once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RlhfRayError, StorageError
from rlhf_ray.monitoring.alarms.catalogue import SILENT_S
from rlhf_ray.storage.reading import read_text

STARTS_S = 600.0
"""So long an attempt may take until its first heartbeat, before which it reads its inputs and joins Ray."""
ENDED = "ended"
"""The phase of a driver that does nothing more, be it with an error."""


@dataclass(frozen=True)
class Heartbeat:
    """What the driver read of itself."""

    at: float
    """When, in seconds since 1970."""
    phase: str
    """What it was doing."""
    phase_began: float
    """Since when."""
    phase_usual_s: float | None = None
    """How long that usually takes; None where it is not known."""
    values: Mapping[str, float] = field(default_factory=dict)
    """States by metric."""
    events: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Of counters, when something was counted in the last hour, and how much."""


class HeartbeatFile:
    """The file ``heartbeat.json`` of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._told = False

    def write(self, beat: Heartbeat) -> None:
        """Replace the file."""
        try:
            storage.write_file(self.path, json.dumps(asdict(beat)))
        except StorageError as error:
            if not self._told:
                get_logger("runs").warning("the heartbeat could not be written: %s", error)
            self._told = True

    def is_fresh(self, now: float, began: float = 0.0) -> bool:
        """Whether a driver that has not ended wrote it so lately that it counts as alive.

        An attempt that has written none of its own counts as alive for ``STARTS_S`` after it ``began``.
        """
        beat = self.read()
        if beat is None or beat.at < began:
            return abs(now - began) <= STARTS_S
        has_ended = beat.phase == ENDED or beat.values.get("run/started", 0.0) <= 0.0
        return not has_ended and abs(now - beat.at) <= SILENT_S

    def read(self) -> Heartbeat | None:
        """What was written last; None where there is no file, or one that this did not write."""
        try:
            found = json.loads(read_text(self.path))
            beat = Heartbeat(
                float(found["at"]),
                str(found["phase"]),
                float(found["phase_began"]),
                None if found["phase_usual_s"] is None else float(found["phase_usual_s"]),
                {str(name): float(value) for name, value in found["values"].items()},
                {name: [(float(at), float(by)) for at, by in every] for name, every in found["events"].items()},
            )
        except (RlhfRayError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        numbers = [
            beat.at,
            beat.phase_began,
            beat.phase_usual_s or 0.0,
            *beat.values.values(),
            *(one for every in beat.events.values() for two in every for one in two),
        ]
        return beat if all(map(math.isfinite, numbers)) else None
