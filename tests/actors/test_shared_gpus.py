"""Ranks of several roles share GPUs, and no two ranks of one role lie on the same one: on a real Ray with logical GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import ray
from ray.util.placement_group import placement_group_table

from rlhf_ray.actors import shells
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import start_ray
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.config.checks.shared_gpus import SharedGpus
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig

GPUS = 2


class Rank:
    """Says where Ray has put it."""

    def __init__(self, rank: int, world_size: int, tells_ray: bool) -> None:
        self.rank = rank

    def gpus(self) -> list[Any]:
        return list(ray.get_gpu_ids())


@pytest.fixture(scope="module")
def with_ray() -> Iterator[None]:
    start_ray(num_cpus=16, num_gpus=GPUS, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster(with_ray: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(shells, "remote_class", lambda worker: ray.remote(Rank))
    shared = SharedGpus(("policy", "reference", "rollout"), GPUS, 3.0)
    with Cluster(ClusterConfig(), RunConfig(name=f"shared-{uuid4().hex[:8]}"), shared=shared) as cluster:
        yield cluster


def spec(role: Any, share: float, ranks: int = GPUS, first_rank: int = 0) -> RankSpec:
    return RankSpec(role, ranks, ResourcesConfig(cpus_per_rank=1.0, gpus_per_rank=share), first_rank)


def gpus(cluster: Cluster, one: RankSpec) -> list[Any]:
    """The GPU of each rank; none on the CPU."""
    found = cluster.start(one).call("gpus", [()] * one.ranks).result()
    return [own[0] if own else None for own in found]


def expect_places(cluster: Cluster, *names: str) -> None:
    """Wait until the job has these placement groups and no others."""
    wanted, deadline = sorted(f"rlhf/{cluster.run.name}/{name}" for name in names), time.monotonic() + 20
    while True:
        entries = [entry for entry in placement_group_table().values() if entry["state"] == "CREATED"]
        found = sorted(entry["name"] for entry in entries if entry["name"].startswith(f"rlhf/{cluster.run.name}/"))
        if found == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert found == wanted


def test_each_rank_of_a_role_has_another_gpu_and_rank_i_that_of_rank_i_of_the_others(cluster: Cluster) -> None:
    policy = gpus(cluster, spec("policy", 0.4))
    assert len(set(policy)) == GPUS, policy
    reference = gpus(cluster, spec("reference", 0.3))
    engines = [gpus(cluster, spec("rollout", 0.3, ranks=1, first_rank=number))[0] for number in range(GPUS)]
    assert policy == reference == engines


def test_a_role_beside_them_has_places_of_its_own_and_all_are_given_back(cluster: Cluster) -> None:
    gpus(cluster, spec("policy", 0.4))
    group = cluster.start(spec("reward", 0.0))
    assert group.call("gpus", [()] * GPUS).result() == [[], []]
    expect_places(cluster, "shared", "reward/0")
    cluster.stop(group)
    expect_places(cluster, "shared")  # until the job leaves, since other roles lie there too
    cluster.__exit__(None, None, None)
    expect_places(cluster)
