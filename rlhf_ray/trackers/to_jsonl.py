"""Send rows to a file of JSON lines, such as one that a collector of logs reads.

Invariant: each line is whole and says of which run it is, so that several runs may write to one file, also at the same time.
"""

from __future__ import annotations

from rlhf_ray.storage.jsonl import JsonLines
from rlhf_ray.trackers.base import Curve
from rlhf_ray.trackers.rows import Row


class JsonLinesTracker:
    """Lines with ``run``, ``id`` (of the curve), ``step``, ``timestamp`` and the metrics."""

    def __init__(self, place: str) -> None:
        self._lines = JsonLines(place, is_shared=True)
        self._held: list[dict[str, object]] = []
        self._about: dict[str, object] = {}

    def open(self, curve: Curve) -> int:
        self._lines.path.parent.mkdir(parents=True, exist_ok=True)
        self._about = {"run": curve.name, "id": curve.unique}
        return max((line["step"] for line in self._lines.read() if line.get("id") == curve.unique), default=-1)

    def log(self, row: Row) -> None:
        self._held.append({**self._about, "step": row.step, "timestamp": row.timestamp, **row.values})

    def flush(self) -> None:
        held, self._held = self._held, []
        self._lines.extend(held)

    def close(self, *, finished: bool) -> None:
        self.flush()
