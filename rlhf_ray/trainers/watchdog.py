"""Watch a run for what hangs: have its stacks written, and end the ranks, or the driver, that keep it from going on.

Invariants: what is done follows ``monitoring/stalls.py`` alone; nothing is ended before the stacks of every process of the run
are on disk, or could not be had; where ranks do not even say how they are, they alone are ended, else all
that have not answered; a call that was answered meanwhile is left alone; a rank on this machine that has been stopped for as
long as the floor is ended, whatever it was doing; the driver is ended only where a parent waits for it;
groups in this process are only looked at, since they cannot be ended.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_FAILED
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.monitoring.stalls import CallBook, Limits, OpenCall, OpenPhase, judge
from rlhf_ray.processes import lifeline, progress, stacks
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Incident

LOOKS_PER_FLOOR, LOOK_EVERY_S = 10, 1.0
SCANS_PER_FLOOR = 4
"""How often the processes of this machine are looked through for stopped ones."""
LATE_S = 5.0
"""A look that comes so much too late was kept from coming, as by a stop of this machine: that time does not count, and nothing
is judged for a while."""
HEALTH_S = 5.0
"""How long a rank has to say how it is."""
LAST_WORDS_S = 10.0
"""How long the end of the driver may take, whose log or disk may be what hangs."""
KEPT_FILES = 20
KEY = "run.stall_floor_s"


class Watched(Protocol):
    """The ranks of a role, as far as they are watched."""

    role: str
    book: CallBook

    def open_calls(self) -> list[OpenCall]:
        """The calls that somebody may wait for and that not every rank has answered."""

    def silent(self, ranks: Sequence[int], timeout_s: float) -> dict[int, bool]:
        """Which of ``ranks`` do not even say how they are."""

    def stacks_elsewhere(self, timeout_s: float) -> str:
        """What ranks on other nodes do."""

    def end_stalled(self, causes: dict[int, str]) -> None:
        """End the processes of ranks, each for a reason."""


class Groups(Protocol):
    """Where the groups of a run are found."""

    @property
    def watched(self) -> Sequence[Watched] | None:
        """All groups whose ranks are processes of their own; None where they are in this one."""

    @property
    def mark(self) -> str:
        """With what the labels of the run's own processes end; empty where it has none."""


class Journalled(Protocol):
    """What the watchdog needs of the journal."""

    clock: PhaseClock
    step: int


