"""What loads a model when a run starts, a group of ranks or one engine, as whoever keeps the start going sees it.

Invariant: what is started again loads what it would have loaded at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.pending import Pending


@dataclass(frozen=True)
class Loading:
    """A group, or an engine, whose processes are placed."""

    role: str
    """As its errors name it."""
    load: Callable[[], Pending[Any]]
    """Begins to load its model; the value says that it is there."""
    restart: Callable[[], None]
    """Ends its processes and starts others in their places, which have no model yet."""
    held: AbstractContextManager[Any]
    """Held by the thread that starts it again, until its model is loaded; may be entered again and again."""
    rank: int | None = None
    """The number of an engine; None of a group."""
    waits: bool = False
    """Whether ``load`` waits for its processes first, as it does where several ranks have to meet."""

    def begin(self) -> Pending[Any]:
        """Begin to load; an error of that is one of the loading."""
        try:
            return self.load()
        except RlhfRayError as error:
            failure = error

        def fail() -> None:
            raise failure

        return Pending(fail)


Load = Callable[[Mapping[str, Loading]], Mapping[str, Any]]
"""Loads all of them side by side; returns their values by their names once every one is there, or raises an error."""


def load_or_fail(parts: Mapping[str, Loading]) -> dict[str, Any]:
    """Load all; the first error is raised, and nothing is started again."""
    begun = {name: part.begin() for name, part in parts.items()}
    return {name: pending.result() for name, pending in begun.items()}
