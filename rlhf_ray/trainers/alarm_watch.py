"""Watch a run for its alarms: every few seconds read how it is, tell Ray, and log and record which alarms begin and end.

Invariants: what holds follows from the alarms of the registry and the readings alone, as in ``rlhf-ray status``. What Ray is
told is told again for as long as it holds, since Ray forgets a gauge after 20 s. Nothing that fails here ends a run. A run that
ended in order says so last.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.console import get_logger
from rlhf_ray.engine.saving.room import used_share
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.monitoring import events
from rlhf_ray.monitoring.alarms.alarm import Alarm, holding
from rlhf_ray.monitoring.alarms.catalogue import DRIFT_S
from rlhf_ray.monitoring.alarms.readings import Event, Readings, State
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.monitoring.registry import REGISTRY, STATE
from rlhf_ray.monitoring.run_readings import add_line
from rlhf_ray.monitoring.stalls import Limits
from rlhf_ray.monitoring.vitals import Progress, room_needed_gb, vitals
from rlhf_ray.processes import progress
from rlhf_ray.rewards.source import CALL
from rlhf_ray.runs.alarms.heartbeat import ENDED, Heartbeat
from rlhf_ray.runs.alarms.record import AlarmChange
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import readings_of
from rlhf_ray.trainers.commit_schedule import LONGEST_S, TIMES_ITS_LENGTH

EVERY_S = 5.0
"""Four times before Ray forgets a gauge."""
JOIN_S = 10.0
CHECKPOINT = "checkpoint"
"""The phase for which training stands still for a commit."""
REMEMBERED_S = 2.0 * DRIFT_S
EVENTS_S = 3600.0
"""For so long an event stays in the heartbeat."""
PRUNED_EVERY = 100
REMEMBERED_STEPS = 50
LIVE = frozenset(metric.name for metric in REGISTRY.groups()[STATE])
FLOOR_SHARE = 0.5
"""Of ``run.stall_floor_s``: an alarm comes before the watchdog ends anything."""


class Exporter(Protocol):
    """Where metrics go besides the run directory, as far as it is told every few seconds."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take values."""

    def again(self) -> None:
        """Tell once more what still holds."""


