"""``python -m tests.faults.matrix [--cells N] [--seed S] [--stale] [--multi N]``: every role x every phase x every fault.

Runs of one small PPO config meet the faults of several cells, one after the other, each in a step of its own; a verdict for
each is appended to ``benchmarks/results/faults.jsonl``, and the table of ``docs/reliability.md`` is made of that file. Without
``--cells`` all cells are run that have no verdict, or whose files have changed since; ``--stale`` lists them. Always true: all
processes of a run carry its mark, and none of them outlives the judgement; a run has a deadline; the run to compare with is of
the same commit; where the bits of a run that met several faults differ, each of its cells is run again alone.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from rlhf_ray.runs.incidents import Incidents
from tests.e2e.conftest import MARK, marked_processes, unheld_memory
from tests.faults import matrix_verdicts
from tests.faults.matrix_cells import Cell, Where, cells, digest, where
from tests.faults.matrix_driver import PLAN, Hit, Plan, read_events
from tests.faults.matrix_verdicts import ENDED, RESULTS, Reading, Verdict, read_hit
from tests.faults.verdict import ledger_differences, weight_differences

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "e2e" / "ppo_tiny.yaml"
PER_RUN = 8
MOST_KILLS = 5
"""In a run that meets several which are drawn."""
STEPS = 2 * PER_RUN + 2
DEADLINE_S, MORE_S = 240.0, 90.0
"""A run has so long, and so much more for every fault; how long it may be silent is judged by the verdict."""
LEAVES_S = 20.0
SETTINGS = [
    "run.name=matrix", f"steps={STEPS}", "run.max_restarts=20", "run.stall_floor_s=15",
    "monitoring.ray_metrics=false", "rollout.backend=transformers",
    "policy.engine.zero=1", "rollout.max_restarts=1000", "rollout.max_new_tokens=4", "checkpoint.every_steps=2",
    "evaluation={prompts: 4, every_steps: 2}", "data.world={prompts: 160, evaluation_prompts: 4}", "cluster.call_timeout_s=45",
    "batch={prompts_per_step: 8, samples_per_prompt: 1, sequences_per_update: 8, max_tokens_per_micro_batch: 512}",
    "rollout.timeout_s=20", "rollout.update_timeout_s=20", "run.stall_floor_s=15",
]  # fmt: skip
HANGS_AT_A_DEADLINE = ["cluster.start_timeout_s=75"]
"""Of a run that meets a hang while it loads, or a driver that hangs, perhaps in a phase that has no usual time yet: both are
found out at that deadline. It counts from the start of the process, and a busy machine may need longer than this for a start
that nothing disturbs."""
PLACES: dict[Where, list[str]] = {
    "Ray": ["policy.ranks=2", "rollout.engines=2", "cluster.num_cpus=2"],
    "one process": ["policy.ranks=1", "rollout.engines=1"],
}


@dataclass(frozen=True)
class Done:
    """A run that has ended, or was ended."""

    path: Path
    code: int | None
    events: list[dict[str, object]]
    left: list[str]
    log: Path


def run(root: Path, place: Where, hits: Sequence[Hit], seed: int) -> Done:
    """Run the small job to its end under the faults of ``hits``."""
    root.mkdir(parents=True)
    events, mark, memory = root / "events.jsonl", uuid.uuid4().hex, unheld_memory()
    Plan(list(hits), str(events), seed).write(root / "plan.json")
    how = {"Ray": "--parent", "one process": "--alone"}[place]
    line = [sys.executable, "-m", "tests.faults.matrix_driver", how, str(CONFIG), f"run.root={root}", *SETTINGS]
    hangs = [hit.cell for hit in hits if hit.cell.fault == "hang"]
    line += HANGS_AT_A_DEADLINE if any(cell.phase == "start" or cell.role == "driver" for cell in hangs) else []
    variables = {PLAN: str(root / "plan.json"), MARK: mark, "PYTHONPATH": str(ROOT)}
    code, deadline = None, time.monotonic() + DEADLINE_S + MORE_S * len(hits)
    with _ended_on_error(mark), (root / "log").open("ab") as log:
        while True:
            process = subprocess.Popen([*line, *PLACES[place]], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                       env=os.environ | variables, cwd=ROOT)  # fmt: skip
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(0.0, deadline - time.monotonic()))
            met = len([event for event in read_events(events) if event["what"] == "driver"])
            if place == "Ray" or code in (0, None) or met > len(hits):
                break  # without Ray nobody but this loop starts a driver again
    left = _end(mark, memory)
    return Done(root / "matrix", code, read_events(events), left, root / "log")


@contextmanager
def _ended_on_error(mark: str) -> Iterator[None]:
    """A campaign that is stopped takes its run along."""
    try:
        yield
    except BaseException:
        _kill(marked_processes(mark))
        raise


def _kill(processes: Iterable[int]) -> None:
    for pid in processes:
        with suppress(psutil.Error):
            psutil.Process(pid).kill()


def _end(mark: str, memory: set[str]) -> list[str]:
    """What is left of a run, which is ended then."""
    deadline = time.monotonic() + LEAVES_S
    while time.monotonic() < deadline and (marked_processes(mark) or unheld_memory() - memory):
        time.sleep(0.5)
    processes = marked_processes(mark)
    left = [f"process {line[:60]}" for line in processes.values()] + [
        f"memory {name}" for name in unheld_memory() - memory
    ]
    _kill(processes)
    return left


def plan(chosen: Sequence[Cell]) -> list[Hit]:
    """In which step each cell of a run is hit."""
    start = [Hit(cell, 0) for cell in chosen if cell.phase == "start"]
    later = [cell for cell in chosen if cell.phase != "start"]
    return start + [Hit(cell, 2 * number) for number, cell in enumerate(later, 1)]


def share_out(chosen: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each run: at most ``PER_RUN``, all of one place, at most one of each role at the start."""
    runs: list[list[Cell]] = []
    for cell in chosen:
        fits = [
            one for one in runs
            if len(one) < PER_RUN and where(one[0]) == where(cell)
            and not (cell.phase == "start" and any((other.phase, other.role) == ("start", cell.role) for other in one))
        ]  # fmt: skip
        (fits or runs.append([]) or runs[-1:])[0].append(cell)
    return runs


