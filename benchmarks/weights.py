"""Part ``weights``: the time from an update of the policy to a rollout engine that samples with the new weights.

Invariants: the clock of an update starts at the policy's weights and stops when the engine has checked, loaded and adopted
them. Publishing in place and publishing copies, as it was done before, are measured in turns on the same weights.
"""

from __future__ import annotations

import mmap
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
from rlhf_ray.rollout.wire import Bucket, publish, to_array

REPEATS = 7
Shape = Literal["llama-tiny", "llama-0.5m", "llama-120m"]


def measure(quick: bool = False) -> Figures:
    """Publishing and receiving in one process, without Ray between them."""
    shape: Shape = "llama-tiny" if quick else "llama-120m"
    return _updates("llama-tiny" if quick else "llama-0.5m") | _publications(shape)


def _policy(shape: Shape) -> PolicyWorker:
    model = ModelConfig(make=MakeConfig(shape=shape, tokenizer_from="world"), dtype="fp32")
    policy = PolicyWorker()
    optimizer = OptimizerConfig(learning_rate=1e-3)
    policy.setup(LanguageSetup(RoleConfig(model=model, engine=EngineConfig(optimizer=optimizer)), 0, total_updates=1))
    return policy


def _parameters(policy: PolicyWorker) -> str:
    return f"{sum(parameter.numel() for parameter in policy.hf_model.parameters()) / 1e6:.2f}M parameters in fp32"


def _updates(shape: Shape) -> Figures:
    policy = _policy(shape)
    try:
        with tempfile.TemporaryDirectory() as directory:
            policy.save_pretrained(directory)
            engine = TransformersEngine(
                directory,
                RolloutConfig(backend="transformers", dtype="fp32"),
                stop_token_ids=(load_tokenizer(policy.config.model).eos_token_id,),
            )
            seconds = [_update(policy, engine, version) for version in range(1, REPEATS + 2)][1:]
            engine.shutdown()
    finally:
        destroy_process_group()
    method = (
        f"{_parameters(policy)} from a policy worker to a transformers engine in the same process, "
        f"checksums included, one thread, wall clock, median of {REPEATS}"
    )
    return {"weights.update_ms": Figure(1e3 * median(seconds), "ms", False, method)}


def _publications(shape: Shape) -> Figures:
    policy = _policy(shape)
    ways = {"in place": policy.engine.disk_weights_in_place, "copies": policy.engine.disk_weights}
    seconds: dict[str, list[float]] = {way: [] for way in (*ways, "copy")}
    try:
        for _ in range(REPEATS + 1):
            seconds["copy"].append(_plain_copy(policy))
            for way, weights in ways.items():
                started_at = time.perf_counter()
                published = publish(1, weights(policy.hf_model), keep=_into_shared_memory)
                seconds[way].append(time.perf_counter() - started_at)
                del published
    finally:
        destroy_process_group()
    in_place, copies, copy = (median(seconds[way][1:]) for way in seconds)
    rate = (
        f"{_parameters(policy)}: seconds of a plain copy of the same bytes into fresh shared memory over those of a "
        f"publication there, which is a copy and a checksum; in turns, one thread, median of {REPEATS}"
    )
    method = (
        f"{_parameters(policy)}, packed into buckets in fresh shared memory, as an object store takes them, checksum included; "
        f"published as copies (a private copy of each weight first) and in place, in turns; one thread, median of {REPEATS}"
    )
    return {
        "weights.publish_ms": Figure(1e3 * in_place, "ms", False, f"{method}; the time in place"),
        "weights.copies_over_in_place": Figure(
            copies / in_place, "ratio", True, f"{method}; the quotient of the times"
        ),
        "weights.publish_over_copy_rate": Figure(copy / in_place, "ratio", True, rate),
    }


def _plain_copy(policy: PolicyWorker) -> float:
    """Seconds for the bytes of all weights into fresh shared memory, in pieces of a bucket's size."""
    weights = [to_array(tensor) for _, tensor in policy.engine.disk_weights_in_place(policy.hf_model)]
    started_at = time.perf_counter()
    memory = mmap.mmap(-1, sum(array.nbytes for array in weights))
    for array in weights:
        memory.write(memoryview(array).cast("B"))
    seconds = time.perf_counter() - started_at
    memory.close()
    return seconds


def _into_shared_memory(bucket: Bucket) -> mmap.mmap:
    """Copy a bucket once, to pages that another process could map."""
    memory = mmap.mmap(-1, sum(array.nbytes for _, array in bucket))
    for _, array in bucket:
        memory.write(memoryview(array).cast("B"))
    return memory


def _update(policy: PolicyWorker, engine: TransformersEngine, version: int) -> float:
    started_at = time.perf_counter()
    published = policy.publish_weights(version)
    assert published is not None, "the only rank publishes"
    engine.receive(published)
    seconds = time.perf_counter() - started_at
    if engine.weight_version != version:
        raise AssertionError(f"the engine is at version {engine.weight_version}, not {version}")
    return seconds
