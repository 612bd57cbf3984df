"""``python -m tests.faults.stops [--count N] [--grace S] [--seed S] [--results FILE] [--keep]``: SIGTERM at drawn moments.

Each trial starts a small run on the Ray that it starts, sends SIGTERM to its process group at a drawn moment, one in five of
them before the first step, and kills everything that still lives after the grace. Always true: with a grace that is long enough
the run ends by itself with 75, the step that was finished last is committed, and before the first step nothing is there that
could be lost; after any grace the last commit is whole. Verdicts are appended to a file, and a campaign that was broken off
goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import REFERENCE, Figure, record
from rlhf_ray.errors import EXIT_RESUMABLE
from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import command
from tests.faults.endings import Run

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
SETTINGS = {
    "sft": (
        "demo-sft", "policy.model.make.shape=llama-tiny", "policy.ranks=1", "data.world.demonstrations=64",
        "batch.sequences_per_update=32", "evaluation.every_steps=0", "epochs=5000",
    ),
    "ppo": (
        str(TINY_PPO), "policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
        "critic=null", "reference=null", "algorithm.name=grpo", "rollout.max_new_tokens=16", "steps=5000",
        "data.world={prompts: 64, evaluation_prompts: 2}", "evaluation={prompts: 2}",
        "batch={prompts_per_step: 4, samples_per_prompt: 2, sequences_per_update: 4, max_tokens_per_micro_batch: 512}",
    ),
}  # fmt: skip
START_S = 150.0
LATEST_S = 4.0
"""After the first step: the latest moment of the signal."""
SLACK_S = 10.0
"""For leaving Ray in order, which comes after the commit."""


@dataclass(frozen=True)
class Trial:
    """One run and its signal: before its first step, or ``after_s`` seconds after it."""

    number: int
    kind: str
    early: bool
    after_s: float
    grace_s: float


@dataclass(frozen=True)
class Verdict:
    """What became of a trial; ``troubles`` is empty where all was as it must be."""

    trial: Trial
    code: int | None
    seconds: float
    finished: int
    committed: int
    troubles: list[str]


def draw(number: int, grace_s: float, seed: int) -> Trial:
    """The trial of this number, always the same one for a seed."""
    rng = random.Random(f"{seed}/{number}")
    early = number % 5 == 0
    return Trial(number, ("sft", "ppo")[number % 2], early, rng.uniform(0.0, 8.0 if early else LATEST_S), grace_s)


class StoppedRun(Run):
    """A run of a trial, in a process group of its own."""

    def __init__(self, root: Path, kind: str) -> None:
        self.directory = root / "run"
        self.log = root / "log"
        line = command("train", kind, *SETTINGS[kind], "checkpoint.every_steps=2", f"run.root={root}", "run.name=run")
        if kind == "ppo":
            line += [f"reward={{function: '{write_reward(root)}:lengths', hold_s: 0.0}}"]
        with self.log.open("wb") as log:
            self.parent = psutil.Popen(line, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        self.seen: set[psutil.Process] = set()


def write_reward(root: Path) -> Path:
    """A file with a reward function."""
    path = root / "mine.py"
    path.write_text("def lengths(responses):\n    return [float(len(response)) for response in responses]\n")
    return path


def run_trial(trial: Trial, root: Path) -> Verdict:
    """Run it in ``root`` and judge how it ended."""
    run = StoppedRun(root, trial.kind)
    try:
        arrived = wait_for_moment(run, trial)
        asked = time.monotonic()
        if not arrived:
            return Verdict(trial, run.parent.poll(), 0.0, 0, 0, ["the run did not come so far"])
        run.processes()
        os.killpg(run.parent.pid, signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            run.parent.wait(trial.grace_s)
        seconds = time.monotonic() - asked
        return judge(trial, run, seconds)
    finally:
        for process in [*run.processes(), run.parent]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def wait_for_moment(run: Run, trial: Trial) -> bool:
    """Wait until the signal is due; false where the run ended before."""
    deadline = time.monotonic() + START_S

    def ready() -> bool:
        return (run.directory / "config.yaml").exists() if trial.early else run.steps() >= 1

    while not ready():
        if run.parent.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    moment = time.monotonic() + trial.after_s
    while time.monotonic() < moment and not (trial.early and run.steps()):
        time.sleep(0.02)
    return run.parent.poll() is None


def judge(trial: Trial, run: Run, seconds: float) -> Verdict:
    """Kill what still lives, and say what is not as it must be."""
    code = run.parent.poll()
    alive = [process for process in run.processes() if process != run.parent]
    for process in [*alive, run.parent]:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=SLACK_S)
    kept = RunDirectory(run.directory)
    finished = max((line["step"] for line in kept.metrics.read()), default=0)
    steps, log = kept.checkpoints.steps(), run.log.read_text(errors="replace")
    committed = 0
    troubles = []
    if steps:
        valid = kept.checkpoints.latest_valid()
        committed = 0 if valid is None else valid.step
        if committed != steps[-1]:
            troubles.append(f"the commit of step {steps[-1]} is not whole")
    if code is None and trial.grace_s >= 30.0:
        troubles.append(f"did not end within {trial.grace_s:g} s")
    if code is not None:
        if code != EXIT_RESUMABLE:
            troubles.append(f"ended with {code}")
        if committed < finished:
            troubles.append(f"step {finished} was finished, and {committed} is committed")
        if "go on with: rlhf-ray resume" not in log or "Traceback" in log:
            troubles.append("did not say how to go on")
    elif committed < finished - finished % 2 - 2:
        troubles.append(f"step {finished} was finished, and only {committed} is committed")
    return Verdict(trial, code, round(seconds, 1), finished, committed, troubles)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try what is not in the file of results yet; the exit code is 0 if every trial there ended as it must."""
    parser = argparse.ArgumentParser(prog="tests.faults.stops")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--grace", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further trial after this time")
    parser.add_argument("--results", type=Path, default=None, help="a file of JSON lines, to go on with")
    parser.add_argument("--keep", action="store_true", help="keep the share that ended as it must as a figure")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    known = {}
    if options.results is not None and options.results.exists():
        for text in options.results.read_text().splitlines():
            line = json.loads(text)
            known[line["trial"]["number"], line["trial"]["grace_s"]] = line
    wrong = 0
    for number in range(options.count):
        trial = draw(number, options.grace, options.seed)
        if (number, options.grace) not in known:
            if time.monotonic() > end:
                break
            root = Path(tempfile.mkdtemp(prefix="rlhf-ray-stops-"))
            line = asdict(run_trial(trial, root))
            known[number, options.grace] = line
            if options.results is not None:
                with options.results.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")
            if not line["troubles"]:
                shutil.rmtree(root)
            print(f"{number:3d} {trial.kind} {line['code']} after {line['seconds']} s, step {line['finished']}: "
                  f"{'; '.join(line['troubles']) or 'as it must'} {root if line['troubles'] else ''}", flush=True)  # fmt: skip
        wrong += bool(known[number, options.grace]["troubles"])
    if options.keep:
        keep([line for (number, grace), line in known.items() if number < options.count and grace == options.grace])
    return min(wrong, 1)


def keep(lines: Sequence[dict[str, Any]]) -> None:
    """Keep the share of trials without trouble, and how long the longest took, as figures."""
    grace, late = lines[0]["trial"]["grace_s"], sum(line["finished"] > 0 for line in lines)
    what = f"{len(lines)} requests to stop at drawn moments of SFT and PPO, {late} after the first step, {grace:g} s of grace"
    good = sum(not line["troubles"] for line in lines) / len(lines)
    longest = max(line["seconds"] for line in lines)
    figures = {
        f"faults.stops_kept_{grace:g}s": Figure(
            good, "share", True, f"those that ended as they must of {what}; 2 cores"
        )
    }
    if all(line["code"] is not None for line in lines):  # where some were killed, the longest took as long as the grace
        method = f"until the end, the longest of {what}; 2 cores"
        figures[f"faults.stops_seconds_{grace:g}s"] = Figure(longest, "s", False, method)
    record(figures, REFERENCE)


if __name__ == "__main__":
    sys.exit(main())
