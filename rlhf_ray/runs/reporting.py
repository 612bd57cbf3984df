"""Write the report of runs, and describe their state, from the files in their directories.

Invariants: a report can be made at any time from these files alone, during a run as well as after it. Which alarms hold follows
from them as it does for the run itself.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.reading import read_mapping
from rlhf_ray.config.shown import shown_value, without_secrets_in
from rlhf_ray.config.writing import write_mapping, write_value
from rlhf_ray.console import duration, get_logger
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.monitoring.alarms.alarm import Alarm, holding
from rlhf_ray.monitoring.alarms.readings import Readings
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.report.lanes import TimeByRank, time_by_rank
from rlhf_ray.monitoring.report.page import RunReport, render_report
from rlhf_ray.monitoring.report.summary import Table
from rlhf_ray.monitoring.run_readings import of_lines, with_heartbeat
from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.useful_time import Interruption, UsefulTime, useful_time
from rlhf_ray.runs.alarms.record import history
from rlhf_ray.runs.clusters import remembered
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.engines import describe
from rlhf_ray.runs.incidents import START, Incident
from rlhf_ray.storage.output import OutputFile


def write_report(runs: Sequence[RunDirectory], output: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Write the report of one run, or of several side by side; returns its path, by default in the first run.

    There it takes the place of the one before. A file at ``output`` is written over only with ``overwrite``.
    """
    if output is not None:
        file = OutputFile(Path(output), overwrite=overwrite, reads=[path for run in runs for path in run.files()])
        file.check()
        return file.write(render_report([_read_run(run) for run in runs]))
    path = runs[0].report_path
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise RequestError(f"{path} is no file, so no report takes its place: remove it, or name a file with --output")
    storage.write_file(path, render_report([_read_run(run) for run in runs]))
    return path


def close_run(run: RunDirectory, *, keep_commit: bool) -> None:
    """Write the report of a run that has its ``closing.json``; it counts as finished only then.

    Unless the config wants commits, that of the last step, which was there for the case that the closing failed, goes.
    """
    write_report([run])
    run.write_summary(run.summary())
    step = run.final_step()
    if not keep_commit and step is not None:
        run.checkpoints.remove(step)


def status(run: RunDirectory) -> dict[str, str]:
    """How far a run is, as rows of a table: facts from its files, and whether a process owns it."""
    checkpoints = run.checkpoints.steps()
    rows = {"run": str(run.path), **progress_rows(run)}
    cluster = remembered(run)
    if cluster is not None:
        rows["cluster"] = f"{cluster.address} ({cluster.session})"
    if run.is_owned():
        rows |= {f"engine {number}": describe(engine) for number, engine in enumerate(run.engines.read())}
    rows["last commit"] = f"step {checkpoints[-1]}" if checkpoints else "none"
    for one in alarms(run):
        alarm = one.alarm
        rows[alarm.name] = f"{alarm.severity}: {alarm.meaning} ({one.reading}). {alarm.way_out}"
    return rows


def progress_rows(run: RunDirectory) -> dict[str, str]:
    """The rows of :func:`status` that say whether it goes on, since when, and how far it is."""
    lines = run.metrics.read()
    rows = {"state": _state(run), **facts(run)}
    if lines:
        rows["last line"] = f"{duration(time.time() - lines[-1]['timestamp'])} ago"
    return rows


@dataclass(frozen=True)
class HeldAlarm:
    """An alarm that holds, and what is read at the moment."""

    alarm: Alarm
    reading: str

    def plain(self) -> dict[str, str]:
        """As plain JSON."""
        alarm = self.alarm
        return {
            "alarm": alarm.name,
            "severity": alarm.severity,
            "meaning": alarm.meaning,
            "reading": self.reading,
            "way_out": alarm.way_out,
        }


def alarms(run: RunDirectory, now: float | None = None) -> list[HeldAlarm]:
    """The alarms that hold, the gravest first.

    None of a run that has ended in order, or has just begun. Of one whose driver is gone it is known only that it is, and how
    the disk is.
    """
    now = time.time() if now is None else now
    beat = run.heartbeat.read()
    starts = [line["timestamp"] for line in run.attempts.read()]
    if beat is None or beat.at < max(starts, default=0.0) or beat.values.get("run/started", 0.0) <= 0.0:
        return []
    disk = {"disk/free_gb": shutil.disk_usage(run.path).free / 1e9}
    if run.is_owned():
        readings = with_heartbeat(readings_of(run), beat.at, beat.values, beat.events)
    else:
        needed = {name: beat.values[name] for name in ("run/started", "disk/needed_gb") if name in beat.values}
        readings = with_heartbeat(of_lines([]), beat.at, needed, {})
    readings = with_heartbeat(readings, now, disk, {})
    held = holding(REGISTRY.alarms, readings, now)
    return [HeldAlarm(alarm, alarm.condition.reading(readings, now)) for alarm in held]


def readings_of(run: RunDirectory) -> Readings:
    """What the lines of a run's metrics tell its alarms, those that a resume moved aside among them."""
    starts = [line["timestamp"] for line in run.attempts.read()]
    return of_lines(run.metrics.read(), run.void_metrics.read(), starts)


def _alarm_table(run: RunDirectory) -> Table:
    """The alarms that there were, for the report."""
    by_name = {alarm.name: alarm for alarm in REGISTRY.alarms}
    starts = [line["timestamp"] for line in run.attempts.read()]
    signs, beat = [line["timestamp"] for line in (*run.metrics.read(), *run.attempts.read())], run.heartbeat.read()
    signs += [] if beat is None else [beat.at]
    goes_on = run.is_owned() and not run.closing_path.exists()  # the last report is written at the end of a run
    last_sign = None if goes_on else max(signs, default=0.0)
    rows = []
    for past in history(run.alarms.read(), starts, last_sign):
        alarm = by_name.get(past.alarm)
        lasted = "holds" if past.ended is None else duration(past.ended - past.began)
        began = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(past.began))}, after step {past.step}"
        texts = ("", "") if alarm is None else (f"{alarm.meaning} ({past.reading})", alarm.way_out)
        rows.append((past.alarm, past.severity, began, lasted, *texts))
    return Table(("alarm", "severity", "began", "lasted", "meaning", "way out"), tuple(rows))


