"""Rules for a job whose roles are on the same GPUs by turns (``cluster.colocate``): whatever lies there must be able to leave.

Invariants: every problem names the key, its value and the way out. What DeepSpeed 0.19 and vLLM 0.32 cannot move is refused
here, before anything is placed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from rlhf_ray.config.checks.shared_gpus import share_of_each
from rlhf_ray.config.facts import Placement, Role
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.config.sections.service import ServiceConfig

COLOCATE = "cluster.colocate"
OFF = f"or {COLOCATE} to false"


def taking_turns(placements: Sequence[Placement]) -> list[Placement]:
    """The same with an equal share of a GPU for each role that is on one."""
    on_gpus = sum(placed.resources.gpus_per_rank > 0 for placed in placements)
    shares = {"gpus_per_rank": share_of_each(on_gpus) if on_gpus else 0.0}
    return [
        replace(placed, resources=placed.resources.model_copy(update=shares))
        if placed.resources.gpus_per_rank
        else placed
        for placed in placements
    ]


def only_ppo_takes_turns(cluster: ClusterConfig, kind: str) -> Iterator[Problem]:
    """Other jobs have one model on a GPU at a time anyhow."""
    if cluster.colocate:
        yield COLOCATE, f"true, but only a job of kind ppo has roles that take turns, and this one is {kind}: remove it"


def engines_can_sleep(
    cluster: ClusterConfig, rollout: RolloutConfig, expose: ServiceConfig | None
) -> Iterator[Problem]:
    """The engines are vLLM's, on one GPU each, and generate while nothing else computes."""
    if not cluster.colocate:
        return
    if rollout.resources.gpus_per_rank == 0:
        yield (
            COLOCATE,
            "true, but rollout.resources.gpus_per_rank is 0, and vLLM has no sleep mode on a CPU: set that to 1, or this to "
            "false",
        )
    if rollout.backend != "vllm":
        yield "rollout.backend", f"{rollout.backend} engines do not sleep: set it to vllm, {OFF}"
    if rollout.mode != "sync":
        yield (
            "rollout.mode",
            f"{rollout.mode}, but then the engines generate while the policy learns, and {COLOCATE} is true: set it to "
            f"sync, {OFF}",
        )
    if rollout.tensor_parallel > 1:
        yield (
            "rollout.tensor_parallel",
            f"{rollout.tensor_parallel}, but Ray shares no engine of several GPUs with other roles: set it to 1, {OFF}",
        )
    if rollout.lora == "adapter":
        yield "rollout.lora", f"adapter, which an engine whose cache sleeps may not take: set it to merged, {OFF}"
    if expose is not None:
        yield "expose", f"its callers may come while the reward models are not on the GPUs: remove it, {OFF}"


def roles_can_leave(cluster: ClusterConfig, roles: Mapping[str, Role]) -> Iterator[Problem]:
    """Every role on a GPU can go to the host, or holds nothing there that must."""
    if not cluster.colocate:
        return
    for key, role in roles.items():
        if role.config.resources.gpus_per_rank == 0 or role.derived:
            if key == "policy":
                yield COLOCATE, "true, but policy.resources.gpus_per_rank is 0: set that to 1, or this to false"
            continue
        if role.config.model.quantization is not None:
            quantization = role.config.model.quantization
            yield f"{key}.model.quantization", f"{quantization} weights stay on their GPU: remove it, {OFF}"
        if isinstance(role.config, ScoringRole) and role.config.scorer == "vllm":
            yield f"{key}.scorer", f"vllm's pooling runner stays on its GPU: set it to packed, {OFF}"
        if role.trained:
            yield from _states_can_leave(key, role)


def _states_can_leave(key: str, role: Role) -> Iterator[Problem]:
    engine, stage = role.config.engine, f"{key}.engine.zero"
    if engine.zero == 0:
        yield stage, f"0, at which DeepSpeed keeps the optimizer on its GPU: set it to 1 or 2, {OFF}"
    if engine.zero == 3 and engine.offload != "optimizer":
        yield (
            f"{key}.engine.offload",
            f"{engine.offload} at {stage} 3, where DeepSpeed moves weights alone, beside an optimizer that is on the host "
            f"for good: set it to optimizer, or {stage} to 2, {OFF}",
        )
    if engine.zero == 3 and role.config.model.lora is not None:
        yield stage, f"3 with {key}.model.lora, whose frozen weights DeepSpeed does not move: set it to 2, {OFF}"
