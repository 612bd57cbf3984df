"""Memory of a tree of processes: all of it, nothing of others, shared pages once."""

from __future__ import annotations

import io
import mmap
import os
import subprocess
import sys
import threading
import time
from mmap import PAGESIZE
from multiprocessing.shared_memory import SharedMemory

import pytest

from rlhf_ray.monitoring import MemorySampler, memory, memory_use
from rlhf_ray.monitoring.memory import MemoryUse, TreeMemory, process_tree

CHILD = """
import subprocess, sys
depth = int(sys.argv[1])
held = bytearray(b"x") * 50_000_000
if depth:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]], stdin=subprocess.PIPE)
print("ready", flush=True)
sys.stdin.read()
if depth:
    child.stdin.close(); child.wait()
"""


def test_memory_counts_the_whole_tree_and_nothing_else() -> None:
    command = [sys.executable, "-c", CHILD, "1", CHILD]
    root = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other = subprocess.Popen([*command[:3], "0", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        for process, lines in ((root, 2), (other, 1)):
            assert process.stdout is not None
            for _ in range(lines):
                assert process.stdout.readline() == b"ready\n"
        use = memory_use([root.pid])
        assert use.processes == 2
        assert use.pss_gb == pytest.approx(0.1, abs=0.03), "twice 50 MB and two interpreters"
        both = memory_use([root.pid, other.pid, root.pid])
        assert both.processes == 3
        assert both.pss_gb - use.pss_gb == pytest.approx(0.05, abs=0.02)
        assert {root.pid, other.pid} < {process.pid for process in process_tree([os.getpid()])}
    finally:
        for process in (root, other):
            process.communicate(timeout=30)
    assert memory_use([root.pid]) == MemoryUse(), "a process that has ended holds nothing"


def test_shared_memory_counts_once_however_many_hold_it_open() -> None:
    before = memory_use([os.getpid()])
    shared = SharedMemory(create=True, size=30_000_000)
    try:
        shared.buf[:] = bytes(30_000_000)
        again = SharedMemory(shared.name)
        after = memory_use([os.getpid()])
        again.close()
        assert after.object_store_gb - before.object_store_gb == pytest.approx(0.03, rel=0.01)
    finally:
        shared.close()
        shared.unlink()


def test_the_sampler_counts_other_trees_and_remembers_them_while_they_do_not_say(
    project_log: io.StringIO,
) -> None:
    other = TreeMemory("other", "other", "other", {1: 10**12}, {})
    answers: list[TreeMemory | OSError] = [other, OSError("Ray is gone"), OSError("Ray is gone")]

    def elsewhere(wait_s: float) -> list[TreeMemory]:
        answer = answers.pop(0) if answers else OSError("Ray is gone")
        if isinstance(answer, OSError):
            raise answer
        return [answer]

    sampler = MemorySampler(interval_s=0.02, elsewhere=elsewhere).start()
    while len(sampler.history) < 4:
        time.sleep(0.01)
    sampler.stop()
    assert all(1000 < use.total_gb < 1010 for _, use in sampler.history)
    assert sampler.peak.by_node["other"] == 1000.0 and len(sampler.peak.by_node) == 2
    assert project_log.getvalue().count("is not known") == 1


def test_the_sampler_sees_a_peak_that_has_passed() -> None:
    def measure_twice(sampler: MemorySampler) -> None:
        wanted = len(sampler.history) + 2
        while len(sampler.history) < wanted:
            time.sleep(0.01)

    with MemorySampler(interval_s=0.02) as sampler:
        start = sampler.latest.total_gb
        held = mmap.mmap(-1, 80_000_000)  # and not from what other tests have freed in this process
        held[::PAGESIZE] = bytes(len(range(0, len(held), PAGESIZE)))
        measure_twice(sampler)
        held.close()
        measure_twice(sampler)
    peak = sampler.stop()
    assert peak.total_gb - start == pytest.approx(0.08, abs=0.02)
    assert sampler.latest.total_gb < peak.total_gb - 0.05
    assert [seconds for seconds, _ in sampler.history] == sorted(seconds for seconds, _ in sampler.history)


def test_what_others_hold_is_asked_at_the_end_of_a_run_that_is_shorter_than_an_interval() -> None:
    answers: list[list[TreeMemory]] = [[]]
    sampler = MemorySampler(interval_s=1000.0, elsewhere=lambda wait_s: answers[-1]).start()
    answers.append([TreeMemory("elsewhere", "another kernel", "another namespace", {1: 10**12}, {})])
    assert "elsewhere" not in sampler.stop().by_node
    assert sampler.last().by_node["elsewhere"] == 1000.0
    assert len(sampler.history) == 2


def test_the_last_question_is_given_longer_than_the_others() -> None:
    """A rank that works answers when it is done, and no later measurement stands in for its answer."""
    other, waits = TreeMemory("elsewhere", "another kernel", "another namespace", {1: 10**12}, {}), list[float]()

    def busy_for_ten_seconds(wait_s: float) -> list[TreeMemory]:
        waits.append(wait_s)
        return [other] if wait_s >= 10.0 else []

    sampler = MemorySampler(interval_s=0.02, elsewhere=busy_for_ten_seconds).start()
    while len(sampler.history) < 3:
        time.sleep(0.01)
    assert "elsewhere" not in sampler.stop().by_node
    assert sampler.last().by_node["elsewhere"] == 1000.0
    assert max(waits[:-1]) <= 2.0, "what is asked while a run goes on does not hold up its figures"


def test_a_measurement_that_hangs_does_not_hold_up_the_end_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "JOIN_S", 0.05)
    asked, hangs, over = list[str](), threading.Event(), threading.Event()

    def elsewhere(wait_s: float) -> list[TreeMemory]:
        asked.append(threading.current_thread().name)
        if len(asked) > 1:
            hangs.set()
            over.wait(20.0)
        return []

    sampler = MemorySampler(interval_s=0.01, elsewhere=elsewhere).start()
    assert hangs.wait(20.0)
    began = time.monotonic()
    assert sampler.last() == sampler.history[0][1]
    assert time.monotonic() - began < 10.0 and asked[1:] == ["memory sampler"]
    over.set()
