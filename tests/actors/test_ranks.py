"""A call to a group ends in one value a rank, in rank order, or in one typed error that names role, rank, phase and cause."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from rlhf_ray.actors.answers import why_late
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import START_TIMEOUT, InProcessRanks, RayRanks
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.errors import CapacityError, DeadlineError, DeadRankError, GroupError, ModelLoadError, StalledError
from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.spans.records import Span
from rlhf_ray.planning.capacity import Bundle
from rlhf_ray.processes import spans, stacks
from rlhf_ray.processes.recorded import record_calls


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

    @ray.method(concurrency_group="health")
    def health(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="health")
    def stacks(self) -> str:
        stacks.offer("a rank")
        return stacks.describe([os.getpid()])

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        if self.rank == 1:
            ray.actor.exit_actor()

    def lose_rank_0(self, dies_s: float, fails_s: float, answered: bool) -> int:
        """Rank 0 dies after ``dies_s``, in the call or when it has ``answered``; rank 1 fails after ``fails_s``."""
        if self.rank == 1:
            time.sleep(fails_s)
            raise RuntimeError("Connection closed by peer")
        if answered:
            threading.Timer(dies_s, os._exit, [1]).start()
        else:
            time.sleep(dies_s)
            os._exit(1)
        return 0


record_calls(Rank)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(ClusterConfig(num_cpus=2, object_store_mb=100), RunConfig(name="ranks-test")) as cluster:
        yield cluster


@pytest.fixture
def ranks(cluster: Cluster) -> Iterator[RayRanks]:
    actors = [ray.remote(num_cpus=0, concurrency_groups={"health": 1})(Rank).remote(rank) for rank in range(2)]
    nodes = ["10.0.0.1 (here)", "10.0.0.2 (there)"]
    group = RayRanks("policy", actors, timeout_s=60.0, on_stop=lambda: None, nodes=nodes)
    yield group
    group.stop()


def test_ranks_that_were_stopped_are_a_typed_error() -> None:
    """A service asks for the health of a group at any time, also while another takes its place."""
    stopped = RayRanks("reward", [], timeout_s=60.0, on_stop=lambda: None)
    with pytest.raises(GroupError, match="reward failed in health: its processes have been stopped"):
        stopped.call("health", [()]).result()


def test_values_come_in_rank_order_whoever_answers_first(ranks: RayRanks) -> None:
    assert ranks.call("double", [(10,), (20,)]).result() == [20, 41]


def test_a_rank_that_is_killed_has_left_what_it_had_answered_and_what_it_was_killed_in(
    ranks: RayRanks, tmp_path: Path
) -> None:
    with spans.recording(tmp_path), spans.span("update"):
        assert ranks.call("double", [(10,), (20,)]).result() == [20, 41]
        pids = ranks.call("health", [(), ()]).result()
        sleeping = ranks.call("sleep", [(60.0,), (60.0,)])
        while "sleep" not in {span.name for span in recorded(tmp_path)["policy/1"]}:
            assert not sleeping.ready(0.05)
        os.kill(pids[1], signal.SIGKILL)
        with pytest.raises(DeadRankError, match="policy rank 1"):
            sleeping.result()
    for lane, processes in recorded(tmp_path).items():
        double, health, sleep = processes
        assert (double.name, double.finished, sleep.name, sleep.finished) == ("double", True, "sleep", False), lane
        assert (health.kind, double.kind) == ("beside", "call")
        assert double.sent is not None and double.sent <= double.begin <= double.end <= health.begin <= sleep.begin
    waits = [span for span in SpanFiles(tmp_path).read().attempts()[0].driver if span.kind == "wait"]
    assert {"policy.double", "policy.sleep"} <= {name for wait in waits for name in wait.calls.values()}


def recorded(directory: Path) -> dict[str, Sequence[Span]]:
    (attempt,) = SpanFiles(directory).read().attempts()
    return {lane: lives[0].spans for lane, lives in attempt.lanes().items()}


def test_the_first_failure_ends_the_call_although_a_peer_never_answers(ranks: RayRanks) -> None:
    ranks.call("double", [(0,), (0,)]).result()  # both processes are up
    began = time.monotonic()
    with pytest.raises(GroupError, match=r"policy rank 1 failed in update: .*the cause") as caught:
        ranks.call("fail_on_one", [(), ()], phase="update").result()
    assert time.monotonic() - began < 15
    assert (caught.value.role, caught.value.rank, caught.value.phase) == ("policy", 1, "update")


def test_our_own_errors_cross_processes_as_themselves_and_name_a_node_that_is_not_this_one(ranks: RayRanks) -> None:
    with pytest.raises(ModelLoadError, match=r"^no head: give one \(policy rank \d on node 10\.0\.0\.\d \(\w+\)\)$"):
        ranks.call("refuse", [(), ()]).result()
    ranks.nodes = [f"{ray.util.get_node_ip_address()} (here)"] * 2
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


def test_a_missed_deadline_names_its_key_and_when_the_others_had_answered() -> None:
    assert why_late([1], 600.0, START_TIMEOUT, 12.34) == (
        "ranks [1] did not answer within 600 s, the others had after 12.3 s. If they were still at work, raise "
        "cluster.start_timeout_s; if they hang, their logs say where"
    )
    assert why_late([0, 1], 10.0, None, None) == "ranks [0, 1] did not answer within 10 s"


def test_a_rank_whose_process_died_is_named(ranks: RayRanks) -> None:
    with pytest.raises(
        GroupError, match=r"policy rank 1 failed in die: its process on node 10\.0\.0\.2 \(there\) died"
    ):
        ranks.call("die", [(), ()]).result()


@pytest.mark.parametrize(
    ("dies_s", "fails_s", "answered"),
    [(0.8, 0.2, False), pytest.param(0.2, 0.6, True, marks=pytest.mark.long)],
    ids=["in the call, which the peer notices before Ray does", "after it had answered"],
)
def test_a_death_is_told_of_the_rank_that_died_and_its_node_whichever_peer_noticed_first(
    ranks: RayRanks, dies_s: float, fails_s: float, answered: bool
) -> None:
    ranks.call("double", [(0,), (0,)]).result()
    wanted = r"policy rank 0 failed in update: its process on node 10\.0\.0\.1 \(here\) died"
    with pytest.raises(GroupError, match=wanted) as caught:
        ranks.call("lose_rank_0", [(dies_s, fails_s, answered)] * 2, phase="update").result()
    assert isinstance(caught.value, DeadRankError)
    assert "Rank 1 noticed: RuntimeError('Connection closed by peer')" in str(caught.value)


def test_a_stopped_rank_is_told_from_a_peer_that_waits_and_ends_its_call_at_once_as_stalled(ranks: RayRanks) -> None:
    pids = ranks.call("health", [(), ()]).result()
    pending = ranks.call("sleep", [(60.0,), (60.0,)], phase="update")
    os.kill(pids[1], signal.SIGSTOP)
    (call,) = ranks.open_calls()
    assert (call.role, call.method, call.missing) == ("policy", "sleep", (0, 1))
    assert ranks.silent(call.missing, 5.0) == {0: False, 1: True}
    ranks.nodes[0] = f"{ray.util.get_node_ip_address()} (this one)"
    assert ranks.stacks_elsewhere(1.0) == "== policy rank 1 on node 10.0.0.2 (there)\n   it does not answer"
    ranks.nodes[0] = "10.0.0.1 (here)"
    assert "in sleep" in ranks.stacks_elsewhere(5.0), "what the thread of the call does, asked from another"
    began = time.monotonic()
    ranks.end_stalled({1: "it did not answer sleep for 2 s"})
    with pytest.raises(
        StalledError, match=r"rank 1 failed in update: it did not answer .*10\.0\.0\.2 \(there\) was ended"
    ):
        pending.result()
    assert time.monotonic() - began < 30 and ranks.open_calls() == []
    while psutil.pid_exists(pids[1]) and psutil.Process(pids[1]).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 60, "a stopped process is not left behind"
        time.sleep(0.05)


def test_how_long_calls_usually_take_is_known_and_not_by_those_that_failed(ranks: RayRanks) -> None:
    ranks.call("double", [(0,), (0,)]).result()
    took = []
    for seconds in (0.0, 0.3, 0.0):
        began = time.monotonic()
        ranks.call("sleep", [(seconds,), (0.0,)]).result()
        took.append(time.monotonic() - began)
    with pytest.raises(DeadlineError):
        ranks.call("sleep", [(2.0,), (0.0,)], timeout_s=0.5).result()
    pending = ranks.call("sleep", [(0.5,), (0.0,)])
    while len(ranks.open_calls()[0].missing) > 1:
        time.sleep(0.01)
    (call,) = ranks.open_calls()
    assert call.missing == (0,) and call.usual_s is not None and call.usual_s <= sorted(took)[1]
    pending.result()
    assert ranks.open_calls() == []
    ranks.call("sleep", [(0.5,), (0.5,)])  # for which nobody can ask any more
    assert ranks.open_calls() == []


def test_how_long_the_disk_took_says_nothing_of_how_long_it_takes() -> None:
    class Answers:
        def __getattr__(self, method: str) -> Any:
            return SimpleNamespace(remote=lambda: method)

    ranks = RayRanks("policy", [Answers()], timeout_s=9.0, on_stop=lambda: None)
    begun = [ranks.call(method, [()]) for method in ("saved", "save_pretrained", "load", "hash_files", "save", "step")]
    ranks.book.open(lambda handles: (), time.monotonic())  # all are there
    begun += [ranks.call(method, [()]) for method in ("saved", "save_pretrained", "load", "hash_files", "save", "step")]
    known = {
        call.method for call in ranks.book.open(lambda handles: (0,), time.monotonic()) if call.usual_s is not None
    }
    assert known == {"step"} and begun


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
