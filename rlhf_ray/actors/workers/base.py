"""A worker: the plain object that does one rank's work, wherever it runs. No Ray here.

Invariant: a worker always answers who it is and what it is doing, without touching its model.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.errors import StorageError
from rlhf_ray.models.devices import placed_device
from rlhf_ray.network import LOOPBACK
from rlhf_ray.storage.shared import SharedFile

if TYPE_CHECKING:
    import torch


STARTING = "starting"
"""What a worker is doing that has no model yet."""


class Worker:
    """One rank of one role."""

    role = "worker"

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size
        self.phase = STARTING

    def health(self) -> dict[str, Any]:
        """Role, rank, current phase and process id."""
        return {"role": self.role, "rank": self.rank, "phase": self.phase, "pid": os.getpid()}

    def node_address(self) -> str:
        """The address at which other ranks reach this one's node; without Ray there is no other node."""
        return LOOPBACK

    def take_device(self, resources: ResourcesConfig) -> torch.device:
        """The device that this rank was placed on; :class:`CapacityError` if it is not there."""
        return placed_device(resources, self.role)

    def require_shared(self, file: SharedFile | None) -> None:
        """Raise :class:`StorageError` if this rank's node does not see the run directory that ``file`` lies in."""
        if file is not None and not file.is_seen():
            raise StorageError(
                f"node {self.node_address()} ({socket.gethostname()}) does not see the run directory "
                f"{Path(file.path).parent}, where its {self.role} rank {self.rank} reads or writes: give run.root a directory "
                "that all nodes share, on a network file system"
            )

    def hold_rendezvous(self, address: str, port: int = 0) -> int | None:
        """On rank 0, listen at ``address`` for the group's other ranks from now on; returns the port.

        None on other ranks, and where ranks do not meet because they share nothing but the requests.
        """
        return None

    @contextmanager
    def doing(self, phase: str) -> Iterator[None]:
        """Report ``phase`` while the block runs. If the block fails, the phase stays: it says where."""
        self.phase = phase
        yield
        self.phase = "ready"
