"""Places of a whole job on two real Ray nodes of one machine: on the nodes that were assigned, all together or none."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from rlhf_ray.actors import shells
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.nodes import free_nodes
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.reservation import reserve
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.errors import CapacityError, GroupError
from rlhf_ray.planning.capacity import Bundle
from rlhf_ray.planning.placement import nodes_table

ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # else each rank would import this module, torch with it


class Rank:
    """Says where Ray has put it."""

    def __init__(self, rank: int, world_size: int, tells_ray: bool) -> None:
        self.rank = rank

    def zone(self) -> str:
        found: str = ray.get_runtime_context().get_node_labels().get("zone", "")
        return found

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    nodes.add_node(num_cpus=2, object_store_memory=80_000_000, labels={"zone": "x"}, include_dashboard=False)
    nodes.add_node(num_cpus=2, object_store_memory=80_000_000, labels={"zone": "y"}, resources={"near": 1})
    ray.init(address=nodes.address, log_to_driver=False)
    nodes.wait_for_nodes()
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(autouse=True)
def plain_ranks(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shells, "remote_class", lambda worker: ray.remote(Rank))
    wait_for(4.0)


def wait_for(cpus: float) -> None:
    """Wait until Ray counts so many CPUs as free."""
    deadline = time.monotonic() + 20
    while sum(node.cpus for node in free_nodes()) < cpus and time.monotonic() < deadline:
        time.sleep(0.1)
    assert sum(node.cpus for node in free_nodes()) == cpus


def job(*bundles: Bundle, timeout_s: float = 20.0) -> Cluster:
    run = RunConfig(name=f"together-{uuid4().hex[:8]}")
    return Cluster(ClusterConfig(placement_timeout_s=timeout_s), run, needed=bundles, together=True)


def zones(cluster: Cluster, role: Any, ranks: int, cpus: float, first_rank: int = 0) -> tuple[Any, list[str]]:
    group = cluster.start(RankSpec(role, ranks, ResourcesConfig(cpus_per_rank=cpus), first_rank))
    return group, group.call("zone", [()] * ranks).result()


def test_every_node_is_known_with_its_labels_its_custom_resources_and_what_is_free(nodes: Nodes) -> None:
    """Fails when Ray's own table of what is free, which is not public, changes."""
    found = {node.labels["zone"]: node for node in free_nodes() if node.labels is not None}
    custom = {
        zone: {name: amount for name, amount in node.resources.items() if not name.startswith("node:")}
        for zone, node in found.items()
    }
    assert {zone: (node.cpus, node.gpus, custom[zone]) for zone, node in found.items()} == {
        "x": (2.0, 0.0, {}),
        "y": (2.0, 0.0, {"near": 1.0}),
    }


def test_all_places_are_taken_together_on_the_nodes_asked_for_and_a_group_that_starts_again_finds_its_own() -> None:
    bundles = [
        *[Bundle("policy", 0.5, strategy="strict_spread")] * 2,
        Bundle("critic", 0.5, labels=(("zone", "y"),)),
        *[Bundle("rollout", 0.5, resource="near")] * 2,
    ]
    with job(*bundles) as cluster:
        wait_for(1.5)  # before any group is started
        assert sorted(zones(cluster, "policy", 2, 0.5)[1]) == ["x", "y"]
        assert zones(cluster, "critic", 1, 0.5)[1] == ["y"]
        engines = [zones(cluster, "rollout", 1, 0.5, number) for number in range(2)]
        assert [where for _, where in engines] == [["y"], ["y"]]
        engines[0][0].restart()
        assert engines[0][0].call("zone", [()]).result() == ["y"]
        cluster.stop(engines[1][0])
        wait_for(1.5)  # its place is still the job's
    wait_for(4.0)


def test_a_job_that_does_not_fit_in_pieces_is_refused_in_seconds_and_holds_nothing() -> None:
    began = time.monotonic()
    with (
        pytest.raises(CapacityError, match=r"reward rank 0 .* finds no place (?s:.*)zone=x(?s:.*)nowhere"),
        job(Bundle("policy", 1.5), Bundle("critic", 1.5), Bundle("reward", 1.0), timeout_s=60.0),
    ):
        pass
    assert time.monotonic() - began < 10
    wait_for(4.0)


