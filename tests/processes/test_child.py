"""A child in a session of its own: signals reach it alone and once it listens, its outcome is known, and nothing of it is left.

Each test runs a real parent in a process of its own, over a real child.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rlhf_ray.processes import lifeline
from rlhf_ray.processes.child import SECONDS_BETWEEN_LOOKS, SECONDS_TO_BEGIN, Ended, Heard

ROOT = Path(__file__).parents[2]
BOTH = """
import os, signal, subprocess, sys, time
from pathlib import Path
from rlhf_ray.processes import interrupts, lifeline
lifeline.BEAT_EVERY_S = 0.05
"""
PARENT = f"""{BOTH}
import threading
from rlhf_ray.processes import child, stacks
child.SECONDS_TO_LEAVE, child.SECONDS_TO_END = 0.3, 0.3
text = Path("text").read_text() if Path("text").exists() else None
limits = dict(silent_s=1.0) if Path("silent").exists() else dict()
def keep(pids):
    with Path("asked").open("a") as asked:
        print(*pids, file=asked)
    if Path("hung").exists():
        time.sleep(60)
    return "FILE"
if Path("hung").exists():
    stacks.KEEP_S = 0.2
    child._kill = lambda started: threading.Timer(1.0, started.kill).start()
ended = child.run_child(["-c", Path("child").read_text()], text=text, on_stop="the child stops", keep_stacks=keep, **limits)
print(ended.code, ended.signal)
if ended.silence:
    print(ended.how)
"""
CHILD = f"""{BOTH}
def listen(handler):
    interrupts.listen(handler)
    lifeline.connect()
    Path("ready").touch()
def end(code):
    return lambda number, frame: (Path("got").write_text(str(number)), os._exit(code))
def end_a_moment_later(number, frame):
    time.sleep(0.3)
    Path("cluster").write_text("lives" if started.poll() is None else "died")
    end(75)(number, frame)
def start(*command):
    heeds_signals = lambda: signal.pthread_sigmask(signal.SIG_SETMASK, [])
    global started
    started = subprocess.Popen(command, preexec_fn=heeds_signals)
    Path("started").write_text(str(started.pid))
"""


def heed_hang_up() -> None:
    """Let SIGHUP do what it does in a terminal, also where the tests run under ``nohup``, which is passed on."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Parent:
    """A parent over a child that runs ``program``, in a directory of its own."""

    def __init__(self, directory: Path, program: str) -> None:
        self.directory = directory
        (directory / "child").write_text(CHILD + program)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            cwd=directory,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=heed_hang_up,
        )

    def wait_for(self, file: str) -> str:
        """What the child wrote there, once it is there."""
        deadline = time.monotonic() + 60
        while not (path := self.directory / file).exists() or (file != "ready" and not path.read_text()):
            assert time.monotonic() < deadline, f"{file} was not written"
            time.sleep(0.02)
        return path.read_text()

    def ended(self) -> tuple[str, str]:
        """What the parent says of the child's end, and what it said before."""
        try:
            out, message = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            pytest.fail("it did not end, or something that the child started did not")
        return out.strip(), message


@pytest.fixture
def parent(tmp_path: Path) -> Callable[[str], Parent]:
    return lambda program: Parent(tmp_path, program)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_to_the_whole_group_reaches_the_child_and_nothing_that_the_child_started(parent, number):
    """A cluster that dies of the signal would take the child's commit along."""
    cluster = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_DFL); time.sleep(60)"
    running = parent(f"start(sys.executable, '-c', {cluster!r})\nlisten(end_a_moment_later)\ntime.sleep(60)")
    running.wait_for("ready")
    watched = psutil.Process(int(running.wait_for("started")))
    os.killpg(running.process.pid, number)
    assert running.wait_for("cluster") == "lives"
    assert running.wait_for("got") == str(int(number))
    out, message = running.ended()
    assert out == f"75 {int(number)}"
    assert message.count(f"{number.name}: the child stops") == 1
    assert not watched.is_running() or watched.status() == psutil.STATUS_ZOMBIE


