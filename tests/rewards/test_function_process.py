"""The process of a user's function ends with the one that started it, and waiting for it to start is no stall."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from rlhf_ray.errors import ScoringError
from rlhf_ray.processes import progress
from rlhf_ray.rewards.function_process import FunctionProcess
from rlhf_ray.rewards.functions import Columns

ROOT = Path(__file__).parents[2]
FUNCTION = """
import os, re
from pathlib import Path
def hangs(responses, **_):
    Path("inside").write_text(str(os.getpid()))
    re.match("(a+)+b", "a" * 60)
"""
DRIVER = """
from rlhf_ray.rewards.function_process import FunctionProcess
FunctionProcess("functions.py:hangs", 600.0).run([{"responses": ["text"], "prompts": ["text"], "labels": [None]}])
"""


def test_a_driver_that_is_killed_leaves_no_process_of_a_function_that_hangs(tmp_path: Path) -> None:
    (tmp_path / "functions.py").write_text(FUNCTION)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    deadline, inside = time.monotonic() + 60, tmp_path / "inside"
    while not (inside.exists() and inside.read_text()):
        assert driver.poll() is None, driver.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    function = psutil.Process(int(inside.read_text()))
    watcher = function.children()
    driver.kill()
    driver.wait(10)
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in (function, *watcher)):
        assert time.monotonic() < deadline, "it outlives its driver"
        time.sleep(0.02)
    assert len(watcher) == 1


def test_a_function_that_is_imported_slowly_again_after_a_death_is_waited_for_by_the_watchdog_too(tmp_path):
    module = tmp_path / "slow.py"
    module.write_text("import os, time\ntime.sleep(1.5)\ndef dies(responses, **_): os._exit(3)\n")
    function = FunctionProcess(f"{module}:dies", 60.0)
    call = {"responses": ["text"], "prompts": ["text"], "labels": [None]}
    longest, ended = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        while not ended.wait(0.02):
            longest = max(longest, time.monotonic() - progress.made_at())

    progress.made()
    watcher = threading.Thread(target=watch)
    watcher.start()
    outcomes = function.run([call, call])  # the second one needs a new process
    ended.set()
    watcher.join()
    function.close()
    assert ["exit code 3" in str(outcome) for outcome in outcomes] == [True, True]
    assert longest < 1.0, "it counts as a driver that hangs"


def test_a_function_that_was_closed_is_not_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a call of another thread is inside: it fails, and its next try starts nothing that nobody would end."""
    (tmp_path / "functions.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    function, ended = FunctionProcess("functions.py:hangs", 600.0), list[object]()
    call: Columns = {"responses": ["text"], "prompts": ["text"], "labels": [None]}
    thread = threading.Thread(target=lambda: ended.extend(function.run([call])), daemon=True)
    thread.start()
    deadline, inside = time.monotonic() + 60, tmp_path / "inside"
    while not (inside.exists() and inside.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = {child.pid for child in psutil.Process().children()}
    function.close()
    thread.join(30)
    assert len(ended) == 1, "the call has failed, at once"
    with pytest.raises(ScoringError, match="after it was closed"):
        function.run([call])
    assert {child.pid for child in psutil.Process().children()} < children
