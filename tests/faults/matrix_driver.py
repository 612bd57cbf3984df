"""The driver of a run that meets faults of the matrix, in place of ``rlhf_ray.launch.driver``.

``python -m tests.faults.matrix_driver --parent CONFIG [key=value ...]`` is the process that a user starts, which starts this
driver; with ``--alone`` every rank is in this process. The plan is the file that ``RLHF_RAY_MATRIX`` names. Always true: a cell
that was hit is noted, with the process and the moment, before the fault; it is hit once, over all attempts of a run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch import driver, parent
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.trainers import session
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trainers.session import Session
from tests.faults.matrix_cells import CALLS, SIGNALS, Cell

PLAN = "RLHF_RAY_MATRIX"
ACTORS = {"policy": "PolicyModelActor", "critic": "CriticModelActor", "reference": "ReferenceModelActor",
          "reward": "RewardModelActor", "rollout": "RolloutActor"}  # fmt: skip
LATEST_SHARE = 0.8
"""Of the time of a phase: the latest moment of a signal in it."""
SLOWER = 9
"""Tenfold slowness is nine times the usual time besides."""
FOR_EVER_S = 3600.0
START_S = 3.0
"""The latest moment of a fault of the driver while it starts."""


@dataclass(frozen=True)
class Hit:
    """A cell that is to be hit in a step; step 0 is the start."""

    cell: Cell
    step: int


@dataclass
class Plan:
    """What a run is to meet; ``events`` is the file of what has happened, over all attempts."""

    hits: list[Hit]
    events: str
    seed: int

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        plain = json.loads(Path(path).read_text())
        hits = [Hit(Cell(**hit["cell"]), hit["step"]) for hit in plain["hits"]]
        return cls(hits, plain["events"], plain["seed"])


def note(events: str, what: str, **more: Any) -> None:
    """Write an event: one line, at once, by whichever process."""
    line = json.dumps({"what": what, "at": time.time(), "pid": os.getpid(), **more}) + "\n"
    descriptor = os.open(events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_events(path: str | Path) -> list[dict[str, Any]]:
    """The events of a run so far."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).is_file() else []


def arm(worker: Any, method: str, cell: str, fault: str, seconds: float, events: str) -> None:
    """Have the next call of ``method`` of a worker fail, hang or take ``seconds`` more; runs in the worker's process."""
    holder, name = {
        "setup": (worker, "take_device"),
        "begin_save": (getattr(worker, "engine", None), "begin_saving"),
    }.get(method, (worker, "doing"))
    original = getattr(holder, name)

    def hit(*arguments: Any, **options: Any) -> Any:
        if name == "doing" and arguments[0] != method:
            return original(*arguments, **options)
        delattr(holder, name)
        note(events, "hit", cell=cell)
        if fault == "exception":
            raise RuntimeError(f"a fault was put into {method}")
        time.sleep(FOR_EVER_S if fault == "hang" else seconds)
        return original(*arguments, **options)

    setattr(holder, name, hit)


def meets_a_call(cell: Cell) -> bool:
    """Whether a cell is hit in a call of a rank, and not by a signal or in the driver."""
    return cell.fault not in SIGNALS and cell.role != "driver"


