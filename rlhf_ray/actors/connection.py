"""Joining a Ray cluster that runs, and starting one here.

Invariants: an address where no cluster can be joined is one sentence within a bounded time; a Ray that is started here listens
on this machine alone.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.network import LOOPBACK, failure_to_reach, outward_address

REACH_S = 5.0
"""How long a cluster's address may take to accept a connection."""
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Makes Ray (2.60) take 127.0.0.1 for the node's address, and bind every port there. By itself it does so on Windows and macOS
only, and opens eleven ports at all addresses here; no option of ``ray.init`` closes them. Read when Ray is imported."""
ONE_ATTEMPT = {"RAY_gcs_server_port_wait_time_s": "1"}
"""How often Ray (2.60) tries to reach a cluster, by itself twenty times. An attempt at what is no cluster takes 40 s."""
GCS_FLAG = "--gcs-address="
"""Names the head's address in the command line of each node's raylet, where Ray looks for it too."""
OTHERWISE = (
    "Start one (ray start --head), name another with cluster.address or RAY_ADDRESS, or start Ray on this machine with "
    "RAY_ADDRESS=local"
)
JOB_NAME = "job_name"
"""The key of a job's metadata that Ray's page of jobs (2.60) shows as its name."""
TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of the cluster"


@dataclass(frozen=True)
class JoinedCluster:
    """The cluster that this process has joined."""

    address: str
    """``host:port`` of its head."""
    session: str
    """Ray's name of the session; another cluster at the same address has another."""


@dataclass(frozen=True)
class StartedRay:
    """A Ray that this process has started for itself."""

    files: Path
    """Where all Rays of this machine keep theirs, a folder for each."""
    page: str
    """``host:port`` of its metrics, for Prometheus."""


def start_ray(*, run: str = "", **options: Any) -> StartedRay:
    """Start Ray here, for this process and those that it starts; ``run`` is the job's name in Ray's dashboard."""
    for name, value in LOOPBACK_ONLY.items():
        os.environ.setdefault(name, value)
    import ray

    context: Any = ray.init(
        address="local", job_config=_named(run), **options
    )  # a RayContext, since it is not a client's
    address = context.address_info
    page = f"{address['node_ip_address']}:{address['metrics_export_port']}"
    return StartedRay(Path(address["session_dir"]).parent, page)


def _named(run: str) -> Any:
    """What makes Ray's page of jobs show the name of a run. What was given with the job's submission comes first."""
    from ray.job_config import JobConfig

    return JobConfig(metadata={JOB_NAME: run} if run else {})


def join_ray(address: str, *, run: str = "", **options: Any) -> JoinedCluster:
    """Join the cluster at ``address`` (``host:port`` or ``auto``); raises :class:`RequestError` where that cannot be.

    ``run`` is the job's name in Ray's dashboard.
    """
    found = _of_this_machine() if address == "auto" else address
    asked = address if found == address else f"{address} (which is {found} here)"
    host, port = _host_and_port(found)
    variables = ONE_ATTEMPT | (LOOPBACK_ONLY if _answers_on_loopback_alone(asked, host, port) else {})
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=found, job_config=_named(run), **options)
    except AuthenticationError as error:
        raise RequestError(
            f"the Ray cluster at {asked} asks for a token, and this is not the one it knows: {TOKEN}"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise RequestError(_refusal(asked, error)) from error
    context = ray.get_runtime_context()
    joined = JoinedCluster(context.gcs_address, context.get_session_name())
    get_logger().info("joined the Ray cluster at %s (%s)", joined.address, joined.session)
    return joined


def job_mark() -> str:
    """What tells the processes of this job from those of all others, on any cluster; empty outside of one."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"{context.get_session_name()}/{context.get_job_id()}"


def lost_cluster(limit_s: float = REACH_S) -> str | None:
    """What of the cluster that this process is connected to has died, its head or the node beside it; none if both answer.

    Ray itself would go on trying to reach a dead head for a minute.
    """
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    gcs = ray.get_runtime_context().gcs_address
    failure = failure_to_reach(*_host_and_port(gcs), limit_s)
    if failure is not None:
        return f"the head of the Ray cluster at {gcs} does not answer ({failure})"
    here = ray.get_runtime_context().get_node_id()
    node = next((node for node in ray.nodes() if node["NodeID"] == here), None)
    if node is None or not node["Alive"]:
        return f"the Ray node {here} of this process is dead"
    address, port = str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])
    failure = failure_to_reach(address, port, limit_s)
    return None if failure is None else f"the raylet of this process at {address}:{port} does not answer ({failure})"


def _of_this_machine() -> str:
    """What ``auto`` means, in Ray's order: the cluster that this machine is a node of, else the last one started here."""
    running = {
        word.removeprefix(GCS_FLAG)
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"] == "raylet"
        for word in process.info["cmdline"] or ()
        if word.startswith(GCS_FLAG)
    }
    directory = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        last = (Path(directory) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        last = ""
    if len(running) > 1 and not last:
        raise RequestError(
            f"several Ray clusters run on this machine ({', '.join(sorted(running))}): name one with cluster.address or "
            "RAY_ADDRESS instead of auto"
        )
    found = last if len(running) != 1 else running.pop()
    if not found:
        raise RequestError(f"no Ray cluster runs on this machine, so auto finds none: {OTHERWISE}")
    return found


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        raise RequestError(
            f"the cluster address {address} is neither auto nor host:port of a head, such as 10.0.0.1:6379: correct "
            "cluster.address or RAY_ADDRESS"
        )
    return host.strip("[]"), int(port)


def _answers_on_loopback_alone(asked: str, host: str, port: int) -> bool:
    """Whether the cluster was started for this machine alone. Where nothing answers it is refused: Ray would go on trying."""
    failure = failure_to_reach(host, port, REACH_S)
    if failure is not None:
        raise RequestError(f"no Ray cluster answers at {asked}: {failure}. {OTHERWISE}")
    if host not in ("localhost", LOOPBACK, "::1"):
        return False
    # Ray looks for such a head at the address that others reach this machine at.
    return failure_to_reach(outward_address(), port, REACH_S) is not None


def _refusal(address: str, error: Exception) -> str:
    cause = str(error).strip()
    if "Version mismatch" in cause:
        return f"the Ray cluster at {address} runs other versions than this process: {cause}. Use the versions of the cluster"
    return (
        f"the Ray cluster at {address} cannot be joined: {cause.splitlines()[0] if cause else repr(error)}. It must be the "
        f"port of a head (6379, not the dashboard), with a node of the cluster on this machine; if it asks for a token, {TOKEN}"
    )
