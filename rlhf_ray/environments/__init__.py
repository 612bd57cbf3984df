"""Environments: programs that answer a policy's answer, for as many turns as an episode takes, and give the rewards."""

from __future__ import annotations

from rlhf_ray.environments.protocol import Answer, Environment, Task, Turn

__all__ = ["Answer", "Environment", "Task", "Turn"]
