"""Send rows to TensorBoard's files of events.

Invariants: TensorBoard shows the same names, steps and times as ``metrics.jsonl``, and the same numbers in 32 bits. Events of
another run are never mixed with those of this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.summary import Writer

from rlhf_ray.errors import RequestError
from rlhf_ray.storage.atomic import write_file
from rlhf_ray.storage.reading import read_text
from rlhf_ray.trackers.base import Curve
from rlhf_ray.trackers.rows import RUN, Row

OWNER = "rlhf_ray_run.txt"
"""Says whose events a directory holds that is not in the directory of its run."""
LAST = "step"
"""The metric that is written after all others of its step."""


class TensorBoardTracker:
    """Files of events in ``tensorboard/`` of the run directory, or in ``place/RUN``."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._writer: Writer | None = None
        self._there: set[str] = set()
        """Metrics of the next step that a killed process wrote before its end."""

    def open(self, curve: Curve) -> int:
        directory = Path(self._place) / curve.run if self._place else curve.directory / "tensorboard"
        if self._place:
            _own(directory, curve)
        directory = directory if curve.key == RUN else directory / curve.key
        last, self._there = _last_step(directory)
        self._writer = Writer(str(directory))
        return last

    def log(self, row: Row) -> None:
        assert self._writer is not None, "opened"
        for name, value in {**row.values, LAST: float(row.step)}.items():
            if name not in self._there:
                self._writer.add_scalar(name, value, row.step, wall_time=row.timestamp)
        self._there = set()

    def flush(self) -> None:
        assert self._writer is not None, "opened"
        self._writer.flush()

    def close(self, *, finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _own(directory: Path, curve: Curve) -> None:
    """Take a directory for a run; raises :class:`RequestError` where another run wrote there."""
    directory.mkdir(parents=True, exist_ok=True)
    owner = directory / OWNER
    if owner.exists():
        is_other = read_text(owner).strip() != curve.id
    else:
        is_other = bool(_event_files(directory))
        if not is_other:
            write_file(owner, f"{curve.id}\n")
    if is_other:
        raise RequestError(
            f"{directory} holds the events of another run, which would be mixed with those of {curve.directory}: name another "
            "directory, or move those away"
        )


def _event_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)


def _last_step(directory: Path) -> tuple[int, set[str]]:
    """The last step that is there whole, and the metrics of the one after it that are there."""
    after: dict[int, set[str]] = {}
    for path in reversed(_event_files(directory)):  # steps rise from file to file
        last = -1
        for step, name in _scalars(path):
            if name == LAST:
                last = max(last, step)
            after.setdefault(step, set()).add(name)
        if last >= 0:
            return last, set().union(*(names for step, names in after.items() if step > last))
    return -1, set().union(*after.values())


def _scalars(path: Path) -> Iterator[tuple[int, str]]:
    for event in EventFileLoader(str(path)).Load():
        for value in event.summary.value:
            yield event.step, value.tag
