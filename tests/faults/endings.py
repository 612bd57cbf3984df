"""``python -m tests.faults.endings [NAME ...]``: how real runs on Ray end that meet a signal or lose a process.

A small SFT run, with the Ray that it starts, meets each of the events below. Always true: the exit code is the documented one,
what was trained is committed where it can be, one sentence says what happened, the end comes soon, and nothing that the run
started is left a moment later.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import command
from tests.faults.killing import DRIVER
from tests.faults.named import chosen

SMALL = (
    "policy.model.make.shape=llama-tiny",
    "policy.ranks=1",
    "data.world.demonstrations=64",
    "batch.sequences_per_update=32",
    "evaluation.every_steps=0",
    "checkpoint.every_steps=2",
)
STEPS_FIRST = 3
START_S = 120.0
LEFT_AFTER_S = 5.0


class Run:
    """A run under way, in a process group of its own."""

    def __init__(self, root: Path, epochs: int) -> None:
        self.directory = root / "run"
        self.log = root / "log"
        with self.log.open("wb") as log:
            line = command("train", "sft", "demo-sft", *SMALL, f"epochs={epochs}", f"run.root={root}", "run.name=run")
            self.parent = psutil.Popen(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.seen: set[psutil.Process] = set()

    def processes(self) -> list[psutil.Process]:
        """Everything that it has started and that lives."""
        with contextlib.suppress(psutil.Error):
            self.seen |= set(self.parent.children(recursive=True))
        return [process for process in self.seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def one(self, name: str) -> psutil.Process | None:
        """The process with this in its command line, once it is there."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    return process
        return None

    def steps(self) -> int:
        return len(RunDirectory(self.directory).metrics.read())


@dataclass(frozen=True)
class Event:
    """What a run meets, and how it must end."""

    happen: Callable[[Run], None]
    code: int
    sentence: str
    within_s: float
    when: Callable[[Run], bool] = lambda run: run.steps() >= STEPS_FIRST
    epochs: int = 5000
    final: bool = False
    """Whether the run is done although it met this."""


def _kill(name: str) -> Callable[[Run], None]:
    def happen(run: Run) -> None:
        process = run.one(name)
        assert process is not None, f"there is no {name}"
        process.kill()

    return happen


def _signal_group(number: signal.Signals) -> Callable[[Run], None]:
    return lambda run: os.killpg(run.parent.pid, number)


def _signal_all(run: Run) -> None:
    for process in [*run.processes(), run.parent]:
        with contextlib.suppress(psutil.Error):
            process.terminate()


RESUMED, EARLY = "go on with: rlhf-ray resume", "stopped on request before the first step"
EVENTS = {
    "SIGTERM to the group": Event(_signal_group(signal.SIGTERM), 75, RESUMED, 30.0),
    "SIGHUP to the group": Event(_signal_group(signal.SIGHUP), 75, RESUMED, 30.0),
    "SIGINT while Ray starts": Event(
        _signal_group(signal.SIGINT), 75, EARLY, 15.0, when=lambda run: run.one("gcs_server") is not None
    ),
    "SIGTERM while Ray starts": Event(
        _signal_group(signal.SIGTERM), 75, EARLY, 15.0, when=lambda run: run.one("gcs_server") is not None
    ),
    "SIGKILL of the parent": Event(
        lambda run: run.parent.kill(), -9, "the process that started this one has ended", 30.0
    ),
    "SIGKILL of the driver": Event(_kill(DRIVER), 1, "was killed by SIGKILL", 15.0),
    "SIGKILL of the raylet": Event(_kill("raylet/raylet"), 1, "the driver ended with 1: the last commit is", 30.0),
    "SIGKILL of the GCS": Event(
        _kill("gcs_server"), 0, "its cluster could not be left in order", 90.0, epochs=30, final=True
    ),
    "SIGTERM to every process": Event(_signal_all, 1, RESUMED, 30.0),
}


def troubles(event: Event, root: Path) -> list[str]:
    """What is not as it must be when a run meets ``event``; the run and its log are in ``root``."""
    run = Run(root, event.epochs)
    try:
        deadline = time.monotonic() + START_S
        while not event.when(run):
            if run.parent.poll() is not None or time.monotonic() > deadline:
                return ["the run did not come so far"]
            time.sleep(0.05)
        run.processes()
        event.happen(run)
        with contextlib.suppress(psutil.TimeoutExpired):
            run.parent.wait(event.within_s)
        deadline = time.monotonic() + (
            event.within_s if event.code < 0 else LEFT_AFTER_S
        )  # the driver of a killed parent
        while run.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return _judge(event, run)
    finally:
        for process in [*run.processes(), run.parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _judge(event: Event, run: Run) -> list[str]:
    kept = RunDirectory(run.directory)
    found = []
    if run.parent.poll() != event.code:
        found.append(f"ended with {run.parent.poll()}, not {event.code}, within {event.within_s:g} s")
    if event.sentence not in run.log.read_text(errors="replace"):
        found.append(f"did not say {event.sentence!r}")
    if "Traceback" in run.log.read_text(errors="replace") and event.code == 75:
        found.append("showed a stack trace")
    if event.when is Event.when and not kept.checkpoints.steps():
        found.append("committed nothing")
    if event.final and not kept.final.is_dir():
        found.append("has no final/")
    left = [" ".join(process.cmdline())[:60] for process in run.processes()]
    return found + ([f"left running: {left}"] if left else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the events whose names hold one of the words, or all; the exit code is 0 if every run ended as it must."""
    wrong = 0
    for name, event in chosen("tests.faults.endings", EVENTS, arguments).items():
        root = Path(tempfile.mkdtemp(prefix="rlhf-ray-endings-"))
        found = troubles(event, root)
        print(f"{name:26}  {'; '.join(found) or 'as it must'}{f'  ({root})' if found else ''}", flush=True)
        wrong += bool(found)
        if not found:
            shutil.rmtree(root)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