class Watchdog:
    """A thread that watches a run for as long as the ``with`` block lasts."""

    def __init__(self, run: RunDirectory, config: TrainingJob, journal: Journalled, groups: Groups) -> None:
        self.run, self.journal, self.groups = run, journal, groups
        self.name = config.run.name
        cluster = config.cluster
        self.limits = Limits(config.run.stall_floor_s, max(cluster.start_timeout_s, cluster.call_timeout_s))
        self._every_s = min(LOOK_EVERY_S, self.limits.floor_s / LOOKS_PER_FLOOR)
        self._noticed: set[OpenPhase] = set()
        self._stopped: dict[int, float] = {}
        """Since when processes of ranks are known to be stopped, by their ids."""
        self._scans_from = 0.0
        self._said: set[str] = set()
        """The warnings that were given already: each is given once."""
        self._looked_at = self._judges_from = time.monotonic()
        self._pauses: list[tuple[float, float]] = []
        """When pauses of this process ended, and how long they were."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._log = get_logger("watchdog")

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.look()
            except Exception:  # such as a Ray that goes down under it: the run finds that out by itself
                if not self._ended.is_set() and self._is_new("could not look"):
                    self._log.warning("the watchdog could not look at the run", exc_info=True)
                self._looked_at = time.monotonic()

    def _is_new(self, warning: str) -> bool:
        """Whether a warning was not given before; it counts as given from now on."""
        new = warning not in self._said
        self._said.add(warning)
        return new

    def look(self) -> None:
        """Look at the run once, and do what has to be done."""
        now = time.monotonic()
        if (pause_s := now - self._looked_at - self._every_s) > LATE_S:
            self._judges_from = now + self.limits.floor_s
            self._pauses.append((now, pause_s))
        self._looked_at = now
        if now < self._judges_from:
            return
        self._end_stopped(now)
        groups, worked = self.groups.watched, self._without_pauses
        phases = [replace(one, entered_at=worked(one.entered_at)) for one in self.journal.clock.open()]
        calls = {
            replace(call, began_at=worked(call.began_at)): group
            for group in groups or ()
            for call in group.open_calls()
        }
        self._noticed &= set(phases)
        verdict = judge(
            now, phases, calls, progress_at=worked(progress.made_at()), limits=self.limits, noticed=self._noticed
        )  # fmt: skip
        for phase in verdict.notice:
            self._noticed.add(phase)
            self._tell(phase, [call.line(now) for call in calls], in_process=groups is None)
        for call in verdict.give_up:
            self._give_up(call, calls[call])
        if verdict.end_driver and groups is not None:
            self._end_driver(phases[-1], verdict.end_driver)
        self._looked_at = time.monotonic()

    def _without_pauses(self, moment: float) -> float:
        """``moment``, put off by the time since then in which this process was stopped, as with its whole machine."""
        return moment + sum(pause_s for ended_at, pause_s in self._pauses if moment < ended_at)

    def _end_stopped(self, now: float) -> None:
        """End ranks on this machine that have been stopped for as long as the floor, also while nothing is overdue."""
        mark = self.groups.mark
        if not mark or now < self._scans_from:
            return
        self._scans_from = now + self.limits.floor_s / SCANS_PER_FLOOR
        ours = {one.pid: one for one in stacks.labelled(f"rlhf/{self.name}/") if one.label.endswith(f" {mark}")}
        self._stopped = {pid: self._stopped.get(pid, now) for pid in ours if stacks.is_stopped(pid)}
        for pid, since in self._stopped.items():
            if now - since >= self.limits.floor_s:
                name = ours[pid].label.partition(" ")[0]
                why = f"{name} (process {pid}) has been stopped for {now - since:.0f} s, as by SIGSTOP"
                self._log.error("%s, and is ended; stacks: %s", why, self._write("stopped", why))
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _tell(self, phase: OpenPhase, calls: Sequence[str], *, in_process: bool) -> None:
        usual = f"{phase.usual_s:.1f} s" if phase.usual_s is not None else "not known"
        seconds = time.monotonic() - phase.entered_at
        what = [f"{phase.name!r} has taken {seconds:.0f} s after step {self.journal.step} (median: {usual}; {KEY} "
                f"{self.limits.floor_s:g} s)", *(calls or ["no call to a rank is under way"])]  # fmt: skip
        if in_process:
            what.append("the ranks are in this process, so that nothing can be ended")
        self._log.warning("%s; stacks: %s", "; ".join(what), self._write(phase.name, "\n".join(what)))

    def _write(self, phase: str, title: str) -> str:
        """Write the stacks of every process of the run, as far as they can be had; where they are, or why they are not."""
        more = [group.stacks_elsewhere(HEALTH_S) for group in self.groups.watched or ()]
        pids = [*stacks.tree(os.getpid()), *(one.pid for one in stacks.labelled(f"rlhf/{self.name}/"))]
        return stacks.kept(lambda: write_stacks(self.run, self.journal.step, phase, pids, title, more))

    def _give_up(self, call: OpenCall, group: Watched) -> None:
        silent = group.silent(call.missing, HEALTH_S)
        now = time.monotonic()
        current = next((one for one in group.open_calls() if one.number == call.number), None)
        if current is None or current.given_up_at is not None:
            return
        dead = [rank for rank in current.missing if silent.get(rank, True)]
        reason = (
            "and does not say how it is: it is stopped, or out of reach"
            if dead
            else f"but says how it is: it hangs; if it was only slow, raise {KEY}"
        )
        usual = f"usually {call.usual_s:.1f} s"
        cause = f"it did not answer {call.method} for {now - call.began_at:.0f} s ({usual}), {reason}"
        ranks = dead or list(current.missing)
        self._log.error("%s rank %s is ended: %s", call.role, ", ".join(map(str, ranks)), cause)
        group.book.give_up(call.number, now)
        group.end_stalled(dict.fromkeys(ranks, cause))

    def _end_driver(self, phase: OpenPhase, why: str) -> None:
        if not lifeline.is_child():
            if self._is_new("not ended"):
                self._log.error("%s: nobody would start this process again, so it is not ended", why)
            return
        lifeline.fails()
        end = threading.Timer(LAST_WORDS_S, os._exit, [EXIT_FAILED])
        end.daemon = True
        end.start()
        where = self._write(phase.name, why)
        cause = f"the driver hangs in {phase.name!r} and is ended: {why}; stacks: {where}"
        self._log.error("%s", cause)
        step, seconds = self.journal.step, time.monotonic() - phase.entered_at
        back = max(self.run.checkpoints.steps(), default=0)
        lost = max(step - back, 0)
        self.run.incidents.add(
            Incident(time.time(), step, phase.name, "driver", None, "stalled", cause, "stopped", back, lost, seconds)
        )
        os._exit(EXIT_FAILED)


def write_stacks(
    run: RunDirectory, step: int, phase: str, pids: Sequence[int], title: str, more: Sequence[str] = ()
) -> Path:
    """Write the stacks of processes into the directory of a run, which keeps the newest ``KEPT_FILES`` of such files."""
    moment = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    name = f"{step:06d}-{phase.replace(' ', '-')}-{moment}"
    path = run.stacks / f"{name}.txt"
    if path.exists():
        path = run.stacks / f"{name}-{time.monotonic_ns()}.txt"
    stacks.write(path, pids, title, more)
    for old in sorted(run.stacks.glob("*.txt"), key=lambda one: one.stat().st_mtime)[:-KEPT_FILES]:
        old.unlink(missing_ok=True)
    return path
