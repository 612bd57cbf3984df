"""Rules about a port that answers with scores.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.config.sections.service import ServiceConfig, is_open_to_others


def open_ports_have_keys(service: ServiceConfig) -> Iterator[Problem]:
    """Whoever can reach the port from another machine must show a token."""
    if is_open_to_others(service.host) and service.token_file is None:
        yield (
            "host",
            f"{service.host} is open to others: set token_file to a file that holds a token, or host to 127.0.0.1",
        )


def exposes_a_reward_model(expose: ServiceConfig | None, reward: RewardConfig) -> Iterator[Problem]:
    """A run that answers with scores has a reward model, and keys where its port is open."""
    if expose is None:
        return
    if not reward.roles:
        yield "expose", "there is no reward model in this job whose scores it could answer: remove it"
    for key, problem in open_ports_have_keys(expose):
        yield f"expose.{key}", problem