def test_a_signal_that_comes_before_the_child_listens_waits_for_it(parent):
    running = parent("Path('begun').write_text('yes')\ntime.sleep(1)\nlisten(end(75))\ntime.sleep(60)")
    running.wait_for("begun")
    running.process.send_signal(signal.SIGINT)
    out, message = running.ended()
    assert out == f"75 {int(signal.SIGINT)}"
    assert "Traceback" not in message


def test_a_child_whose_parent_is_killed_is_asked_to_stop(parent):
    running = parent("Path('pid').write_text(str(os.getpid()))\nlisten(end(75))\ntime.sleep(60)")
    running.wait_for("ready")
    running.process.kill()
    running.process.wait()
    assert running.wait_for("got") == str(int(signal.SIGTERM))


def test_a_process_of_the_child_is_not_a_child_of_the_parent(parent):
    running = parent("listen(end(75))\nPath('seen').write_text(str(lifeline.DESCRIPTOR in os.environ))\nsys.exit(0)")
    assert running.ended()[0] == "0 None"
    assert running.wait_for("seen") == "False"


@pytest.mark.parametrize(
    ("leaving", "code"),
    [
        ("with lifeline.leaving(None): os.kill(os.getpid(), signal.SIGABRT)", "0"),
        ("with lifeline.leaving(None): time.sleep(60)", "0"),
        ("with lifeline.leaving(ResumableStop('stopped')): os._exit(1)", "75"),
        ("with lifeline.leaving(KeyError('a bug')): os._exit(0)", "1"),
        ("with lifeline.leaving(None): pass\nsys.exit(3)", "3"),
        ("with lifeline.leaving(None): pass\nos.kill(os.getpid(), signal.SIGKILL)", "-9"),
    ],
)
def test_what_the_child_said_before_it_left_its_cluster_holds_until_it_has_left(parent, leaving, code):
    running = parent(f"from rlhf_ray.errors import ResumableStop\nlisten(end(75))\n{leaving}")
    out, message = running.ended()
    assert out == f"{code} None"
    assert ("the work had ended with" in message) == ("pass" not in leaving)


def test_the_error_of_a_child_that_does_not_get_away_from_its_cluster_is_told(parent):
    died = "GroupError('policy', 1, 'apply', 'its process on node2 died')"
    leaving = f"with lifeline.leaving({died}): os._exit(1)"
    out, message = parent(f"from rlhf_ray.errors import GroupError\nlisten(end(75))\n{leaving}").ended()
    assert out == "1 None" and "its process on node2 died" in message, message


def test_nothing_of_a_child_that_was_killed_is_left(parent):
    agent = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    running = parent(f"start(sys.executable, '-c', {agent!r})\nlisten(end(75))\nos.kill(os.getpid(), signal.SIGKILL)")
    agent_process = psutil.Process(int(running.wait_for("started")))
    assert running.ended()[0] == "-9 None"
    assert not agent_process.is_running() or agent_process.status() == psutil.STATUS_ZOMBIE


def test_a_child_gets_its_text(tmp_path):
    (tmp_path / "text").write_text("a config\n" * 20000)
    running = Parent(tmp_path, "listen(end(75))\nPath('got').write_text(sys.stdin.read()[-9:])")
    assert running.ended()[0] == "0 None"
    assert running.wait_for("got") == "a config\n"


@pytest.mark.parametrize(
    "hangs", ["os.kill(os.getpid(), signal.SIGSTOP)", "re.match('(a+)+b', 'a' * 60)"], ids=["stop", "hang"]
)
def test_a_child_that_gives_no_sign_of_life_is_killed_after_its_processes_were_asked_for_their_stacks(tmp_path, hangs):
    (tmp_path / "silent").touch()
    running = Parent(
        tmp_path, f"import re\nlisten(end(75))\nPath('pid').write_text(str(os.getpid()))\ntime.sleep(0.3)\n{hangs}"
    )
    out, message = running.ended()
    assert out == "-9 None\ngave no sign of life for 1 s (it was stopped, or hung), and was killed"
    assert running.wait_for("pid") in running.wait_for("asked").split()
    assert "was killed; stacks: FILE" in message


