"""``python -m tests.faults.campaign [--kills N] [--seconds S]``: kill runs at random moments, resume, compare.

One PPO run is left alone. Then each of N runs of the same config loses a process to SIGKILL (the driver, an actor, or the
process that the user started), at a moment drawn over the whole run, start-up and saving included, and is resumed by
``rlhf-ray resume`` until it is done. Always true: a run counts as identical only if every final weight is so bit for bit
and the ledger has each prompt once, in the same step; every command has a deadline; figures are kept after each kill.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figures import LATEST, Figure, record
from tests.e2e.conftest import DEADLINE_S, command
from tests.faults.killing import VICTIMS, HangError, StartedRun, Victim
from tests.faults.verdict import ledger_differences, weight_differences

CONFIG = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
RESUMES = 3
"""Commands that may follow a kill before the run counts as lost."""
LATEST_SHARE = 0.95
"""Of the undisturbed run's time: the latest moment of a kill."""


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    victim: Victim
    at_s: float
    killed: str | None
    """Command line of what was killed; None if the run ended first."""
    resumes: int
    seconds: float
    troubles: list[str]

    @property
    def identical(self) -> bool:
        return not self.troubles

    def line(self, number: int) -> str:
        """One row of the table."""
        killed = (self.killed or "ended first")[:34]
        ending = "identical" if self.identical else "; ".join(self.troubles)
        return f"{number:4d}  {self.victim:7}  {self.at_s:7.1f}  {killed:34}  {self.resumes:7d}  {self.seconds:7.1f}  {ending}"


HEADER = f"{'run':>4}  {'victim':7}  {'at s':>7}  {'killed':34}  {'resumes':>7}  {'seconds':>7}  ending"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; the exit code is 0 if every killed run ended identical."""
    parser = argparse.ArgumentParser(prog="tests.faults.campaign", description="kill runs and compare how they end")
    parser.add_argument("--kills", type=int, default=100, help="kills in all (default 100)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    parser.add_argument("--seed", type=int, default=0, help="draws victims and moments")
    parser.add_argument("--results", type=Path, default=LATEST, help="file for the figures")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    root = Path(tempfile.mkdtemp(prefix="rlhf-ray-faults-"))
    outcomes = campaign(root, options.kills, options.seconds, options.seed, options.results)
    if outcomes and all(outcome.identical for outcome in outcomes):
        shutil.rmtree(root)
        return 0
    print(f"runs and their logs are in {root}", file=sys.stderr)
    return 1


def campaign(root: Path, kills: int, seconds: float, seed: int, results: Path) -> list[Outcome]:
    """Outcomes of runs until ``kills`` of them were killed; runs that ended before their kill are drawn again."""
    end = time.monotonic() + seconds
    whole, length_s = _undisturbed(root / "whole")
    print(f"undisturbed: {length_s:.1f} s\n{HEADER}", flush=True)
    outcomes: list[Outcome] = []
    number = 0
    while sum(outcome.killed is not None for outcome in outcomes) < kills and time.monotonic() < end:
        number += 1
        rng = random.Random(f"{seed}/{number}")
        outcome = disturbed(root / f"run-{number}", whole, length_s, rng)
        outcomes.append(outcome)
        print(outcome.line(number), flush=True)
        _keep(outcomes, results)
        if outcome.identical:
            shutil.rmtree(root / f"run-{number}")
    return outcomes


def disturbed(root: Path, whole: Path, length_s: float, rng: random.Random) -> Outcome:
    """One run, one kill, and as many resumes as it takes."""
    began, deadline_s = time.monotonic(), max(DEADLINE_S, 5 * length_s)
    victim, at_s = rng.choice(VICTIMS), rng.uniform(0.0, LATEST_SHARE * length_s)
    root.mkdir(parents=True)
    killed, resumes, troubles = None, 0, []
    try:
        with StartedRun(_train(root), root / "log", deadline_s) as run:
            killed = run.kill(victim, at_s, rng)
            code = run.wait()
        while code != 0 and resumes < RESUMES:
            resumes += 1
            with StartedRun(_again(root), root / "log", deadline_s) as run:
                code = run.wait()
        troubles = _differences(root / "tiny", whole) if code == 0 else [f"ended with {code}"]
    except HangError as error:
        troubles = [f"hang: {error}"]
    return Outcome(victim, at_s, killed, resumes, time.monotonic() - began, troubles)


def _undisturbed(root: Path) -> tuple[Path, float]:
    root.mkdir(parents=True)
    began = time.monotonic()
    with StartedRun(_train(root), root / "log", 3 * DEADLINE_S) as run:
        code = run.wait()
    if code != 0:
        raise SystemExit(f"the undisturbed run ended with {code}:\n{(root / 'log').read_text()[-3000:]}")
    return root / "tiny", time.monotonic() - began


def _train(root: Path) -> list[str]:
    return command("train", "ppo", CONFIG, f"run.root={root}")


def _again(root: Path) -> list[str]:
    """Resume what was begun; a run that was killed before it had a directory is started once more."""
    return command("resume", root / "tiny") if (root / "tiny" / "config.yaml").is_file() else _train(root)


def _differences(run: Path, whole: Path) -> list[str]:
    return weight_differences(run, whole) + ledger_differences(run, whole)


def _keep(outcomes: Sequence[Outcome], results: Path) -> None:
    killed = [outcome for outcome in outcomes if outcome.killed is not None]
    if not killed:
        return
    method = (
        f"{CONFIG.name} in fp32 on CPU: SIGKILL to driver, actor or parent at a random moment of the run, then "
        "rlhf-ray resume until it is done"
    )
    share = sum(outcome.identical for outcome in killed) / len(killed)
    figures = {
        "faults.kills": Figure(float(len(killed)), "kills", True, method),
        "faults.bit_identical_share": Figure(
            share, "share", True, f"{method}; final weights bit for bit those of a run never killed, each prompt once"
        ),
    }
    record(figures, results)


if __name__ == "__main__":
    sys.exit(main())
