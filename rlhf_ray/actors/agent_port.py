"""The one port of a machine at which Ray's job agents listen by default, where several Rays run on it.

Invariant: a run that starts Ray here says so where that Ray takes the port from a cluster which has it not yet. A cluster
without it takes no jobs, and Ray has no public way to give a local Ray another one (2.60: no such option of ``ray.init``).
"""

from __future__ import annotations

import socket
from contextlib import suppress

import psutil

from rlhf_ray.console import get_logger

AGENT_PORT = 52365
NODE = "raylet"
"""The name of the process that every node of a Ray cluster has."""


def warn_if_taken(port: int = AGENT_PORT) -> None:
    """Say that the Ray which is about to start takes ``port``, if it is free although a node of another cluster runs here."""
    if has_node() and is_free(port):
        get_logger().warning(
            "this run starts Ray here and takes port %d, at which the job agent of the cluster on this machine does not listen "
            "(yet): until this run ends, a cluster that starts takes no jobs (No available agent), unless it is started with "
            "ray start --dashboard-agent-listen-port=PORT; or run on that cluster: cluster.address=auto",
            port,
        )


def has_node() -> bool:
    """Whether a node of a Ray cluster runs on this machine."""
    with suppress(psutil.Error):
        return any(process.info["name"] == NODE for process in psutil.process_iter(["name"]))
    return False


def is_free(port: int) -> bool:
    """Whether a server could listen at ``port`` of every address now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
