"""End-to-end tests run the real Ray, DeepSpeed and vLLM, as a user starts them: by command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from rlhf_ray.network import is_loopback

DEADLINE_S = 300
MARK = "RLHF_RAY_END_TO_END"
SHARED_MEMORY = "/dev/shm"


def command(*arguments: object) -> list[str]:
    """An rlhf-ray command line."""
    return [sys.executable, "-m", "rlhf_ray", *map(str, arguments)]


def run(*arguments: object, expect: int = 0) -> str:
    """Run a command to its end and return what it said; its exit code must be ``expect``."""
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=DEADLINE_S)
    output = done.stdout + done.stderr
    assert done.returncode == expect, f"{' '.join(map(str, arguments))} ended with {done.returncode}:\n{output[-6000:]}"
    return output


def wait_for_step(parent: subprocess.Popen[bytes], root: Path, step: int) -> None:
    """Wait until the run ``tiny`` below ``root`` has done ``step`` steps."""
    ledger, deadline = root / "tiny" / "ledger.jsonl", time.monotonic() + DEADLINE_S
    while not (ledger.exists() and ledger.read_text().count("\n") >= step):
        assert parent.poll() is None and time.monotonic() < deadline, f"the run ended before step {step}"
        time.sleep(0.002)


def kill_an_engine(parent: subprocess.Popen[bytes], root: Path, *, after_step: int) -> None:
    """SIGKILL to one of the two engines of a run."""
    wait_for_step(parent, root, after_step)
    engines = [one for one in psutil.Process(parent.pid).children(recursive=True) if "RolloutActor" in one.name()
               or "RolloutActor" in " ".join(one.cmdline())]  # fmt: skip
    assert len(engines) == 2
    engines[1].kill()


def marked_processes(mark: str) -> dict[int, str]:
    """Commands, by process id, of living processes that carry ``mark`` in their environment, at any depth."""
    commands = {}
    for process in psutil.process_iter(["pid", "cmdline"]):
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                commands[process.pid] = " ".join(process.info["cmdline"] or ())
    return commands


def command_lines(processes: Iterable[psutil.Process]) -> list[str]:
    """The command lines of those that live."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return lines


def listening_beyond_loopback(processes: Iterable[psutil.Process]) -> set[tuple[str, int]]:
    """Name and port of what these processes let other machines connect to."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            for one in process.net_connections(kind="inet"):
                if one.status == psutil.CONN_LISTEN and not is_loopback(one.laddr.ip):
                    found.add((process.name(), one.laddr.port))
    return found


def unheld_memory() -> set[str]:
    """Names in the machine's shared memory that no living process has mapped or open: nobody will remove them."""
    held = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            held |= {Path(one.path).name for one in process.memory_maps() if one.path.startswith(SHARED_MEMORY)}
            held |= {Path(one.path).name for one in process.open_files() if one.path.startswith(SHARED_MEMORY)}
    return set(os.listdir(SHARED_MEMORY)) - held


@pytest.fixture(scope="package", autouse=True)
def nothing_left() -> Iterator[None]:
    """After the last end-to-end test of a process no process that it started and no shared memory of theirs is left."""
    mark, memory = uuid.uuid4().hex, unheld_memory()
    os.environ[MARK] = mark
    yield
    left = marked_processes(mark)
    psutil.wait_procs([psutil.Process(pid) for pid in left if psutil.pid_exists(pid)], timeout=20)
    left = marked_processes(mark)
    del os.environ[MARK]
    assert not left, f"left running: {left}"
    left_over = unheld_memory() - memory
    assert not left_over, f"left in shared memory: {left_over}"


def metrics(run_directory: Path) -> Sequence[dict[str, float]]:
    """The steps of a run's metrics file."""
    from rlhf_ray.runs.directory import RunDirectory

    return [line for line in RunDirectory.open(run_directory).metrics.read() if "reward/learned" in line]
