"""A worker: the plain object that does one rank's work, wherever it runs. No Ray here.

Invariant: a worker always answers who it is and what it is doing, without touching its model.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Worker:
    """One rank of one role."""

    role = "worker"

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.phase = "starting"

    def health(self) -> dict[str, Any]:
        """Role, rank, current phase and process id."""
        return {"role": self.role, "rank": self.rank, "phase": self.phase, "pid": os.getpid()}

    def rendezvous(self) -> str:
        """A free ``host:port`` on this rank's machine, where the ranks of the group can meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return f"{socket.gethostbyname(socket.gethostname())}:{port}"

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Report ``phase`` while the block runs. If the block fails, the phase stays: it says where."""
        self.phase = phase
        yield
        self.phase = "ready"
