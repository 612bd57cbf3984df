"""``python -m tests.faults.cluster_deaths [WORD ...]``: how real runs end whose raylet or GCS is killed.

A small SFT run starts Ray itself, or joins a cluster that was started here by ``ray start`` in a folder of its own; then the
raylet or the GCS is killed. Always true: the end, or the restart, is told within ``WITHIN_S``; with a restart to spend a second
driver does the rest with a Ray of its own, and one whose cluster is gone says so; a run that had committed ``final/`` ends with
0 and is never restarted; nothing that the run started is left a moment later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.network import LOOPBACK, free_port
from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import command
from tests.faults.endings import SMALL
from tests.faults.named import chosen

WITHIN_S, START_S, LEFT_AFTER_S = 120.0, 200.0, 10.0
RAYLET, GCS = "raylet/raylet", "gcs_server"
STEPS_FIRST = 3


@dataclass(frozen=True)
class Death:
    """Whose, of which run, and how the run must end."""

    victim: str
    joins: bool = False
    """Whether the run joins a cluster."""
    restarts: int = 0
    final: bool = False
    """Whether the process dies when ``final/`` is there, before the last evaluation."""
    code: int = 1
    sentences: Sequence[str] = ("the driver ended with 1: the last commit is",)
    attempts: int = 1


RESTARTED = ("restart 1 of 1", "going on after step")
DEATHS = {
    "raylet, own Ray": Death(RAYLET),
    "GCS, own Ray": Death(GCS),
    "raylet, own Ray, a restart": Death(RAYLET, restarts=1, code=0, sentences=RESTARTED, attempts=2),
    "GCS, own Ray, a restart": Death(GCS, restarts=1, code=0, sentences=RESTARTED, attempts=2),
    "raylet, a cluster": Death(RAYLET, joins=True),
    "GCS, a cluster": Death(GCS, joins=True),
    "GCS, a cluster, a restart": Death(
        GCS, joins=True, restarts=1, code=2, sentences=("restart 1 of 1", "no Ray cluster answers at")
    ),
    "raylet, own Ray, final": Death(RAYLET, restarts=1, final=True, code=0, sentences=("could not be left in order",)),
    "GCS, own Ray, final": Death(GCS, restarts=1, final=True, code=0, sentences=("could not be left in order",)),
    "raylet, a cluster, final": Death(
        RAYLET, joins=True, restarts=1, final=True, code=0, sentences=("could not be left in order",)
    ),
}


def troubles(death: Death, root: Path) -> tuple[float, list[str]]:
    """The seconds until the first sentence was said, and what is not as it must be."""
    log, run = root / "log", RunDirectory(root / "run")
    epochs = 40 if death.restarts or death.final else 5000
    with _cluster(root) if death.joins else contextlib.nullcontext() as head, log.open("wb") as stream:
        words = command(
            "train", "sft", "demo-sft", *SMALL, f"epochs={epochs}", f"run.root={root}", "run.name=run",
            f"run.max_restarts={death.restarts}", *([f"cluster.address={LOOPBACK}:{head.port}"] if head else []),
        )  # fmt: skip
        parent = psutil.Popen(words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=_variables())
        seen: set[psutil.Process] = set()
        try:
            ready = run.final.is_dir if death.final else lambda: len(run.metrics.read()) >= STEPS_FIRST
            if not _await(ready, START_S, parent, pause_s=0.001 if death.final else 0.05):
                return float("inf"), ["the run did not come so far"]
            seen |= set(parent.children(recursive=True))
            victims = seen | (set(head.process.children(recursive=True)) if head else set())
            for victim in victims:
                with contextlib.suppress(psutil.Error):
                    if death.victim in " ".join(victim.cmdline()):
                        victim.kill()
            began = time.monotonic()
            _await(lambda: death.sentences[0] in log.read_text(errors="replace"), WITHIN_S, parent)
            seconds = time.monotonic() - began
            with contextlib.suppress(psutil.TimeoutExpired):
                parent.wait(START_S)
            return seconds, _judge(death, run, log.read_text(errors="replace"), parent.poll(), seconds, seen)
        finally:
            for process in [*seen, parent, *(parent.children(recursive=True) if parent.is_running() else [])]:
                with contextlib.suppress(psutil.Error):
                    process.kill()


def _judge(
    death: Death, run: RunDirectory, log: str, code: int | None, seconds: float, seen: set[psutil.Process]
) -> list[str]:
    found = [f"did not say {sentence!r}" for sentence in death.sentences if sentence not in log]
    if code != death.code:
        found.append(f"ended with {code}, not {death.code}")
    if seconds >= WITHIN_S:
        found.append(f"said nothing within {WITHIN_S:g} s")
    if not run.checkpoints.steps():
        found.append("has no commit")
    attempts = len(run.attempts.read())
    if attempts != death.attempts:
        found.append(f"was begun {attempts} times, not {death.attempts}")
    if death.code == 0 and not run.final.is_dir():
        found.append("has no final/")
    deadline = time.monotonic() + LEFT_AFTER_S
    while (left := [one for one in seen if _lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found + ([f"left running: {[' '.join(one.cmdline())[:60] for one in left]}"] if left else [])


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _await(happened: Callable[[], bool], limit_s: float, parent: psutil.Popen, *, pause_s: float = 0.05) -> bool:
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline or parent.poll() is not None:
            return happened()
        time.sleep(pause_s)
    return True


@dataclass(frozen=True)
class Head:
    """A cluster on this machine."""

    process: psutil.Popen
    port: int


@contextmanager
def _cluster(root: Path) -> Iterator[Head]:
    """A cluster of its own, in a folder whose sockets have short names."""
    folder, port = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), free_port(LOOPBACK)
    words = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", f"--port={port}",
        f"--node-ip-address={LOOPBACK}", "--num-cpus=2", f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder}",
        "--include-dashboard=false", f"--dashboard-agent-listen-port={free_port(LOOPBACK)}",
    ]  # fmt: skip
    with (root / "head").open("wb") as log:
        process = psutil.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_variables())
    try:
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in (root / "head").read_text(errors="replace"):
            assert process.poll() is None and time.monotonic() < deadline, "the cluster did not start"
            time.sleep(0.1)
        yield Head(process, port)
    finally:
        started = [process, *(process.children(recursive=True) if process.is_running() else [])]
        process.terminate()
        _, left = psutil.wait_procs(started, timeout=10)
        for one in left:
            with contextlib.suppress(psutil.Error):
                one.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _variables() -> dict[str, str]:
    """The environment of run and cluster, but for a session of Ray that stands around them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"RAY_AUTH_MODE": "disabled"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the deaths whose names hold one of the words, or all; the exit code is 0 if every run ended as it must."""
    wrong = 0
    for name, death in chosen("tests.faults.cluster_deaths", DEATHS, arguments).items():
        root = Path(tempfile.mkdtemp(prefix="rlhf-ray-deaths-"))
        seconds, found = troubles(death, root)
        print(
            f"{name:28} {seconds:6.1f} s  {'; '.join(found) or 'as it must'}{f'  ({root})' if found else ''}",
            flush=True,
        )
        wrong += bool(found)
        if not found:
            shutil.rmtree(root)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
