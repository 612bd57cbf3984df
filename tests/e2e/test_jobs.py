"""Jobs on a running cluster with token authentication, the way a user submits them.

One head serves all tests; it is a process group of its own, which is all that is ended afterwards.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8299"
START_TIMEOUT_S = 60.0
SMALL = (
    "policy.model.make.shape=llama-tiny",
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
        return subprocess.run(
            [sys.executable, "-m", *command],
            cwd=cwd,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def metrics(self) -> str:
        """What the node's metrics agents serve now."""
        found = json.loads((self.directory / "prom_metrics_service_discovery.json").read_text())
        texts = []
        for target in (target for group in found for target in group["targets"]):
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                texts.append(answer.read().decode())
        return "\n".join(texts)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Ray's sockets lie below this directory, and their paths may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    variables = _variables()
    process = subprocess.Popen(_start_command(directory), env=variables, cwd=directory, start_new_session=True)
    try:
        _wait_for(lambda: _answers(process), "the head does not answer")
        yield Head(variables, directory)
    finally:
        _end(process)
        shutil.rmtree(directory, ignore_errors=True)


def _variables() -> dict[str, str]:
    """The environment of head and clients, but for a session that stands around the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    authentication = os.environ.get("RAY_AUTH_MODE", "token")
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


def test_a_submitted_job_streams_its_log_and_ends_with_its_drivers_code(head, tmp_path):
    done = head.run("rlhf_ray", "submit", "demo-sft", *SMALL, "run.name=submitted", "--address", ADDRESS, cwd=tmp_path)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    Path("/tmp/build/metrics.txt").write_text(head.metrics())
