"""Write metrics to TensorBoard event files.

Invariants: TensorBoard shows the same names, steps and numbers as ``metrics.jsonl``. After a failure the next values go to a
new file of events, since the thread that writes one ends with its first error.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tensorboard.summary import Writer


class TensorBoardWriter:
    """A sink of ``MetricsLog`` that writes event files into a directory, which it makes with the first values."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = str(directory)
        self._writer: Writer | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        self._writer = self._writer or Writer(self._directory)
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()
        except Exception:
            broken, self._writer = self._writer, None
            with suppress(Exception):
                broken.close()
            raise

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
