"""The Ray cluster as a run sees it: join or start it, hold groups in placement groups, leave nothing behind.

Always true: nothing is placed before the whole job is known to fit; a group is placed as a whole or not at all, within a
deadline; leaving the ``with`` block stops every actor this run started, and Ray itself where this run started it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rlhf_ray import environment
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.schema import ClusterConfig, ResourcesConfig, RunConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import CapacityError, RequestError
from rlhf_ray.planning.capacity import Bundle, offered_here, require_fit

SERVICE_NAMESPACE = "rlhf-serve"


def run_namespace(run: str) -> str:
    """The Ray namespace of a run's actors."""
    return f"rlhf-{run}"


def actor_name(run: str, role: str, rank: int) -> str:
    return f"rlhf/{run}/{role}/{rank}"


class Cluster:
    """A connection to Ray for one run."""

    def __init__(
        self,
        config: ClusterConfig,
        run: RunConfig,
        *,
        needed: Sequence[Bundle] = (),
        hub: bool = False,
        namespace: str | None = None,
    ) -> None:
        self.config = config
        self.run = run
        self.namespace = namespace or run_namespace(run.name)
        self.needed = list(needed)
        self.hub = hub
        self._groups: list[RayRanks] = []
        self._joined = False

    def __enter__(self) -> Cluster:
        import ray

        if ray.is_initialized():
            self._joined = True
        else:
            self._connect(ray)
        free = _resources(ray.available_resources())
        try:
            require_fit(self.needed, free)
        except CapacityError:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self, ray: Any) -> None:
        options: dict[str, Any] = {"namespace": self.namespace, "log_to_driver": True}
        address = self.config.address or os.environ.get("RAY_ADDRESS")
        if address is not None:
            try:
                ray.init(address=address, **options)
            except ConnectionError as error:
                raise RequestError(
                    f"cluster.address {address}: no Ray cluster answers there ({error}); where one runs that asks for a "
                    "token, set RAY_AUTH_MODE=token"
                ) from error
            return
        offered = offered_here(self.config)
        assert offered is not None, "a job without an address starts Ray here"
        require_fit(self.needed, offered)
        ray.init(
            address="local",
            num_cpus=int(offered["CPU"]),
            object_store_memory=self.config.object_store_mb * 2**20,
            include_dashboard=self.config.dashboard,
            **options,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        for group in self._groups:
            group.stop()
        self._groups = []
        if not self._joined:
            ray.shutdown()

    def start(
        self,
        role: str,
        ranks: int,
        resources: ResourcesConfig,
        *,
        first_rank: int = 0,
        name: str | None = None,
    ) -> RayRanks:
        """Place and start ranks ``first_rank``... of ``role``, called ``name`` where a run has several of that role.

        Their models are not loaded yet.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from rlhf_ray.actors.shells import remote_class

        called = name or role
        bundle = {"CPU": resources.cpus_per_rank, "GPU": resources.gpus_per_rank}
        bundle = {name: amount for name, amount in bundle.items() if amount > 0}
        group = placement_group([bundle] * ranks, strategy="PACK", name=f"rlhf/{self.run.name}/{called}/{first_rank}")
        if not group.wait(timeout_seconds=self.config.placement_timeout_s):
            remove_placement_group(group)
            needed = [Bundle(role=called, cpus=resources.cpus_per_rank, gpus=resources.gpus_per_rank)] * ranks
            require_fit(needed, _resources(ray.available_resources()))
            raise CapacityError(
                f"{called}: no place for {ranks} ranks of {bundle} within {self.config.placement_timeout_s:g} s, although "
                "the cluster's free total would do: no single node has room for one; lower cpus_per_rank or gpus_per_rank"
            )
        variables = environment.for_process(
            threads=resources.threads_per_rank, hub=self.hub, device="cuda" if resources.gpus_per_rank > 0 else "cpu"
        )
        actor_class = remote_class(role)
        actors = [
            actor_class.options(
                name=actor_name(self.run.name, called, first_rank + rank),
                namespace=self.namespace,
                num_cpus=resources.cpus_per_rank,
                num_gpus=resources.gpus_per_rank,
                max_restarts=0,
                runtime_env={"env_vars": variables},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(first_rank + rank, ranks)
            for rank in range(ranks)
        ]
        started = RayRanks(
            called, actors, timeout_s=self.config.call_timeout_s, on_stop=lambda: remove_placement_group(group)
        )
        self._groups.append(started)
        get_logger().info("%s: %d rank%s placed", called, ranks, "" if ranks == 1 else "s")
        return started

    def stop(self, ranks: RayRanks) -> None:
        """Stop one group before the run ends; one that is stopped already stays so."""
        if ranks in self._groups:
            self._groups.remove(ranks)
            ranks.stop()


def _resources(answer: Mapping[str, float]) -> dict[str, float]:
    return {"CPU": float(answer.get("CPU", 0.0)), "GPU": float(answer.get("GPU", 0.0))}
