"""A process that ends with another one does so inside code that never returns, and nothing is left of either."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
from rlhf_ray.processes.ends_with import end_with
end_with({descriptor}, {grace})
print("ready", flush=True)
{work}
"""
HANGS = "import re; re.match('(a+)+b', 'a' * 60)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait(10)


def start(started: list[subprocess.Popen[str]], descriptor: str, work: str = HANGS, grace: float = 0.0, **options):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(descriptor=descriptor, grace=grace, work=work)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options,
    )  # fmt: skip
    started.append(process)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    (watcher,) = psutil.Process(process.pid).children()
    return process, watcher


def has_ended(process: psutil.Process, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_it_ends_with_another_process_although_its_code_never_returns(started) -> None:
    other = subprocess.Popen(["sleep", "600"])
    started.append(other)
    end = os.pidfd_open(other.pid)
    process, watcher = start(started, str(end), pass_fds=[end])
    os.close(end)
    time.sleep(0.2)
    assert process.poll() is None, "the other lives"
    other.kill()
    other.wait(10)
    assert process.wait(10) == -9 and has_ended(watcher)


def test_it_ends_with_its_input_after_a_grace(started) -> None:
    process, watcher = start(started, "0", grace=0.5)
    process.stdin.write("more input ends nothing\n")
    process.stdin.flush()
    time.sleep(0.2)
    assert process.poll() is None
    began = time.monotonic()
    process.stdin.close()
    assert process.wait(10) == -9 and time.monotonic() - began >= 0.5 and has_ended(watcher)


def test_within_the_grace_it_ends_by_itself(started) -> None:
    process, watcher = start(started, "0", "sys.stdin.read(); time.sleep(0.1); sys.exit(7)", grace=60.0)
    process.stdin.close()
    assert process.wait(10) == 7 and has_ended(watcher)


def test_one_that_is_killed_leaves_no_watcher(started) -> None:
    process, watcher = start(started, "0")
    process.kill()
    process.wait(10)
    assert has_ended(watcher)


def test_the_end_of_its_output_is_seen_while_it_lives(started) -> None:
    process, _ = start(started, "0", "os.close(1); time.sleep(60)")
    assert process.stdout.read() == "", "the watcher does not hold it open"
    assert process.poll() is None
