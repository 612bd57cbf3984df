"""The workers of an engine are known by rank, the first that died is named, and what they share keeps no name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.rollout.vllm_workers import WorkerProcesses, mapped_names, starting_workers


def processes(*exit_codes: int | None) -> Any:
    return [
        SimpleNamespace(exitcode=code, pid=100 + rank, is_alive=lambda code=code: code is None)
        for rank, code in enumerate(exit_codes)
    ]


@pytest.mark.parametrize(
    ("exit_codes", "said"),
    [
        ((), None),
        ((None, None), None),
        (
            (0, -9),
            "tensor-parallel worker 1 of 2 (process 101) died of SIGKILL: see whether the node ran out of memory",
        ),
        ((-15, None, 1, 0), "tensor-parallel worker 2 of 4 (process 102) ended with exit code 1"),
        ((None, -15), "tensor-parallel worker 1 of 2 (process 101) died of SIGTERM"),
        ((0, 0), "tensor-parallel worker 0 of 2 (process 100) ended with exit code 0"),
    ],
)
def test_the_worker_that_died_is_named_before_those_that_ended_with_it(
    exit_codes: tuple[int | None, ...], said: str | None
) -> None:
    assert WorkerProcesses(processes(*exit_codes)).death() == said


def test_workers_that_an_engine_starts_are_known_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::UserWarning")
    context = get_context("spawn")
    other = context.Process(target=time.sleep, args=(60,), name="VllmWorker-7")
    other.start()
    with starting_workers() as workers:
        sockets = Path(os.environ["VLLM_RPC_BASE_PATH"])
        assert sockets.is_dir() and sockets.parent == Path(tempfile.gettempdir())
        mine = [context.Process(target=time.sleep, args=(60,), name=f"VllmWorker-{rank}") for rank in (1, 0)]
        for process in mine:
            process.start()
    try:
        assert [process.name for process in workers.processes] == ["VllmWorker-0", "VllmWorker-1"]
        assert workers.death() is None
        assert not sockets.exists() and "VLLM_RPC_BASE_PATH" not in os.environ
        assert os.environ["PYTHONWARNINGS"] == "ignore::UserWarning", "what the user has set stands"
        assert mine[0].pid is not None
        os.kill(mine[0].pid, signal.SIGKILL)
        mine[0].join()
        assert str(workers.death()).startswith(f"tensor-parallel worker 1 of 2 (process {mine[0].pid}) died of SIGKILL")
    finally:
        for process in (other, *mine):
            process.kill()
            process.join()


SHARES = """
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from rlhf_ray.rollout.vllm_workers import WorkerProcesses, mapped_names

before = mapped_names("self")
memory, lock = SharedMemory(create=True, size=4096), get_context("spawn").Lock()
workers = WorkerProcesses()
workers.forget_names(before)
assert mapped_names("self") == before
assert sorted(name[:3] for name in workers._names) == ["psm", "sem"], workers._names
memory.buf[:2] = b"ok"
with lock:
    assert bytes(memory.buf[:2]) == b"ok"
RESTORE
memory.close()
memory.unlink()
print("ended")
"""


@pytest.mark.parametrize("restores", [True, False])
def test_what_is_shared_works_without_a_name_and_its_owner_finds_the_name_when_it_removes_it(restores: bool) -> None:
    code = SHARES.replace("RESTORE", "workers.restore_names()" if restores else "")
    before = mapped_names("self")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    if restores:
        assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
    else:
        assert "FileNotFoundError" in done.stderr, "names are missed no longer: they need not be made again"
    assert mapped_names("self") == before


def test_names_of_others_stay() -> None:
    mine = SharedMemory(create=True, size=4096)
    try:
        before = mapped_names("self")
        assert mine.name in before
        WorkerProcesses().forget_names(before)
        assert mapped_names("self") == before
    finally:
        mine.close()
        mine.unlink()
