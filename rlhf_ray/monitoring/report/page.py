"""The report of a run, or of several side by side: one HTML file that needs nothing else.

Always true: the page asks for nothing from anywhere (no script, no font, no image), text from models and data is
escaped, and a section without content is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.report import curves
from rlhf_ray.monitoring.report.charts import Curve, Panel, line_chart, number
from rlhf_ray.monitoring.report.preferences import calibration_chart, histogram_chart
from rlhf_ray.monitoring.report.summary import Answer, Check, MemoryRecord, Sample, Summary, Table

STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True)
class RunReport:
    """What the report knows of one run."""

    name: str
    lines: curves.Lines
    summary: Summary = field(default_factory=Summary)
    config: str = ""


def render_report(runs: Sequence[RunReport]) -> str:
    """The page for one run, or for several with their curves in the same charts."""
    title = " and ".join(run.name for run in runs)
    body = "\n".join(part for part in _body(title, runs) if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}: report</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _body(title: str, runs: Sequence[RunReport]) -> Iterable[str]:
    measured = [curves.Run(run.name, run.lines) for run in runs]
    yield f"<header><h1>{escape(title)}</h1>"
    yield from (_facts(run, alone=len(runs) == 1) for run in runs)
    yield "</header>"
    for run in runs:
        yield _section("" if len(runs) == 1 else run.name, _figures(run))
        yield _section(_of("At the end", run, runs), _table(run.summary.closing))
    yield _reward_section(measured, runs)
    for run in runs:
        yield from _preferences(run, runs)
        yield _section(_of("Samples side by side", run, runs), _samples(run.summary.samples))
        yield _section(_of("Self-check at start-up", run, runs), _checks(run.summary.checks))
    yield _section("Curves", _charts(curves.metric_charts(measured)))
    yield _section("What never changed", _constants(measured))
    for run in runs:
        yield _section(_of("Time", run, runs), _times(run.lines))
        yield _section(_of("Memory", run, runs), _memory(run.summary.memory))


def _of(heading: str, run: RunReport, runs: Sequence[RunReport]) -> str:
    return heading if len(runs) == 1 else f"{heading}: {run.name}"


def _section(heading: str, content: str) -> str:
    title = f"<h2>{escape(heading)}</h2>" if heading else ""
    return f"<section>{title}\n{content}\n</section>" if content else ""


def _facts(run: RunReport, alone: bool) -> str:
    facts = dict(run.summary.facts) if alone else {"run": run.name, **run.summary.facts}
    spans = "".join(f"<span>{escape(name)} {escape(value)}</span>" for name, value in facts.items())
    config = f"<details><summary>Config</summary><pre>{escape(run.config)}</pre></details>" if run.config else ""
    return (f'<p class="facts">{spans}</p>' if spans else "") + config


def _figures(run: RunReport) -> str:
    cards = "".join(
        f'<div class="figure"><span>{escape(figure.label)}</span><b>{escape(figure.value)}</b>'
        f"<span>{escape(figure.note)}</span></div>"
        for figure in run.summary.figures
    )
    return f'<div class="figures">{cards}</div>' if cards else ""


def _table(table: Table | None, style: str = "") -> str:
    if table is None or not table.rows:
        return ""
    head = "".join(f"<th>{escape(header)}</th>" for header in table.headers)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return _sheet(f"<tr>{head}</tr>", rows, style)


def _sheet(head: str, rows: str, style: str = "") -> str:
    return (
        f'<div class="card scroll"><table class="{style}"><thead>{head}</thead><tbody>\n{rows}\n</tbody></table></div>'
    )


def _charts(charts: Iterable[curves.Chart | None], style: str = "charts") -> str:
    cards = "\n".join(
        f'<figure class="card">{_group(chart)}{chart.svg}<figcaption>{escape(chart.caption)}</figcaption></figure>'
        for chart in charts
        if chart is not None and chart.svg
    )
    return f'<div class="{style}">\n{cards}\n</div>' if cards else ""


def _group(chart: curves.Chart) -> str:
    return f'<span class="group">{escape(chart.group)}</span>' if chart.group else ""


def _reward_section(measured: Sequence[curves.Run], runs: Sequence[RunReport]) -> str:
    best_of = next((run.summary.best_of for run in runs if run.summary.best_of), ())
    charts = [curves.reward_chart(measured), curves.frontier_chart(measured, best_of)]
    return _section("Gold score and learned reward", _charts(charts, "charts wide"))


def _preferences(run: RunReport, runs: Sequence[RunReport]) -> Iterable[str]:
    page = run.summary.preferences
    if page is None:
        return
    charts = _charts([calibration_chart(page), histogram_chart(page)], "charts wide")
    yield _section(_of("Held-out pairs", run, runs), charts + _table(page.sources))
    yield _section(_of("What it learned besides the rule", run, runs), _table(page.probes))
    yield _section(_of("The worst held-out pairs", run, runs), _table(page.worst, "text"))


def _constants(measured: Sequence[curves.Run]) -> str:
    rows = [
        (name, value, REGISTRY[name].unit, REGISTRY[name].help) for name, value in curves.constants(measured).items()
    ]
    return _table(Table(("metric", "value", "unit", "meaning"), tuple(rows)), "text")


def _samples(samples: Sequence[Sample]) -> str:
    if not samples:
        return ""
    head = (
        "<tr><th>prompt</th>" + "".join(f"<th>{escape(answer.label)}</th>" for answer in samples[0].answers) + "</tr>"
    )
    rows = "\n".join(
        f'<tr><td class="words">{escape(sample.prompt)}</td>' + "".join(map(_answer, sample.answers)) + "</tr>"
        for sample in samples
    )
    return _sheet(head, rows, "text even")


def _answer(answer: Answer) -> str:
    scores = " · ".join(f"{escape(name)} {number(value)}" for name, value in answer.scores.items())
    cut = "" if answer.finished else ' <span class="badge bad">cut off</span>'
    return f'<td class="words">{escape(answer.text)}{cut}<span class="scores">{scores}</span></td>'


def _checks(checks: Sequence[Check]) -> str:
    if not checks:
        return ""
    head = "<tr><th>what must hold</th><th>measured</th><th>bound</th><th></th></tr>"
    rows = "\n".join(
        f"<tr><td>{escape(check.name)}</td><td>{escape(check.value)}</td><td>{escape(check.bound)}</td>"
        f"<td>{_badge(check.passed)}</td></tr>"
        for check in checks
    )
    return _sheet(head, rows, "text")


def _badge(passed: bool) -> str:
    return '<span class="badge good">holds</span>' if passed else '<span class="badge bad">fails</span>'


def _times(lines: curves.Lines) -> str:
    totals: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            if name.startswith(curves.TIMES) and value is not None:
                totals.setdefault(name, []).append(value)
    steps = totals.pop("time/step", [])
    named = sum(map(sum, totals.values()))
    whole = max(sum(steps), named)
    if not whole:
        return ""
    parts = [(REGISTRY[name].help, sum(values), len(values)) for name, values in totals.items()]
    parts.sort(key=lambda part: -part[1])
    if whole > named * 1.001:
        parts.append(("Everything else", whole - named, len(steps)))
    rows = "\n".join(_time_row(label, seconds, count, seconds / whole) for label, seconds, count in parts)
    return _sheet("<tr><th>phase</th><th>total</th><th>share</th><th>each time</th><th></th></tr>", rows)


def _time_row(label: str, seconds: float, count: int, share: float) -> str:
    return (
        f"<tr><td>{escape(label)}</td><td>{number(seconds, 3)} s</td><td>{share:.1%}</td>"
        f'<td>{number(seconds / count, 3)} s</td><td class="bar"><i style="width:{share:.1%}"></i></td></tr>'
    )


def _memory(memory: MemoryRecord | None) -> str:
    if memory is None:
        return ""
    peak = (
        f"Peak {memory.pss_gb + memory.object_store_gb:.2f} GB: {memory.pss_gb:.2f} GB in {memory.processes} processes "
        f"(PSS) and {memory.object_store_gb:.2f} GB in the object store, sampled each second"
    )
    curve = Curve("total", memory.history)
    panel = Panel("Memory of all processes and the object store", "GB", [curve], include=(0.0,))
    chart = line_chart([panel], "seconds since the start", "Memory over time", curves.WIDE)
    return _charts([curves.Chart(chart, peak)], "charts wide") or f"<p>{peak}</p>"
