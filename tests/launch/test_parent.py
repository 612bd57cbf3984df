"""The parent owns the driver's life: signals go down, exit codes come up, restarts are counted.

Each test runs a real parent in a process of its own, over a driver that does as it is told (``stub_driver.py``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.errors import Interrupted, ResumableStop
from rlhf_ray.launch import parent as launch_parent
from rlhf_ray.launch.parent import Watch, exit_code
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.child import Ended
from rlhf_ray.runs.directory import RunDirectory

ROOT = Path(__file__).parents[2]
PARENT = """
import os, sys
from rlhf_ray.config.loading import load_config
from rlhf_ray.launch.parent import resume_run, start_run
from rlhf_ray.processes import lifeline
lifeline.BEAT_EVERY_S = float(os.environ["BEAT"])
if sys.argv[1] == "resume":
    code = resume_run(sys.argv[2], sys.argv[3:], ["data.path"] if sys.argv[3:] else [], driver="stub_driver")
else:
    code = start_run(load_config("demo-sft", ["run.name=stub", f"run.max_restarts={sys.argv[2]}",
                                                   f"run.stall_floor_s={os.environ['FLOOR']}"]), driver="stub_driver")
assert not {"torch", "ray"} & set(sys.modules)
sys.exit(code)
"""


class Parent:
    """Starts a parent over a driver with this script, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.floor_s, self.beat_every_s = 60.0, lifeline.BEAT_EVERY_S

    def start(self, script: list[str], *arguments: str) -> subprocess.Popen[str]:
        (self.directory / "script").write_text("\n".join(script))
        path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        variables = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        return subprocess.Popen(
            [sys.executable, "-c", PARENT, *arguments],
            cwd=self.directory,
            env=variables | {"PYTHONPATH": path, "FLOOR": str(self.floor_s), "BEAT": str(self.beat_every_s)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: list[str], *arguments: str) -> tuple[int, str]:
        """Its exit code and what it said."""
        process = self.start(script, *arguments)
        _, message = process.communicate(timeout=60)
        return process.returncode, message

    def stop(self, process: subprocess.Popen[str], number: signal.Signals) -> int:
        """Send a signal to the parent alone once the driver waits for one."""
        deadline = time.monotonic() + 60
        while not (self.directory / "ready").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
        return process.returncode

    @property
    def starts(self) -> list[str]:
        """How each driver was started."""
        return (self.directory / "starts").read_text().splitlines()


@pytest.fixture
def parent(tmp_path: Path) -> Parent:
    return Parent(tmp_path)


@pytest.mark.parametrize("code", [0, 2, 3, 75])
def test_a_code_of_the_drivers_own_reaches_the_caller_and_is_final(parent, code):
    assert parent.run([str(code)], "new", "3")[0] == code
    assert parent.starts == ["new"]


def test_a_driver_that_died_is_started_again_from_the_last_commit(parent):
    code, message = parent.run(["begin kill", "1", "0"], "new", "2")
    assert code == 0
    assert parent.starts == ["new", f"--resume {parent.directory}/runs/stub", f"--resume {parent.directory}/runs/stub"]
    assert (
        "was killed by SIGKILL, as by the kernel when memory runs out: restart 1 of 2" in message
        and "ended with 1: restart 2 of 2" in message
    )


def test_a_signal_between_two_drivers_stops_the_restarts_and_the_run_can_go_on(tmp_path, monkeypatch):
    def interrupted(*arguments: object) -> Ended:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(launch_parent, "run_driver", interrupted)
    with pytest.raises((Interrupted, ResumableStop)) as caught:
        launch_parent._restart_until_final(Ended(1), Watch(tmp_path), 1, "stub_driver", "")
    assert caught.type is Interrupted, "no run was begun"
    (tmp_path / "config.yaml").touch()
    with pytest.raises((Interrupted, ResumableStop)) as caught:
        launch_parent._restart_until_final(Ended(1), Watch(tmp_path), 1, "stub_driver", "")
    assert caught.type is ResumableStop and f"rlhf-ray resume {tmp_path}" in str(caught.value)


def test_a_driver_that_is_stopped_is_killed_and_started_again_and_the_run_keeps_its_stacks_and_the_incident(parent):
    parent.floor_s, parent.beat_every_s = 1.0, 0.1
    code, message = parent.run(["begin stop", "0"], "new", "1")
    assert code == 0 and parent.starts == ["new", f"--resume {parent.directory}/runs/stub"]
    assert (
        "the driver gave no sign of life for 1.5 s (it was stopped, or hung), and was killed: restart 1 of 1" in message
    )
    run = RunDirectory(parent.directory / "runs" / "stub")
    (stacks,) = run.stacks.iterdir()
    assert str(stacks) in message and "it is stopped (as by SIGSTOP)" in stacks.read_text()
    (incident,) = run.incidents.read()
    assert (incident.role, incident.fault, incident.action) == ("driver", "stalled", "restarted")


def test_a_driver_is_not_killed_between_two_signs_of_life_however_small_the_floor_is():
    assert Watch(Path(), 0.1).silent_s >= 3 * lifeline.BEAT_EVERY_S
    assert Watch(Path(), 60.0).silent_s == 90.0


def test_restarts_are_counted(parent):
    assert parent.run(["begin kill", "kill", "kill", "0"], "new", "2")[0] == 1
    assert len(parent.starts) == 3


def test_without_restarts_a_dead_driver_is_a_failure(parent):
    assert parent.run(["begin kill", "0"], "new", "0")[0] == 1
    assert len(parent.starts) == 1


@pytest.mark.parametrize(
    ("code", "begun", "commits", "sentence"),
    [
        (
            -9,
            True,
            [2, 4],
            "was killed by SIGKILL, as by the kernel when memory runs out: the last commit is that of step 4; go on",
        ),
        (1, True, [4], "ended with 1: the last commit is that of step 4; go on with: rlhf-ray resume"),
        (-6, True, [], "was killed by SIGABRT: nothing was committed yet; go on with: rlhf-ray resume"),
        (-9, False, [], "memory runs out: no run was begun"),
    ],
)
def test_the_last_sentence_says_how_the_driver_ended_and_how_to_go_on(
    tmp_path, project_log, code, begun, commits, sentence
):
    if begun:
        (tmp_path / "config.yaml").touch()
    for step in commits:
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:06d}/manifest.json").touch()
    assert launch_parent._restart_until_final(Ended(code), Watch(tmp_path), 0, "stub_driver", "") == 1
    said = project_log.getvalue()
    assert "the driver " in said and sentence in said
    assert (f"rlhf-ray resume {tmp_path}" in said) == begun


