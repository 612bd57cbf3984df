"""The deadline of an update goes by the bytes of all weights, or by the longest that read a part, and is at least a floor."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.actors.answers import why_late
from rlhf_ray.actors.workers.rollout import RanksHandle
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.weights.deadline import Taken, UpdateDeadline
from rlhf_ray.rollout.weights.delta import Delta
from rlhf_ray.rollout.wire import PublishedAdapter, PublishedWeights

GB = 10**9


def weights(nbytes: int, delta: int | None = None, adapter: int | None = None) -> PublishedWeights:
    return PublishedWeights(
        1, (), "sum", None if delta is None else Delta("base", (), delta), nbytes,
        None if adapter is None else PublishedAdapter({}, PublishedWeights(1, (), "sum", None, adapter)),
    )  # fmt: skip


def test_the_slowest_rate_sets_the_deadline_and_the_floor_is_its_least() -> None:
    updates = UpdateDeadline(floor_s=60.0)
    assert updates.limit(weights(GB).ways) is None, "nothing is known before the first"
    updates.took(Taken(whole=True, nbytes=10 * GB, seconds=5.0))
    updates.took(Taken(whole=True, nbytes=10 * GB, seconds=20.0))
    updates.took(Taken(whole=True, nbytes=10 * GB, seconds=1.0))
    large, small = (updates.limit(weights(nbytes).ways) for nbytes in (20 * GB, GB))
    assert large is not None and small is not None
    assert large.seconds == pytest.approx(10 * 20 / 0.5) and small.seconds == 60.0
    assert large.key == (
        "rollout.update_timeout_s, 60: 20000.0 MB at 500.0 MB/s, the slowest update so far, take 40.0 s, and the deadline is "
        "10 times as long, but never less than that key"
    )


@pytest.mark.parametrize("part", [{"delta": GB // 10}, {"adapter": GB // 10}])
def test_an_engine_that_may_need_all_weights_has_the_time_for_them(part: dict[str, int]) -> None:
    updates = UpdateDeadline(floor_s=1.0)
    updates.took(Taken(whole=True, nbytes=GB, seconds=10.0))
    assert updates.limit(weights(GB, **part).ways) is None, "how long the part alone takes is not known"
    updates.took(Taken(whole=False, nbytes=GB // 10, seconds=8.0))
    limit = updates.limit(weights(GB, **part).ways)
    assert limit is not None and limit.seconds == pytest.approx(110.0 if "adapter" in part else 100.0)


@pytest.mark.parametrize("nbytes", [0, 2000])
def test_a_small_change_does_not_make_the_deadline_of_a_larger_one_hours(nbytes: int) -> None:
    updates = UpdateDeadline(floor_s=1.0)
    updates.took(Taken(whole=True, nbytes=GB, seconds=10.0))
    updates.took(Taken(whole=False, nbytes=nbytes, seconds=1.0))
    limit = updates.limit({False: GB // 2})
    assert limit is not None and limit.seconds == pytest.approx(10 * (1 + 5), rel=1e-4)
    assert "500.0 MB of changes or an adapter take 6.0 s by the longest update so far, 1.0 s" in limit.key


def test_more_of_a_part_than_ever_has_no_deadline_of_its_own_where_no_rate_is_known() -> None:
    updates = UpdateDeadline(floor_s=1.0)
    updates.took(Taken(whole=False, nbytes=1000, seconds=2.0))
    assert updates.limit({False: 1001}) is None
    same = updates.limit({False: 1000})
    assert same is not None and same.seconds == pytest.approx(20.0)


class Slow:
    """Ranks that answer with what an update took."""

    def __init__(self) -> None:
        self.limits: list[tuple[float | None, str | None]] = []

    def call(
        self, method: str, arguments: Any, *, timeout_s: float | None = None, key: str | None = None
    ) -> Pending[Any]:
        self.limits.append((timeout_s, key))
        return Pending.done([(Taken(whole=True, nbytes=GB, seconds=20.0), None)])


def test_the_second_update_of_an_engine_ends_by_the_rate_of_the_first_and_the_error_names_it() -> None:
    ranks = Slow()
    handle = RanksHandle(ranks, RolloutConfig(update_timeout_s=5.0))  # type: ignore[arg-type]  # nothing else is called
    for _ in range(2):
        assert handle.receive(weights(GB)).result() is None
    first, second = ranks.limits
    assert first == (None, None) and second[0] == pytest.approx(200.0)
    handle.restarted()
    assert handle.receive(weights(GB)).result() is None
    assert ranks.limits[2] == (None, None), "a new process may be on another node"
    late = why_late([0], 200.0, second[1], None)
    assert "did not answer within 200 s" in late and "raise rollout.update_timeout_s, 5: 1000.0 MB at 50.0 MB/s" in late
