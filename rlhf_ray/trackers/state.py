"""What a run knows of a tracker: the directory ``trackers/`` in the run directory.

Invariants: one process at a time feeds a tracker. A run keeps its id for each tracker, and a copy of its directory under
another name has an id of its own: to a tracker it is another run. ``sent`` is never ahead of what the tracker has.
"""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.config.trackers import Target, key_of
from rlhf_ray.errors import IntegrityError, RlhfRayError
from rlhf_ray.storage.locks import take, this_process
from rlhf_ray.storage.reading import read_bytes

FOLDER = "trackers"


@dataclass
class State:
    """What is known of one tracker."""

    run: str
    id: str
    tracker: str = ""
    """As the config names it."""
    sent: dict[str, int] = field(default_factory=dict)
    """The last step of each curve that the tracker has."""
    error: str = ""
    """What failed last, if it has not worked since."""

    def describe(self) -> str:
        """How far the tracker is, as ``status`` shows it."""
        sent = [f"{key} up to step {step}" for key, step in self.sent.items() if step >= 0]
        return (", ".join(sent) or "nothing is sent yet") + (f"; failed last: {self.error}" if self.error else "")


class StateFile:
    """The state of one tracker, its lock and its log."""

    def __init__(self, directory: Path, target: Target) -> None:
        key = key_of(target)
        self.target = target
        self.path = directory / FOLDER / f"{key}.json"
        self.log_path = directory / FOLDER / f"{key}.log"
        self._lock_path = directory / FOLDER / f"{key}.lock"
        self._lock: int | None = None

    def begin(self, run: str) -> State:
        """What is known of the tracker of the run of this name; a new state, which is kept at once, where nothing is."""
        known = self.last()
        if known is not None and known.run == run:
            return known
        new = State(run, secrets.token_hex(4), str(self.target))
        self.write(new)
        return new

    def last(self) -> State | None:
        """What was kept last; none where nothing was."""
        if not self.path.exists():
            return None
        try:
            return _parse(read_bytes(self.path))
        except ValueError as error:
            raise IntegrityError(
                f"{self.path} is damaged, so nobody knows as which run {self.target} knows this one: restore it, or remove it "
                "to be a new run there"
            ) from error

    def error(self) -> str:
        """What the process that fed the tracker last said of its end; empty where it said nothing."""
        try:
            known = self.last()
        except RlhfRayError as error:
            return str(error)
        return "" if known is None else known.error

    def sent(self) -> dict[str, int]:
        """The last step of each curve that the tracker has, as far as it is known."""
        try:
            known = self.last()
        except RlhfRayError:
            return {}
        return {} if known is None else known.sent

    def write(self, state: State) -> None:
        """Keep the state."""
        storage.write_file(self.path, json.dumps(asdict(state), indent=1) + "\n")

    def own(self) -> bool:
        """Feed the tracker alone from here on; false where another process does."""
        with storage.storage_errors(self._lock_path):
            self._lock_path.parent.mkdir(exist_ok=True)
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        if not take(lock):
            os.close(lock)
            return False
        os.ftruncate(lock, 0)
        os.pwrite(lock, this_process().encode(), 0)
        self._lock = lock
        return True

    def owner(self) -> str:
        """Which process feeds the tracker."""
        return read_bytes(self._lock_path).decode(errors="replace") or "another process"


def follower_log(directory: Path) -> Path:
    """Where the process that has the trackers of a run fed writes once the run is over."""
    return directory / FOLDER / "follower.log"


def states(directory: Path) -> list[State]:
    """What a run knows of its trackers, as far as it can be read."""
    found = []
    for path in sorted((directory / FOLDER).glob("*.json")):
        with suppress(ValueError, RlhfRayError):
            found.append(_parse(read_bytes(path)))
    return found


def _parse(raw: bytes) -> State:
    """Raises ``ValueError`` for what is no state."""
    try:
        state = State(**json.loads(raw))
        texts, steps = (state.run, state.id, state.tracker, state.error), [*state.sent.values()]
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not (all(isinstance(text, str) for text in texts) and all(isinstance(step, int) for step in steps)):
        raise ValueError("not the kinds of values that a state has")
    return state