def time_of(run: RunDirectory, *, now: float | None = None, line: Mapping[str, Any] | None = None) -> UsefulTime:
    """Where the time of a run went, up to ``now`` if it is under way; ``line`` is one of metrics that is not written yet."""
    steps = [*run.checkpoints.steps(), run.final_step() or 0]
    void = run.void_metrics.read()
    lines = [*run.metrics.read(), *([] if line is None else [line])]
    interruptions = [_interruption(incident) for incident in run.incidents.read()]
    return useful_time(run.attempts.read(), lines, void, interruptions, committed=max(steps), now=now)


def _interruption(incident: Incident) -> Interruption:
    undone = (incident.back_to, incident.step) if incident.fault == "numeric" else (0, 0)
    hung = incident.fault in ("stalled", "deadline")
    repeats = incident.fault != "numeric" and (
        hung or incident.phase != START
    )  # a start that goes on is none that is repeated
    return Interruption(incident.at, incident.seconds, hung=hung, repeats=repeats, undone=undone)


def _time_facts(run: RunDirectory) -> dict[str, str]:
    spent = time_of(run, now=time.time() if run.is_owned() else None)
    if not spent.whole_s:
        return {}
    lost = sorted(spent.lost_s.items(), key=lambda reason: -reason[1])
    facts = {"useful time": f"{spent.share:.1%} of {duration(spent.whole_s)}"}
    if lost:
        facts["time lost"] = ", ".join(f"{reason} {duration(seconds)}" for reason, seconds in lost)
    return facts


def _state(run: RunDirectory) -> str:
    if run.is_owned():
        return "running"
    if run.is_finished:
        return "finished"
    if run.closing_path.exists():
        return f"trained; its report is missing; write it with: rlhf-ray resume {run.path}"
    steps = run.checkpoints.steps()
    if steps and run.final_step() == steps[-1]:
        return f"trained, final/ is written; its last evaluation and its report are missing: rlhf-ray resume {run.path}"
    elsewhere = "" if remembered(run) is None else f" on a node of its cluster, or rlhf-ray submit --resume {run.path}"
    return f"stopped; go on with: rlhf-ray resume {run.path}{elsewhere}"


def _read_run(run: RunDirectory) -> RunReport:
    summary = run.summary()
    return RunReport(
        name=run.path.resolve().name,
        lines=run.metrics.read(),
        summary=replace(summary, facts={**facts(run), **summary.facts}),
        config=_shown_config(run),
        alarms=_alarm_table(run),
        time_by_rank=_time_by_rank(run),
        samples=_last_samples(run),
    )


def _shown_config(run: RunDirectory) -> str:
    """The config without secrets, as trackers have it: a report is for others."""
    document = read_mapping(run.config_text())
    if document.problems:
        return (
            f"{run.config_path} is damaged, so it is not shown: restore it from a backup"  # and what is wrong quotes it
        )
    return write_mapping(without_secrets_in(document.values))


def _last_samples(run: RunDirectory) -> tuple[int, list[dict[str, Any]]]:
    """The samples of the last step that has any; left out where they cannot be read, as spans are."""
    try:
        return run.read_samples()
    except RequestError:  # none were kept
        return 0, []
    except RlhfRayError as error:
        get_logger("runs").warning("the report has no tokens: %s", error)
        return 0, []


def _time_by_rank(run: RunDirectory) -> TimeByRank | None:
    """Why a step was slow; left out where its spans cannot be read, since a run does not stay without a report for that."""
    try:
        return time_by_rank(SpanFiles(run.spans).read().attempts())
    except Exception as error:
        get_logger("spans").warning(
            "%s cannot be read, so the report does not say why a step was slow: %r; without these files it is written as for a "
            "run without spans", run.spans, error,
        )  # fmt: skip
        return None


@lru_cache(maxsize=8)
def config_values(text: str) -> Mapping[str, Any]:
    """What stands in a config; one that is read again and again is parsed once, which takes longer than all else."""
    return read_mapping(text).values


def facts(run: RunDirectory) -> dict[str, str]:
    """Facts about a run that its files show."""
    told = {"kind": str(config_values(run.config_text()).get("kind", "unknown"))}
    starts = [line["timestamp"] for line in run.attempts.read()]
    lines = run.metrics.read()
    if starts:
        told["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(starts[0]))
    if starts and lines:
        told["took"] = duration(lines[-1]["timestamp"] - starts[0])
        told["steps"] = str(lines[-1]["step"])
    if len(starts) > 1:
        told["starts"] = str(len(starts))
    told |= _time_facts(run)
    if changed := _changes(run):
        told["changed"] = "; ".join(changed)
    return told


def _shown_value(change: Mapping[str, Any], which: str) -> str:
    return write_value(shown_value(change["key"], change[which]))


def _changes(run: RunDirectory) -> list[str]:
    """What each attempt changed, and after which step."""
    phrases = []
    for line in run.attempts.read():
        changes = [
            f"{one['key']} {_shown_value(one, 'from')} -> {_shown_value(one, 'to')}" for one in line.get("changes", ())
        ]
        changes += [f"{one['key']} accepted with other content" for one in line.get("accepted", ())]
        if changes:
            phrases.append(f"after step {line['from_step']}: {', '.join(changes)}")
    return phrases
