"""Steady arrivals fail nowhere, too many are refused at once, who hangs up costs nothing: the short forms of the soak."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from benchmarks.service.reward_service import Service, role_of, serving

from . import soak

pytestmark = pytest.mark.early

CAPACITY_REQUESTS, SHORT_S = 300, 5.0


def at_a_port(directory: Path, **settings: int) -> AbstractContextManager[Service]:
    role = role_of(directory, threads=1)
    return serving(role, lambda _: soak.Waits(), max_batch_tokens=2048, **settings)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[soak.Load]:
    """A service with the queue that it has by default."""
    with at_a_port(tmp_path_factory.mktemp("none")) as service:
        yield soak.Load(service, soak.made_bodies(64, longest=256))


@pytest.fixture(scope="module")
def short_queue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[soak.Load]:
    with at_a_port(tmp_path_factory.mktemp("none"), max_queue_items=64) as service:
        yield soak.Load(service, soak.made_bodies(64, longest=256))


@pytest.fixture(scope="module")
def capacity(load: soak.Load) -> float:
    return load.capacity(CAPACITY_REQUESTS)


@pytest.mark.parametrize("seconds", [15.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_arrivals_at_80_percent_of_capacity_fail_no_request(load: soak.Load, capacity: float, seconds: float) -> None:
    soak.steady(load, capacity, seconds).require()


def test_five_times_too_many_are_refused_at_once(short_queue: soak.Load, capacity: float) -> None:
    soak.overload(short_queue, capacity, SHORT_S).require()


def test_clients_that_hang_up_cost_no_forward(load: soak.Load, capacity: float) -> None:
    soak.hanging_up(load, capacity, SHORT_S).require()


def test_a_slope_is_found_whatever_its_size() -> None:
    memory = soak.Memory()
    memory.samples = [(float(second), 1e8 * (1 + 0.02 * second / 60)) for second in range(61)]
    assert memory.growth_a_minute() == pytest.approx(0.02, rel=0.02)
    memory.samples = [(float(second), 1e8) for second in range(61)]
    assert memory.growth_a_minute() == 0.0
