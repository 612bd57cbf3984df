"""What a scoring service listens to and how much it takes: of ``serve``, and of a PPO run that exposes its reward model.

Always true: it listens on this machine only unless a token file is given; every limit has a bound.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegativeFloat, Positive, PositiveFloat, Section

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""


def is_open_to_others(host: str) -> bool:
    """Whether other machines may reach a port on ``host``."""
    return host not in LOOPBACK


class ServiceConfig(Section):
    """A port that answers with scores, and its limits."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 5000
    token_file: str | None = None
    normalize: bool = False
    requests_per_minute: Positive | None = None
    """Of one key; beyond it the answer is 429."""
    max_batch_tokens: Positive = 8192
    max_items: Positive = 1024
    max_queue_items: Positive = 4096
    max_queue_tokens: Positive = 4_000_000
    max_body_bytes: Positive = 8_000_000
    max_bodies_bytes: Positive = 256_000_000
    """Of all requests together that are being read or answered."""
    header_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 30.0
    hold_s: NonNegativeFloat = 100.0
    """How long requests wait for a reward group that restarts."""
    tracing: bool = False
