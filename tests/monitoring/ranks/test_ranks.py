"""What a rank says of itself: its memory and its busy time, never twice, at a bounded cost, and without harm to the rank."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from rlhf_ray.actors.shells import ACTORS
from rlhf_ray.models import devices
from rlhf_ray.monitoring.memory import TreeMemory, memory_use, together
from rlhf_ray.monitoring.ranks import meter
from rlhf_ray.monitoring.ranks.busy import BusyTime, count_calls
from rlhf_ray.monitoring.ranks.meter import RankMeter


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_moment_counts_once_however_many_calls_are_under_way() -> None:
    clock = Clock()
    busy = BusyTime(clock)
    clock.now += 2
    outer, inner = busy.call(), busy.call()
    outer.__enter__()
    clock.now += 1
    inner.__enter__()
    clock.now += 1
    assert busy.share() == pytest.approx(0.5), "two of four seconds, in calls that go on"
    outer.__exit__(None, None, None)
    clock.now += 3
    inner.__exit__(None, None, None)
    clock.now += 9
    assert busy.share() == pytest.approx(0.25), "three of twelve"
    clock.now += 5
    assert busy.share() == 0.0
    with pytest.raises(KeyError), busy.call():
        clock.now += 1
        raise KeyError("a call that fails")
    clock.now += 1
    assert busy.share() == pytest.approx(0.5), "a call that failed is over"


def test_calls_beside_the_work_and_private_methods_do_not_count() -> None:
    class Rank:
        def __init__(self) -> None:
            self.busy = BusyTime(clock)

        def work(self) -> None:
            clock.now += 1

        def health(self) -> None:
            clock.now += 1

        def _own(self) -> None:
            clock.now += 1

    clock = Clock()
    count_calls(Rank, {"health"})
    rank = Rank()
    for call in (rank.work, rank.health, rank._own, rank._own):
        call()
    assert rank.busy.share() == pytest.approx(0.25)


@pytest.mark.parametrize("kind", ACTORS)
def test_no_actor_counts_what_answers_in_a_lane_of_its_own(kind: Any) -> None:
    """Else a rank that waits for its files, or is asked how it is, would seem to work."""
    counted = {name for name in dir(ACTORS[kind]) if "_counted" in _wrappers(getattr(ACTORS[kind], name))}
    assert counted and not counted & {"health", "memory", "stacks", "saved"}


def _wrappers(method: Any) -> str:
    """The code of a function and of those that it closes over."""
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    own = getattr(getattr(method, "__code__", None), "co_qualname", "")
    return " ".join([own, *(_wrappers(one) for one in cells if callable(one))])


def test_what_several_trees_hold_counts_once() -> None:
    """The driver's tree has a rank in it; another rank is on its machine in another container, a third on another machine."""
    gb = 10**9
    driver = TreeMemory("a", "a", "a 1", {1: gb, 7: 2 * gb}, {(5, 9): gb})
    rank = TreeMemory("a", "a", "a 1", {7: 3 * gb}, {(5, 9): gb})
    container = TreeMemory("pod", "a", "a 2", {7: 4 * gb}, {(5, 9): gb, (6, 9): gb})
    other = TreeMemory("b", "b", "b 1", {7: 5 * gb}, {(5, 9): gb})
    use = together([driver, rank, container, other])
    assert (use.pss_gb, use.object_store_gb, use.processes) == (12.0, 3.0, 4)
    assert use.by_node == {"a": 4.0, "pod": 5.0, "b": 6.0}
    assert sum(use.by_node.values()) == use.total_gb


class Told:
    def __init__(self) -> None:
        self.values: list[Mapping[str, float]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.values.append(values)


def test_a_rank_tells_the_memory_of_itself_and_of_what_it_started_and_its_busy_share() -> None:
    clock, told = Clock(), Told()
    busy = BusyTime(clock)
    child = subprocess.Popen(
        [sys.executable, "-c", "held = bytearray(b'x') * 50_000_000; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == b"\n"
        with busy.call():
            clock.now += 1
        clock.now += 3
        rank = RankMeter(busy, lambda: (1.5, 2.5), lambda: told)
        values = rank.look()
        expected = memory_use([os.getpid()])
    finally:
        child.communicate(b"\n", timeout=30)
    assert told.values == [values]
    assert values["rank/pss_gb"] == pytest.approx(expected.pss_gb, rel=0.05)
    assert values["rank/resident_gb"] >= values["rank/pss_gb"] > 0.05
    assert values["rank/busy_share"] == pytest.approx(0.25)
    assert (values["rank/gpu_held_gb"], values["rank/gpu_peak_gb"]) == (1.5, 2.5)
    assert rank.held is not None and child.pid in rank.held.pss


def test_reading_the_memory_takes_a_thousandth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose page tables take 20 ms to read is read every 20 s, one of 0.1 ms every 5 s; resident memory at each look."""
    for cost_s, gap_s in ((0.02, 20.0), (0.0001, meter.EVERY_S)):
        worked, clock, reads = [0.0], Clock(), [0]

        def read(
            roots: Any, worked: list[float] = worked, cost_s: float = cost_s, reads: list[int] = reads
        ) -> TreeMemory:
            worked[0] += cost_s
            reads[0] += 1
            return TreeMemory("", "", "", {}, {})

        monkeypatch.setattr(meter, "tree_memory", read)
        monkeypatch.setattr(meter.time, "monotonic", clock)
        monkeypatch.setattr(meter.time, "thread_time", lambda worked=worked: worked[0])
        rank = RankMeter(BusyTime(), lambda: None)
        for _ in range(1000):
            rank.look()
            clock.now += 1.0
        assert reads[0] == pytest.approx(1000 / gap_s, rel=0.02)
        assert worked[0] <= 0.00101 * 1000


def test_a_meter_that_fails_says_so_once_and_costs_the_rank_nothing(
    monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(meter, "EVERY_S", 0.01)
    told, looks = Told(), [0]

    def fails_at_first() -> None:
        looks[0] += 1
        if looks[0] < 4:
            raise OSError("out of files")

    RankMeter(BusyTime(), fails_at_first, lambda: told).start()
    deadline = time.monotonic() + 20
    while not told.values and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told.values, "it goes on"
    said = project_log.getvalue()
    assert said.count("the rank does not say how it is") == said.count("out of files") == 1
    threads = [one for one in threading.enumerate() if one.name == "rank meter"]  # other tests leave some too
    assert threads and all(one.daemon for one in threads), "they would keep the process of a rank alive"


def test_a_rank_without_a_gpu_opens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("the driver was asked"))
    assert devices.gpu_memory() is None


def test_the_most_of_a_gpu_outlives_the_reset_of_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own counters in the place of a GPU: what is held, and the most since the last reset."""
    held, most = 2e9, [6e9]
    monkeypatch.setattr(devices, "_most", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda gpu: held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 1e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda gpu: most[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: most.__setitem__(0, held))
    peak = devices.take_peak(torch.device("cuda", 0))
    assert peak is not None and peak.reserved_gb == 6.0
    assert devices.gpu_memory() == (2.0, 6.0)