def test_an_engine_whose_node_has_died_starts_again_where_there_is_room_for_it(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_nodes = ray.nodes  # all nodes are this machine, so they are told apart by what stands for their host names
    monkeypatch.setattr(
        ray, "nodes", lambda: [{**entry, "NodeManagerHostname": entry["NodeID"]} for entry in true_nodes()]
    )
    gone = nodes.add_node(num_cpus=1, object_store_memory=80_000_000, resources={"gone": 1}, labels={"zone": "z"})
    nodes.wait_for_nodes()
    wait_for(5.0)
    with job(Bundle("rollout", 0.5, labels=(("zone", "z"),))) as cluster:
        engine, zone = zones(cluster, "rollout", 1, 0.5)
        assert zone == ["z"]
        nodes.remove_node(gone, allow_graceful=True)
        wait_for(4.0)
        engine.restart()  # its section, here the default, asks for no label
        assert engine.call("zone", [()]).result()[0] in ("x", "y")
        assert engine.nodes[0].endswith(f"({engine.call('node', [()]).result()[0]})"), (
            "errors name the node where it is now"
        )
    wait_for(4.0)


@pytest.mark.parametrize("together", [True, False])
def test_a_job_begun_right_after_another_waits_until_ray_counts_what_that_one_left(
    together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lags_until = time.monotonic() + 0.5
    true_sums = ray.available_resources
    monkeypatch.setattr(
        ray, "available_resources", lambda: true_sums() if time.monotonic() > lags_until else {"CPU": 0.0}
    )
    run = RunConfig(name=f"next-{uuid4().hex[:8]}")
    cluster = Cluster(ClusterConfig(), run, needed=[Bundle("policy", 1.0)], together=together)
    refusals = []
    try:
        with cluster:
            pass
    except CapacityError as error:
        refusals.append(str(error))
    assert refusals == []
    wait_for(4.0)


def test_a_resource_that_ray_itself_gives_a_node_can_be_asked_for_and_is_not_in_the_picture() -> None:
    found = free_nodes()
    address = next(name for name in found[0].resources if name.startswith("node:") and "internal" not in name)
    assert "node:" not in nodes_table(found)
    places = reserve([Bundle("rollout", 0.5, resource=address)], f"own-{uuid4().hex[:8]}", 10.0)
    assert places.lives()
    places.give_back()
    wait_for(4.0)


def raised_by(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_a_name_that_ray_refuses_is_an_error_of_the_group_which_a_fleet_survives() -> None:
    name, bundles = f"twice-{uuid4().hex[:8]}", [Bundle("rollout", 0.5)]
    places = reserve(bundles, name, 10.0)
    error = raised_by(lambda: reserve(bundles, name, 10.0))
    places.give_back()
    wait_for(4.0)
    assert isinstance(error, GroupError)
    assert name in str(error)


def test_two_engines_whose_node_has_died_hold_one_place_elsewhere_each_however_often_they_start_again(
    nodes: Nodes,
) -> None:
    gone = nodes.add_node(num_cpus=1, object_store_memory=80_000_000, labels={"zone": "z"})
    nodes.wait_for_nodes()
    wait_for(5.0)
    with job(*[Bundle("rollout", 0.5, labels=(("zone", "z"),))] * 2) as cluster:
        engines = [zones(cluster, "rollout", 1, 0.5, number)[0] for number in range(2)]
        nodes.remove_node(gone, allow_graceful=True)
        wait_for(4.0)
        assert [raised_by(engine.restart) for engine in engines * 2] == [None] * 4
        assert {engine.call("zone", [()]).result()[0] for engine in engines} <= {"x", "y"}
        wait_for(3.0)  # one place each, and what they had first is gone with its node
        cluster.stop(engines[0])
        wait_for(3.5)
    wait_for(4.0)


def test_all_models_of_a_service_are_placed_together_and_a_group_that_is_restarted_under_another_name_comes_back() -> (
    None
):
    bundles = [*[Bundle("reward", 1.0)] * 2, Bundle("other", 1.0, labels=(("zone", "y"),))]
    with job(*bundles) as cluster:
        wait_for(1.0)  # before any group is started

        def start(name: str, model: str) -> Any:
            spec = RankSpec("reward", 1, ResourcesConfig(), name=name, places=model)
            group = cluster.start(spec)
            return group, group.call("zone", [()]).result()[0]

        first, other = start("reward", "reward"), start("other-2", "other")
        start("reward-3", "reward")
        assert other[1] == "y"
        wait_for(1.0)  # nothing beside what was reserved
        cluster.stop(first[0])
        assert start("reward-4", "reward")[1] == first[1]
        wait_for(1.0)
        start("reward-5", "reward")  # a version that is loaded beside the one that it replaces
        wait_for(0.0)
    wait_for(4.0)
