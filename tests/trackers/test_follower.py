"""Trackers that hang, raise, exit or are missing hold neither the run nor each other; a kill of the run loses nothing.

The processes are real; the packages that misbehave stand in for wandb, mlflow and trackio. `make trackers` has the real ones.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rlhf_ray.config.sections.run import MonitoringConfig
from rlhf_ray.config.shown import WITHHELD
from rlhf_ray.config.trackers import target
from rlhf_ray.trackers import feeding, follower, starting
from rlhf_ray.trackers.follower import follow, variables
from rlhf_ray.trackers.starting import Followed
from rlhf_ray.trackers.state import State, StateFile, states
from tests.trackers.small_run import SmallRun, crashed_at_9
from tests.trackers.stores import of_jsonl

ROOT = Path(__file__).parents[2]
HANGS = "import time\nclass Settings:\n    def __init__(self, **_): pass\ndef init(**_): time.sleep(600)\n"
EXITS = "import os\nos._exit(7)\n"
RAISES = "raise SystemExit('I want to go home')\n"
OPENS = """
import os, time
from pathlib import Path
class Settings:
    def __init__(self, **_): pass
class Run:
    starting_step = 0
    def log(self, *_, **__):
        if os.environ.get("WANDB_MODE") == "offline":
            Path(os.environ["WANDB_DIR"], "hangs").touch()
            time.sleep(600)
        time.sleep(1)
        raise OSError("the server has gone")
    def finish(self, **_): pass
def init(**_): return Run()
"""
REFUSES_AT_THE_END = """
import select
from rlhf_ray.errors import RequestError
select.select([0], [], [])
raise RequestError("not today")
"""
FINDS = """
import json, os, sys
from pathlib import Path
text = Path(sys.argv[1], "config.yaml").read_text()
found = next(line for line in text.splitlines() if "canary" in line)
"""
TELLS = (
    FINDS
    + """
class Settings:
    def __init__(self, **_): pass
def init(config, **_):
    handed = {"variables": dict(os.environ), "config": config}
    Path(sys.argv[1], "handed.json").write_text(json.dumps(handed))
    raise OSError(found)
"""
)
PRINTS = (
    FINDS
    + """
sys.stderr.write(found + chr(10))
sys.stderr.flush()
os._exit(3)
"""
)
FEEDING = "rlhf_ray.trackers.feeding"
DATABASE = {"sqlalchemy": "", "alembic": ""}


def packages(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(content)


@pytest.fixture
def with_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put packages before all others in the processes that are started, and in this one."""

    def put(**contents: str) -> None:
        folder = tmp_path / "packages"
        packages(folder, **contents)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return put


def wait_until(done: Callable[[], bool], seconds: float = 120.0) -> None:
    by = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < by, "too late"
        time.sleep(0.1)


def sent(path: Path) -> list[int]:
    return [step for step, _ in of_jsonl(path)["loss/sft"]] if path.exists() else []


def feeding_processes() -> dict[str, psutil.Process]:
    """The processes of this one that feed trackers now, by tracker."""
    found = {}
    for child in psutil.Process().children():
        with suppress(psutil.Error):  # it has just ended
            words = child.cmdline()
            if FEEDING in words:
                found[words[4]] = child
    return found


