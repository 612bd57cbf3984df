"""Rollout engines of two tensor-parallel workers each, as actors in Ray with the GPUs of their placement, here only counted.

The model is a mixture of padded experts with one dense layer, its head is its embedding, and its vocabulary is odd.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray

from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import start_ray
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.actors.workers.rollout import RanksHandle, RolloutSetup
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import EngineState
from rlhf_ray.rollout.vllm_workers import mapped_names
from tests.architectures.configs import small_model
from tests.architectures.rollout import DEADLINE_S, FP32, STOPS, Policy, sampled_requests

pytestmark = pytest.mark.early
PARALLEL = 2
TOLERANCE, OTHER_MODEL = 1e-4, 1e-2
"""Nats: the bar on trainer against engine in fp32, and less than what weights of before make of log-probs."""
VOCABULARY = 131
"""No multiple of the workers: vLLM pads it."""


@dataclass
class Engine:
    """One engine of a run, with the actor that steps it and the workers that compute."""

    ranks: RayRanks
    handle: RanksHandle
    process: psutil.Process
    workers: list[psutil.Process]


@dataclass
class Site:
    """A cluster with room for engines, and the policy that they sample from."""

    cluster: Cluster
    policy: Policy
    sockets: set[Path]
    """Where vLLM's sockets were on this machine before any engine started."""

    def start(self, number: int) -> Engine:
        placed = ResourcesConfig(cpus_per_rank=1.0, gpus_per_rank=float(PARALLEL))
        config = FP32.model_copy(
            update={"tensor_parallel": PARALLEL}
        )  # which computes on the CPU, wherever it is placed
        ranks = self.cluster.start(RankSpec("rollout", 1, placed, first_rank=number, name="rollout"))
        ranks.call(
            "setup", [(RolloutSetup(config, str(self.policy.start), STOPS, seed=5, deterministic=False),)]
        ).result()
        process = psutil.Process(ranks.call("health", [()]).result()[0]["pid"])
        workers = [child for child in process.children() if is_worker(child)]
        return Engine(ranks, RanksHandle(ranks, config), process, workers)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("parallel") / "model"
    changes = {"tie_word_embeddings": True, "vocab_size": VOCABULARY, "mlp_only_layers": [0]}
    small_model("qwen3_moe", policy=True, **changes)[0].save_pretrained(directory)
    sockets = sockets_of_vllm()
    start_ray(num_cpus=2, num_gpus=2 * PARALLEL, object_store_memory=100 * 2**20, namespace="parallel")
    try:
        with Cluster(ClusterConfig(), RunConfig(name="parallel")) as cluster:
            yield Site(cluster, Policy(directory), sockets)
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def engine(site: Site) -> Engine:
    return site.start(0)


def is_worker(process: psutil.Process) -> bool:
    """By the title that vLLM gives it, or as it was started: in a small environment a process gets no title."""
    words = " ".join(process.cmdline())
    return "Worker_TP" in words or "spawn_main" in words


def end_within(processes: Sequence[psutil.Process], seconds: float) -> bool:
    """Whether all end in that time. One whose end its parent has not looked at yet has ended."""
    deadline = time.monotonic() + seconds
    living = list(processes)
    while living and time.monotonic() < deadline:
        living = [one for one in living if lives(one)]
        time.sleep(0.05)
    return not living


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


OTHERS_START_S = 60.0


def sockets_of_vllm() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("vllm-*"))


def test_an_engine_of_two_workers_agrees_with_the_trainer_before_and_after_each_update(
    site: Site, engine: Engine
) -> None:
    assert len(engine.workers) == PARALLEL
    fleet, requests, before = Fleet(Engines([engine.handle])), sampled_requests(), None
    for version in range(4):
        if version:
            fleet.update_weights(version, site.policy.changed(version, keep=ray.put, bucket_bytes=10**6))
        generations = engine.handle.generate(requests, DEADLINE_S).result()
        assert site.policy.difference(requests, generations) < TOLERANCE, f"after update {version}"
        assert {v for generation in generations for v in generation.weight_versions} == {version}
        if before is not None:
            assert site.policy.difference(requests, before) > OTHER_MODEL, f"update {version} changes nothing"
        before = generations


@pytest.mark.long
def test_a_worker_that_dies_is_named_and_another_engine_does_its_work(site: Site, engine: Engine) -> None:
    other = site.start(1)
    fleet = Fleet(Engines([engine.handle, other.handle]))
    fleet.update_weights(9, site.policy.changed(9, keep=ray.put))
    victim, beside = other.workers
    victim.kill()
    batch = fleet.generate(sampled_requests(), DEADLINE_S)
    assert len(batch) == len(sampled_requests())
    lost = fleet.health[1]
    assert lost.state is EngineState.DEAD
    named = rf"tensor-parallel worker \d of 2 \(process {victim.pid}\) died of SIGKILL"
    assert re.search(named, lost.cause), lost.cause
    assert end_within([victim, beside], 20.0), "its neighbour ends with it"
    other.ranks.stop()
    assert end_within([other.process], 20.0)


def test_an_engine_that_is_killed_leaves_nothing(site: Site, engine: Engine) -> None:
    """Nor shared memory: ``nothing_left`` looks for it after the last test."""
    for process in (engine.process, *engine.workers):
        assert mapped_names(process.pid) == set(), "a kill would leave these names behind"
        assert "/dev/shm/psm_" in Path(f"/proc/{process.pid}/maps").read_text(), "though it shares memory"
    engine.ranks.stop()
    assert end_within([engine.process, *engine.workers], 20.0)
    deadline = time.monotonic() + OTHERS_START_S
    while (new := sockets_of_vllm() - site.sockets) and time.monotonic() < deadline:
        time.sleep(0.1)  # an engine of a test beside this one has its own for as long as it starts
    assert new == set()
