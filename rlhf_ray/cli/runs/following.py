"""Follow a run from its files: a picture on a terminal that is painted again, or lines for what is new.

Invariants: only files of the run directory are read, so that any machine that sees it can follow, and nothing of the run waits.
A file that cannot be read costs a picture, and is an error where it could not from the start, or five times in a row. Following
ends when the run has finished, or on Ctrl-C, which is no failure; without a terminal also when nobody has gone on with the run
for two minutes, in which a driver that died would have been started again.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rlhf_ray.console import printable, write_result
from rlhf_ray.errors import EXIT_DONE, Interrupted, RlhfRayError
from rlhf_ray.monitoring.spans.latest import LatestStep
from rlhf_ray.monitoring.spans.steps import StepLanes
from rlhf_ray.monitoring.terminal.drawing import Pen
from rlhf_ray.monitoring.terminal.live import Phase, RunAlarm, RunState, live_view, log_lines
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.engines import describe
from rlhf_ray.runs.reporting import alarms, config_values, progress_rows

SECONDS_BETWEEN_PICTURES, SECONDS_BETWEEN_LINES = 1.0, 10.0
TRIES = 5
GIVEN_UP_S = 120.0
"""A run that for so long no process has owned, and that gave no sign of life, is not started again by itself."""


def read_state(run: RunDirectory, *, now: float, lanes: StepLanes | None = None) -> RunState:
    """What the files of a run say at a moment, in seconds since 1970; ``lanes`` are those of the last step."""
    told, lines = progress_rows(run), run.metrics.read()
    attempts, commits = run.attempts.read(), run.checkpoints.steps()
    steps = config_values(run.config_text()).get("steps")
    state = told["state"]
    return RunState(
        name=run.path.resolve().name,
        kind=told["kind"],
        state=state.partition(";")[0].partition(",")[0],
        lines=lines,
        total=steps if isinstance(steps, int) else None,
        age_s=now - lines[-1]["timestamp"] if lines else None,
        took_s=(now if state == "running" or not lines else lines[-1]["timestamp"]) - attempts[0]["timestamp"]
        if attempts
        else None,
        committed=max([*commits, run.final_step() or 0]) or None,
        phase=_phase(run, now) if state == "running" else None,
        alarms=[
            RunAlarm(one.alarm.name, one.alarm.severity, f"{one.alarm.meaning} ({one.reading})", one.alarm.way_out)
            for one in alarms(run, now)
        ],
        health=[*_engines(run), *_groups(run)] if state == "running" else (),
        facts=_facts(told),
        lanes=lanes,
    )


def _phase(run: RunDirectory, now: float) -> Phase | None:
    beat = run.heartbeat.read()
    return None if beat is None else Phase(beat.phase, max(now - beat.phase_began, 0.0), beat.phase_usual_s)


def _engines(run: RunDirectory) -> list[tuple[str, str]]:
    return [(f"engine {number}", describe(engine)) for number, engine in enumerate(run.engines.read())]


def _groups(run: RunDirectory) -> list[tuple[str, str]]:
    """What was restarted, and how often; the last time with its reason."""
    last: dict[str, tuple[int, str]] = {}
    for incident in run.incidents.read():
        count, _ = last.get(incident.role, (0, ""))
        last[incident.role] = (count + 1, f"{incident.fault} in step {incident.step}")
    return [(role, f"{count} incidents, the last: {how}") for role, (count, how) in last.items()]


def _facts(told: Mapping[str, str]) -> dict[str, str]:
    shown = {name: told[name] for name in ("useful time", "time lost", "last line") if name in told}
    _, _, way_on = told["state"].partition("; ")
    return shown | ({"to do": way_on} if way_on else {})


def follow(run: RunDirectory) -> int:
    """Show a run until it has finished or the caller wants no more; without a terminal also until nobody goes on with it."""
    try:
        if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
            _paint(run)
        else:
            _tell(run)
    except (Interrupted, KeyboardInterrupt):
        pass
    return EXIT_DONE


class Reader:
    """Reads a run again and again, over a moment in which it cannot be read; what is added to its files it reads once."""

    def __init__(self, run: RunDirectory, *, with_lanes: bool = True) -> None:
        self._run = run
        self._steps = LatestStep(run.spans) if with_lanes else None
        run.remember_lines()
        self._failed = TRIES  # of a run that cannot be read from the start, nothing is waited for

    def __call__(self) -> RunState | None:
        """What its files say now; None where they say nothing at the moment, and an error where that lasts."""
        try:
            state = read_state(self._run, now=time.time(), lanes=self._lanes())
        except (RlhfRayError, OSError):
            if self._failed >= TRIES:
                raise
            self._failed += 1
            return None
        self._failed = 0
        return state

    def _lanes(self) -> StepLanes | None:
        """What the ranks did; a run whose spans cannot be read is shown without them."""
        try:
            return None if self._steps is None else self._steps.read()
        except Exception:
            return None


def pen_of(console: Console) -> Pen:
    """How the terminal is drawn on, at its present width."""
    return Pen(console.width, color=console.color_system is not None, ascii_only="utf" not in console.encoding.lower())


def _paint(run: RunDirectory) -> None:
    console, lines, read = Console(highlight=False), [""], Reader(run)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                state = read()
                if state is not None:
                    lines = live_view(state, pen_of(console), console.height)
                    live.update(Text.from_ansi("\n".join(lines), no_wrap=True), refresh=True)
                if state is not None and state.state == "finished":
                    break
                time.sleep(SECONDS_BETWEEN_PICTURES)
    finally:
        if any(lines):
            write_result("\n".join(lines) + "\n")  # what was shown last stays


def _tell(run: RunDirectory) -> None:
    before, read, alive_at = None, Reader(run, with_lanes=False), time.time()
    while True:
        state, now = read(), time.time()
        if state is not None:
            new = log_lines(before, state)
            alive_at = now if state.state == "running" else max(alive_at, _last_sign(run, now))
            given_up = now - alive_at > GIVEN_UP_S
            if given_up and state.state != "finished":
                way_on = f"; {state.facts['to do']}" if "to do" in state.facts else ""
                how = f"{state.name}: {state.state} after step {state.step}, and nobody goes on with it{way_on}"
                new.append(printable(how))
            if new:
                write_result("".join(f"{time.strftime('%H:%M:%S')} {line}\n" for line in new))
            before = state
            if given_up or state.state == "finished":
                return
        time.sleep(SECONDS_BETWEEN_LINES)


def _last_sign(run: RunDirectory, now: float) -> float:
    """When the driver, which may be on another machine, said last that it lives; never later than now."""
    beat = run.heartbeat.read()
    return 0.0 if beat is None else min(beat.at, now)