@pytest.mark.early
def test_each_tracker_that_misbehaves_is_named_and_holds_no_other(
    tmp_path: Path, with_packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(wandb=HANGS, mlflow=EXITS, trackio=RAISES, **DATABASE)
    monkeypatch.setattr(follower, "LAST_TRIES", 2)
    small = crashed_at_9(tmp_path)
    names = [f"jsonl:{tmp_path}/lines", "wandb", "mlflow", "trackio"]
    trackers = [target(name) for name in names]

    def over(seconds: float) -> bool:
        """Once all others are at their end, the one that hangs is killed, as its deadline would."""
        time.sleep(seconds)
        running = feeding_processes()
        if running.keys() == {"wandb"} and sent(tmp_path / "lines"):
            running["wandb"].kill()
        return True

    lacking = follow(small.run, trackers, project="p", live=False, over=over, patient=True)
    assert sent(tmp_path / "lines") == [1, 2, 3, 4, 5, 6]
    told = {wanted.name: cause for wanted, cause in lacking.items()}
    assert told == {
        "wandb": "its process was killed by SIGKILL, as by the kernel when memory runs out",
        "mlflow": "its process ended with 7",
        "trackio": "SystemExit: I want to go home",
    }
    described = {state.tracker: state.describe() for state in states(small.run.path)}
    assert described["trackio"] == "nothing is sent yet; failed last: SystemExit: I want to go home"
    assert described[names[0]] == "run up to step 6"


def test_a_tracker_that_makes_no_progress_after_the_run_is_given_up(
    tmp_path: Path, with_packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(wandb=HANGS)
    monkeypatch.setattr(follower, "PATIENCE_S", 0.3)
    monkeypatch.setattr(follower, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(follower, "LAST_TRIES", 2)
    small = crashed_at_9(tmp_path)

    def over(seconds: float) -> bool:
        time.sleep(0.1)
        return True

    lacking = follow(small.run, [target("wandb")], project="p", live=False, over=over, patient=True)
    assert lacking == {target("wandb"): "its process was killed by SIGKILL, as by the kernel when memory runs out"}


def test_a_tracker_that_opens_and_then_fails_or_hangs_is_given_up_after_its_tries(
    tmp_path: Path, with_packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try writes the state once the tracker is open, and fails long after."""
    with_packages(wandb=OPENS)
    monkeypatch.setattr(follower, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(follower, "LAST_TRIES", 2)
    small, tries = crashed_at_9(tmp_path), [0]
    hangs, by = small.run.path / "hangs", time.monotonic() + 120

    def over(seconds: float) -> bool:
        """One that hangs is killed a few looks later, as its deadline would."""
        assert time.monotonic() < by and tries[0] <= 2, "it is tried again and again"
        time.sleep(0.2)
        if hangs.exists() and time.time() - hangs.stat().st_mtime > 1.0:
            hangs.unlink()
            tries[0] += 1
            feeding_processes()["wandb:offline"].kill()
        return True

    trackers = [target("wandb"), target("wandb:offline")]
    lacking = follow(small.run, trackers, project="p", live=False, over=over, patient=True)
    assert lacking == {
        trackers[0]: "OSError: the server has gone",
        trackers[1]: "its process was killed by SIGKILL, as by the kernel when memory runs out",
    }
    assert tries[0] == 2
    assert StateFile(small.run.path, trackers[1]).sent() == {"run": -1}, "it was open, and was sent nothing"


def test_a_step_counts_as_progress_once_and_a_state_that_is_written_again_never(tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    file = StateFile(small.run.path, target("wandb"))
    file.path.parent.mkdir()
    fed = follower.Fed(small.run, target("wandb"), [], patient=True)
    seen = []
    for now, (curve, step) in enumerate(
        [("run", -1), ("run", 3), ("run", -1), ("run", 3), ("run", 4), ("attempt-2", 1)]
    ):
        fed._failures = 1
        file.write(State("small", "abcd", "wandb", {"run": 4, curve: step} if curve != "run" else {"run": step}))
        os.utime(file.path, ns=(0, now + 1))
        fed._note_progress(float(now))
        seen.append((fed._failures, fed._progressed_at))
    assert seen == [(1, 0.0), (0, 1.0), (1, 1.0), (1, 3.0), (0, 4.0), (0, 5.0)]


def test_a_call_that_never_returns_ends_its_process_and_says_where(tmp_path: Path) -> None:
    code = "from rlhf_ray.trackers.feeding import _deadline\nimport time\nwith _deadline(0.2):\n    time.sleep(100)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("Timeout (") and "line 4" in done.stderr


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from rlhf_ray.config.sections.run import MonitoringConfig
from rlhf_ray.trackers.starting import Followed
from tests.trackers.small_run import SmallRun
small = SmallRun(Path({place!r}))
Followed(small.run, MonitoringConfig(trackers=["jsonl:{place}/lines"]))
small.log(1, 2, 3)
small.commit(2)
sys.stdout.write("logged")
sys.stdout.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_gets_what_it_has_committed_to_its_trackers_and_nobody_waits_for_that(
    tmp_path: Path, with_packages: Callable[..., None]
) -> None:
    code = DRIVER.format(root=str(ROOT), place=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == -9 and done.stdout == "logged"
    at_its_end = sent(tmp_path / "lines")
    wait_until(lambda: sent(tmp_path / "lines") == [1, 2])
    assert at_its_end == [], "its output was read to the end before the follower had even begun"
    wait_until(lambda: StateFile(tmp_path / "small", target(f"jsonl:{tmp_path}/lines")).own())


def test_a_run_that_ends_waits_for_a_tracker_that_hangs_for_no_time(
    tmp_path: Path, with_packages: Callable[..., None], project_log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(wandb=HANGS)
    monkeypatch.setattr(starting, "LONGEST_S", 300.0)  # of which it waits its share
    small = SmallRun(tmp_path)
    began = time.monotonic()
    followed = Followed(small.run, MonitoringConfig(trackers=["wandb"]))
    started = time.monotonic() - began
    small.log(1, 2)
    before = time.monotonic()
    followed.close()
    assert time.monotonic() - before < 30.0 and started < 30.0
    assert "rlhf-ray track" in project_log.getvalue() and "in the background" in project_log.getvalue()
    assert followed._process is not None
    followed._process.kill()
    followed._process.wait(30)


def test_a_run_says_that_its_trackers_lack_steps_where_the_follower_says_so_in_time(
    tmp_path: Path, with_packages: Callable[..., None], project_log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_packages(wandb=REFUSES_AT_THE_END)
    monkeypatch.setattr(starting, "LONGEST_S", 120.0)
    monkeypatch.setattr(starting, "SHARE", 1e9)
    small = SmallRun(tmp_path)
    Followed(small.run, MonitoringConfig(trackers=["wandb"])).close()
    log = small.run.path / "trackers/follower.log"
    assert "wandb has not got everything: not today" in log.read_text()
    assert (
        f"the process that feeds the trackers ended before they had everything (log: {log}). "
        f"To send what they lack: rlhf-ray track {small.run.path}"
    ) in project_log.getvalue()


def test_a_run_says_that_what_feeds_its_trackers_was_killed(tmp_path: Path, project_log: io.StringIO) -> None:
    small = SmallRun(tmp_path)
    followed = Followed(small.run, MonitoringConfig(trackers=[f"jsonl:{tmp_path}/lines"]))
    assert followed._process is not None
    followed._process.kill()
    wait_until(lambda: followed._process is not None and psutil.Process(followed._process.pid).status() == "zombie")
    followed.close()
    said = project_log.getvalue()
    assert "the process that feeds the trackers was killed by SIGKILL" in said and "log:" not in said
    assert f"To send what they lack: rlhf-ray track {small.run.path}" in said


def test_no_token_of_a_hub_is_in_what_a_tracker_is_handed_or_in_what_is_said_of_its_failure(
    tmp_path: Path, with_packages: Callable[..., None], monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    with_packages(wandb=TELLS, mlflow=PRINTS, **DATABASE)
    monkeypatch.setattr(follower, "LAST_TRIES", 1)
    for name in feeding.SECRET_OF_HUBS:
        monkeypatch.setenv(name, f"canary-{name}")
    small = crashed_at_9(
        tmp_path, f"data.cache={tmp_path}/" + "/".join(f"canary-{name}" for name in feeding.SECRET_OF_HUBS)
    )
    wandb, mlflow = target("wandb"), target("mlflow")

    def over(seconds: float) -> bool:
        time.sleep(0.1)
        return True

    lacking = follow(small.run, [wandb, mlflow], project="p", live=False, over=over, patient=True)
    handed = json.loads((small.run.path / "handed.json").read_text())
    assert handed["config"]["data.cache"] == WITHHELD
    assert not handed["variables"].keys() & set(feeding.SECRET_OF_HUBS) and "canary" not in repr(handed)
    assert lacking[wandb].startswith("OSError: ") and lacking[mlflow].startswith("its process ended with 3 (")
    assert all(cause.count(WITHHELD) == 3 and "canary" not in cause for cause in lacking.values())
    log = StateFile(small.run.path, wandb).log_path.read_text()
    assert "Traceback" in log and WITHHELD in log and "canary" not in log
    assert "canary" not in project_log.getvalue() + (small.run.path / "trackers/wandb.json").read_text()


def test_the_environment_of_a_tracker_is_that_of_the_user_and_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "key")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "7")
    given = variables(target("trackio:/d"))
    assert given["WANDB_API_KEY"] == "key"
    assert given["HF_HUB_OFFLINE"] == "1" and given["TRACKIO_DIR"] == "/d"
    assert given["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "7", "what the user has set stays"
