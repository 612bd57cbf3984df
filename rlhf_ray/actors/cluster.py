"""A job's connection to Ray: join or start a cluster, start groups of ranks in placement groups, clean up at the end.

Invariants: nothing is placed before the whole job is known to fit, node by node; all groups of a training job are placed
together or none (``reservation.py``), and any other group as a whole or not at all, within a deadline; leaving the ``with``
block stops every actor that this job started, and Ray itself if this job started it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rlhf_ray import environment
from rlhf_ray.actors.agent_port import warn_if_taken
from rlhf_ray.actors.connection import JoinedCluster, join_ray, start_ray
from rlhf_ray.actors.ranks import UNPLACED, RayRanks
from rlhf_ray.actors.reservation import SETTLES_S, Elsewhere, Reservation, on_live_nodes, require_room, reserve
from rlhf_ray.config.checks.shared_gpus import SharedGpus
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.console import get_logger
from rlhf_ray.monitoring.scrape_targets import published
from rlhf_ray.network import cluster_address
from rlhf_ray.planning.capacity import Bundle, bundle_of, needed, offered_here, require_fit
from rlhf_ray.planning.colocation.memory import requirement
from rlhf_ray.planning.gpus import gpu_bytes
from rlhf_ray.planning.job_memory import job_memory
from rlhf_ray.planning.object_store import LEAST, advice, store_to_start
from rlhf_ray.processes.interrupts import kept_handlers
from rlhf_ray.processes.lifeline import leaving

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from rlhf_ray.actors.place import RankSpec

SERVICE_NAMESPACE = "rlhf-serve"


def run_namespace(run: str) -> str:
    """The Ray namespace of a run's actors."""
    return f"rlhf-{run}"


def group_of(key: str) -> str:
    """The name of the group of the role at a key: reward.mixture.helpful runs as reward-helpful, its second model as ...-2."""
    return key.replace(".mixture.", "-").replace(".ensemble.", "-")


def actor_name(run: str, role: str, rank: int, incarnation: int = 0) -> str:
    """The name of a rank's actor. One that was restarted has another: Ray frees that of the dead some time later."""
    return f"rlhf/{run}/{role}/{rank}" + (f"/{incarnation}" if incarnation else "")


