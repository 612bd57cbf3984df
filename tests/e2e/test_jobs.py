"""Jobs on a running cluster, the way a user submits them.

One head with token authentication serves most tests, and one without serves the rest after it, PPO on the whole stack among
them; each is a process group of its own, which is all that is ended afterwards.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.monitoring.registry import PHASES
from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import DEADLINE_S, metrics
from tests.e2e.cutting_proxy import CuttingProxy

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8299"
GCS = "127.0.0.1:6399"
START_TIMEOUT_S = 120.0
WHOLE_STACK = Path(__file__).with_name("ppo_tiny.yaml")
WRONG = ("data.world=null", "data.path=./gone.jsonl", "policy.model.make.tokenizer_from=world")
SMALL = (
    "demo-sft",
    "policy.model.make.shape=llama-tiny",
    "policy.ranks=1",
    "data.world.demonstrations=64",
    "batch.sequences_per_update=32",
    "epochs=2",
    "evaluation.every_steps=0",
)


@dataclass(frozen=True)
class Head:
    """A running head and how to talk to it."""

    variables: dict[str, str]
    directory: Path

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A command of this environment as a client of the head."""
        process = self.start(*command, cwd=cwd)
        out, message = process.communicate(timeout=DEADLINE_S)
        return subprocess.CompletedProcess(command, process.returncode, out, message)

    def start(self, *command: str, cwd: Path) -> subprocess.Popen[str]:
        """The same, not waited for."""
        line = [sys.executable, "-m", *command]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, cwd=cwd, env=self.variables, stdout=pipe, stderr=pipe, text=True)

    def job(self, run: str) -> dict[str, Any]:
        """What the submitted job of this run says about itself."""
        (job,) = [job for job in self._ask("GET", "") if (job["metadata"] or {}).get("run") == run]
        return dict(job)

    def stop(self, run: str) -> None:
        """As ``ray job stop``."""
        self._ask("POST", f"{self.job(run)['submission_id']}/stop")

    def _ask(self, method: str, path: str) -> Any:
        token = self.variables.get("RAY_AUTH_TOKEN")
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(f"{ADDRESS}/api/jobs/{path}", headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def metrics(self) -> str:
        """What the node's metrics agents serve now."""
        discovered = json.loads((self.directory / "prom_metrics_service_discovery.json").read_text())
        texts = []
        for target in (target for group in discovered for target in group["targets"]):
            with (
                contextlib.suppress(OSError),  # some processes of Ray are named there before they listen
                urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer,
            ):
                texts.append(answer.read().decode())
        return "\n".join(texts)


class Watch:
    """Reads the metrics agents again and again while something runs, and keeps every line of this project."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=30)

    def _read(self) -> None:
        while not self._over.wait(0.5):
            self.seen |= {line for line in self.head.metrics().splitlines() if line.startswith("ray_rlhf_")}


@pytest.fixture(scope="module", params=["token", "disabled"])
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    """A running head, which asks for tokens or does not (Ray's ``RAY_AUTH_MODE``)."""
    # Ray's sockets lie below this directory, and their paths may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    variables = _variables(request.param)
    process = subprocess.Popen(_start_command(directory), env=variables, cwd=directory, start_new_session=True)
    try:
        _wait_for(lambda: _answers(process), "the head does not answer")
        yield Head(variables, directory)
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)


def _variables(authentication: str) -> dict[str, str]:
    """The environment of head and clients, but for a session that stands around the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")])),
        "RAY_AUTH_MODE": authentication,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "500",
        "OMP_NUM_THREADS": "1",
    } | ({"RAY_AUTH_TOKEN": secrets.token_hex(32)} if authentication == "token" else {})  # fmt: skip


def _start_command(directory: Path) -> list[str]:
    ports = ["--port=6399", "--dashboard-port=8299", "--dashboard-host=127.0.0.1", "--ray-client-server-port=6398"]
    ports += ["--dashboard-agent-listen-port=8298"]
    sizes = ["--num-cpus=2", f"--object-store-memory={256 * 2**20}", f"--temp-dir={directory}"]
    ray = str(Path(sys.executable).parent / "ray")
    return [ray, "start", "--head", "--block", "--disable-usage-stats", *ports, *sizes]


def _answers(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the head ended"
    try:
        with urllib.request.urlopen(f"{ADDRESS}/api/version", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code == 401
    except OSError:
        return False


def _wait_for(holds: Callable[[], bool], otherwise: str, seconds: float = START_TIMEOUT_S) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.3)


def _end(process: subprocess.Popen[bytes]) -> None:
    started = [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    for one in started:
        try:
            one.wait(timeout=10)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            one.kill()


with_tokens = pytest.mark.parametrize("head", ["token"], indirect=True)
without_tokens = pytest.mark.parametrize("head", ["disabled"], indirect=True)


@with_tokens
def test_a_submitted_job_streams_its_log_and_ends_with_its_drivers_code(head, tmp_path):
    """Through a proxy that ends every connection to the log after two seconds, with and without a word."""
    with Watch(head) as watch, CuttingProxy(ADDRESS, seconds=2.0).running() as proxy:
        done = head.run("rlhf_ray", "submit", *SMALL, "run.name=submitted", "--address", proxy.address, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"close", "abort"} <= set(proxy.cuts)
    for line in (
        "Running entrypoint for job",
        *(f"{step}/4  loss/sft" for step in range(1, 5)),
        "rlhf-ray: exit code 0",
    ):
        assert done.stderr.count(line) == 1, done.stderr
    assert (tmp_path / "runs/submitted/final/model.safetensors").is_file()
    assert head.job("submitted")["metadata"] == {
        "run": "submitted",
        "kind": "sft",
        "job_name": "submitted",
    }
    assert [line for line in watch.seen if line.startswith("ray_rlhf_loss_sft{") and 'run="submitted"' in line]
    phases = {line.split('phase="')[1].split('"')[0] for line in watch.seen if line.startswith("ray_rlhf_phase{")}
    assert phases == set(PHASES)


def test_a_request_that_only_the_driver_finds_wrong_ends_with_2(head, tmp_path):
    done = head.run("rlhf_ray", "submit", *SMALL, *WRONG, "run.name=wrong", "--address", ADDRESS, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/gone.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr


@with_tokens
def test_ray_job_submit_runs_the_same_command(head, tmp_path):
    entry = ["python", "-m", "rlhf_ray", "train", "sft", *SMALL, "run.name=raw", f"run.root={tmp_path}"]
    done = head.run("ray.scripts.scripts", "job", "submit", "--address", ADDRESS, "--", *entry, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4/4  loss/sft" in done.stdout + done.stderr
    assert (tmp_path / "raw/final/model.safetensors").is_file()


@without_tokens
def test_ray_job_submit_trains_ppo_until_it_pleases_the_reward_model(head, tmp_path):
    """Two ranks at ZeRO-2 and long enough to learn: the reward rises well beyond what its noise explains."""
    options = ["policy.engine.zero=2", "run.deterministic=false", "steps=30", "checkpoint.every_steps=0"]
    options += ["batch.prompts_per_step=64", "batch.sequences_per_update=32", "evaluation.prompts=1"]
    entry = ["python", "-m", "rlhf_ray", "train", "ppo", str(WHOLE_STACK), f"run.root={tmp_path}", *options]
    done = head.run("ray.scripts.scripts", "job", "submit", "--address", ADDRESS, "--", *entry, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "30/30  reward/learned" in done.stdout + done.stderr
    steps = metrics(tmp_path / "tiny")
    first, last = ([step["reward/learned"] for step in part] for part in (steps[:5], steps[-5:]))
    noise = steps[0]["reward/std"] / (5 * 64) ** 0.5
    assert sum(last) / 5 - sum(first) / 5 > 4 * noise
    assert max(step["rollout/log_prob_difference"] for step in steps) <= 1e-4


@with_tokens
def test_a_stopped_job_commits_and_can_be_resumed(head, tmp_path):
    job = "rlhf_ray", "submit", *SMALL, "epochs=300", "run.name=ended", "--address", ADDRESS
    process = head.start(*job, cwd=tmp_path)
    run = RunDirectory(tmp_path / "runs/ended")
    _wait_for(lambda: len(run.metrics.read()) >= 3, "no step was made")
    head.stop("ended")
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert "was stopped and ended with 75" in message
    commit = run.checkpoints.steps()[-1]
    assert commit == run.metrics.read()[-1]["step"]
    _shorten(run, commit)
    done = head.run("rlhf_ray", "submit", "--resume", "runs/ended", "--address", ADDRESS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert run.metrics.read()[-1]["step"] == commit + 2 and run.final.is_dir()


@with_tokens
def test_a_stopped_run_commits_and_goes_on(head, tmp_path):
    """Over a joined cluster, whose connection takes SIGTERM for itself, and which the run remembers when it goes on.

    Every step is committed, so the stop meets a checkpoint that is due.
    """
    long = (*SMALL, "epochs=300", "run.name=stopped", "checkpoint.every_steps=1")
    joining = Head({**head.variables, "RAY_ADDRESS": GCS}, head.directory)
    process = joining.start("rlhf_ray", "train", "sft", *long, cwd=tmp_path)
    run = RunDirectory(tmp_path / "runs/stopped")
    _wait_for(lambda: len(run.metrics.read()) >= 3, "no step was made")
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    commit = run.checkpoints.steps()[-1]
    assert commit == run.metrics.read()[-1]["step"] < 600
    assert f"rlhf-ray resume {run.path}" in message
    _shorten(run, commit)
    done = head.run("rlhf_ray", "resume", "stopped", cwd=run.path.parent)
    assert done.returncode == 0, done.stderr
    assert "joined the Ray cluster at" in done.stderr and "Started a local Ray" not in done.stderr
    assert [line["step"] for line in run.metrics.read() if "loss/sft" in line] == list(range(1, commit + 3))
    assert run.final.is_dir()


def _shorten(run, commit):
    """Let a run of 300 epochs end two steps after its commit."""
    run.config_path.write_text(run.config_path.read_text().replace("epochs: 300.0", f"epochs: {commit / 2 + 1}"))


OTHER_VERSION = (
    "import ray; ray.__version__ = '2.0.0'; from rlhf_ray.launch.driver import main; raise SystemExit(main([]))"
)


@with_tokens
def test_a_cluster_that_cannot_be_joined_is_a_sentence_and_leaves_no_run(head, tmp_path):
    """Without the token, with another one, and with another Ray; each from a home without a token of its own."""
    bare = {**head.variables, "RAY_ADDRESS": GCS, "HOME": str(tmp_path)}
    without = {name: value for name, value in bare.items() if name != "RAY_AUTH_TOKEN"}
    wrong = {**bare, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    train = ("rlhf_ray", "train", "sft", *SMALL, f"run.root={tmp_path}/runs")
    running = {
        "asks for a token, and this is not the one": Head(without, head.directory).start(
            *train, "run.name=a", cwd=tmp_path
        ),
        "if it asks for a token, set RAY_AUTH_MODE": Head(wrong, head.directory).start(
            *train, "run.name=b", cwd=tmp_path
        ),
    }
    config = dump_config(load_config(SMALL[0], [*SMALL[1:], f"run.root={tmp_path}/runs", "run.name=other"]))
    pipe = subprocess.PIPE
    running["runs other versions than this process"] = subprocess.Popen(
        [sys.executable, "-c", OTHER_VERSION], env=bare, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=tmp_path
    )
    ended = {
        sentence: (process.communicate(config if process.stdin else None, timeout=DEADLINE_S)[1], process.returncode)
        for sentence, process in running.items()
    }
    for sentence, (message, code) in ended.items():
        assert code == 2, message
        assert f"the Ray cluster at {GCS}" in message and sentence in message and "Traceback" not in message
    assert not list((tmp_path / "runs").iterdir())


@with_tokens
def test_a_client_without_the_token_is_told_what_to_set(head, tmp_path):
    stranger = Head({**head.variables, "RAY_AUTH_TOKEN": secrets.token_hex(32)}, head.directory)
    done = stranger.run("rlhf_ray", "submit", *SMALL, "run.name=stranger", "--address", ADDRESS, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr and "Traceback" not in done.stderr
