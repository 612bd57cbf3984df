"""Part ``weights``: the time from an update of the policy to a rollout engine that samples with the new weights.

Invariant: the clock starts at the policy's weights and stops when the engine has checked, loaded and adopted them.
"""

from __future__ import annotations

import tempfile
import time
from statistics import median
from typing import Literal

from benchmarks.figures import Figure, Figures
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.engine import destroy_process_group
from rlhf_ray.models import load_tokenizer
from rlhf_ray.rollout.transformers_engine import TransformersEngine

REPEATS = 7


def measure(quick: bool = False) -> Figures:
    """Publishing and receiving in one process, without Ray between them."""
    shape: Literal["llama-tiny", "llama-0.5m"] = "llama-tiny" if quick else "llama-0.5m"
    model = ModelConfig(make=MakeConfig(shape=shape, tokenizer_from="world"), dtype="fp32")
    policy = PolicyWorker()
    optimizer = OptimizerConfig(learning_rate=1e-3)
    policy.setup(LanguageSetup(RoleConfig(model=model, engine=EngineConfig(optimizer=optimizer)), 0, total_updates=1))
    try:
        with tempfile.TemporaryDirectory() as directory:
            policy.save_pretrained(directory)
            engine = TransformersEngine(
                directory,
                RolloutConfig(backend="transformers", dtype="fp32"),
                stop_token_ids=(load_tokenizer(model).eos_token_id,),
            )
            seconds = [_update(policy, engine, version) for version in range(1, REPEATS + 2)][1:]
            engine.shutdown()
    finally:
        destroy_process_group()
    parameters = sum(parameter.numel() for parameter in policy.hf_model.parameters())
    method = (
        f"{parameters / 1e6:.2f}M parameters in fp32 from a policy worker to a transformers engine in the same process, "
        f"checksums included, one thread, wall clock, median of {REPEATS}"
    )
    return {"weights.update_ms": Figure(1e3 * median(seconds), "ms", False, method)}


def _update(policy: PolicyWorker, engine: TransformersEngine, version: int) -> float:
    started_at = time.perf_counter()
    published = policy.publish_weights(version)
    assert published is not None, "the only rank publishes"
    engine.receive(published)
    seconds = time.perf_counter() - started_at
    if engine.weight_version != version:
        raise AssertionError(f"the engine is at version {engine.weight_version}, not {version}")
    return seconds
