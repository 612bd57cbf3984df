"""``status --follow`` shows what the files of a run say as they grow, and ends with the run or on Ctrl-C; ``samples`` shows
what was kept.
"""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.cli.runs import following
from rlhf_ray.cli.runs.following import read_state
from rlhf_ray.errors import IntegrityError
from rlhf_ray.monitoring.report.summary import Answer, Sample, Summary
from rlhf_ray.monitoring.terminal.drawing import Pen
from rlhf_ray.monitoring.terminal.live import live_view
from rlhf_ray.processes import spans
from rlhf_ray.runs.alarms.heartbeat import Heartbeat
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.jsonl import JsonLines

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [
    {"prompt": "why?", "response": "because \x1b[2J", "finished": True, "score": 0.5,
     "tokens": {"text": ["because", " \x1b[2J"], "log_probs": [-0.5, -1.25], "advantages": [1.0, None]}},
    {"prompt": "why?", "response": "no", "finished": False, "score": -1.0},
]  # fmt: skip


def add(run: RunDirectory, step: int) -> None:
    run.metrics.append({"step": step, "timestamp": time.time(), "reward/learned": step / 10, "time/step": 2.0})


def begin_line(run: RunDirectory) -> None:
    with open(run.metrics.path, "ab") as file:
        file.write(b'{"step": 4, "timest')