class Campaign:
    """Runs cells and keeps their verdicts; the runs to compare with are made when they are needed."""

    def __init__(self, root: Path, seed: int, results: Path = RESULTS) -> None:
        self.root, self.seed, self.results = root, seed, results
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.commit = asked.stdout.strip()
        self.number = 0

    def whole(self, place: Where) -> Path:
        """The run of this commit that met nothing."""
        root = self.root / f"whole-{place.replace(' ', '-')}-{self.commit}"
        if not (root / "matrix" / "summary.json").is_file():
            shutil.rmtree(root, ignore_errors=True)
            done = run(root, place, [], self.seed)
            if done.code != 0:
                raise SystemExit(f"the run that meets nothing ended with {done.code}:\n{done.log.read_text()[-3000:]}")
        return root / "matrix"

    def judge(self, chosen: Sequence[Cell], hits: Sequence[Hit] | None = None) -> list[Verdict]:
        """Run some cells together, or ``hits`` of them that were drawn, and append their verdicts."""
        place, whole = where(chosen[0]), self.whole(where(chosen[0]))
        self.number += 1
        root = self.root / f"run-{os.getpid()}-{self.number}"
        done = run(root, place, plan(chosen) if hits is None else hits, self.seed)
        differences = ["it has no end"] if done.code != 0 else weight_differences(done.path, whole)
        prompts = ["it has no end"] if done.code != 0 else ledger_differences(done.path, whole)
        incidents = Incidents(done.path / "incidents.jsonl").read() if done.path.is_dir() else []
        verdicts = []
        for cell in chosen:
            reading = read_hit(done.events, str(cell), incidents)
            if reading is not None:
                verdicts.append(self._verdict(cell, reading, done, not differences, not prompts, hits is not None))
            print(f"{cell!s:34}  {'was not met' if reading is None else verdicts[-1].words()}", flush=True)
        bad = not all(verdict.as_promised for verdict in verdicts) or done.code != 0
        if bad:
            print(f"  {differences[:2]} {prompts[:2]} {done.left[:2]}; its log: {done.log}", flush=True)
        else:
            shutil.rmtree(root)
        if bad and len(chosen) > 1 and hits is None and (differences or prompts or done.left):
            return [verdict for cell in chosen for verdict in self.judge([cell])]
        matrix_verdicts.append(verdicts, self.results)
        return verdicts

    def _verdict(self, cell: Cell, reading: Reading, done: Done, identical: bool, once: bool, drawn: bool) -> Verdict:
        outcome = reading.outcome if done.code == 0 else ENDED
        lines = [line for line in done.log.read_text(errors="replace").splitlines() if line.strip()]
        note = "" if done.code == 0 else f"ended with {done.code}: {lines[-1][:200] if lines else ''}"
        which = f"--multi {self.number}" if drawn else f"--only {cell}"
        command = f"python -m tests.faults.matrix {which} --seed {self.seed}"
        return Verdict(
            cell.role, cell.phase, cell.fault, outcome, identical, once,
            reading.seconds if done.code == 0 else None, reading.detected_s, reading.back_s, reading.lost_steps,
            reading.silence_s, done.left, where(cell), self.commit, self.seed, command,
            datetime.now(UTC).date().isoformat(), digest(cell), note,
            f"{self.commit}/{self.seed}/{done.path.parent.name}", drawn,
        )  # fmt: skip