class AlarmWatch:
    """A thread that watches a run from :meth:`start` to :meth:`stop`; a sink of the metrics of its steps, too."""

    def __init__(
        self,
        run: RunDirectory,
        config: TrainingJob,
        clock: PhaseClock,
        exporters: tuple[Exporter, ...] = (),
    ) -> None:
        self.run, self.config, self.clock, self.exporters = run, config, clock, exporters
        self.engines_down: Callable[[], float] | None = None
        """How many rollout engines are down; None where there are none."""
        self.holding: dict[str, tuple[Alarm, float]] = {}
        """The alarms that hold, and since when."""
        cluster = config.cluster
        unknown_s = max(cluster.start_timeout_s, cluster.call_timeout_s)
        self._limits = Limits(FLOOR_SHARE * config.run.stall_floor_s, unknown_s)
        self._alarms = REGISTRY.alarms
        self._lock = threading.Lock()
        self._states: dict[str, list[State]] = {}
        self._events: dict[str, list[Event]] = {}
        self._live_events: dict[str, list[Event]] = {}
        self._steps_s: list[float] = []
        self._step = 0
        self._last_step_at: float | None = None
        self._started = self._committed_at = 0.0
        self._committed = 0
        self._measured = (0, 0)
        """A commit, and what it takes on disk in bytes."""
        self._last_event = events.newest()
        self._looks = 0
        self._told: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="alarms", daemon=True)
        self._log = get_logger("alarms")

    def start(self) -> AlarmWatch:
        """Take over what earlier attempts have recorded, and begin."""
        now = time.time()
        lines, before = self.run.metrics.read(), readings_of(self.run).since(now - REMEMBERED_S)
        self._states = {name: list(every) for name, every in before.states.items()}
        self._events = {name: list(every) for name, every in before.events.items()}
        self._steps_s = [line["time/step"] for line in lines if line.get("time/step") is not None]
        self._step = int(lines[-1]["step"]) if lines else 0
        self._started, self._committed, self._committed_at = now, self._newest_commit(), time.monotonic()
        self._guarded("read", self.look)  # so that the run has a sign of life from its start on
        self._thread.start()
        return self

    def stop(self, *, in_order: bool) -> None:
        """End the thread; of a run that ended in order no alarm holds any more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)
        self._guarded("read", self.look)  # what came since the last look, be it over now
        if in_order:
            self._started = -abs(self._started)
            self._guarded("read", self.look)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the metrics of a step."""
        with self._lock:
            add_line(values, time.time(), self._states, self._events)
            if "time/step" in values:
                self._step, self._last_step_at = step, time.monotonic()
                self._steps_s = [*self._steps_s[-REMEMBERED_STEPS:], values["time/step"]]

    def close(self) -> None:
        """Nothing to do: :meth:`stop` ends it."""

    def _watch(self) -> None:
        progress.only_watches()  # else each heartbeat that reaches the disk would hide that the driver hangs
        while not self._ended.wait(EVERY_S):
            self._guarded("read", self.look)

    def _guarded(self, what: str, work: Callable[[], None]) -> None:
        """Do something that may fail, as where the disk or Ray has gone; each kind of failure is said once."""
        try:
            work()
        except Exception as error:
            if what not in self._told:
                self._log.warning("the alarms of the run: %s failed (%r): training goes on", what, error)
            self._told.add(what)

    def look(self) -> None:
        """Read how the run is, tell it, and say which alarms begin and end."""
        now, values, counted = time.time(), self._values(), self._counted()
        with self._lock:
            add_line({**values, **dict.fromkeys(self._states.keys() & LIVE - values.keys())}, now, self._states, {})
            for at, name, by in counted:
                self._live_events.setdefault(name, []).append((at, by))
                self._events.setdefault(name, []).append((at, by))
            self._looks += 1
            if self._looks % PRUNED_EVERY == 0:
                kept = Readings(self._states, self._events).since(now - REMEMBERED_S)
                self._states = {name: list(every) for name, every in kept.states.items()}
                self._events = {name: list(every) for name, every in kept.events.items()}
            readings = Readings({**self._states}, {**self._events})
            held = [] if self._started < 0 else holding(self._alarms, readings, now)
            said = [(alarm, alarm.condition.reading(readings, now)) for alarm in held]
        for exporter in self.exporters:
            self._guarded("Ray", partial(self._export, exporter, values, counted))
        self._say(said, now)
        recent = {name: [one for one in every if one[0] > now - EVENTS_S] for name, every in self._live_events.items()}
        self._live_events = {name: every for name, every in recent.items() if every}
        phase = self.clock.open()[-1]
        doing, began = phase.name, now - (time.monotonic() - phase.entered_at)
        if self._ended.is_set():
            doing, began = ENDED, now
        self.run.heartbeat.write(Heartbeat(now, doing, began, phase.usual_s, values, self._live_events))

    def _values(self) -> dict[str, float]:
        now, newest = time.monotonic(), self._newest_commit()
        if newest != self._committed:
            self._committed, self._committed_at = newest, now
        known = Progress(
            now=now,
            last_step_at=self._last_step_at,
            steps_s=self._steps_s,
            phases=self.clock.open(),
            committed_at=self._committed_at,
            commit_every=self.config.checkpoint.every_steps,
            reward_call_s=events.oldest_call(CALL),
            usual_reward_call_s=events.usual_call(CALL),
        )
        stands_still_s = self.clock.durations.median(CHECKPOINT) or 0.0
        longest_s = max(LONGEST_S, TIMES_ITS_LENGTH * stands_still_s)  # as the schedule of commits has it
        values = {"run/started": self._started, **vitals(known, self._limits, longest_s)}
        values |= {"disk/free_gb": shutil.disk_usage(self.run.path).free / 1e9, "memory/used_share": used_share()}
        values["disk/needed_gb"] = room_needed_gb(self._commit_bytes(newest))
        if self.engines_down is not None:
            values["rollout/engines_down"] = self.engines_down()
        return values

    def _counted(self) -> list[tuple[float, str, float]]:
        found = events.counted_after(self._last_event)
        if found:
            self._last_event = found[-1][0]
        return [(at, name, by) for _, at, name, by in found]

    def _export(self, exporter: Exporter, values: Mapping[str, float], counted: list[tuple[float, str, float]]) -> None:
        exporter.log(self._step, values)
        for _, name, by in counted:
            exporter.log(self._step, {name: by})
        exporter.again()

    def _say(self, said: list[tuple[Alarm, str]], now: float) -> None:
        names = {alarm.name for alarm, _ in said}
        for alarm, began in [one for name, one in self.holding.items() if name not in names]:
            del self.holding[alarm.name]
            self._log.info("%s is over after %.0f s", alarm.name, now - began)
            self._record(alarm, now, began=False, reading="")
        for alarm, reading in said:
            if alarm.name in self.holding:
                continue
            self.holding[alarm.name] = (alarm, now)
            level = {"critical": self._log.error, "warning": self._log.warning, "advice": self._log.info}[
                alarm.severity
            ]
            level("%s (%s): %s (%s). %s", alarm.name, alarm.severity, alarm.meaning, reading, alarm.way_out)
            self._record(alarm, now, began=True, reading=reading)

    def _record(self, alarm: Alarm, at: float, *, began: bool, reading: str) -> None:
        change = AlarmChange(at, self._step, alarm.name, alarm.severity, began, reading)
        self._guarded("writing alarms.jsonl", partial(self.run.alarms.add, change))

    def _newest_commit(self) -> int:
        try:
            return max(self.run.checkpoints.steps(), default=0)
        except (OSError, RlhfRayError):
            return 0

    def _commit_bytes(self, step: int) -> int:
        """What the newest commit takes on disk; a file that goes meanwhile takes nothing."""
        if not step:
            return 0
        if step != self._measured[0]:
            self._measured = step, _size(self.run.checkpoints.checkpoint_path(step))
        return self._measured[1]


def _size(directory: Path) -> int:
    total = 0
    for where, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except OSError:
                continue
    return total
