"""A reward model behind the app, in this process: loaded as a rank of a group loads it, and asked over ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.serving.backend import GroupBackend

MakeConfig = Callable[..., ServeConfig]
LIMIT = 200
"""Tokens of the longest item."""


def load(path: Path, config: MakeConfig) -> RewardGroup:
    """A reward model, loaded as a rank of a group loads it."""
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    setup = RewardSetup(config(str(path)).reward, seed=0, max_tokens=256, max_item_tokens=LIMIT)
    group.setup(setup, timeout_s=60.0).result()
    return group


def backend_of(group: RewardGroup, config: ServeConfig) -> GroupBackend:
    """The group as a gateway puts it behind the app."""
    return GroupBackend(group, config.reward.model, normalize=config.normalize)


Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


def ask(app: Starlette, work: Ask) -> Any:
    """What ``work`` returns for a client of ``app``."""

    async def run() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await asyncio.wait_for(work(client), timeout=30)

    return asyncio.run(run())


def post(app: Starlette, path: str, body: Any) -> httpx.Response:
    return ask(app, lambda client: client.post(path, content=json.dumps(body)))


def items(app: Starlette, *items: Any) -> list[dict[str, Any]]:
    """The results of ``/v1/reward``."""
    response = post(app, "/v1/reward", {"items": list(items)})
    assert response.status_code == 200, response.text
    return response.json()["results"]


def close(number: float) -> Any:
    return pytest.approx(number, rel=0, abs=1e-5)