class Injector:
    """Waits for the phases of the plan in the driver, and hits."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = random.Random(f"{plan.seed}/{len(read_events(plan.events))}")
        done = {event["cell"] for event in read_events(plan.events) if event["what"] == "hit"}
        self.left = [hit for hit in plan.hits if str(hit.cell) not in done]
        self.lasted: defaultdict[str, list[float]] = defaultdict(list)
        self.trainer: PpoTrainer | None = None
        self.step, self.inside = 0, "start"

    def due(self, *phases: str, called: bool | None = None, signals: bool | None = None) -> Iterator[Cell]:
        """The cells of phases that are due, each once.

        With ``called`` only those that meet a call of a rank, or no call; with ``signals`` only those of signals, or no signal.
        """
        for hit in list(self.left):
            cell = hit.cell
            asked = called in (None, meets_a_call(cell)) and signals in (None, cell.fault in SIGNALS)
            if cell.phase in phases and hit.step <= self.step and asked:
                self.left.remove(hit)
                yield cell

    # In the driver

    def begin(self) -> None:
        """The driver has begun."""
        note(self.plan.events, "driver")
        for cell in list(self.due("start", called=False, signals=True)):
            self._signal(cell, self.rng.uniform(0.0, START_S) if cell.role == "driver" else 0.0)

    def before_placing(self) -> None:
        """The first group is about to be placed: the driver's own code of the start runs."""
        for cell in self.due("start", called=False, signals=False):
            self._hit_driver(cell)

    def _hit_driver(self, cell: Cell) -> None:
        note(self.plan.events, "hit", cell=str(cell))
        if cell.fault == "exception":
            raise RuntimeError(f"a fault was put into {cell.phase}")
        time.sleep(FOR_EVER_S if cell.fault == "hang" else SLOWER * self._usual(cell.phase))

    def _usual(self, phase: str) -> float:
        return statistics.median(self.lasted[phase] or [0.3])

    def _signal(self, cell: Cell, after_s: float) -> None:
        began = time.monotonic()

        def send() -> None:
            victim = self._victim(cell)  # which takes time, and a phase may have little of it
            time.sleep(max(0.0, began + after_s - time.monotonic()))
            if self.inside != cell.phase or victim is None:
                note(self.plan.events, "late", cell=str(cell))
                self.left.append(Hit(cell, self.step + 1 if self.step else 0))
                return
            note(self.plan.events, "hit", cell=str(cell), victim=victim)
            os.kill(victim, signal.SIGKILL if cell.fault == "SIGKILL" else signal.SIGSTOP)

        threading.Thread(target=send, daemon=True).start()

    def _victim(self, cell: Cell) -> int | None:
        """The process of a rank; at the start it is waited for."""
        if cell.role == "driver":
            return os.getpid()
        while True:
            found = []
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if f"ray::{ACTORS[cell.role]}" in " ".join(process.cmdline()):
                        found.append(process.pid)
            if found or self.inside != "start":
                break
            time.sleep(0.05)
        if self.inside == "start":
            time.sleep(self.rng.uniform(0.0, START_S))
        return self.rng.choice(sorted(found)) if found else None

    def arm(self, cell: Cell, ranks: Any) -> None:
        """Prepare the next call of a rank to meet the fault."""
        method = CALLS[cell.phase][cell.role]
        arguments = (method, str(cell), cell.fault, SLOWER * self._usual(cell.phase), self.plan.events)
        number = self.rng.randrange(ranks.size)
        if isinstance(ranks, RayRanks):
            import ray

            ray.get(ranks.actors[number].__ray_call__.remote(arm, *arguments), timeout=60)
        else:
            arm(ranks.worker, *arguments)

    def ranks_of(self, role: str) -> Any:
        assert self.trainer is not None, "a phase of a step has begun"
        groups = self.trainer.groups
        if role == "rollout":
            return self.rng.choice(self.trainer.publisher._engines)
        if role == "reward":
            return next(iter(groups.rewards.values())).ranks
        return getattr(groups, role).ranks

    def before_loading(self, ranks: Any) -> None:
        """The ranks of a role are about to load."""
        for hit in list(self.left):
            if hit.cell.phase == "start" and meets_a_call(hit.cell) and hit.cell.role == ranks.role.partition("-")[0]:
                self.left.remove(hit)
                self.arm(hit.cell, ranks)

    def before_step(self, trainer: PpoTrainer) -> None:
        """A step begins: its calls are armed, but for those of evaluations, which other phases make too."""
        self.trainer, self.step = trainer, trainer.progress.step + 1
        for cell in self.due(*(phase for phase in CALLS if phase not in ("start", "evaluation")), called=True):
            self.arm(cell, self.ranks_of(cell.role))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the driver."""
        began, before = time.monotonic(), self.inside
        if self.trainer is not None:
            self.inside = name
            for cell in self.due(name):
                if cell.fault in SIGNALS:
                    self._signal(cell, self.rng.uniform(0.0, LATEST_SHARE * self._usual(name)))
                elif cell.role == "driver":
                    self._hit_driver(cell)
                else:
                    self.arm(cell, self.ranks_of(cell.role))
        note(self.plan.events, "phase", name=name, step=self.step)
        try:
            yield
            self.lasted[name].append(time.monotonic() - began)
        finally:
            self.inside = before


@contextmanager
def faults(plan: Plan) -> Iterator[Injector]:
    """Have whatever trains in the block meet the faults of ``plan``."""
    injector = Injector(plan)
    phase, step, setup, load_fleet = PhaseClock.phase, PpoTrainer.step, Group.setup, session.load_fleet
    place_policy = Session.policy

    @contextmanager
    def watched_phase(clock: PhaseClock, name: str, work: str | None = None) -> Iterator[None]:
        with phase(clock, name, work), injector.phase(name):
            yield

    def watched_step(trainer: PpoTrainer) -> None:
        injector.before_step(trainer)
        step(trainer)
        note(plan.events, "step", step=trainer.progress.step)

    def watched_setup(group: Group, *arguments: Any, **options: Any) -> Any:
        injector.before_loading(group.ranks)
        return setup(group, *arguments, **options)

    def watched_placing(place: Session, *arguments: Any, **options: Any) -> Any:
        injector.before_placing()
        return place_policy(place, *arguments, **options)

    def watched_loading(engines: Any, *arguments: Any) -> Any:
        injector.before_loading(injector.rng.choice(engines))
        return load_fleet(engines, *arguments)

    with (
        mock.patch.object(PhaseClock, "phase", watched_phase),
        mock.patch.object(PpoTrainer, "step", watched_step),
        mock.patch.object(Group, "setup", watched_setup),
        mock.patch.object(session, "load_fleet", watched_loading),
        mock.patch.object(Session, "policy", watched_placing),
    ):
        injector.begin()
        yield injector


def main(arguments: Sequence[str]) -> int:
    """The parent, or the driver."""
    if arguments[:1] == ["--parent"]:
        config = load_config(arguments[1], arguments[2:], kind="ppo")
        return parent.start_run(config, driver=__spec__.name if __spec__ is not None else __name__)
    if arguments[:1] == ["--alone"]:
        return alone(arguments[1], arguments[2:])
    work: Callable[[], int] = lambda: driver.main(arguments)  # noqa: E731
    return under_faults(work)


def under_faults(work: Callable[[], int]) -> int:
    """Do the work of a driver under the faults of the plan; a fault of the driver itself ends it as any error would."""
    plan = Plan.read(os.environ[PLAN])
    try:
        with faults(plan):
            code = work()
        if code == 0:
            note(plan.events, "end")
        return code
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return 1


def alone(config: str, overrides: Sequence[str]) -> int:
    """A new run in this process; where it was begun already, the rest of it."""
    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.config.paths import run_directory

    job = load_config(config, overrides, kind="ppo").to_train()
    place, path = ThisProcess(job.cluster), run_directory(job)
    again = (path / "config.yaml").is_file()

    def work() -> None:
        if again:
            driver.continue_run(str(path), place=place)
        else:
            driver.train_new_run(dump_config(job), place=place)

    return under_faults(lambda: driver.exit_code(work))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
