"""What hangs has its stacks written first, and then only what does not answer is ended; what has answered is left alone."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.monitoring.stalls import CallBook, Durations, Limits, OpenCall
from rlhf_ray.processes import lifeline, progress, stacks
from rlhf_ray.processes.child import Heard
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import watchdog
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trainers.watchdog import Watchdog

MARK = f"session_of_a_test_{os.getpid()}/01000000"


class Ranks:
    """Ranks of which the test says who answers what."""

    def __init__(self, role: str, *, dead: Sequence[int] = ()) -> None:
        self.role, self.book, self.dead = role, CallBook(role), dead
        self.ended: dict[int, str] = {}
        self.missing: tuple[int, ...] = (0, 1)
        self.on_health: Callable[[], None] = lambda: None

    def open_calls(self) -> list[OpenCall]:
        return self.book.open(lambda handles: self.missing, time.monotonic())

    def silent(self, ranks: Sequence[int], timeout_s: float) -> dict[int, bool]:
        self.on_health()
        return {rank: rank in self.dead for rank in ranks}

    def stacks_elsewhere(self, timeout_s: float) -> str:
        return f"== {self.role} on another node"

    def end_stalled(self, causes: dict[int, str]) -> None:
        self.ended |= causes


class Run:
    """A run of which one phase has lasted for long, with what the watchdog needs of it."""

    def __init__(self, path: Path, groups: Sequence[Ranks] | None) -> None:
        self.directory = RunDirectory.create(path / "run", "kind: sft\n")
        self.clock = PhaseClock()
        self.step = 3
        cluster = SimpleNamespace(start_timeout_s=9.0, call_timeout_s=9.0)
        config: Any = SimpleNamespace(run=SimpleNamespace(name="demo", stall_floor_s=0.2), cluster=cluster)
        self.watchdog = Watchdog(self.directory, config, self, SimpleNamespace(watched=groups, mark=MARK))

    def hang(self, seconds: float = 0.3) -> None:
        """Enter a phase that is usually short, and wait in it."""
        with self.clock.phase("update"):
            pass
        self.phase = self.clock.phase("update")
        self.phase.__enter__()
        time.sleep(seconds)

    def stacks(self) -> list[str]:
        return [path.read_text() for path in sorted(self.directory.stacks.glob("*.txt"))]


def begin(ranks: Ranks, method: str = "accumulate") -> Any:
    """A call of a kind that usually takes a moment, which hangs."""
    ranks.book.end(ranks.book.begin(method, [], time.monotonic()), time.monotonic())
    return ranks.book.begin(method, [], time.monotonic())


def test_ranks_that_do_not_say_how_they_are_are_ended_and_not_the_peers_that_wait_for_them(tmp_path: Path) -> None:
    policy, critic = Ranks("policy", dead=[1]), Ranks("critic")
    run = Run(tmp_path, [policy, critic])
    held = begin(policy)
    run.hang()
    run.watchdog.look()
    assert policy.ended.keys() == {1} and not critic.ended and held
    assert (
        "it did not answer accumulate for 0 s" in policy.ended[1]
        and "it is stopped, or out of reach" in policy.ended[1]
    )
    (text,) = run.stacks()
    assert "'update' has taken 0 s after step 3" in text and "policy.accumulate: no answer of rank 0, 1" in text
    assert f"process {os.getpid()}" in text and "== policy on another node" in text
    run.watchdog.look()
    assert len(run.stacks()) == 1, "the stacks of a phase are written once"


def test_where_all_say_how_they_are_all_are_ended_that_did_not_answer_the_call(tmp_path: Path) -> None:
    policy = Ranks("policy")
    run, held = Run(tmp_path, [policy]), begin(policy)
    run.hang()
    policy.missing = (1,)
    run.watchdog.look()
    assert policy.ended.keys() == {1} and held
    assert "it hangs; if it was only slow, raise run.stall_floor_s" in policy.ended[1]


def test_a_call_that_is_answered_while_ranks_are_asked_is_left_alone(tmp_path: Path) -> None:
    policy = Ranks("policy")
    run, held = Run(tmp_path, [policy]), begin(policy)
    policy.on_health = lambda: setattr(policy, "missing", ())
    run.hang()
    run.watchdog.look()
    assert not policy.ended and held


def test_stacks_that_cannot_be_written_keep_nothing_from_being_ended(tmp_path: Path, project_log: io.StringIO) -> None:
    policy = Ranks("policy", dead=[0])
    run, held = Run(tmp_path, [policy]), begin(policy)
    run.directory.stacks.write_text("in the way")
    run.hang()
    run.watchdog.look()
    assert policy.ended.keys() == {0} and "they could not be written" in project_log.getvalue() and held


def test_groups_in_this_process_are_looked_at_and_nothing_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("it was ended"))
    monkeypatch.setattr(lifeline, "is_child", lambda: True)
    stacks.offer("this test")
    run = Run(tmp_path, None)
    run.hang()
    run.watchdog.look()
    assert "in this process, so that nothing can be ended" in project_log.getvalue()
    assert "in test_groups_in_this_process_are_looked_at_and_nothing_is_ended" in run.stacks()[0]


class Ended(Exception):
    """What the end of the driver is in these tests."""


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watchdog.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(lifeline, "is_child", lambda: True)


@pytest.mark.usefixtures("exits")
def test_a_driver_that_hangs_by_itself_writes_its_stacks_and_an_incident_and_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    run.hang()
    with pytest.raises(Ended, match="1"):
        run.watchdog.look()
    (incident,) = run.directory.incidents.read()
    assert (incident.role, incident.phase, incident.fault, incident.action) == (
        "driver",
        "update",
        "stalled",
        "stopped",
    )
    assert (incident.step, incident.lost_steps) == (3, 3) and str(run.directory.stacks) in incident.cause
    assert len(run.stacks()) == 2


@pytest.mark.usefixtures("exits")
def test_a_driver_that_is_ended_after_its_result_has_failed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last evaluation or its report is missing."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(lifeline, "_line", theirs)
    lifeline.result_is_there()
    run = Run(tmp_path, [])
    run.hang()
    with ours, theirs, pytest.raises(Ended, match="1"):
        try:
            run.watchdog.look()
        finally:
            heard = Heard(60.0)
            heard.hear(ours.recv(100))
            assert heard.ended(1) == 1 and heard.outcome is None


@pytest.mark.usefixtures("exits")
def test_a_driver_that_gets_ahead_does_not_end(tmp_path: Path) -> None:
    run = Run(tmp_path, [])
    run.hang()
    progress.made()
    run.watchdog.look()
    assert not run.directory.incidents.read()


@pytest.mark.usefixtures("exits")
def test_a_driver_that_nobody_would_start_again_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(lifeline, "is_child", lambda: False)
    run = Run(tmp_path, [])
    run.hang()
    run.watchdog.look()
    run.watchdog.look()
    assert project_log.getvalue().count("nobody would start this process again") == 1


@pytest.mark.usefixtures("exits")
def test_one_warning_of_the_watchdog_does_not_silence_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(lifeline, "is_child", lambda: False)
    run, looks = Run(tmp_path, []), []
    look = run.watchdog.look

    def fails_twice() -> None:
        looks.append(0)
        if len(looks) <= 2:
            raise ConnectionError("no answer of the head")
        look()

    monkeypatch.setattr(run.watchdog, "look", fails_twice)
    run.hang()
    with run.watchdog:
        began = time.monotonic()
        while len(looks) < 5:
            assert time.monotonic() - began < 60
            time.sleep(0.01)
    run.watchdog._thread.join(10)
    said = project_log.getvalue()
    assert said.count("could not look at the run") == 1 and said.count("nobody would start this process again") == 1


def pause(run: Run, call: Any, seconds: float) -> None:
    """Have all that began so far have begun so much earlier, and no look have come since."""
    run.watchdog._looked_at = time.monotonic() - seconds
    earlier(run, call, seconds)


def earlier(run: Run, call: Any, seconds: float) -> None:
    """Have all that began so far have begun so much earlier."""
    call.began_at -= seconds
    run.clock._open = tuple((name, began - seconds) for name, began in run.clock._open)


def test_after_a_stop_of_the_machine_nothing_is_judged_until_there_was_time_to_answer(tmp_path: Path) -> None:
    policy = Ranks("policy", dead=[0])
    run, held = Run(tmp_path, [policy]), begin(policy)
    run.hang()
    pause(run, held, 60.0)
    run.watchdog.look()
    assert not policy.ended
    time.sleep(0.25)
    run.watchdog.look()
    assert policy.ended.keys() == {0}


def test_the_time_in_which_the_machine_was_paused_counts_for_nothing(tmp_path: Path) -> None:
    policy = Ranks("policy", dead=[0])
    run, held = Run(tmp_path, [policy]), begin(policy)
    policy.book._durations, run.clock.durations = Durations(), Durations()
    policy.book._durations.add("accumulate", 20.0)
    run.clock.durations.add("update", 20.0)  # so that 120 s are late
    run.phase = run.clock.phase("update")
    run.phase.__enter__()
    pause(run, held, 3600.0)
    run.watchdog.look()
    time.sleep(0.3)
    run.watchdog.look()
    assert not policy.ended and not run.stacks()
    earlier(run, held, 120.0)
    run.watchdog.look()
    assert policy.ended.keys() == {0}


def test_a_disk_that_hangs_keeps_nothing_from_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(stacks, "KEEP_S", 0.1)
    answers = threading.Event()
    monkeypatch.setattr(watchdog, "write_stacks", lambda *_: answers.wait(60.0))
    policy = Ranks("policy", dead=[0])
    run, held = Run(tmp_path, [policy]), begin(policy)
    run.hang()
    began = time.monotonic()
    run.watchdog.look()
    answers.set()
    assert policy.ended.keys() == {0} and time.monotonic() - began < 30 and held
    assert "they could not be written within 0.1 s" in project_log.getvalue()


def test_the_self_check_and_the_first_evaluation_say_nothing_of_how_long_an_evaluation_takes() -> None:
    clock = PhaseClock()
    trainer: Any = SimpleNamespace(
        journal=SimpleNamespace(phase=clock.phase, keep_checks=lambda _: None), progress=SimpleNamespace(step=0),
        checked_prompts=list, experience=SimpleNamespace(gather=lambda *_, **__: ([], {}, [])),
        sampler=SimpleNamespace(generate=lambda *_: [], fleet=SimpleNamespace(refuse_empty=lambda _: None)),
        self_check=SimpleNamespace(run=lambda *_: []), evaluation=SimpleNamespace(measure_start=lambda resumed: None),
    )  # fmt: skip
    PpoTrainer.check(trainer)
    PpoTrainer.measure_start(trainer)
    assert clock.durations.median("evaluation") is None and "time/evaluation" in clock.take()


def test_a_stopped_rank_of_this_job_is_ended_and_no_other_process(tmp_path: Path, project_log: io.StringIO) -> None:
    """Also where nothing is overdue, as while the first models are loaded."""
    program = (
        "import sys, time; from rlhf_ray.processes import stacks; stacks.offer(sys.argv[1]); print(1, flush=True); "
        "time.sleep(600)"
    )
    ours, later = f"rlhf/demo/policy/0 {MARK}", f"rlhf/demo/policy/1 {MARK}"
    labels = [ours, later, f"{ours}0", f"rlhf/other/policy/0 {MARK}"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", program, label], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()}
        )
        for label in labels
    ]
    try:
        assert all(one.stdout is not None and one.stdout.readline() for one in ranks)
        run = Run(tmp_path, [])
        run.watchdog.limits = Limits(0.4, 9.0)
        for number in (0, 2, 3):
            ranks[number].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        while ranks[0].poll() is None:
            assert time.monotonic() - began < 60
            run.watchdog.look()
            time.sleep(0.05)
        assert time.monotonic() - began >= 0.4 and [one.poll() for one in ranks] == [-9, None, None, None]
        assert (
            "rlhf/demo/policy/0 (process" in project_log.getvalue() and "is stopped (as by SIGSTOP)" in run.stacks()[0]
        )
    finally:
        for one in ranks:
            one.kill()
            one.wait(10)


def test_the_thread_looks_until_the_block_ends(tmp_path: Path) -> None:
    policy = Ranks("policy", dead=[0])
    run, held = Run(tmp_path, [policy]), begin(policy)
    with run.watchdog:
        run.hang(0.1)
        began = time.monotonic()
        while not policy.ended:
            assert time.monotonic() - began < 60 and held
            time.sleep(0.01)
    run.watchdog._thread.join(10)
    assert not run.watchdog._thread.is_alive()


def test_only_the_newest_files_of_stacks_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "KEPT_FILES", 2)
    run = Run(tmp_path, [])
    for step in range(4):
        watchdog.write_stacks(run.directory, step, "between phases", [], "title")
        time.sleep(0.01)
    assert [path.name[:22] for path in sorted(run.directory.stacks.iterdir())] == [
        f"00000{step}-between-phases-"[:22] for step in (2, 3)
    ]
