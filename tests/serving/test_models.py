"""All items of a request are scored by one version; a new version drops no request; a batch whose group died is scored
again, whole, once the group is back, and in halves if that one died too; what does not come back is an error, never a
made-up score.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.errors import GroupError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import TRIES_OF_A_BATCH, TRIES_OF_AN_ITEM, Limits, ServedModel

from .services import Lengths, served_models

MakeConfig = Callable[..., ServeConfig]


class Mortal(Lengths):
    """Dies at the forwards that ``deaths`` numbers, and stays dead until restarted; some restarts fail."""

    def __init__(self, deaths: Sequence[int] = (), failing_restarts: int = 0, plus: float = 0.0) -> None:
        super().__init__("mortal", plus)
        self.deaths, self.failing = set(deaths), failing_restarts
        self.forwards, self.items, self.attempts, self.alive = 0, 0, 0, True
        self.gate = asyncio.Event()
        self.gate.set()

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.forwards += 1
        self.items += len(requests)
        self.alive &= self.forwards not in self.deaths
        await self.gate.wait()
        if not self.alive:
            raise GroupError("reward", 0, "score", "its process died")
        return await super().score(requests)

    async def restart(self) -> None:
        self.attempts += 1
        await asyncio.sleep(0)
        if self.attempts <= self.failing:
            raise GroupError("reward", 0, "setup", "no room")
        self.alive = True


def served(*backends: Mortal, hold_s: float = 100.0, batch_tokens: int = 8) -> ServedModel:
    limits = Limits(batch_tokens=batch_tokens, queue_items=1000, queue_tokens=10_000, hold_s=hold_s)
    return ServedModel("reward", backends, limits, Metrics())


def items(*lengths: int) -> list[ScoreRequest]:
    return [ScoreRequest(token_ids=(7,) * length) for length in lengths]


async def score(model: ServedModel, *lengths: int) -> list[float | None]:
    return [result.raw for result in await model.current.score(items(*lengths))]


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_twenty_deaths_lose_no_reward_and_make_none_up() -> None:
    async def run() -> tuple[list[list[float | None]], Mortal]:
        backend = Mortal(deaths=range(2, 61, 3))
        model = served(backend)
        requests = [(1 + i % 5, 1 + i % 3) for i in range(200)]
        answers = await asyncio.gather(*(score(model, *lengths) for lengths in requests))
        assert answers == [[float(length) for length in lengths] for lengths in requests]
        return answers, backend

    _, backend = asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert backend.attempts == 20, "every death was met by one restart"


def test_a_group_that_comes_back_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.recovery.FIRST_PAUSE_S", 0.01)

    async def run() -> Mortal:
        backend = Mortal(deaths=[1], failing_restarts=3)
        assert await score(served(backend), 3) == [3.0]
        return backend

    assert asyncio.run(run()).attempts == 4


@pytest.mark.parametrize("hold_s", [0.0, 0.05])
def test_a_group_that_does_not_come_back_is_an_error_within_the_time(hold_s: float) -> None:
    async def run() -> None:
        model = served(Mortal(deaths=[1], failing_restarts=10**6), hold_s=hold_s)
        with pytest.raises(GroupError):
            await asyncio.wait_for(score(model, 3), timeout=5)

    asyncio.run(run())


def test_a_restart_that_hangs_ends_with_the_time() -> None:
    class Hanging(Mortal):
        async def restart(self) -> None:
            await asyncio.sleep(60)

    async def run() -> None:
        with pytest.raises(GroupError, match="did not come back in time"):
            await asyncio.wait_for(score(served(Hanging(deaths=[1]), hold_s=0.05), 3), timeout=5)

    asyncio.run(run())


class Poisoned(Mortal):
    """Dies of every item of ``poison`` tokens, wherever it stands."""

    def __init__(self, poison: int) -> None:
        super().__init__()
        self.poison = poison

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        if any(len(request.token_ids or ()) == self.poison for request in requests):
            self.alive = False
        return await super().score(requests)


@pytest.mark.parametrize("place", range(7))
def test_an_item_that_kills_every_group_costs_no_other_its_score(place: int) -> None:
    lengths = [1] * 7
    lengths[place] = 5

    async def run() -> tuple[list[ScoreResult], list[float | None], int]:
        backend = Poisoned(5)
        model = served(backend, batch_tokens=100)
        results = await model.current.score(items(*lengths))
        return results, await score(model, 4), backend.attempts

    results, after, restarts = asyncio.run(asyncio.wait_for(run(), timeout=5))
    expected = [None if length == 5 else 1.0 for length in lengths]
    assert [result.raw for result in results] == expected and after == [4.0]
    assert results[place].error == "the reward group fails on this item: its process died"
    assert results[place].fault == "item" and restarts <= TRIES_OF_A_BATCH + TRIES_OF_AN_ITEM + 2, "a few halves"


def test_a_group_that_fails_on_everything_is_no_item_at_fault() -> None:
    async def run() -> int:
        backend = Mortal(deaths=range(1, 1000))
        with pytest.raises(GroupError, match="its process died"):
            await score(served(backend, batch_tokens=100), *[1] * 64)
        return backend.attempts

    assert asyncio.run(asyncio.wait_for(run(), timeout=5)) < 12


def test_the_other_replica_works_on_while_one_restarts() -> None:
    async def run() -> None:
        dead, alive = Mortal(deaths=[1]), Mortal()
        back = asyncio.Event()

        async def restart() -> None:
            await back.wait()
            dead.alive = True

        dead.restart = restart  # type: ignore[method-assign]
        model = served(dead, alive, batch_tokens=1)
        first = asyncio.create_task(score(model, 1))
        await turns()
        assert await asyncio.wait_for(score(model, 1, 1, 1), timeout=5) == [1.0] * 3
        assert not first.done()
        back.set()
        assert await asyncio.wait_for(first, timeout=5) == [1.0]

    asyncio.run(run())


def test_a_new_version_takes_new_requests_and_the_old_one_answers_its_own() -> None:
    async def run() -> None:
        old, new = Mortal(), Mortal(plus=100.0)
        old.gate.clear()
        model = served(old, batch_tokens=2)
        before = [asyncio.create_task(score(model, 1, 1, 1, 1)) for _ in range(5)]
        await turns()
        closing = model.replace([new])
        assert (model.describe()["version"], model.current.name) == ("2", "2")
        after = await score(model, 1, 1)
        assert after == [101.0, 101.0]
        assert not closing.done() and not old.closed, "the old one still has requests"
        old.gate.set()
        assert await asyncio.gather(*before) == [[1.0] * 4] * 5, "no request was dropped, or scored by two versions"
        await asyncio.wait_for(closing, timeout=5)
        assert old.closed and not new.closed

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_a_restart_is_tried_for_as_long_as_it_takes_and_requests_that_come_later_are_held_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rlhf_ray.serving.recovery.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("rlhf_ray.serving.recovery.LONGEST_PAUSE_S", 0.001)

    async def run() -> None:
        backend = Mortal(deaths=[1], failing_restarts=10**6)
        model = served(backend, hold_s=0.2)
        with pytest.raises(GroupError):
            await score(model, 3)
        tried = backend.attempts
        await until(lambda: backend.attempts > tried + 3)
        assert model.current.down == 1, "nobody waits, and it is tried on"
        later = asyncio.create_task(score(model, 2))
        await asyncio.sleep(0.1)
        assert not later.done(), "a request that comes when the group is long down waits too"
        backend.failing = 0
        assert await asyncio.wait_for(later, timeout=5) == [2.0]
        assert model.current.down == 0

    asyncio.run(asyncio.wait_for(run(), timeout=10))


def test_each_model_says_how_many_of_its_replicas_are_down(config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.recovery.FIRST_PAUSE_S", 0.001)

    async def run() -> None:
        metrics, backend = Metrics(), Mortal(deaths=[1], failing_restarts=10**6)
        catalog = served_models(config(hold_s=0.05), backend, Lengths(), metrics=metrics)
        create_app(catalog, config(), metrics, dict)
        with pytest.raises(GroupError):
            await score(catalog.models[0], 3)
        assert replicas(metrics) == {
            'replicas{model="reward"}': 1.0, 'replicas{model="model-2"}': 1.0,
            'replicas_down{model="reward"}': 1.0, 'replicas_down{model="model-2"}': 0.0,
        }  # fmt: skip
        backend.failing = 0
        assert await asyncio.wait_for(score(catalog.models[0], 2), timeout=5) == [2.0]
        assert replicas(metrics)['replicas_down{model="reward"}'] == 0.0

    asyncio.run(asyncio.wait_for(run(), timeout=10))


def replicas(metrics: Metrics) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in metrics.text().decode().splitlines())
    return {
        name.removeprefix("rlhf_scoring_"): float(value)
        for name, _, value in lines
        if name.startswith("rlhf_scoring_replicas")
    }


def test_requests_behind_a_batch_that_waits_for_its_group_are_held_no_longer_than_it() -> None:
    async def run() -> None:
        model = served(Mortal(deaths=[1], failing_restarts=10**6), hold_s=0.3, batch_tokens=1)
        asking = {asyncio.create_task(score(model, 1)) for _ in range(8)}
        early, _ = await asyncio.wait(asking, timeout=0.25)
        done, _ = await asyncio.wait(asking, timeout=1.0)
        assert not early and done == asking, "eight batches one after the other would wait for 2.4 s"
        assert all(isinstance(one.exception(), GroupError) for one in done)

    asyncio.run(asyncio.wait_for(run(), timeout=10))


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is longer"), OSError("no room"), KeyError("x")])
def test_no_error_of_a_restart_ends_it(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_ray.serving.recovery.FIRST_PAUSE_S", 0.001)

    class Odd(Mortal):
        async def restart(self) -> None:
            if not self.attempts:
                self.attempts += 1
                raise error
            await super().restart()

    async def run() -> None:
        backend = Odd(deaths=[1])
        assert await score(served(backend), 3) == [3.0]
        assert backend.forwards == 2, "nothing is sent to a group before it is back"

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_an_item_whose_group_was_killed_twice_from_outside_still_gets_its_score() -> None:
    async def run() -> list[float | None]:
        return await score(served(Mortal(deaths=[1, 2])), 3)

    assert asyncio.run(asyncio.wait_for(run(), timeout=5)) == [3.0]


def test_readiness_is_told_within_its_time_whatever_the_model_does() -> None:
    async def run() -> None:
        hung = Mortal()
        hung.gate.clear()
        model = served(hung)
        assert await asyncio.gather(*(model.current.ready(60.0, 0.05) for _ in range(50))) == [False] * 50
        hung.gate.set()
        assert await model.current.ready(60.0, 5.0)
        await model.current.close()
        assert hung.items == 1, "one probe for all who ask"

    asyncio.run(asyncio.wait_for(run(), timeout=5))


def test_a_replica_that_is_down_takes_no_batch_and_is_not_ready() -> None:
    async def run() -> None:
        backend = Mortal(deaths=[2], failing_restarts=10**6)
        model = served(backend, hold_s=0.1)
        assert await score(model, 1) == [1.0] and await model.current.ready(60.0, 1.0)
        with pytest.raises(GroupError):
            await score(model, 1)
        assert not await model.current.ready(60.0, 1.0), "a score of a minute ago does not count once the group is down"
        with pytest.raises(GroupError):
            await score(model, 1)
        assert backend.forwards == 2

    asyncio.run(asyncio.wait_for(run(), timeout=5))
