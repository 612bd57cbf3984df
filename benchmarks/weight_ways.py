"""Part ``weight_ways``: weights on their way to vLLM engines on Ray, merged or as an adapter, all or what changed.

Invariants: both ways of LoRA have the same policy and an engine each, and are measured in turns; the clock starts before the
policy publishes and stops when the engine has sampled a token with the new weights. What a step of PPO changes is counted in a
run of the job itself, with the bytes of indices and bitmaps.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.figures import Figure, Figures
from benchmarks.peers.ppo_material import make_material
from benchmarks.ppo import LEARNING_RATE, ROOT, run
from benchmarks.sequences import REAL_PAIRS
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import start_ray
from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.workers.policy import LanguageSetup
from rlhf_ray.actors.workers.rollout import RanksHandle, RolloutSetup
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig, ResourcesConfig
from rlhf_ray.config.sections.models import LoraConfig, MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.wire import Content

RANK, PROMPT, VOCABULARY, REPEATS = 8, 16, 200, 7
DEADLINE_S = 120.0
WAYS: dict[str, Content] = {"merged": "weights", "adapter": "adapter"}
SMALL_PART = ResourcesConfig(cpus_per_rank=0.2)


def measure(quick: bool = False) -> Figures:
    """LoRA merged against as an adapter; then what a step of PPO sends, which ``quick`` leaves out."""
    return _lora(quick) | ({} if quick else _step())


def _lora(quick: bool) -> Figures:
    """How much sooner an engine samples with a new adapter than with all weights that it was merged into."""
    import ray

    model = ModelConfig(
        make=MakeConfig(shape="llama-tiny" if quick else "llama-120m", tokenizer_from="world"),
        dtype="bf16", lora=LoraConfig(rank=RANK),
    )  # fmt: skip
    start_ray(num_cpus=2, object_store_memory=2**30, namespace="ways")
    try:
        with Cluster(ClusterConfig(), RunConfig(name="ways")) as cluster, tempfile.TemporaryDirectory() as directory:
            seconds = _publications(cluster, model, directory, 2 if quick else REPEATS)
    finally:
        ray.shutdown()
    merged, adapter = (median(seconds[way]) for way in WAYS)
    method = (
        f"llama-120m in bf16 with LoRA of rank {RANK} on all linear layers, policy and vLLM engines as processes on Ray, from "
        f"the publication to the first token after a prompt of {PROMPT} tokens, in turns, medians of {REPEATS}: "
        f"{1e3 * merged:.0f} ms merged, {1e3 * adapter:.0f} ms as an adapter"
    )
    return {"weights.merged_over_adapter": Figure(merged / adapter, "ratio", True, method)}


def _publications(cluster: Cluster, model: ModelConfig, directory: str, repeats: int) -> dict[str, list[float]]:
    policy = PolicyGroup(cluster.start(RankSpec("policy", 1, SMALL_PART)))
    optimizer = OptimizerConfig(learning_rate=1e-4)
    role = RoleConfig(model=model, engine=EngineConfig(optimizer=optimizer), resources=SMALL_PART)
    policy.setup(LanguageSetup(role, seed=0, total_updates=1), timeout_s=DEADLINE_S).result()
    shapes = policy.save_without_weights(directory).result()
    handles = {}
    for number, way in enumerate(WAYS):
        config = RolloutConfig(
            dtype="bf16", kv_cache_gib=0.1, max_model_tokens=64, lora="adapter" if way == "adapter" else "merged",
            resources=SMALL_PART,
        )  # fmt: skip
        ranks = cluster.start(RankSpec("rollout", 1, SMALL_PART, first_rank=number, name="rollout"))
        setup = RolloutSetup(
            config, directory, (1,), seed=0, deterministic=False, shapes=shapes,
            adapter_rank=policy.adapter_rank() if way == "adapter" else None,
        )  # fmt: skip
        ranks.call("setup", [(setup,)], timeout_s=DEADLINE_S).result()
        handles[way] = RanksHandle(ranks, config)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for version in range(1, repeats + 2):
        for way, content in WAYS.items():
            seconds[way].append(_to_first_token(policy, handles[way], content, version))
    return {way: found[1:] for way, found in seconds.items()}


def _to_first_token(policy: PolicyGroup, engine: RanksHandle, content: Content, version: int) -> float:
    prompt = torch.randint(2, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(version)).tolist()
    requests = make_requests([(0, prompt)], samples_per_prompt=1, max_new_tokens=1)
    started_at = time.perf_counter()
    engine.receive(policy.publish_weights(version, content).result()).result()
    (generation,) = engine.generate(requests, DEADLINE_S).result()
    seconds = time.perf_counter() - started_at
    if generation.weight_versions != (version,):
        raise AssertionError(f"the token is of versions {generation.weight_versions}, not {version}")
    return seconds


def _step() -> Figures:
    """What of a PPO step its publication takes, and what of all weights a step changes."""
    with tempfile.TemporaryDirectory() as name:
        material = make_material(Path(name), REAL_PAIRS)
        plain = run(ROOT, material, "plain", steps=3)
        changes = run(ROOT, material, "changes", "rollout.weight_delta=true", steps=3)
    share = _median(plain, "time/weights") / _median(plain, "time/step")
    conditions = "a synchronous PPO step as in the part ppo (Llama of 14.5M in bf16, 64 samples of 81 + 64 tokens)"
    publication = f"time/weights over time/step in {conditions}, medians of {len(plain)} steps after the first"
    sent = (
        f"bytes of the changes, indices and bitmaps included, over those of all weights, after {conditions} with a learning "
        f"rate of {LEARNING_RATE:g}; the largest of {len(changes)} steps after the first"
    )
    return {
        "weights.share_of_step": Figure(share, "share", False, publication),
        "weights.changed_share": Figure(max(step["weights/sent_share"] for step in changes), "share", False, sent),
    }


def _median(steps: Sequence[dict[str, Any]], name: str) -> float:
    return median(step[name] for step in steps)
