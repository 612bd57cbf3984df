"""Rules for a job whose driver and ranks all run in one process: what cannot share a process with a training engine.

vLLM sets the thread count and the process groups of its whole process.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_ray.config.facts import Role
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.rollout import RolloutConfig


def no_role_scores_in_vllm(roles: Mapping[str, Role]) -> Iterator[Problem]:
    """Reward models run on the packed forward pass."""
    for key, role in roles.items():
        if isinstance(role.config, ScoringRole) and role.config.scorer == "vllm":
            yield f"{key}.scorer", "vllm needs a process of its own: set it to packed"


def no_engine_is_vllm(rollout: RolloutConfig) -> Iterator[Problem]:
    """Rollout engines run on transformers."""
    if rollout.backend == "vllm":
        yield "rollout.backend", "vllm needs a process of its own: set rollout.backend=transformers"
