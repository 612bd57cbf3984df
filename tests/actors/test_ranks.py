"""A call to a group ends in one value a rank, in rank order, or in one typed error that names role, rank, phase and cause."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import ray

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import START_TIMEOUT, InProcessRanks, RayRanks
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.errors import CapacityError, DeadlineError, GroupError, ModelLoadError
from rlhf_ray.planning.capacity import Bundle


class Rank:
    """A rank whose calls do what the test asks for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def double(self, number: int) -> int:
        time.sleep(0.2 * (1 - self.rank))  # rank 1 answers first
        return 2 * number + self.rank

    def fail_on_one(self) -> int:
        if self.rank == 1:
            raise ValueError("the cause")
        time.sleep(30)
        return 0

    def refuse(self) -> None:
        raise ModelLoadError("no head: give one")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        if self.rank == 1:
            ray.actor.exit_actor()

    def run_and_share(self, method: str, *arguments: object) -> list[object]:
        return [ray.put(getattr(self, method)(*arguments))]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig(num_cpus=2, object_store_mb=100), RunConfig(name="ranks-test")) as cluster:
        yield cluster


@pytest.fixture
def ranks(cluster: Cluster) -> Iterator[RayRanks]:
    actors = [ray.remote(num_cpus=0)(Rank).remote(rank) for rank in range(2)]
    group = RayRanks("policy", actors, timeout_s=60.0, on_stop=lambda: None)
    yield group
    group.stop()


def test_ranks_that_were_stopped_are_a_typed_error() -> None:
    """A service asks for the health of a group at any time, also while another takes its place."""
    stopped = RayRanks("reward", [], timeout_s=60.0, on_stop=lambda: None)
    with pytest.raises(GroupError, match="reward failed in health: its processes have been stopped"):
        stopped.call("health", [()]).result()


def test_values_come_in_rank_order_whoever_answers_first(ranks: RayRanks) -> None:
    assert ranks.call("double", [(10,), (20,)]).result() == [20, 41]


def test_the_first_failure_ends_the_call_although_a_peer_never_answers(ranks: RayRanks) -> None:
    ranks.call("double", [(0,), (0,)]).result()  # both processes are up
    began = time.monotonic()
    with pytest.raises(GroupError, match=r"policy rank 1 failed in update: .*the cause") as caught:
        ranks.call("fail_on_one", [(), ()], phase="update").result()
    assert time.monotonic() - began < 15
    assert (caught.value.role, caught.value.rank, caught.value.phase) == ("policy", 1, "update")


def test_our_own_errors_cross_processes_as_themselves(ranks: RayRanks) -> None:
    with pytest.raises(ModelLoadError, match=r"^no head: give one$"):
        ranks.call("refuse", [(), ()]).result()


def test_a_call_past_its_deadline_names_the_late_ranks(ranks: RayRanks) -> None:
    ranks.call("double", [(0,), (0,)]).result()
    late = r"ranks \[0\] did not answer within 1 s, the others had after 0\.\d s"
    with pytest.raises(DeadlineError, match=rf"{late}$"):
        ranks.call("sleep", [(20.0,), (0.0,)], timeout_s=1.0).result()
    with pytest.raises(
        DeadlineError, match=rf"{late}\. If they were still at work, raise cluster\.start_timeout_s; if"
    ):
        ranks.call("sleep", [(20.0,), (0.0,)], timeout_s=1.0, key=START_TIMEOUT).result()
    ranks.timeout_s = 1.0
    with pytest.raises(DeadlineError, match=r"ranks \[0, 1\] did not .* 1 s\. If .* raise cluster\.call_timeout_s"):
        ranks.call("sleep", [(20.0,), (20.0,)]).result()


def test_a_rank_whose_process_died_is_named(ranks: RayRanks) -> None:
    with pytest.raises(GroupError, match="policy rank 1 failed in die: its process died"):
        ranks.call("die", [(), ()]).result()


def test_a_shared_result_stays_in_the_object_store_until_it_is_used(ranks: RayRanks) -> None:
    handle = ranks.call_shared("double", [(5,), (6,)]).result()
    assert isinstance(handle, ray.ObjectRef)
    assert ranks.call("double", [(handle,), (handle,)]).result() == [20, 21]


def test_more_than_the_cluster_has_is_refused_before_anything_is_placed(cluster: Cluster) -> None:
    needed = [Bundle(role="policy", cpus=4.0)]
    with pytest.raises(CapacityError, match=r"4 CPU needed"), Cluster(cluster.config, cluster.run, needed=needed):
        pass
    resources = ResourcesConfig(cpus_per_rank=4.0)
    short = Cluster(cluster.config.model_copy(update={"placement_timeout_s": 1.0}), cluster.run)
    with pytest.raises(CapacityError, match=r"policy"):
        short.start(RankSpec("policy", 1, resources))


def test_in_this_process_a_failure_is_the_same_typed_error() -> None:
    ranks = InProcessRanks("critic", Rank(1))
    assert ranks.call("double", [(3,)]).result() == [7]
    with pytest.raises(GroupError, match="critic rank 0 failed in values"):
        ranks.call("fail_on_one", [()], phase="values").result()
    with pytest.raises(ModelLoadError):
        ranks.call("refuse", [()]).result()
