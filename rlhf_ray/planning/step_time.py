"""The time of a step on GPUs, estimated from the work of each phase and the rates of a device.

Invariant: a figure follows from counted operations, bytes and numbers, and from the rates in :class:`Rates` alone. Roles that
share GPUs work one after the other, others side by side. Has not been held against a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.config.facts import Role, Sampling
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.planning.flops import ComputeShape, training_flops
from rlhf_ray.planning.job_memory import Files, published_size, role_size, weights_here
from rlhf_ray.planning.memory import BYTES, cache_of_a_token
from rlhf_ray.planning.model_size import ModelSize
from rlhf_ray.planning.object_store import STEP_OF_A_NUMBER


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, and how long sequences are; by default an H100 and conversations."""

    training: float = 400e12
    """Operations of forward and backward passes."""
    forward: float = 450e12
    read: float = 2.3e12
    """Bytes that decoding reads of GPU memory."""
    decode_s: float = 0.005
    """Seconds that a step of decoding takes of the host."""
    publish: float = 1.2e9
    """Bytes of weights that reach the engines through the object store."""
    prompt: int = 180
    answer: int = 300
    """Mean tokens of a prompt and an answer; the longest answer of a batch is taken to be twice as long."""


H100 = Rates()


def step_seconds(config: Job, files: Files = weights_here, rates: Rates = H100) -> dict[str, float]:
    """Seconds of each phase of a step (of supervised training: of an update); empty where a model's size is not known."""
    roles = [
        (role, role_size(role, files), role.config.resources.gpus_per_rank)
        for role in config.roles().values()
        if role.work is not None
    ]
    known = [(role, size, gpus) for role, size, gpus in roles if size is not None]
    if not known or len(known) < len(roles):
        return {}
    length, sampling = min(config.longest_sequence(), rates.prompt + rates.answer), config.sampling()
    trained = [one for one in known if one[0].trained]
    if sampling is None:
        # an item of the work may be several sequences, such as the two sides of a pair
        each = [_sequences(role, config.longest_sequence()) for role, _, _ in trained]
        return {
            "update": sum(_update(r, s, n * length, length, rates) for (r, s, _), n in zip(trained, each, strict=True))
        }
    size = published_size(sampling, files)
    if size is None:
        return {}
    tokens = sampling.sequences * length
    scores = [(_score(role, size, tokens, length, rates), gpus) for role, size, gpus in known]
    updates = [
        (sampling.updates * _update(role, size, tokens / sampling.updates, length, rates), gpus)
        for role, size, gpus in trained
    ]
    return {
        "rollout": _decode(sampling, size, length, rates),
        "scores": _side_by_side(scores),
        "updates": _side_by_side(updates),
        "weights": size.numbers * BYTES[sampling.config.dtype] / rates.publish,
    }


def _decode(sampling: Sampling, size: ModelSize, length: int, rates: Rates) -> float:
    rollout = sampling.config
    sequences = -(-sampling.sequences // rollout.engines)
    weights = size.numbers * BYTES[rollout.dtype] / rollout.tensor_parallel
    cache = sequences * length * cache_of_a_token(size, rollout.dtype, rollout.tensor_parallel)
    steps = min(rollout.max_new_tokens, 2 * rates.answer)
    return steps * ((weights + cache) / rates.read + rates.decode_s)


def _score(role: Role, size: ModelSize, tokens: float, length: int, rates: Rates) -> float:
    return _flops(size, tokens, length) / 3 / role.config.ranks / rates.forward


def _update(role: Role, size: ModelSize, tokens: float, length: int, rates: Rates) -> float:
    """An update: forward, backward, with checkpointing another forward, and the step where it runs on the host."""
    section = role.config
    flops = (
        _flops(size, tokens, length) * (2 if size.trained < size.frozen else 3) / 3
    )  # frozen weights have no gradient
    if section.model.gradient_checkpointing:
        flops += _flops(size, tokens, length) / 3
    seconds = flops / section.ranks / rates.training
    if section.engine.offload != "none":
        seconds += size.trained / section.ranks * STEP_OF_A_NUMBER / section.resources.threads_per_rank
    return seconds


def _flops(size: ModelSize, tokens: float, length: int) -> float:
    """Operations of forward and backward passes with all gradients; the embedding is looked up and not multiplied."""
    linear = size.numbers - (0 if size.tied else size.largest)
    shape = ComputeShape(linear, linear, size.layers, size.query)
    return training_flops(shape, [length]) * tokens / length


def _sequences(role: Role, longest: int) -> int:
    assert role.work is not None
    return role.work.items().value * max(1, role.work.longest().value // longest)


def _side_by_side(times: list[tuple[float, float]]) -> float:
    """Seconds until all are done: roles that share GPUs take turns, a role with GPUs of its own works beside them."""
    shared = sum(seconds for seconds, gpus in times if gpus < 1)
    return max([shared, *(seconds for seconds, gpus in times if gpus >= 1)])
