"""The facts that a job states about itself: its models, what they take of a cluster, and its sizes.

Invariant: a fact is a plain value. Code that checks, plans or places a job reads its facts and never asks for its
kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rlhf_ray.config.problems import unless_absent
from rlhf_ray.config.sections.engine import PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig, TokenBudget
from rlhf_ray.config.sections.rollout import RolloutConfig


class Amount(NamedTuple):
    """A number, and the keys that it comes from, as a message names them."""

    value: int
    origin: str


@dataclass(frozen=True)
class Work:
    """What each batch brings to a role. These are functions, because a partial config may lack what they read."""

    items: Callable[[], Amount]
    """How many items all ranks of the role share."""
    longest: Callable[[], Amount]
    """Tokens of the longest item that must stay in one micro-batch."""
    budget: Callable[[], TokenBudget]
    """The section that says how many tokens a micro-batch holds."""


@dataclass(frozen=True)
class Role:
    """One model of a job, and what the job does with it."""

    config: RoleConfig
    trained: bool = False
    """Whether the job changes its weights; otherwise it runs forward only."""
    head: bool | None = None
    """Whether it has a score head; none where a model with and without one will do."""
    work: Work | None = None
    """None where requests from outside decide what it works on."""
    entropy_in_loss: bool = False
    """Whether its loss depends on the entropy of its choices."""
    beside: ModelConfig | None = None
    """A frozen model that each of its ranks holds too."""
    derived: bool = False
    """Whether its section is null and it follows from another role, whose problems are reported already."""


def present_roles(makers: Mapping[str, Callable[[], Role | None]]) -> dict[str, Role]:
    """The roles by the keys of their sections, without those that are null or absent from a partial config."""
    roles = {key: unless_absent(make, None) for key, make in makers.items()}
    return {key: role for key, role in roles.items() if role is not None}


@dataclass(frozen=True)
class Sampling:
    """Engines that sample from a model of the job, which sends them its weights."""

    config: RolloutConfig
    role: Role
    """The model that they sample from."""
    sequences: int
    """Answers that they sample in a step, all together."""
    updates: int
    """Updates of each trained model in a step."""


@dataclass(frozen=True)
class Placement:
    """Processes of one role that a cluster must find room for, each on one node."""

    name: str
    count: int
    resources: ResourcesConfig
    placement: PlacementConfig = field(default_factory=PlacementConfig)


@dataclass(frozen=True)
class Size:
    """One line of a job's batch arithmetic: what it counts, how many, and what that follows from."""

    what: str
    value: str
    follows: str = ""
