"""The Ray cluster that a run joined: its attempts remember it, so that it goes on there, on whichever node that is asked for.

Invariant: a run that has joined a cluster is never trained on a Ray of its own instead, unless the user says so.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import TypeVar

from rlhf_ray.actors.connection import JoinedCluster
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.runs.directory import RunDirectory

KEY = "cluster"
AnyJob = TypeVar("AnyJob", bound=Job)


def remember(run: RunDirectory, joined: JoinedCluster | None) -> None:
    """Note in this attempt which cluster it joined; none where it started Ray itself."""
    run.attempts.amend_last({KEY: None if joined is None else asdict(joined)})


def remembered(run: RunDirectory) -> JoinedCluster | None:
    """The cluster of the last attempt that came so far; none where it started Ray itself, or none came so far."""
    known = next((line[KEY] for line in reversed(run.attempts.read()) if KEY in line), None)
    if not isinstance(known, dict) or not all(isinstance(known.get(key), str) for key in ("address", "session")):
        return None
    return JoinedCluster(known["address"], known["session"])


def on_its_cluster(config: AnyJob, run: RunDirectory) -> AnyJob:
    """``config`` with the cluster that the run joined, where neither it nor ``RAY_ADDRESS`` says which one to join."""
    known = remembered(run)
    if known is None or config.cluster.address is not None or os.environ.get("RAY_ADDRESS"):
        return config
    cluster = config.cluster.model_copy(update={"address": known.address, "num_cpus": None})
    return config.model_copy(update={"cluster": cluster})
