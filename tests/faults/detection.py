"""``python -m tests.faults.detection [WORD ...]``: how soon a process that is stopped, or hangs, is found out in a real run.

Each case is a run on Ray with ``run.stall_floor_s=15``. Once it has made a few steps, one of its processes gets SIGSTOP, or
hangs in a call while it still says how it is. Always true: it is found out within ``WITHIN_S``, the stacks of its processes are
in the run directory then and name the function in which one hangs; the process is not left behind.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import command
from tests.faults.endings import SMALL
from tests.faults.killing import DRIVER
from tests.faults.named import chosen

ROOT = Path(__file__).parents[2]
WITHIN_S = 90.0
START_S = 200.0
SFT = ("sft", "demo-sft", *SMALL, "epochs=5000", "policy.ranks=2")
PPO = ("ppo", str(ROOT / "tests" / "e2e" / "ppo_tiny.yaml"), "steps=100000", "cluster.num_cpus=2")
FOUND = (
    "is ended: it did not answer", "as by SIGSTOP, and is ended", "gave no sign of life", "is ended: the driver waits",
    "does not answer:",
)  # fmt: skip
"""What the log says when it is found out."""


@dataclass(frozen=True)
class Case:
    """What happens to which process."""

    job: Sequence[str]
    victim: str
    """A word of its command line."""
    hangs_in: str = ""
    """The module and the method in which rank ``rank`` hangs; empty: it gets SIGSTOP."""
    rank: int = 1


CASES = {
    "policy, SIGSTOP": Case(SFT, "ray::PolicyModelActor"),
    "policy, hang": Case(SFT, "ray::PolicyModelActor", "rlhf_ray.actors.workers.model:ModelWorker.accumulate"),
    "driver, SIGSTOP": Case(SFT, DRIVER),
    "driver, hang": Case(SFT, DRIVER, "rlhf_ray.trainers.checkpointing:Checkpointer.save", rank=0),
    "rollout, SIGSTOP": Case(PPO, "ray::RolloutActor"),
    "rollout, hang": Case(PPO, "ray::RolloutActor", "rlhf_ray.rollout.engine:RolloutEngine.generate"),
}


@dataclass(frozen=True)
class Found:
    """How a case went."""

    seconds: float
    troubles: list[str]


def find(case: Case, root: Path) -> Found:
    """Run a case in a directory of its own."""
    log, flag, run = root / "log", root / "hang", RunDirectory(root / "run")
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests' / 'faults' / 'hang'}{os.pathsep}{ROOT}"}
    if case.hangs_in:
        variables["RLHF_RAY_TEST_HANG"] = f"{case.hangs_in}:{flag}"
    words = command("train", *case.job, f"run.root={root}", "run.name=run", "run.stall_floor_s=15")
    with log.open("wb") as stream:
        parent = psutil.Popen(words, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=variables)
    seen: set[psutil.Process] = set()
    try:
        _await(lambda: len(run.metrics.read()) >= 3, START_S, parent)
        seen |= set(parent.children(recursive=True))
        victims = sorted((one for one in seen if _is(one, case.victim)), key=lambda one: one.pid)
        if case.hangs_in:
            flag.write_text(str(case.rank))
            _await(lambda: flag.read_text().startswith("process"), 60.0, parent)
            victim = psutil.Process(int(flag.read_text().split()[1]))
        else:
            victim = victims[-1]
            os.kill(victim.pid, signal.SIGSTOP)
        began = time.monotonic()
        _await(lambda: any(words in log.read_text(errors="replace") for words in FOUND), WITHIN_S, parent, ends=True)
        seconds = time.monotonic() - began
        troubles = _judge(case, run, log.read_text(errors="replace"), victim)
        return Found(seconds, troubles)
    except TimeoutError as error:
        return Found(float("inf"), [str(error)])
    finally:
        for process in {*seen, *parent.children(recursive=True), parent} if parent.is_running() else seen:
            with contextlib.suppress(psutil.Error):
                process.kill()
        parent.wait()


def _judge(case: Case, run: RunDirectory, log: str, victim: psutil.Process) -> list[str]:
    found = [] if any(words in log for words in FOUND) else ["it was not found out"]
    text = "".join(path.read_text() for path in run.stacks.glob("*.txt"))
    if case.hangs_in and "in hanging" not in text:
        found.append("no stacks name the function that hangs")
    if not case.hangs_in and "is stopped (as by SIGSTOP)" not in text and "rollout" not in case.victim.lower():
        found.append("no stacks say that it is stopped")
    deadline = time.monotonic() + 30.0
    while victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return [*found, "it was left behind"]
        time.sleep(0.1)
    return found


def _is(process: psutil.Process, words: str) -> bool:
    with contextlib.suppress(psutil.Error):
        return words in " ".join(process.cmdline())
    return False


def _await(happened, limit_s: float, parent: psutil.Popen, *, ends: bool = False) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:g} s")
        if parent.poll() is not None:
            if ends:
                return
            raise TimeoutError(f"the run ended with {parent.poll()}")
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases whose names hold one of the words, or all; the exit code is 0 if all were found out in time."""
    wrong = 0
    for name, case in chosen("tests.faults.detection", CASES, arguments).items():
        root = Path(tempfile.mkdtemp(prefix="rlhf-ray-detection-"))
        found = find(case, root)
        print(f"{name:20} {found.seconds:6.1f} s  {'; '.join(found.troubles) or 'as it must'}  {root}", flush=True)
        wrong += bool(found.troubles)
        if not found.troubles:
            shutil.rmtree(root)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
