"""The report of run directories, written from what lies in them.

Always true: a report can be made again at any time, from the files alone, while the run goes on as after its end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.config.reading import read_mapping
from rlhf_ray.monitoring.report.page import RunReport, render_report
from rlhf_ray.runs.directory import RunDirectory


def write_report(runs: Sequence[RunDirectory], output: str | Path | None = None) -> Path:
    """Write the report of one run, or of several side by side, and say where: by default into the first run."""
    path = runs[0].report_path if output is None else Path(output)
    storage.write_file(path, render_report([_report_of(run) for run in runs]))
    return path


def status(run: RunDirectory) -> dict[str, str]:
    """How far a run is: what stands in its files, and whether a process owns it."""
    lines, commits = run.metrics.read(), run.checkpoints.steps()
    told = {"run": str(run.path), "state": _state(run), **_facts(run)}
    if lines:
        told["last line"] = f"{_duration(time.time() - lines[-1]['timestamp'])} ago"
    told["last commit"] = f"step {commits[-1]}" if commits else "none"
    return told


def _state(run: RunDirectory) -> str:
    if run.is_owned():
        return "running"
    if run.summary_path.exists():
        return "finished"
    return f"stopped; go on with: rlhf-ray resume {run.path}"


def _report_of(run: RunDirectory) -> RunReport:
    summary = run.summary()
    return RunReport(
        name=run.path.resolve().name,
        lines=run.metrics.read(),
        summary=replace(summary, facts={**_facts(run), **summary.facts}),
        config=run.config_text(),
    )


def _facts(run: RunDirectory) -> dict[str, str]:
    """What the files alone tell of a run."""
    facts = {"kind": str(read_mapping(run.config_text()).values.get("kind", "unknown"))}
    starts = [line["timestamp"] for line in run.attempts.read()]
    lines = run.metrics.read()
    if starts:
        facts["started"] = time.strftime("%Y-%m-%d %H:%M", time.localtime(starts[0]))
    if starts and lines:
        facts["took"] = _duration(lines[-1]["timestamp"] - starts[0])
        facts["steps"] = str(lines[-1]["step"])
    if len(starts) > 1:
        facts["starts"] = str(len(starts))
    return facts


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
