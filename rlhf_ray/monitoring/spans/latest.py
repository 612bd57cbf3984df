"""The lanes of the last step that ended, for one who looks again and again while a run goes on.

Invariants: of the files of the newest attempt only the last part is read, and then what is added; no more is kept than the last
step needs. A step of which something was not read is not shown.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.spans.records import DRIVER
from rlhf_ray.monitoring.spans.steps import StepLanes, step_pieces

LAST_BYTES = 2**17
"""Of each file: about a thousand spans."""


class LatestStep:
    """Reads the spans in a directory as they are written."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: SpanFiles | None = None
        self._shown: StepLanes | None = None

    def read(self) -> StepLanes | None:
        """The last step that ended, of the attempt that began last; None where there is none of which all is known."""
        driver = _newest_driver(self._directory)
        if driver is None:
            return None
        if self._files is None or self._files.driver != driver:
            self._files, self._shown = SpanFiles(self._directory, driver, last_bytes=LAST_BYTES), None
        attempt = next((one for one in self._files.read().attempts() if one.name == driver), None)
        if attempt is None:
            return None
        step = next(reversed(attempt.steps()), None)
        if step is None or (attempt.whole_since is not None and step.begin < attempt.whole_since):
            return self._shown
        if self._shown is None or self._shown.step != step:
            self._shown = StepLanes(step, step_pieces(attempt, step))
            boot = self._files.files[driver].header["boot"]
            self._files.forget(step.begin, boot=boot, unix_offset=attempt.unix_offset)
        return self._shown


def _newest_driver(directory: Path) -> str | None:
    """The name of the driver's file that was begun last; names hold when, in milliseconds since 1970."""
    begun = [(int(parts[1]), path.stem) for path in directory.glob(f"{DRIVER}.*.jsonl")
             if len(parts := path.stem.split(".")) == 3 and parts[1].isdecimal()]  # fmt: skip
    return max(begun, default=(0, None))[1]
