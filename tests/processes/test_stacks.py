"""What every process of a run is doing is told from outside, of one that hangs or is stopped too, and asking ends none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlhf_ray.processes import stacks

ROOT = Path(__file__).parents[2]
Start = Callable[[str], int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a process that runs a program; returns its id once it says that it is ready."""
    processes: list[subprocess.Popen[str]] = []

    def begin(program: str) -> int:
        code = f"import os, sys, time, threading\nfrom rlhf_ray.processes import stacks\n{program}"
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=log, text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process.pid

    yield begin
    for process in processes:
        process.kill()
        process.wait(10)


HANGS = """
def a_function_that_hangs():
    print("ready", flush=True)
    while True:
        pass
def another_thread():
    time.sleep(600)
stacks.offer("rlhf/demo/policy/0")
threading.Thread(target=another_thread, daemon=True).start()
a_function_that_hangs()
"""


def test_a_process_that_hangs_says_the_stacks_of_all_its_threads_and_goes_on(start: Start, tmp_path: Path) -> None:
    pid = start(HANGS)
    for _ in range(2):  # the second time it says what is so then, and nothing twice
        text = stacks.write(tmp_path / "stacks" / "step.txt", [pid, pid], "the title").read_text()
        assert text.startswith("the title\n") and f"process {pid}: rlhf/demo/policy/0" in text
        assert text.count("in a_function_that_hangs") == text.count("in another_thread") == 1
    assert psutil.Process(pid).is_running()


def test_a_stopped_process_is_said_to_be_stopped_with_the_last_lines_of_its_log(start: Start) -> None:
    pid = start("stacks.offer('the driver')\nprint('the last words', file=sys.stderr, flush=True)\n"
                "print('ready', flush=True)\ntime.sleep(600)")  # fmt: skip
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() - began < 10
    text = stacks.describe([pid])
    assert "the driver, stopped" in text and "it is stopped (as by SIGSTOP)" in text and "| the last words" in text
    os.kill(pid, signal.SIGCONT)
    assert "line" in stacks.describe([pid]) and psutil.Process(pid).is_running()


def test_a_process_that_offers_nothing_is_named_and_never_gets_the_signal_that_would_end_it(start: Start) -> None:
    pid = start("print('ready', flush=True)\ntime.sleep(600)")
    assert stacks.offer_of(pid) is None
    assert f"process {pid}: sleeping" in stacks.describe([pid])
    time.sleep(0.1)
    assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    os.kill(pid, stacks.SIGNAL)
    time.sleep(0.3)
    assert psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, "the signal does end one that does not handle it"


def test_a_mark_without_a_handler_is_no_offer(start: Start) -> None:
    """A program that a process of ours has started by ``exec`` may hold the descriptor, and no handler."""
    pid = start(f"os.memfd_create({stacks.MARK!r} + 'x')\nprint('ready', flush=True)\ntime.sleep(600)")
    assert stacks.offer_of(pid) is None


def test_processes_are_found_by_the_beginning_of_their_label_and_by_their_ancestor(start: Start) -> None:
    mine, other = (start(f"stacks.offer('rlhf/{name}/policy/0')\nprint('ready', flush=True)\ntime.sleep(600)")
                   for name in ("mine", "other"))  # fmt: skip
    assert [offer.pid for offer in stacks.labelled("rlhf/mine/")] == [mine]
    assert {mine, other} <= set(stacks.tree(os.getpid()))


def test_what_has_ended_is_left_out() -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(20)
    assert stacks.describe([ended.pid]) == "" and stacks.tree(ended.pid) == []
