"""The ``engine`` and ``resources`` sections: how a role trains, and what each of its ranks takes of the cluster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import Fraction, NonNegativeFloat, Positive, PositiveFloat, Section
from rlhf_ray.environment import Device

Beta = Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]
ZeroStage = Annotated[int, Field(ge=0, le=3)]
Schedule = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]

SCHEDULE_KEYS = {"restarts": "cosine_with_restarts", "power": "polynomial", "decay_fraction": "warmup_stable_decay"}
"""Keys that only one schedule reads, and which."""


class OptimizerConfig(Section):
    """AdamW and the schedule of its learning rate over all updates of a run."""

    learning_rate: PositiveFloat
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Schedule = "constant"
    warmup_fraction: Fraction = 0.0
    final_fraction: Fraction = 0.0
    """The learning rate at the last update, as a share of ``learning_rate``; the schedules ``constant`` and
    ``inverse_sqrt`` do not read it."""
    restarts: Positive = 1
    """The number of cosines in the schedule ``cosine_with_restarts``."""
    power: PositiveFloat = 1.0
    """The exponent of the schedule ``polynomial``."""
    decay_fraction: Fraction = 0.2
    """The last share of the run, in which the schedule ``warmup_stable_decay`` falls along a cosine."""
    max_grad_norm: PositiveFloat = 1.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (
            self.schedule in ("constant", "inverse_sqrt")
            and self.final_fraction
            and not self.is_default("final_fraction")
        ):
            yield (
                "final_fraction",
                f"{self.final_fraction} has no effect: schedule is {self.schedule}; set it to cosine",
            )
        for key, schedule in SCHEDULE_KEYS.items():
            if self.schedule != schedule and not self.is_default(key):
                yield (
                    key,
                    f"{getattr(self, key)} belongs to the schedule {schedule}, but it is {self.schedule}: remove it",
                )
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1.0:
            yield (
                "decay_fraction",
                f"{self.decay_fraction} and warmup_fraction {self.warmup_fraction} are more than the run: lower one",
            )


class EngineConfig(Section):
    """A DeepSpeed engine. Without an optimizer it runs forward only."""

    zero: ZeroStage = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    optimizer: OptimizerConfig | None = None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.zero in (1, 2) and self.optimizer is None:
            yield "zero", f"stage {self.zero} shards an optimizer, but there is none: set 0 or 3, or add optimizer"
        if self.offload == "optimizer" and self.optimizer is None:
            yield "offload", "there is no optimizer to offload: add optimizer, or set offload to none"
        if self.offload == "optimizer" and self.zero == 0:
            yield "offload", "optimizer needs ZeRO: set zero to 1, 2 or 3, or offload to none"
        if self.offload == "all" and self.zero != 3:
            yield "offload", f"all moves parameters, but zero is {self.zero}: set zero to 3, or offload to optimizer"


Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]


class PlacementConfig(Section):
    """On which nodes the ranks of a role (of ``rollout``: its engines) go."""

    strategy: Strategy = "pack"
    """``pack``: on few nodes, as far as there is room; ``strict_pack``: on one. ``spread``: on many, as far as there is room;
    ``strict_spread``: on a node of their own each."""
    labels: dict[str, str] = {}  # noqa: RUF012 (pydantic copies it)
    """Ray labels that a node must have, names and values."""
    resource: str | None = None
    """A custom resource of Ray that a node must have; each rank takes a thousandth of it."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.resource in ("CPU", "GPU", "memory", "object_store_memory"):
            yield "resource", f"{self.resource} is no custom resource: resources says how much a rank takes; remove it"


class ResourcesConfig(Section):
    """What one rank (of ``rollout``: one engine with all its tensor-parallel workers) takes of the cluster."""

    cpus_per_rank: PositiveFloat = 1.0
    gpus_per_rank: NonNegativeFloat = 0.0
    threads_per_rank: Positive = 1

    @property
    def device(self) -> Device:
        """What each rank computes on; whoever loads or runs something for a rank takes it from here."""
        return "cuda" if self.gpus_per_rank > 0 else "cpu"
