"""The gateway's check of its groups: whatever is wrong with a group, it begins a restart and never ends the gateway."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import CapacityError, GroupError
from rlhf_ray.pending import Pending
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.gateway import Gateway

from .services import served_models


class Ranks:
    """A reward group by its answers: an exception is raised, by the call itself or when its result is asked for."""

    role = "reward"

    def __init__(self, trouble: Exception | None = None, *, at_once: bool = False) -> None:
        self.trouble, self.at_once = trouble, at_once

    def health(self, timeout_s: float) -> Pending[Any]:
        return self._answer([{}])

    def score(self, requests: list[ScoreRequest]) -> Pending[list[ScoreResult]]:
        return self._answer([ScoreResult.of(1.0) for _ in requests])

    def describe(self) -> Pending[dict[str, Any]]:
        return Pending.done({"mean": None, "std": None, "max_tokens": 8})

    def _answer(self, value: Any) -> Pending[Any]:
        trouble = self.trouble
        if trouble is None:
            return Pending.done(value)
        if self.at_once:
            raise trouble

        def result() -> Any:
            raise trouble

        return Pending(result)


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


TROUBLES = (
    GroupError("reward", 0, "health", "its process died"),
    ValueError("zip() argument 2 is longer than argument 1"),
    RuntimeError("anything"),
)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: type(trouble).__name__)
def test_a_group_in_any_trouble_is_restarted_and_the_gateway_goes_on(
    trouble: Exception, at_once: bool, config: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.serving.recovery.FIRST_PAUSE_S", 0.001)
    settings = config(hold_s=0.0)
    started: list[Any] = []

    def start_again(failed: Any) -> Any:
        started.append(failed)
        if len(started) < 3:
            raise CapacityError("no room yet")
        return Ranks()

    async def run() -> None:
        broken: Any = Ranks()
        backend = GroupBackend(broken, settings.reward.model, normalize=False, start_again=start_again)
        catalog = served_models(settings, backend)
        gateway = Gateway.__new__(Gateway)
        service: Any = SimpleNamespace(catalog=catalog, server=SimpleNamespace(loop=asyncio.get_running_loop()))
        gateway.config, gateway.service = settings, service
        await asyncio.to_thread(gateway.check)
        assert not started, "a group that is well is left alone"
        broken.trouble, broken.at_once = trouble, at_once
        for _ in range(3):
            assert await asyncio.to_thread(error_of, gateway.check) is None, "an error of the check ends the service"
        while catalog.down:
            await asyncio.sleep(0.001)
        assert started == [broken] * 3 and backend.group is not broken
        assert [result.raw for result in await backend.score([ScoreRequest(token_ids=(1,))])] == [1.0]

    asyncio.run(asyncio.wait_for(run(), timeout=10))


def test_a_gateway_checks_its_groups_by_itself_until_it_stops(
    config: Callable[..., ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else does that for a service that outlives its command."""
    monkeypatch.setattr("rlhf_ray.serving.gateway.SECONDS_BETWEEN_CHECKS", 0.01)
    checks = threading.Semaphore(0)
    service: Any = SimpleNamespace(start=lambda _: "http://127.0.0.1:1", stop=lambda: None)
    cluster: Any = SimpleNamespace(__enter__=lambda: None, __exit__=lambda *_: None)
    monkeypatch.setattr("rlhf_ray.serving.gateway.ScoringService", lambda _: service)
    monkeypatch.setattr(Gateway, "_replicas", lambda *_: [])
    monkeypatch.setattr(Gateway, "check", lambda _: checks.release())
    gateway = Gateway(config(path="model"))
    gateway.cluster = cluster
    assert gateway.start() == "http://127.0.0.1:1"
    assert all(checks.acquire(timeout=5) for _ in range(3)), "it does not check"
    gateway.stop()
    while checks.acquire(timeout=0.2):
        pass
    assert not any(thread.name == "group checks" for thread in threading.enumerate())


def test_a_group_that_a_restart_brings_up_after_its_version_was_replaced_is_stopped(
    config: Callable[..., ServeConfig],
) -> None:
    settings = config()
    starting, may_start = threading.Event(), threading.Event()
    replacement: Any = Ranks()
    stopped: list[Any] = []

    def start_again(failed: Any) -> Any:
        starting.set()
        may_start.wait(10)
        return replacement

    async def run() -> None:
        broken: Any = Ranks()
        backend = GroupBackend(
            broken, settings.reward.model, normalize=False, start_again=start_again, stop=stopped.append
        )
        version = served_models(settings, backend).models[0].current
        version.recover(backend)
        await asyncio.to_thread(starting.wait, 10)
        closing = asyncio.create_task(version.close())
        await asyncio.sleep(0.1)
        may_start.set()
        await closing
        await asyncio.sleep(0.1)
        assert stopped[-1:] == [replacement], "a group outlives the version that it was started for"

    asyncio.run(asyncio.wait_for(run(), timeout=10))
