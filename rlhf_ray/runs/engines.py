"""How the rollout engines of a run are, for others to read while it runs.

Invariants: the file is whole at every moment. A death or a restart stands in it as soon as the driver knows, all else as it was
at the end of the last step. A file that cannot be written ends no run.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RlhfRayError, StorageError
from rlhf_ray.storage.reading import read_text

FIELDS = {"state": str, "weight_version": int, "restarts": int, "cause": str}


class EngineStates:
    """The file ``engines.json`` of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._one_at_a_time = threading.Lock()
        self._written: Sequence[Mapping[str, Any]] | None = None

    def write(self, engines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file, if anything has changed; any thread may call this.

        Of each engine: its ``state``, the ``weight_version`` that it holds (None: none), how often it was restarted
        (``restarts``: the number of its process), and why it last was not healthy (``cause``).
        """
        with self._one_at_a_time:
            if engines == self._written:
                return
            try:
                storage.write_file(self.path, json.dumps(list(engines)))
                self._written = [dict(engine) for engine in engines]
            except StorageError as error:
                get_logger("runs").warning("how the rollout engines are could not be written: %s", error)

    def forget(self) -> None:
        """The engines of an earlier attempt are no more."""
        with storage.storage_errors(self.path):
            self.path.unlink(missing_ok=True)

    def read(self) -> list[dict[str, Any]]:
        """What was written last; nothing where there is no file, or one that this did not write."""
        try:
            lines = json.loads(read_text(self.path))
        except (RlhfRayError, ValueError, RecursionError):
            return []
        return lines if isinstance(lines, list) and all(map(_is_engine, lines)) else []


def _is_engine(line: object) -> bool:
    return isinstance(line, dict) and all(
        isinstance(line.get(name), kind) or (name == "weight_version" and line.get(name) is None)
        for name, kind in FIELDS.items()
    )


def describe(engine: Mapping[str, Any]) -> str:
    """An engine in a phrase."""
    holds = "no weights" if engine["weight_version"] is None else f"weights {engine['weight_version']}"
    text = f"{engine['state']}, {holds}, {engine['restarts']} restarts"
    why = engine["cause"].partition("\n")[0]
    return text if engine["state"] == "healthy" or not why else f"{text}: {why}"
