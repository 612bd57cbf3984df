"""The section of a scoring service: the port it listens on, who may use it, and its limits.

Invariant: with the defaults only this machine can reach the port, and every buffer is bounded.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegativeFloat, Positive, PositiveFloat, Section

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine can reach."""


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
    """Requests that one key may send in a minute; further ones are answered with status 429. Null sets no limit."""
    max_batch_tokens: Positive = 8192
    max_items: Positive = 1024
    max_queue_items: Positive = 4096
    max_queue_tokens: Positive = 4_000_000
    max_body_bytes: Positive = 8_000_000
    max_bodies_bytes: Positive = 256_000_000
    """About how many bytes all request bodies take in memory that are being read or answered. One caller may take half of what
    the others leave."""
    header_timeout_s: PositiveFloat = 10.0
    body_timeout_s: PositiveFloat = 30.0
    write_timeout_s: PositiveFloat = 30.0
    """Seconds in which a client must read its answer."""
    trusted_proxies: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Addresses or networks of proxies whose header ``X-Forwarded-For`` says who a caller is; nobody else's is read."""
    hold_s: NonNegativeFloat = 100.0
    """Seconds for which requests wait for a reward model whose processes restart."""
    tracing: bool = False
    page: bool = True
    """Whether a page for people answers at ``/``, which scores two answers side by side."""