def test_a_disk_that_hangs_keeps_no_silent_child_alive_and_it_is_told_once(tmp_path):
    """Nor does the kernel end a process at once that waits for such a disk."""
    (tmp_path / "silent").touch()
    (tmp_path / "hung").touch()
    running = Parent(tmp_path, "listen(end(75))\nos.kill(os.getpid(), signal.SIGSTOP)")
    out, message = running.ended()
    assert out.startswith("-9 None\ngave no sign of life")
    assert len(running.wait_for("asked").splitlines()) == 1
    assert message.count("they could not be written within 0.2 s") == 1


def test_a_child_that_works_without_a_word_for_long_is_left_alone(tmp_path):
    """What waits or computes lets go of the interpreter now and then, and its heart beats beside it."""
    (tmp_path / "silent").touch()
    running = Parent(
        tmp_path, "listen(end(75))\nend = time.monotonic() + 2.0\nwhile time.monotonic() < end: pass\nsys.exit(3)"
    )
    assert running.ended()[0] == "3 None"


def test_a_child_has_room_to_say_its_outcome_after_a_parent_was_stopped_for_days(monkeypatch):
    """The line is full of beats then, as far as they may fill it."""
    monkeypatch.setattr(lifeline, "BEAT_EVERY_S", 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        beats = threading.Thread(target=lifeline._beat, args=(theirs,), daemon=True)
        beats.start()
        time.sleep(0.1)
        theirs.setblocking(False)
        for _ in range(3):
            assert theirs.send(lifeline.RESULT) == 1
        monkeypatch.setattr(lifeline, "BEAT_EVERY_S", 0.01)
        words = ours.recv(100_000)
        said = words.rstrip(lifeline.BEAT)  # a beat may come while this reads, which makes room
        assert said.count(lifeline.BEAT) > 10 and said.endswith(3 * lifeline.RESULT)
        ours.settimeout(5.0)
        assert ours.recv(1) == lifeline.BEAT, "it goes on once there is room"
        ours.close()
        beats.join(5.0)
        assert not beats.is_alive()


def test_silence_is_counted_while_this_process_listens_and_not_before_the_child_has_begun() -> None:
    heard = Heard(90.0)
    for _ in range(3):
        heard.wait(10_000.0)  # this process was stopped itself
    assert not heard.is_silent

    def listen(seconds: float) -> bool:
        for _ in range(round(seconds / SECONDS_BETWEEN_LOOKS)):
            heard.wait(SECONDS_BETWEEN_LOOKS)
        return heard.is_silent

    assert not listen(SECONDS_TO_BEGIN - 5) and listen(6), "importing may take long, and not for ever"
    heard.hear(lifeline.BEAT)
    assert not heard.is_silent and not listen(89) and listen(2)
    heard.hear(lifeline.BEAT)
    assert heard.outcome is None and not listen(60)
    heard.hear(lifeline.BEAT + b"\x4b" + lifeline.BEAT)
    assert heard.outcome == 75 and not heard.is_silent
    heard.hear(lifeline.LEFT)
    assert heard.outcome is None


def test_a_cluster_that_ends_a_child_with_a_result_costs_it_nothing_and_whatever_else_ends_it_is_told() -> None:
    heard = Heard(90.0)
    assert heard.ended(1) == 1 and heard.ended(-9) == -9
    heard.hear(lifeline.RESULT)
    assert heard.ended(1) == 0, "without a word, as by Ray"
    assert heard.ended(-9) == -9 and heard.ended(0) == 0
    heard.hear(b"\x01")
    assert heard.ended(0) == 1, "it said that something failed"
    heard.hear(lifeline.LEFT)
    assert heard.ended(1) == 1


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (1, "ended with 1"),
        (-6, "was killed by SIGABRT"),
        (-9, "was killed by SIGKILL, as by the kernel when memory runs out"),
    ],
)
def test_an_end_is_told_in_words(code, how):
    assert Ended(code).how == how
