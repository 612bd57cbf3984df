"""Sections that every run has: its name and place, the cluster it runs on, what it keeps and what it reports."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegative, Positive, PositiveFloat, Section


class RunConfig(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="a name of letters, digits, '_', '.' and '-' that starts with a letter or digit",
    )
    root: str = "runs"
    """The run directory is ``root/name``."""
    seed: NonNegative = 0
    deterministic: bool = False
    max_consecutive_skips: Positive = 5
    max_restarts: NonNegative = 0
    """How often the supervising parent restarts a driver that died, from its last commit."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join (``auto`` or ``host:port``); none starts Ray on this machine, or joins the job's cluster."""
    num_cpus: Positive | None = None
    """CPUs that Ray offers where this run starts it; none means the machine's."""
    object_store_mb: Positive = 512
    dashboard: bool = False
    """Serve Ray's dashboard where this run starts Ray itself."""
    placement_timeout_s: PositiveFloat = 60.0
    start_timeout_s: PositiveFloat = 300.0
    call_timeout_s: PositiveFloat = 600.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.address is not None and self.num_cpus is not None:
            yield "num_cpus", f"{self.num_cpus} counts only where Ray is started here: remove it, or address"


class CheckpointConfig(Section):
    every_steps: NonNegative = 0
    """0 keeps only the final weights."""
    keep: Positive = 2


class MonitoringConfig(Section):
    ray_metrics: bool = True
    tensorboard: bool = False
    samples_per_log: NonNegative = 4