def test_a_driver_that_died_before_it_began_a_run_begins_one(parent):
    assert parent.run(["kill", "begin 0"], "new", "1")[0] == 0
    assert parent.starts == ["new", "new"]


def test_what_a_resumed_run_changes_reaches_every_driver_of_it(parent):
    parent.run(["begin 75"], "new", "1")
    assert parent.run(["kill", "0"], "resume", "runs/stub", "epochs=2", "checkpoint.keep=4")[0] == 0
    resumed = f"--resume {parent.directory}/runs/stub epochs=2 checkpoint.keep=4 --accept data.path"
    assert parent.starts == ["new", resumed, resumed]


def test_a_resumed_run_is_restarted_as_its_own_config_says(parent):
    parent.run(["begin 75"], "new", "1")
    assert parent.run(["kill", "0"], "resume", "runs/stub")[0] == 0
    assert parent.starts == ["new", f"--resume {parent.directory}/runs/stub", f"--resume {parent.directory}/runs/stub"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_reaches_the_driver_and_its_answer_the_caller(parent, number):
    process = parent.start(["begin wait", "0"], "new", "3")
    assert parent.stop(process, number) == 75
    assert (parent.directory / "signal").read_text() == str(int(number))
    assert parent.starts == ["new"]


def test_a_driver_that_dies_of_the_request_to_stop_is_not_started_again(parent):
    process = parent.start(["begin deaf", "0"], "new", "3")
    assert parent.stop(process, signal.SIGTERM) == 75
    assert parent.starts == ["new"]


@pytest.mark.parametrize("begun", [True, False])
def test_a_driver_stopped_before_its_first_step_says_how_to_go_on_where_a_run_was_begun(tmp_path, project_log, begun):
    if begun:
        (tmp_path / "config.yaml").touch()
    ended = Ended(Interrupted(signal.SIGTERM).exit_code, signal.SIGTERM)
    code = launch_parent._restart_until_final(ended, Watch(tmp_path), 3, "stub_driver", "")
    said = project_log.getvalue()
    if begun:
        assert code == 75 and f"nothing was committed yet; go on with: rlhf-ray resume {tmp_path}\n" in said
    else:
        assert code == 128 + signal.SIGTERM and said == ""


def test_a_driver_stopped_before_it_began_a_run_leaves_nothing_to_resume(parent):
    process = parent.start(["deaf", "0"], "new", "3")
    assert parent.stop(process, signal.SIGTERM) == 128 + signal.SIGTERM
    assert parent.starts == ["new"]


def test_a_failure_after_the_request_to_stop_stays_a_failure(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert exit_code(Ended(1, signal.SIGTERM), tmp_path) == 1
    assert exit_code(Ended(-15, signal.SIGTERM), tmp_path) == 75
    assert exit_code(Ended(-15), tmp_path) == 1
