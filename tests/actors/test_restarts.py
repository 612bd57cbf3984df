"""Engines that are killed come back in their places, on a real Ray: nothing is lost, doubled or of other weights.

The same Ray shows by which names it knows a run, and where Prometheus finds it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import ray
import torch
from ray._raylet import ActorID, GcsClient
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.util.placement_group import placement_group_table
from transformers import LlamaForCausalLM

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.engines import load_fleet
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.actors.workers.rollout import RolloutSetup
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.wire import publish
from rlhf_ray.trajectories.batch import TrajectoryBatch
from tests.rollout.llamas import EOS, make_llama

pytestmark = pytest.mark.early
REQUESTS = make_requests(
    [(index, [3 + index, 7]) for index in range(4)], samples_per_prompt=2, max_new_tokens=80, run_seed=5
)


UPDATE_S = 0.6
"""How long a weight update takes at least."""


@ray.remote(num_cpus=0)
def come_later(seconds: float, bucket: Any) -> Any:
    time.sleep(seconds)
    return bucket


class Engines:
    """Two engines of a fleet, and a policy whose weights change with every version."""

    def __init__(self, fleet: Fleet, ranks: list[RayRanks], model: LlamaForCausalLM, run: str) -> None:
        self.fleet, self.ranks, self.model, self.run = fleet, ranks, model, run

    def publish(self, version: int) -> None:
        """Publish other weights for each version; half of them are on their way for a while."""
        torch.manual_seed(version)
        named = [(name, weight + 0.01 * torch.randn_like(weight)) for name, weight in self.model.named_parameters()]
        weights = publish(version, named, keep=ray.put, bucket_bytes=50_000)
        first, *rest = weights.buckets
        assert rest, "an engine must be able to die between two buckets"
        weights = replace(weights, buckets=(first, *[come_later.remote(UPDATE_S, bucket) for bucket in rest]))
        self.fleet.forget_weights()
        self.fleet.update_weights(version, weights)

    def pid(self, engine: int) -> int:
        return int(self.ranks[engine].call("health", [()]).result()[0]["pid"])

    def generate(self) -> TrajectoryBatch:
        return self.fleet.generate(REQUESTS, 60.0)

    def generate_while_one_dies(self) -> TrajectoryBatch:
        """Generate, and kill engine 0 in the middle of it; when that is tells the last try, since a cold engine is slow."""
        began = time.monotonic()
        self.generate()
        for _ in range(10):
            seconds, began = 0.3 * (time.monotonic() - began), time.monotonic()
            kill = after(seconds, self.pid(0), signal.SIGKILL)
            batch = self.generate()
            if not kill.is_alive():
                return batch
            kill.cancel()
        raise AssertionError("it generated ten times, each three times as fast as before")

    def expect_whole(self) -> None:
        """Wait until both engines are healthy."""
        deadline = time.monotonic() + 60
        while self.fleet.health.healthy != (0, 1):
            assert time.monotonic() < deadline, self.fleet.health.describe()
            self.fleet.heal()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = make_llama(0)
    directory = tmp_path_factory.mktemp("llama")
    model.save_pretrained(directory)
    config = RolloutConfig(backend="transformers", dtype="fp32", engines=2, max_restarts=20)
    with Cluster(
        ClusterConfig(num_cpus=2, object_store_mb=100), RunConfig(name=f"restarts-{uuid4().hex[:8]}")
    ) as cluster:
        ranks = [cluster.start(RankSpec("rollout", 1, config.resources, first_rank=number)) for number in range(2)]
        setup = RolloutSetup(config, str(directory), (EOS,), seed=0, deterministic=True)
        yield Engines(load_fleet(ranks, setup, 180.0), ranks, model, cluster.run.name)


def assert_same_bits(batch: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    for name in (name for name in expected.columns if name != "weight_version"):
        assert torch.equal(batch[name], expected[name]), name


def after(seconds: float, pid: int, number: int) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, [pid, number])
    timer.start()
    return timer


def test_prometheus_finds_the_page_of_a_run(engines: Engines) -> None:
    files = Path(ray._private.worker._global_node.get_session_dir_path()).parent
    ((page,),) = (
        entry["targets"] for entry in json.loads((files / f"rlhf_ray_targets_{os.getpid()}.json").read_text())
    )
    deadline = time.monotonic() + 60
    shown = b""
    while b"\nray_" not in shown:  # the agent has nothing to say at first
        assert time.monotonic() < deadline, shown[:1000]
        with suppress(OSError), urllib.request.urlopen(f"http://{page}/metrics", timeout=30) as answer:
            shown = answer.read()
        time.sleep(0.1)


def test_ray_knows_a_run_its_ranks_and_their_places_by_name(engines: Engines) -> None:
    """Read from where the dashboard reads it: tables of jobs, actors and placement groups of Ray's control service, in 2.60."""
    jobs = GcsClient(address=ray.get_runtime_context().gcs_address).get_all_job_info().values()
    assert [dict(job.config.metadata)["job_name"] for job in jobs] == [engines.run]
    accessor = ray._private.state.state._connect_and_get_accessor()
    for number, ranks in enumerate(engines.ranks):
        (actor,) = ranks.actors
        told = ActorTableData.FromString(accessor.get_actor_info(ActorID.from_hex(actor._actor_id.hex())))
        assert (told.name, told.repr_name) == (f"rlhf/{engines.run}/rollout/{number}", f"rollout/{number}")
    assert {f"rlhf/{engines.run}/rollout/{number}" for number in range(2)} == {
        entry["name"] for entry in placement_group_table().values()
    }


def test_engines_killed_while_they_generate_and_in_the_middle_of_an_update_come_back(engines: Engines) -> None:
    fleet = engines.fleet
    engines.publish(1)
    expected = engines.generate()
    batch = engines.generate_while_one_dies()
    assert fleet.health.has_died(0, 0)
    assert_same_bits(batch, expected)
    assert set(batch["weight_version"][batch["action_mask"]].tolist()) == {1}
    kill = after(0.5 * UPDATE_S, engines.pid(1), signal.SIGKILL)
    engines.publish(2)
    kill.join()
    assert fleet.health.has_died(1, 0), "it holds a mixture of weights"
    first = engines.generate()  # waits for whichever engine is up first
    assert set(first["weight_version"][first["action_mask"]].tolist()) == {2}
    engines.expect_whole()
    assert [fleet.health[engine].incarnation for engine in range(2)] == [1, 1]
    again = engines.generate()
    assert_same_bits(again, first)
    assert not torch.equal(first["rollout_log_probs"][:40], expected["rollout_log_probs"][:40]), "the weights changed"
