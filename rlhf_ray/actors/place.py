"""Where the ranks of a job run, and how a group of them is started there.

A place is the Ray cluster (``cluster.py``) or the current process (``this_process.py``). Whoever needs a group describes
its ranks once and does not know which place it gets.

Invariants: placing starts processes but loads no model; loading ends in a group that is ready, or in one typed error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from rlhf_ray.actors.groups import Group, RewardGroup
from rlhf_ray.actors.loading import Loading
from rlhf_ray.actors.ranks import Ranks
from rlhf_ray.actors.workers.model import WorkerSetup
from rlhf_ray.actors.workers.registry import WORKERS, WorkerKind
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.engine import PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.roles import RoleConfig, ScoringRole
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.models.weights.encoder_config import is_encoder
from rlhf_ray.pending import Pending

AnyGroup = TypeVar("AnyGroup", bound=Group)


@dataclass(frozen=True)
class RankSpec:
    """The ranks of one group: which worker runs in them, how many there are, and what each of them takes."""

    worker: WorkerKind
    ranks: int
    resources: ResourcesConfig
    first_rank: int = 0
    """The number of the first rank. Rollout engines are started one by one, each under its own number."""
    name: str | None = None
    """The name of the group, if a job has several groups of the same role."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """On which nodes they go, where no places were reserved for the whole job."""
    places: str | None = None
    """Whose places of those reserved for the whole job they take, where the group is called otherwise."""

    @property
    def group_name(self) -> str:
        """What the group is called in logs, errors and actor names."""
        return self.name or WORKERS[self.worker].role

    @property
    def place_name(self) -> str:
        """What their places are reserved as."""
        return self.places or self.group_name


class Place(Protocol):
    """Somewhere ranks can run."""

    config: ClusterConfig

    def start(self, spec: RankSpec) -> Ranks:
        """Start the ranks of ``spec``; they have no model yet."""


@dataclass(frozen=True)
class PlacedGroup(Generic[AnyGroup]):
    """A group whose ranks have a place but no model yet. Their processes start while others are being placed."""

    group: AnyGroup
    setup: WorkerSetup
    timeout_s: float

    def load(self) -> Pending[AnyGroup]:
        """Begin to load the model on every rank; the value is the group, ready."""
        return self.group.setup(self.setup, timeout_s=self.timeout_s).then(lambda line: self.group)

    @property
    def loading(self) -> Loading:
        """Its loading, which may be begun again with other processes."""
        group = self.group
        return Loading(group.role, self.load, group.restart, group.restarting, waits=group.size > 1)


def place_group(
    place: Place,
    worker: WorkerKind,
    kind: type[AnyGroup],
    setup: WorkerSetup,
    *,
    name: str | None = None,
    places: str | None = None,
) -> PlacedGroup[AnyGroup]:
    """Start the ranks of a model group as its section of the config asks, without loading the model."""
    section = setup.config
    spec = RankSpec(worker, section.ranks, section.resources, name=name, placement=section.placement, places=places)
    # A collective begins later than the call that it is part of. So the call's deadline comes first, whose error says more.
    limits = place.config
    setup = replace(setup, collective_timeout_s=max(limits.start_timeout_s, limits.call_timeout_s))
    return PlacedGroup(kind(place.start(spec)), setup, limits.start_timeout_s)


def place_reward_group(
    place: Place, setup: RewardSetup, *, name: str | None = None, places: str | None = None
) -> PlacedGroup[RewardGroup]:
    """Start the ranks of a reward model that only scores, in the runner that its section and its architecture ask for."""
    return place_group(place, _scoring_worker(setup.config), RewardGroup, setup, name=name, places=places)


def _scoring_worker(role: RoleConfig) -> WorkerKind:
    if isinstance(role, ScoringRole) and role.scorer == "vllm":
        return "vllm_reward"
    return "encoder_reward" if is_encoder(role.model) else "reward"


def place_scoring_group(
    place: Place,
    config: ServeConfig,
    role: RoleConfig,
    *,
    name: str | None = None,
    places: str | None = None,
    max_item_bytes: int | None = None,
) -> PlacedGroup[RewardGroup]:
    """Start the ranks of a reward model that scores what callers send, within the limits of ``config``.

    ``places`` says as which of the models that ``config`` names its places are reserved, by default as the first one.
    """
    setup = RewardSetup(
        role,
        seed=0,
        max_tokens=config.max_batch_tokens,
        max_item_tokens=config.max_tokens,
        max_item_bytes=max_item_bytes,
        refuse_markers=config.refuse_markers,
    )
    return place_reward_group(place, setup, name=name, places=places or config.name)
