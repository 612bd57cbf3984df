"""Write metrics to TensorBoard event files.

Invariant: TensorBoard shows the same names, steps and numbers as ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tensorboard.summary import Writer


class TensorBoardWriter:
    """A sink of ``MetricsLog`` that writes event files into a directory."""

    def __init__(self, directory: str | Path) -> None:
        self._writer = Writer(str(directory))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