def end(run: RunDirectory) -> None:
    run.write_summary(Summary())
    run.release()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of ten steps after the first, owned by this process."""
    run = RunDirectory.create(tmp_path / "small", "kind: ppo\nrun: {name: small}\nsteps: 10\n")
    add(run, 1)
    return run


def test_a_state_is_what_the_files_say(run: RunDirectory) -> None:
    run.engines.write([{"state": "dead", "weight_version": None, "restarts": 1, "cause": "killed\nat 5"}])
    state = read_state(run, now=time.time() + 1)
    assert (state.name, state.kind, state.state, state.step, state.total) == ("small", "ppo", "running", 1, 10)
    assert state.health == [("engine 0", "dead, no weights, 1 restarts: killed")] and state.committed is None
    assert state.left_s == pytest.approx(17, abs=0.9) and state.took_s == pytest.approx(1, abs=0.9)
    run.release()
    stopped = read_state(run, now=time.time())
    assert stopped.state == "stopped" and "rlhf-ray resume" in stopped.facts["to do"] and not stopped.health


def test_without_a_terminal_a_log_gets_each_step_once_until_the_run_has_finished(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = iter(
        [lambda: None, *(partial(add, run, step) for step in (2, 3)), partial(begin_line, run), partial(end, run)]
    )
    clock = SimpleNamespace(time=time.time, strftime=time.strftime, sleep=lambda seconds: next(changes)())
    monkeypatch.setattr(following, "time", clock)
    assert main(["status", str(run.path), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    told = [line[9:] for line in lines]
    assert told[0] == "small: running" and told[-1] == "small: finished"
    assert [re.sub(r"  \d+ s left", "", line) for line in told[1:-1]] == [
        f"{step}/10  reward/learned {step / 10:.3g}" for step in range(1, 4)
    ]


class Clock:
    """Time that passes only where somebody sleeps."""

    def __init__(self, at: float, on_sleep: Callable[[float], object]) -> None:
        self.began = self.now = at
        self.on_sleep = on_sleep

    def time(self) -> float:
        return self.now

    def strftime(self, form: str) -> str:
        return time.strftime(form, time.localtime(self.now))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.passed < 3600, "it does not end"
        self.on_sleep(self.passed)

    @property
    def passed(self) -> float:
        return self.now - self.began


def beat(run: RunDirectory, at: float) -> None:
    run.heartbeat.write(Heartbeat(at, "update", at, 1.0, {"run/started": at}, {}))


def given_up(run: RunDirectory, clock: Clock, capsys: pytest.CaptureFixture[str]) -> str:
    """Follow a run until nobody goes on with it; returns the last line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "time", clock)
        assert main(["status", str(run.path), "--follow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("nobody goes on" in line for line in lines) == 1
    return lines[-1][9:]


def test_in_a_pipe_following_ends_where_a_run_crashed_and_nobody_goes_on_with_it(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(passed: float) -> None:
        if passed == 150:
            run.release()

    clock = Clock(time.time(), crash)
    assert given_up(run, clock, capsys) == (
        f"small: stopped after step 1, and nobody goes on with it; go on with: rlhf-ray resume {run.path}"
    )
    given_up_after = clock.passed - 150
    assert following.GIVEN_UP_S <= given_up_after <= following.GIVEN_UP_S + following.SECONDS_BETWEEN_LINES


def test_following_goes_on_with_a_run_that_is_started_again_within_two_minutes(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash_and_resume(passed: float) -> None:
        if passed in (20, 160):
            run.release()
        elif passed in (120, 260):
            run._own()
        elif passed == 300:
            add(run, 2)
            end(run)

    clock = Clock(time.time(), crash_and_resume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "time", clock)
        assert main(["status", str(run.path), "--follow"]) == 0
    told = capsys.readouterr().out
    assert clock.passed == 300 and "small: finished" in told and "nobody goes on" not in told


def test_following_does_not_end_while_a_driver_on_another_machine_says_that_it_lives(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose lock is not seen here, as on a file system without locks."""
    run.release()
    clock = Clock(time.time(), lambda passed: passed <= 200 and beat(run, clock.now))
    assert "nobody goes on with it; go on with: " in given_up(run, clock, capsys)
    assert 200 + following.GIVEN_UP_S < clock.passed <= 200 + following.GIVEN_UP_S + 20


def test_a_damaged_file_costs_a_picture_and_is_named_where_it_stays(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    good, read = run.metrics.path.read_bytes(), following.Reader(run)
    assert read() is not None
    for _ in range(2):  # each time from the beginning
        run.metrics.path.write_bytes(b"nonsense\n" + good)
        assert [read() for _ in range(following.TRIES)] == [None] * following.TRIES
        run.metrics.path.write_bytes(good)
        assert read() is not None
    run.metrics.path.write_bytes(b"nonsense\n" + good)
    with pytest.raises(IntegrityError):
        for _ in range(following.TRIES + 1):
            read()
    assert main(["status", str(run.path), "--follow"]) != 0
    assert "metrics.jsonl:1 is damaged" in capsys.readouterr().err


def test_on_a_terminal_a_picture_is_painted_and_ctrl_c_ends_it_well(run: RunDirectory) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "rlhf_ray", "status", str(run.path), "--follow"]
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "COLUMNS": "80",
        "LINES": "24",
        "PYTHONUTF8": "1",
    }
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=subprocess.PIPE, env=variables)
    os.close(follower)
    screen = b""

    def until(word: bytes) -> None:
        nonlocal screen
        deadline = time.monotonic() + 180
        while word not in screen and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.5)[0]:
                screen += os.read(leader, 65536)
        assert word in screen, screen

    try:
        until(b"step 1 of 10")
        add(run, 2)
        until(b"step 2 of 10")
        child.send_signal(signal.SIGINT)
        until(b"\x1b[?1049l")  # back from the alternate screen
        until(b"step 2 of 10")
        assert child.wait(60) == 0 and child.stderr is not None and child.stderr.read() == b""
        assert b"\x1b[?1049h" in screen and "━".encode() in screen
    finally:
        child.kill()
        child.wait(20)
        os.close(leader)


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["samples", *words]) == 0
    return capsys.readouterr().out


def test_samples_are_shown_side_by_side_and_one_token_by_token(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run.write_samples(3, [{"prompt": "old", "response": "older", "score": 0.0}])
    run.write_samples(12, ROWS)
    text = shown(capsys, str(run.path))
    assert (
        text.startswith("step 12\nwhy?\n1: score 0.5") and "because \\x1b[2J" in text and "2: score -1, cut off" in text
    )
    assert "older" in shown(capsys, str(run.path), "--step", "3")
    tokens = shown(capsys, str(run.path), "--tokens", "1").splitlines()
    assert tokens[2].split() == ["token", "log-prob", "advantage"]
    assert [line.split() for line in tokens[3:]] == [["1", "because", "-0.500", "1.000"], ["2", "\\x1b[2J", "-1.250"]]
    assert "nothing is kept of the tokens" in shown(capsys, str(run.path), "--tokens", "2")


def test_the_starting_policy_and_the_trained_one_are_compared(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = (Answer("start", "so so", {"reward": 0.25}), Answer("ppo", "better", {"reward": 1.5}))
    run.write_summary(Summary(samples=(Sample("why?", answers),)))
    text = shown(capsys, str(run.path), "--compare")
    assert (
        text.splitlines()[0] == "why?"
        and "start, reward 0.25" in text
        and "ppo, reward 1.5" in text
        and "better" in text
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "has no samples: monitoring.samples_per_log keeps some"),
        (("--step", "4"), "has no samples of step 4: there are those of steps 3 to 12"),
        (("--step", "12", "--tokens", "3"), "step 12 of"),
        (("--tokens", "0"), "has 2 samples: there is no number 0"),
        (("--compare",), "has no answers to compare"),
    ],
)
def test_samples_that_are_not_there_are_named(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    if words:
        run.write_samples(3, ROWS)
        run.write_samples(12, ROWS)
    assert main(["samples", str(run.path), *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    ['{"prompt": 1}', '{"prompt": "p", "response": "r", "score": "x"}',
     '{"prompt": "p", "response": "r", "score": 1, "tokens": [1]}',
     '{"prompt": "p", "response": "r", "score": 1, "tokens": {"text": ["a"], "log_probs": ["b"]}}'],
)  # fmt: skip
def test_samples_that_somebody_edited_are_named_by_their_line(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    run.write_samples(3, [])
    (run.samples / "step-000003.jsonl").write_text(line + "\n")
    assert main(["samples", str(run.path)]) != 0
    assert "step-000003.jsonl:1 is damaged" in capsys.readouterr().err


def test_a_picture_reads_what_is_new_alone_and_shows_what_the_ranks_did(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed, parse = list[Path](), JsonLines._parse
    monkeypatch.setattr(JsonLines, "_parse", lambda self, *line: parsed.append(self.path) or parse(self, *line))
    run.heartbeat.write(Heartbeat(time.time(), "update", time.time(), None, {"run/started": time.time()}))
    read = following.Reader(run)
    assert read() is not None and parsed.count(run.metrics.path) == 1, (
        "for the status, the alarms and the curves together"
    )
    with spans.recording(run.spans):
        for step in (2, 3):
            add(run, step)
            began = time.monotonic()
            with spans.span("update"):
                time.sleep(0.01)
            spans.end_step(step, began, time.monotonic())
            state = read()
            assert state is not None and state.step == step and parsed.count(run.metrics.path) == step
            assert state.lanes is not None and state.lanes.step.number == step
    assert "by rank" in "\n".join(live_view(state, Pen(80))) and "driver" in state.lanes.lanes
    monkeypatch.setattr("rlhf_ray.monitoring.spans.latest.SpanFiles.read", lambda self: 1 / 0)
    state = read()
    assert state is not None and state.lanes is None and state.step == 3, "spans that cannot be read cost no picture"
