"""Sections that every run has: its name and place, the cluster it runs on, what it keeps and what it reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegative, Positive, PositiveFloat, Section
from rlhf_ray.config.trackers import problem


class RunConfig(Section):
    """The name of a run, where it is kept, and how it repeats and survives failures."""

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
    """How often a driver that died is started again, from its last commit."""
    stop_grace_s: PositiveFloat = 30.0
    """How long a run has to end after it was asked to stop: a PPO step that would take longer is broken off."""
    stall_floor_s: PositiveFloat = 60.0
    """How long a phase, or a call, may take at least before it counts as stalled; above that, six times its own median."""
    max_group_restarts: NonNegative = 3
    """How often the ranks of a role are started again in place, between two commits, while the run goes on."""


class ClusterConfig(Section):
    """The Ray cluster that a job joins or starts, and how long it waits for it."""

    address: str | None = None
    """Ray address to join (``auto`` or ``host:port``); null starts Ray on this machine, or joins the cluster that
    ``RAY_ADDRESS`` names."""
    num_cpus: Positive | None = None
    """CPUs that Ray offers if this run starts it; null means those of the machine."""
    object_store_mb: Positive | None = None
    """Size of Ray's object store if this run starts Ray; null sizes it from the weights that are published and the batches."""
    dashboard: bool = False
    """Whether Ray's dashboard is served, if this run starts Ray."""
    colocate: bool = False
    """PPO: whether all roles on GPUs are on the same ones, by turns: rank i of each, and rollout engine i, on GPU i."""
    placement_timeout_s: PositiveFloat = 60.0
    start_timeout_s: PositiveFloat = 300.0
    call_timeout_s: PositiveFloat = 600.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.address is not None and self.num_cpus is not None:
            yield "num_cpus", f"{self.num_cpus} counts only where Ray is started here: remove it, or address"


LEAST_KEPT = 2
"""Checkpoints that are always kept, so that a damaged one has another before it."""


class CheckpointConfig(Section):
    """How often a run is saved so that it can be resumed, and how many of these checkpoints are kept."""

    every_steps: NonNegative | None = None
    """Null commits after every tenth of a run, where commits cost it little, and every quarter of an hour; 0 keeps only the
    final weights."""
    keep: Positive = 2
    background: bool = True
    """Whether ranks copy their state in memory and write the copy while the next steps run; they write at once where the
    memory is short."""


PROJECT_NAME = "a name of at most 100 letters, digits, '_', '.' and '-' that starts with a letter or digit"


class MonitoringConfig(Section):
    """Where metrics go, besides the run directory."""

    ray_metrics: bool = True
    trackers: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Each as ``NAME`` or ``NAME:PLACE``, such as ``wandb:offline``; fed by processes of their own (``rlhf_ray.trackers``)."""
    project: str = Field(default="rlhf-ray", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$", description=PROJECT_NAME)
    """Where trackers file the run: the project of wandb and trackio, the experiment of mlflow."""
    track_live: bool = False
    """Whether trackers get steps as they are logged, and each attempt as a curve of its own; else what is committed, as one."""
    samples_per_log: NonNegative = 4
    spans: bool = True
    """Whether every process writes down when it did what, into the run directory."""
    open_telemetry: bool = False
    """Whether it writes that as OpenTelemetry too; this needs ``spans``."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for text in self.trackers:
            if wrong := problem(text):
                yield "trackers", wrong
        for text, count in Counter(self.trackers).items():
            if count > 1:
                yield "trackers", f"{text} stands there {count} times: each tracker gets the run once"