def several_kills(rng: random.Random) -> list[Hit]:
    """Some kills of any role in any phase, for one run."""
    kills = [cell for cell in cells() if cell.fault == "SIGKILL" and cell.phase != "start"]
    return [Hit(cell, rng.randrange(2, STEPS)) for cell in rng.sample(kills, rng.randint(2, MOST_KILLS))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cells; the exit code is 0 if each ended as promised."""
    parser = argparse.ArgumentParser(prog="tests.faults.matrix", description="every role x every phase x every fault")
    parser.add_argument("--cells", type=int, help="a sample of so many (default: all that have no valid verdict)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="cells whose names hold this, ROLE/PHASE/FAULT"
    )
    parser.add_argument("--place", choices=list(PLACES), help="only those that are run there")
    parser.add_argument("--seed", type=int, default=0, help="draws the sample, victims and moments")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    parser.add_argument("--stale", action="store_true", help="list the cells that have no valid verdict")
    parser.add_argument("--multi", type=int, default=0, metavar="N", help="N runs with several random kills each")
    parser.add_argument("--table", action="store_true", help="write the table of the docs and run nothing")
    parser.add_argument("--root", type=Path, help="where runs are made, and kept if they did not end as promised")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.table:
        matrix_verdicts.write_table(matrix_verdicts.read())
        return 0
    remaining = matrix_verdicts.open_cells(matrix_verdicts.read())
    if options.stale:
        print("\n".join(map(str, remaining)))
        return 0
    rng, end = random.Random(options.seed), time.monotonic() + options.seconds
    campaign = Campaign(options.root or Path(tempfile.mkdtemp(prefix="rlhf-ray-matrix-")), options.seed)
    if options.multi:
        runs = [several_kills(rng) for _ in range(options.multi)]
        verdicts = [one for hits in runs if time.monotonic() < end for one in
                    campaign.judge([hit.cell for hit in hits], hits)]  # fmt: skip
    else:
        chosen = (
            [cell for cell in cells() if any(word in str(cell) for word in options.only)] if options.only else remaining
        )
        chosen = [cell for cell in chosen if options.place in (None, where(cell))]
        if options.cells is not None:
            chosen = rng.sample(chosen, min(options.cells, len(chosen)))
        verdicts = [one for part in share_out(chosen) if time.monotonic() < end for one in campaign.judge(part)]
    matrix_verdicts.write_table(matrix_verdicts.read())
    good = sum(verdict.as_promised for verdict in verdicts)
    print(f"{good} of {len(verdicts)} ended as promised")
    return 0 if good == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
