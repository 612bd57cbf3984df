"""The object store holds what is published twice, keeps within shared memory, and a store that cannot is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.actors import cluster
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.config.files.sampled import is_mixture
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rollout import DELTA_SHARE, RolloutConfig
from rlhf_ray.errors import CapacityError
from rlhf_ray.planning import capacity, object_store
from rlhf_ray.planning.object_store import LEAST, advice, routed_bytes, shared_memory, store_bytes, store_to_start
from tests.planning.recipes import published_files

LARGE = "policy.model={make: {shape: llama-120m, tokenizer_from: world, vocabulary: 4096}, dtype: fp32}"


def job(*overrides: str) -> Job:
    return load_config("demo-ppo", [LARGE, *overrides])


def test_a_store_holds_two_publications() -> None:
    config = load_config("qwen3-0.6b-1gpu")
    needed = store_bytes(config, published_files)
    assert needed is not None and needed == pytest.approx(2 * 2 * 596_049_920, rel=0.02)
    assert store_bytes(config) is None, "its model is not on this machine"
    assert store_bytes(load_config("demo-rm")) == LEAST
    assert store_bytes(job()) > LEAST
    with_changes = store_bytes(load_config("qwen3-0.6b-1gpu", ["rollout.weight_delta=true"]), published_files)
    assert with_changes == pytest.approx(2 * (1 + DELTA_SHARE) * 2 * 596_049_920, rel=0.02)


def test_a_store_holds_the_sets_among_which_tokens_were_sampled() -> None:
    """Of every token of a step, twice: at most top_k ids and a few that tie, or one bit for each of 4096 tokens."""
    small = "batch.prompts_per_step=2048"
    config = job(small)
    (tokens,) = {
        role.work.items().value * role.work.longest().value
        for name, role in config.roles().items()
        if name == "policy" and role.work is not None
    }
    plain, by_k, by_p = (store_bytes(job(small, *more)) for more in ([], ["rollout.top_k=20"], ["rollout.top_p=0.9"]))
    assert plain is not None and by_k is not None and by_p is not None and plain > LEAST
    assert by_k - plain >= 2 * tokens * 4 * 20 and by_p - plain >= 2 * tokens * 4096 / 8
    assert by_k < by_p


def test_a_store_holds_the_experts_that_tokens_were_sent_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every token of a step, twice: a byte for each layer and expert of a token, two where there are many experts."""
    needed = []
    for experts in (4, 255, 256):
        config = {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": 3,
            "num_hidden_layers": 5,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        needed.append(routed_bytes(RolloutConfig(routing_replay=True), ModelConfig(path=str(tmp_path)), 5))
    assert needed == [5 * 3, 5 * 3, 2 * 5 * 3]
    assert routed_bytes(RolloutConfig(), ModelConfig(path=str(tmp_path)), 5) == 0
    config = job("batch.prompts_per_step=2048")
    (tokens,) = {
        role.work.items().value * role.work.longest().value
        for name, role in config.roles().items()
        if name == "policy" and role.work is not None
    }
    plain = store_bytes(config)
    monkeypatch.setattr(object_store, "routed_bytes", lambda rollout, policy, layers: 100 * layers)
    routed = store_bytes(config)
    assert plain is not None and routed is not None and routed - plain >= 2 * tokens * 100


@pytest.mark.parametrize("experts", [256, [4, 256]])
def test_a_store_holds_the_experts_of_a_model_with_other_numbers_in_each_layer(tmp_path: Path, experts: Any) -> None:
    """As of HunYuan, whose config may have a list: the largest counts for every layer."""
    config = {"model_type": "hunyuan_v1_moe", "num_experts": experts, "moe_topk": [1, 3]}
    assert is_mixture(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy = ModelConfig(path=str(tmp_path))
    assert routed_bytes(RolloutConfig(routing_replay=True), policy, 5) == 2 * 5 * 3
    assert not is_mixture({"num_experts": [1, 1]})


def test_a_store_that_is_not_set_is_sized_and_never_larger_than_shared_memory() -> None:
    assert store_to_start(job(), shared=2**40) == store_bytes(job())
    assert store_to_start(job(), shared=LEAST * 11 // 9) == LEAST * 11 // 10
    assert store_to_start(job(), shared=64 * 2**20) == LEAST, "Ray refuses less than 75 MiB, and puts this on the disk"
    assert store_to_start(load_config("qwen3-0.6b-1gpu"), shared=2**40) is None
    assert shared_memory("/nowhere") is None


@pytest.mark.parametrize(("overrides", "size"), [((), None), (("cluster.object_store_mb=100",), 100 * 2**20)])
def test_ray_is_started_with_the_store_of_the_job(
    overrides: tuple[str, ...], size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = {}

    def start(**options: object) -> None:
        started.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_is_connected", lambda: False)  # another test may have left Ray running
    monkeypatch.setattr(cluster, "start_ray", start)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = job(*overrides)
    with pytest.raises(KeyboardInterrupt), Cluster.for_job(config):
        pass
    assert started["object_store_memory"] == (store_to_start(config) if size is None else size)


def test_a_run_is_refused_before_ray_starts_where_a_role_does_not_fit_the_gpus_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "gpu_bytes", lambda: 10**9)
    monkeypatch.setattr(capacity, "count_gpus", lambda: 1)
    monkeypatch.setattr(cluster, "_is_connected", lambda: False)  # another test may have left Ray running
    monkeypatch.setattr(cluster, "start_ray", lambda **options: pytest.fail("Ray was started"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = job("policy.resources.gpus_per_rank=0.5")
    with pytest.raises(CapacityError, match=r"a rank of policy needs .* of 1 GB is 0\.5 GB"), Cluster.for_job(config):
        pass


def test_a_store_that_the_weights_do_not_fit_is_told_with_the_numbers() -> None:
    small = job("cluster.object_store_mb=128")
    told = list(advice(small, shared=2**40))
    assert len(told) == 1 and "null" in told[0]
    assert told[0].startswith("cluster.object_store_mb is 128, but weights and batches take ")
    told = list(advice(job(), shared=2**20))
    assert len(told) == 1 and "but /dev/shm has 0.0 GB free" in told[0] and "--shm-size" in told[0]
    assert list(advice(job(), shared=2**40)) == []
    assert list(advice(job("cluster.address=auto"), shared=2**20)) == [], "the cluster has its own store"


def test_an_offloaded_optimizer_on_one_thread_is_told_with_its_time() -> None:
    one = ["critic.resources.threads_per_rank=1"]
    told = list(advice(load_config("llama-3-8b-8gpu", one), published_files, shared=2**50))
    assert len(told) == 1 and told[0].startswith(
        "critic.resources.threads_per_rank is 1, and its optimizer runs on the CPU "
    )
    assert "about 8 s an update" in told[0] and "critic.resources.cpus_per_rank, to 8" in told[0]
