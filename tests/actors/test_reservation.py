"""Places of a whole job on two real Ray nodes of one machine: on the nodes that were assigned, all together or none."""

from __future__ import annotations

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
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning.capacity import Bundle


class Rank:
    """Says where Ray has put it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank

    def zone(self) -> str:
        found: str = ray.get_runtime_context().get_node_labels().get("zone", "")
        return found


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
    assert {zone: (node.cpus, node.gpus, dict(node.resources)) for zone, node in found.items()} == {
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


def test_an_engine_whose_node_has_died_starts_again_where_there_is_room_for_it(nodes: Nodes) -> None:
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
    wait_for(4.0)
