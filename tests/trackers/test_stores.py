"""With the real packages: after a crash at step 9 with the last commit at 6 every tracker shows one curve, each step once.

Each is read from its own store. A package that is missing skips its tests; `make trackers` makes an environment with all.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trackers import stores
from tests.trackers.small_run import BEGAN, EXPECTED, SmallRun, crashed_at_9, ended_at_12
from tests.trackers.test_feeding import assert_one_curve

ROOT = Path(__file__).parents[2]
CANARY = "canary-5f2c19"
READERS: dict[str, Callable[[Path], stores.Points]] = {
    "wandb:offline": lambda root: stores.of_wandb(root / "small/wandb"),
    "mlflow": lambda root: stores.of_mlflow(f"sqlite:///{root}/mlflow.db"),
    "trackio": lambda root: stores.of_trackio(root / "trackio"),
}


def needs(name: str) -> pytest.MarkDecorator:
    package = name.partition(":")[0]
    is_there = importlib.util.find_spec(package) is not None
    if not is_there and os.environ.get("TRACKERS_MUST_BE_THERE"):
        raise ImportError(f"{package} is missing")
    return pytest.mark.skipif(not is_there, reason=f"{package} is not installed: make trackers")


TRACKERS = [pytest.param(name, marks=needs(name)) for name in READERS]


def feeding(small: SmallRun, name: str, root: Path) -> subprocess.Popen[bytes]:
    """The process that feeds a tracker, as the follower starts it; its standard input stays open."""
    from rlhf_ray.config.trackers import target
    from rlhf_ray.trackers.follower import variables

    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.trackers.feeding", str(small.run.path), name, "--project", "rlhf-ray"],
        stdin=subprocess.PIPE,
        env={**variables(target(name)), "TRACKIO_DIR": str(root / "trackio"), "PYTHONPATH": str(ROOT)},
        cwd=root,
    )


def feed(small: SmallRun, name: str, root: Path) -> None:
    process = feeding(small, name, root)
    process.communicate(timeout=400)
    assert process.returncode == 0


@pytest.mark.parametrize("name", TRACKERS)
def test_a_resumed_run_is_one_curve(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    small = crashed_at_9(
        tmp_path, "data.template_variables={note: " + CANARY + "-2}", f"data.cache={tmp_path}/{CANARY}-3"
    )
    feed(small, name, tmp_path)
    assert [step for step, _ in READERS[name](tmp_path)["loss/sft"]] == [1, 2, 3, 4, 5, 6]
    ended_at_12(small)
    feed(small, name, tmp_path)
    feed(small, name, tmp_path)
    assert_one_curve(READERS[name](tmp_path))
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("config.yaml", "inputs.json")]
    assert len(kept) > 5
    assert [path for path in kept if CANARY.encode() in path.read_bytes()] == [], "no secret is handed over"


@pytest.mark.parametrize("name", TRACKERS)
def test_a_kill_at_any_time_loses_and_repeats_nothing(name: str, tmp_path: Path) -> None:
    """A run under way is fed, and the process is killed again and again, with the processes that a library has started."""
    small, step = SmallRun(tmp_path), 0
    for kill in range(6):
        process = feeding(small, name, tmp_path)
        by = time.monotonic() + 120
        known = len(EXPECTED) * kill
        while time.monotonic() < by:
            step += 1
            small.log(step)
            small.commit(step)
            time.sleep(0.05 if kill % 2 else 0.15)
            from rlhf_ray.config.trackers import target
            from rlhf_ray.trackers.state import StateFile

            state = StateFile(small.run.path, target(name)).last()
            if state is not None and state.sent.get("run", -1) > known and step > known + 12:
                break
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    small.finish()
    feed(small, name, tmp_path)
    loss = READERS[name](tmp_path)["loss/sft"]
    assert [at for at, _ in loss] == list(range(1, step + 1))


@needs("mlflow")
def test_mlflow_has_the_times_of_the_run_and_its_end(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    small = crashed_at_9(tmp_path)
    feed(small, "mlflow", tmp_path)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("rlhf-ray")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and run.data.params["run.name"] == "small"
    assert client.get_metric_history(run.info.run_id, "loss/sft")[0].timestamp == round(1000 * (BEGAN + 2))
    ended_at_12(small)
    feed(small, "mlflow", tmp_path)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("name", TRACKERS)
def test_every_registered_metric_is_taken(name: str, tmp_path: Path) -> None:
    from rlhf_ray.monitoring.registry import REGISTRY

    names = [metric.name.replace("*", "a b.c") for metric in REGISTRY if metric.name != "step"]
    small = SmallRun(tmp_path)
    for step in (1, 2):
        small.run.metrics.append({"step": step, "timestamp": BEGAN + step} | dict.fromkeys(names, 0.5 * step))
    small.commit(2)
    small.finish()
    feed(small, name, tmp_path)
    points = READERS[name](tmp_path)
    assert {metric: points.get(metric) for metric in names} == {metric: [(1, 0.5), (2, 1.0)] for metric in names}
