"""The current process as a place for ranks: plain workers, one rank a role, without Ray.

Tests run whole jobs here, and so does ``rlhf-ray train --in-process``, where a debugger reaches every rank.
"""

from __future__ import annotations

from functools import partial

from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.registry import WORKERS
from rlhf_ray.config.sections.run import ClusterConfig


class ThisProcess:
    """Runs every rank as an object in this process."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    def start(self, spec: RankSpec) -> InProcessRanks:
        """One worker; more ranks of a role need more processes."""
        make = partial(WORKERS[spec.worker], spec.first_rank, spec.ranks)
        return InProcessRanks(spec.group_name, make(), make)
