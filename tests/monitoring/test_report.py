"""The report: self-contained, escaped, complete, and honest about what never changed."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from rlhf_ray.errors import IntegrityError
from rlhf_ray.monitoring import REGISTRY, Check, Figure, MemoryRecord, Sample, Summary, Table, render_report
from rlhf_ray.monitoring.report.page import RunReport
from rlhf_ray.monitoring.report.summary import Answer, BestOf

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def every_metric(steps: int = 5) -> list[dict[str, Any]]:
    names = [metric.name for metric in REGISTRY if not metric.is_family]
    lines = []
    for step in range(1, steps + 1):
        values = {name: step * 0.5 + place for place, name in enumerate(names)}
        lines.append({**values, "step": step, "timestamp": 100.0 + step, "evaluation/gold_mean": step * 0.1})
    return lines


SUMMARY = Summary(
    facts={"kind": "ppo"},
    figures=(Figure("Gold win rate over SFT", "0.86", "at least 0.80"),),
    closing=Table(("figure", "SFT", "PPO"), (("Gold mean", "0.556", "0.812"),)),
    samples=(
        Sample("<script>alert(1)</script> & more", (Answer("SFT", "a", {"gold": 0.25}), Answer("PPO", "b", {}, False))),
    ),
    checks=(Check("first ratio", "1", "exactly 1", True), Check("tokenizers", "differ", "match", False)),
    best_of=(BestOf(1, 0.0, 0.5), BestOf(4, 0.636, 0.7)),
    memory=MemoryRecord(6.5, 0.5, 11, ((0.0, 1.0), (1.0, 7.0))),
)


def test_the_page_needs_nothing_from_anywhere() -> None:
    html = render_report([RunReport("demo", every_metric(), SUMMARY, "kind: ppo\n")])
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert not {name for name, _ in page.attributes} & {"src", "href", "srcset", "xlink:href", "onclick", "onload"}
    assert "http" not in html and "url(" not in html and "@import" not in html


HOSTILE = "<script>alert(1)</script>'\"&"
"""Would run, close an attribute or begin an entity wherever it was not escaped."""


def hostile(kind: Any) -> Any:
    """A value of a type in which every text is :data:`HOSTILE`."""
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: hostile(hints[field.name]) for field in fields(kind)})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(hostile(argument) for argument in arguments if argument is not Ellipsis)
    if origin is dict:
        return {hostile(arguments[0]): hostile(arguments[1])}
    if origin in (Union, UnionType):
        return hostile(arguments[0])
    values: dict[Any, Any] = {str: HOSTILE, float: 0.5, int: 1, bool: False}
    return values[kind]


def hostile_summary() -> Summary:
    """A summary whose every text is hostile, with numbers that can be drawn."""
    summary = hostile(Summary)
    page = replace(summary.preferences, edges=(0.0, 1.0), histograms={HOSTILE: (1.0,)})
    return replace(summary, preferences=page)


@pytest.mark.parametrize("count", [1, 2])
def test_text_of_models_and_data_is_shown_and_never_run(count: int) -> None:
    run = RunReport(HOSTILE, every_metric(), hostile_summary(), HOSTILE)
    html = render_report([run] * count)
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert {name for name, _ in page.attributes} <= {
        name for name, _ in Page(render_report([RunReport("plain", every_metric(), SUMMARY)] * count)).attributes
    }, "no text has opened an attribute"
    expected = page_texts(run.summary) + 3 + (count - 1)
    assert page.text.count(HOSTILE) >= expected * count, "every text is on the page as it was written"


def page_texts(value: Any) -> int:
    """How many texts a summary holds."""
    if isinstance(value, str):
        return 1
    if isinstance(value, dict):
        return sum(map(page_texts, (*value.keys(), *value.values())))
    if isinstance(value, tuple):
        return sum(map(page_texts, value))
    return sum(page_texts(getattr(value, field.name)) for field in fields(value)) if is_dataclass(value) else 0


def test_every_logged_metric_is_on_the_page() -> None:
    page = Page(render_report([RunReport("demo", every_metric())]))
    for metric in REGISTRY:
        if metric.name in ("step", "update", "weights/version", "time/step") or metric.is_family:
            continue
        assert metric.help in page.text or metric.name in ("gold/mean", "reward/learned"), metric.name
    for title in ("Gold score", "Learned reward", "evaluation/gold_mean", "kl/k1", "kl/k3"):
        assert title in page.text


def test_every_section_has_its_place_and_an_empty_one_has_none() -> None:
    full = render_report([RunReport("demo", every_metric(), SUMMARY, "kind: ppo")])
    headings = re.findall("<h2>(.*?)</h2>", full)
    assert headings == [
        "At the end",
        "Gold score and learned reward",
        "Samples side by side",
        "Self-check at start-up",
        "Curves",
        "Time",
        "Memory",
    ]
    assert full.index("<details><summary>Config</summary><pre>kind: ppo</pre>") < full.index("<h2>")
    assert "Peak 7.00 GB" in full and "cut off" in full and "holds" in full and "fails" in full
    bare = render_report([RunReport("demo", [])])
    assert re.findall("<h2>", bare) == []
    Page(bare)


def test_gold_stands_beside_the_learned_reward_on_one_axis_of_steps() -> None:
    lines = [{"step": step, "timestamp": 1.0, "gold/mean": 0.5, "reward/learned": step * 1.0} for step in (1, 2, 3)]
    html = render_report([RunReport("demo", lines)])
    charts = re.findall("<svg.*?</svg>", html, re.DOTALL)
    both = [chart for chart in charts if "Gold score" in chart and "Learned reward" in chart]
    assert len(both) == 1
    assert both[0].count(">step</text>") == 1
    assert "Metrics that kept one value" not in html


def test_a_metric_that_never_changed_is_a_number_and_not_a_chart() -> None:
    lines = [{"step": step, "timestamp": 1.0, "kl/coefficient": 0.05, "entropy": 1.0 / step} for step in (1, 2, 3)]
    html = render_report([RunReport("demo", lines)])
    assert html.count("<svg") == 1
    constant = html[html.index("Metrics that kept one value") :]
    assert "<td>kl/coefficient</td><td>0.05</td>" in constant


def test_values_that_were_not_finite_leave_a_gap() -> None:
    lines = [{"step": step, "timestamp": 1.0, "entropy": None if step == 3 else float(step)} for step in range(1, 7)]
    html = render_report([RunReport("demo", lines)])
    assert [len(points.split()) for points in re.findall('points="(.*?)"', html)] == [2, 3]


def test_times_add_up_to_the_whole() -> None:
    lines = [
        {"step": 1, "timestamp": 1.0, "time/step": 10.0, "time/rollout": 6.0, "time/update": 3.0},
        {
            "step": 2,
            "timestamp": 2.0,
            "time/step": 10.0,
            "time/rollout": 6.0,
            "time/update": 3.0,
            "time/checkpoint": 1.0,
        },
    ]
    html = render_report([RunReport("demo", lines)])
    rows = re.findall(r"<td>([^<]*)</td><td>([\d.]+) s</td><td>([\d.]+)%</td><td>([\d.]+) s</td>", html)
    assert rows == [
        ("Sampling answers", "12", "60.0", "6"),
        ("Optimizer updates", "6", "30.0", "3"),
        ("Waiting for checkpoints", "1", "5.0", "1"),
        ("Everything else", "1", "5.0", "0.5"),
    ]


def test_several_runs_share_their_charts() -> None:
    runs = [RunReport("first", every_metric(4), SUMMARY), RunReport("second", every_metric(6))]
    html = render_report(runs)
    Page(html)
    entropy = next(chart for chart in re.findall("<svg.*?</svg>", html, re.DOTALL) if "entropy by step" in chart)
    assert ">first</text>" in entropy and ">second</text>" in entropy
    assert "At the end: first" in html and "At the end: second" not in html


def test_a_summary_comes_back_equal_and_a_damaged_one_is_an_error() -> None:
    assert Summary.from_json(SUMMARY.to_json()) == SUMMARY
    assert Summary.from_json(Summary().to_json()) == Summary()
    with pytest.raises(IntegrityError, match=r"runs/x/summary\.json is damaged"):
        Summary.from_json(SUMMARY.to_json()[:-20], "runs/x/summary.json")