class Cluster:
    """A connection to Ray for one job."""

    def __init__(
        self,
        config: ClusterConfig,
        run: RunConfig,
        *,
        needed: Sequence[Bundle] = (),
        hub: bool = False,
        namespace: str | None = None,
        object_store: int | None = LEAST,
        shared: SharedGpus | None = None,
        require_memory: Callable[[float], None] = lambda gpu_bytes: None,
        together: bool = False,
        rank_metrics: bool = False,
    ) -> None:
        """``object_store`` is its size in bytes if Ray is started here and the config names none; None lets Ray choose.

        ``shared`` are GPUs on which the ranks of several roles are placed side by side. ``require_memory`` refuses the job if
        the GPUs of this machine, where Ray is started on it, have too few bytes.

        With ``together`` the places of all that is ``needed`` are reserved at once, before the first group is started. With
        ``rank_metrics`` every rank tells Ray how it is.
        """
        self.config = config
        self.run = run
        self.namespace = namespace or run_namespace(run.name)
        self.needed = list(needed)
        self.hub = hub
        given = config.object_store_mb
        self.object_store = object_store if given is None else given * 2**20
        self._groups: list[RayRanks] = []
        self.shared = shared
        self.require_memory = require_memory
        self.together = together
        self.rank_metrics = rank_metrics
        self._shared_places: Reservation | None = None
        self._reserved: Reservation | None = None
        self._elsewhere = Elsewhere()
        self._shared = False
        self._published = ExitStack()
        """Ends what tells Prometheus of a Ray that was started here."""
        self.joined: JoinedCluster | None = None
        """The cluster that this one is a connection to; none where Ray was started here, or was there in this process."""

    @classmethod
    def for_job(
        cls, config: Job, *, namespace: str | None = None, check_room: bool = True, together: bool = False
    ) -> Cluster:
        """The cluster of a job. With ``check_room``, entering it refuses a job whose ranks do not fit.

        With ``together`` entering it also takes the places of all ranks.
        """
        bundles = needed(config) if check_room else ()
        for sentence in advice(config):
            get_logger().warning("%s", sentence)
        return cls(
            config.cluster,
            config.run,
            needed=bundles,
            hub=bool(hub_ids(config)),
            namespace=namespace,
            object_store=store_to_start(config),
            shared=config.shared_gpus(),
            together=together,
            rank_metrics=config.tells_ray(),
            **({"require_memory": requirement(config, job_memory(config))} if check_room else {}),
        )

    def __enter__(self) -> Cluster:
        with kept_handlers(exits_on=signal.SIGTERM):  # Ray takes it for itself
            self._connect()
        try:
            if self.together and self.needed:
                self._reserve_all()
            elif self.needed:
                require_room(self.needed)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _reserve_all(self) -> None:
        """Take the places of the whole job, or none."""
        bundles = [replace(bundle, role=group_of(bundle.role)) for bundle in self.needed]
        self._reserved = self._reserve(bundles, "all", room_s=SETTLES_S)
        if self.joined is not None:
            get_logger().info("%s", self._reserved.picture)

    def _connect(self) -> None:
        """Join or start Ray, where this process has not done so; Ray is first imported when it is known which."""
        if _is_connected():
            self._shared = True
            return
        options: dict[str, Any] = {"namespace": self.namespace, "log_to_driver": True}
        address = cluster_address(self.config.address)
        if address is not None:
            self.joined = join_ray(address, run=self.run.name, **options)
            return
        offered = offered_here(self.config)
        assert offered is not None, "a job without an address starts Ray here"
        require_fit(self.needed, offered)
        size = gpu_bytes()
        if size is not None:
            self.require_memory(size)
        warn_if_taken()
        environment.require_room_for_sockets()
        started = start_ray(
            run=self.run.name,
            num_cpus=int(offered["CPU"]),
            num_gpus=int(offered["GPU"]),  # Ray itself would ask NVML, which a container may lack
            object_store_memory=self.object_store,
            include_dashboard=self.config.dashboard,
            **options,
        )
        # With its dashboard Ray names its pages too, in one file that all dashboards on this machine write in turn.
        self._published.enter_context(published(started.files, started.page))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._shared:
            self._stop_groups()
            return
        with self._published, leaving(error):
            self._stop_groups()
            ray.shutdown()

    def _stop_groups(self) -> None:
        for group in self._groups:
            group.stop()
        self._groups = []
        for places in (self._shared_places, self._reserved):
            if places is not None:
                places.give_back()
        self._shared_places = self._reserved = None

    def start(self, spec: RankSpec) -> RayRanks:
        """Place and start the ranks of ``spec``; they have no model yet."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from rlhf_ray.actors.shells import remote_class

        placement, first, give_back = self._places(spec)
        now = [(placement, first)]
        resources = spec.resources
        variables = variables_of(spec, hub=self.hub)
        actor_class = remote_class(spec.worker)

        def start_actors(incarnation: int) -> list[Any]:
            if incarnation > 0:
                now[0] = self._again(placement, first, spec, incarnation)
            where, bundle = now[0]
            return [
                actor_class.options(
                    name=actor_name(self.run.name, spec.group_name, spec.first_rank + index, incarnation),
                    namespace=self.namespace,
                    num_cpus=resources.cpus_per_rank,
                    num_gpus=resources.gpus_per_rank,
                    max_restarts=0,
                    runtime_env={"env_vars": variables},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        where, placement_group_bundle_index=bundle + index
                    ),
                ).remote(spec.first_rank + index, spec.ranks, self.rank_metrics)
                for index in range(spec.ranks)
            ]

        def stopped() -> None:
            give_back()
            self._elsewhere.give_back(spec.group_name, spec.first_rank)

        ranks = RayRanks(
            spec.group_name,
            start_actors(0),
            timeout_s=self.config.call_timeout_s,
            on_stop=stopped,
            nodes=_nodes(placement, range(first, first + spec.ranks)),
            start_again=start_actors,
            where=lambda: _nodes(now[0][0], range(now[0][1], now[0][1] + spec.ranks)),
        )
        self._groups.append(ranks)
        count = f"{spec.ranks} rank{'' if spec.ranks == 1 else 's'}"
        where = "" if self.joined is None else f" on {', '.join(dict.fromkeys(ranks.nodes))}"
        get_logger().info("%s: %s placed%s", spec.group_name, count, where)
        return ranks

    def _places(self, spec: RankSpec) -> tuple[PlacementGroup, int, Callable[[], None]]:
        """A placement group, the bundle in it of the first rank of ``spec``, and what gives the places back.

        Ray fills a GPU with fractions before it takes the next one, and would put two ranks of one role on it. So roles with
        several ranks that share GPUs lie in bundles of a whole GPU each, one rank of each role in a bundle.

        What was reserved for the whole job stays so until its end: a group that starts again finds its places.
        """
        share = self.shared is not None and spec.group_name in map(group_of, self.shared.roles)
        role = group_of(self.shared.name) if self.shared is not None and share else spec.place_name
        held = self._reserved
        first = None if held is None else held.take(role, spec.place_name, spec.first_rank, spec.ranks)
        if held is not None and first is not None:
            return held.placement, first, lambda: held.leave(spec.place_name, first, spec.ranks)
        if self.shared is not None and share:
            if self._shared_places is None:
                together = bundle_of(role, self.shared.cpus, 1.0, spec.placement)
                self._shared_places = self._reserve([together] * self.shared.count, "shared")
            return self._shared_places.placement, spec.first_rank, lambda: None
        own = bundle_of(role, spec.resources.cpus_per_rank, spec.resources.gpus_per_rank, spec.placement)
        places = self._reserve([own] * spec.ranks, f"{spec.group_name}/{spec.first_rank}")
        return places.placement, 0, places.give_back

    def _again(
        self, placement: PlacementGroup, first: int, spec: RankSpec, incarnation: int
    ) -> tuple[PlacementGroup, int]:
        """Where ranks start again: in their own places, or where Ray finds others, if a node of theirs has died."""
        group, rank = spec.group_name, spec.first_rank
        if on_live_nodes(placement, range(first, first + spec.ranks)):
            self._elsewhere.give_back(group, rank)
            return placement, first
        own = bundle_of(group, spec.resources.cpus_per_rank, spec.resources.gpus_per_rank, spec.placement)
        name = f"rlhf/{self.run.name}/{group}/{rank}/{incarnation}"
        return self._elsewhere.places(group, rank, [own] * spec.ranks, name), 0

    def _reserve(self, bundles: Sequence[Bundle], name: str, *, room_s: float | None = None) -> Reservation:
        return reserve(bundles, f"rlhf/{self.run.name}/{name}", self.config.placement_timeout_s, room_s=room_s)

    @property
    def has_own_ray(self) -> bool:
        """Whether all processes of Ray are descendants of this one, which started it for this job alone."""
        return self.joined is None and not self._shared

    @property
    def groups(self) -> tuple[RayRanks, ...]:
        """The groups that run now."""
        return tuple(self._groups)

    def stop(self, ranks: RayRanks) -> None:
        """Stop one group before the run ends. A second call does nothing."""
        if ranks in self._groups:
            self._groups.remove(ranks)
            ranks.stop()


def variables_of(spec: RankSpec, *, hub: bool) -> dict[str, str]:
    """The environment variables of the ranks of ``spec``.

    Engines on a policy's own GPU read its weights where they lie, and the workers of an engine the results of one another.
    """
    resources = spec.resources
    return environment.for_process(
        threads=resources.threads_per_rank,
        hub=hub,
        device=resources.device,
        hands_memory_on=spec.worker == "rollout" or (spec.worker == "policy" and resources.gpus_per_rank < 1),
    )


def _nodes(placement: PlacementGroup, bundles: Iterable[int]) -> list[str]:
    """Address and host name of the node of each of these bundles."""
    import ray
    from ray.util.placement_group import placement_group_table

    names = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in ray.nodes()}
    places = placement_group_table(placement)["bundles_to_node_id"]
    return [names.get(places.get(bundle), UNPLACED) for bundle in bundles]


def _is_connected() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def free_places_of_the_dead(run: str) -> None:
    """Remove the placement groups of a service of this name, in the namespace of this process, whose gateway has died.

    Ray keeps them until the whole job has ended, with their CPUs and GPUs, and another gateway would find no place.
    """
    from ray.util import get_placement_group
    from ray.util.placement_group import placement_group_table, remove_placement_group

    for entry in placement_group_table().values():
        if entry["name"].startswith(f"rlhf/{run}/") and entry["state"] != "REMOVED":
            try:
                remove_placement_group(get_placement_group(entry["name"]))
            except ValueError:  # there is none of this name in this namespace: it is another job's
                continue
