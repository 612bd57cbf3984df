"""Write the report of one run, or of several side by side, as one HTML file that needs nothing else.

Invariants: the page loads nothing (no script, font or image). The template ``page.html`` escapes every text; only the
charts, which escape their own, and the stylesheet go in as they are. A section without content is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.report import curves
from rlhf_ray.monitoring.report.charts import Curve, Panel, line_chart
from rlhf_ray.monitoring.report.lanes import TimeByRank
from rlhf_ray.monitoring.report.preferences import calibration_chart, histogram_chart
from rlhf_ray.monitoring.report.summary import MemoryRecord, PreferencePage, Summary, Table
from rlhf_ray.monitoring.report.templates import render
from rlhf_ray.monitoring.report.tokens import ShownSample, token_samples
from rlhf_ray.monitoring.tokens import SampleRow

ROUNDING = 1.001
"""Steps this much longer than the sum of their phases get a row for the rest; less is rounding."""


NO_ALARMS = Table((), ())


@dataclass(frozen=True)
class RunReport:
    """What the report knows of one run: its name, the lines of ``metrics.jsonl``, its summary, and its config as YAML."""

    name: str
    lines: curves.Lines
    summary: Summary = field(default_factory=Summary)
    config: str = ""
    alarms: Table = NO_ALARMS
    """When alarms held."""
    time_by_rank: TimeByRank | None = None
    """What the spans of its processes say, where it has any."""
    samples: tuple[int, Sequence[SampleRow]] = (0, ())
    """The last step with samples, and these."""


def render_report(runs: Sequence[RunReport]) -> str:
    """The HTML page for one run, or for several with their curves in the same charts."""
    alone = len(runs) == 1
    measured = [curves.Run(run.name, run.lines) for run in runs]
    best_of = next((run.summary.best_of for run in runs if run.summary.best_of), ())
    return render(
        "page.html",
        title=" and ".join(run.name for run in runs),
        what="report",
        runs=[_prepare_run(run, alone=alone) for run in runs],
        reward_charts=_drawn([curves.reward_chart(measured), curves.frontier_chart(measured, best_of)]),
        metric_charts=_drawn(curves.metric_charts(measured)),
        constants=_constants(measured),
    )


@dataclass(frozen=True)
class _PhaseTime:
    """What one phase of the steps took in all, how often it ran, and its share of the whole."""

    label: str
    seconds: float
    count: int
    share: float


@dataclass(frozen=True)
class _RunSections:
    """One run as the template shows it; ``heading`` and ``suffix`` tell runs apart and are empty for a single one."""

    heading: str
    suffix: str
    facts: dict[str, str]
    config: str
    summary: Summary
    alarms: Table
    preference_charts: Sequence[curves.Chart]
    phase_times: Sequence[_PhaseTime]
    time_by_rank: TimeByRank | None
    tokens: Sequence[ShownSample]
    memory_peak: str
    memory_chart: curves.Chart | None


def _prepare_run(run: RunReport, *, alone: bool) -> _RunSections:
    return _RunSections(
        heading="" if alone else run.name,
        suffix="" if alone else f": {run.name}",
        facts=run.summary.facts if alone else {"run": run.name, **run.summary.facts},
        config=run.config,
        summary=run.summary,
        alarms=run.alarms,
        preference_charts=_preference_charts(run.summary.preferences),
        phase_times=_phase_times(run.lines),
        time_by_rank=run.time_by_rank,
        tokens=token_samples(*run.samples),
        memory_peak=_memory_peak(run.summary.memory),
        memory_chart=_memory_chart(run.summary.memory),
    )


def _drawn(charts: Iterable[curves.Chart | None]) -> list[curves.Chart]:
    """The charts that have anything to draw."""
    return [chart for chart in charts if chart is not None and chart.svg]


def _preference_charts(page: PreferencePage | None) -> list[curves.Chart]:
    return [] if page is None else _drawn([calibration_chart(page), histogram_chart(page)])


def _constants(measured: Sequence[curves.Run]) -> Table:
    rows = [
        (name, value, REGISTRY[name].unit, REGISTRY[name].help) for name, value in curves.constants(measured).items()
    ]
    return Table(("metric", "value", "unit", "meaning"), tuple(rows))


def _phase_times(lines: curves.Lines) -> list[_PhaseTime]:
    """Total time of each phase over all steps, longest first, and what the steps took besides."""
    seconds_by_phase: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(curves.TIMES) and value is not None:
                seconds_by_phase.setdefault(name, []).append(value)
    steps = seconds_by_phase.pop("time/step", [])
    in_phases = sum(map(sum, seconds_by_phase.values()))
    whole = max(sum(steps), in_phases)
    if not whole:
        return []
    phases = [
        _PhaseTime(REGISTRY[name].help, sum(seconds), len(seconds), sum(seconds) / whole)
        for name, seconds in seconds_by_phase.items()
    ]
    phases.sort(key=lambda phase: -phase.seconds)
    if whole > in_phases * ROUNDING:
        rest = whole - in_phases
        phases.append(_PhaseTime("Everything else", rest, len(steps), rest / whole))
    return phases


def _memory_peak(memory: MemoryRecord | None) -> str:
    if memory is None:
        return ""
    nodes = ", ".join(f"{name} {size:.2f} GB" for name, size in memory.nodes.items())
    return (
        f"Peak {memory.pss_gb + memory.object_store_gb:.2f} GB: {memory.pss_gb:.2f} GB in {memory.processes} processes "
        f"(PSS) and {memory.object_store_gb:.2f} GB in the object store, sampled every few seconds"
        f"{f'; on {len(memory.nodes)} nodes: {nodes}' if len(memory.nodes) > 1 else ''}"
    )


def _memory_chart(memory: MemoryRecord | None) -> curves.Chart | None:
    if memory is None:
        return None
    curve = Curve("total", memory.history)
    panel = Panel("Memory of all processes and the object store", "GB", [curve], include=(0.0,))
    svg = line_chart([panel], "seconds since the start", "Memory over time", curves.WIDE)
    return curves.Chart(svg, _memory_peak(memory)) if svg else None
