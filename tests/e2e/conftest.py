"""End-to-end tests run the real Ray, DeepSpeed and vLLM, as a user starts them: by command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

DEADLINE_S = 300
OURS = ("rlhf_ray", "ray::", "raylet", "gcs_server")


def command(*arguments: object) -> list[str]:
    """An rlhf-ray command line."""
    return [sys.executable, "-m", "rlhf_ray", *map(str, arguments)]


def run(*arguments: object, expect: int = 0) -> str:
    """Run a command to its end and return what it said; its exit code must be ``expect``."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=DEADLINE_S)
    told = done.stdout + done.stderr
    assert done.returncode == expect, f"{' '.join(map(str, arguments))} ended with {done.returncode}:\n{told[-6000:]}"
    return told


def our_processes() -> dict[int, str]:
    """Processes of this project and of Ray on this machine, by id."""
    found = {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if process.info["pid"] != os.getpid() and any(word in line for word in OURS) and "pytest" not in line:
            found[process.info["pid"]] = line
    return found


def shared_memory() -> set[str]:
    """What lies in the machine's shared memory."""
    return set(os.listdir("/dev/shm"))


@pytest.fixture(scope="package", autouse=True)
def nothing_left() -> Iterator[None]:
    """After the last end-to-end test no process and no shared memory of theirs is left."""
    processes, memory = set(our_processes()), shared_memory()
    yield
    left = {pid: line for pid, line in our_processes().items() if pid not in processes}
    psutil.wait_procs([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)], timeout=20)
    left = {pid: line for pid, line in left.items() if psutil.pid_exists(pid)}
    assert not left, f"left running: {left}"
    assert not shared_memory() - memory, f"left in shared memory: {shared_memory() - memory}"


def metrics(run_directory: Path) -> Sequence[dict[str, float]]:
    """The steps of a run's metrics file."""
    from rlhf_ray.runs.directory import RunDirectory

    return [line for line in RunDirectory.open(run_directory).metrics.read() if "reward/learned" in line]
