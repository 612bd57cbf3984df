"""A comparison lists what differs and nothing else, calls nothing better where that depends on the run; texts stay texts."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.reading import read_mapping
from rlhf_ray.config.shown import flat, shown_config
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.report.comparison import (
    NOT_SET,
    ComparedRun,
    Setting,
    differences,
    render_comparison,
    value_rows,
)

from .test_report import HOSTILE, Page, every_metric


def settings(**values: Any) -> dict[str, Setting]:
    return {key: Setting(value, f"shown {value}") for key, value in values.items()}


@pytest.mark.parametrize("seed", range(20))
def test_settings_are_listed_if_and_only_if_they_differ(seed: int) -> None:
    draw = random.Random(seed)
    configs = [{f"k{key}": draw.choice([1, True, 1.0, "1", None]) for key in range(8) if draw.random() < 0.8}
               for _ in range(draw.randint(2, 4))]  # fmt: skip
    table = differences([ComparedRun(str(n), (), settings=settings(**one)) for n, one in enumerate(configs)])
    listed = {row[0]: row[1:] for row in table.rows}
    for key in {key for one in configs for key in one}:
        texts = [f"shown {one[key]}" if key in one else NOT_SET for one in configs]
        kinds = {repr(one[key]) if key in one else "" for one in configs}
        assert (key in listed) is (len(kinds) > 1), (key, configs)
        assert key not in listed or list(listed[key]) == texts
    assert len(table.headers) == 1 + len(configs)


def test_a_text_that_is_withheld_is_listed_where_it_differs_and_not_shown() -> None:
    runs = [ComparedRun(name, (), settings={"key": Setting(name, "(withheld)")}) for name in ("one", "two")]
    assert differences(runs).rows == (("key", "(withheld)", "(withheld)"),)


@pytest.mark.parametrize("recipe", ["demo-ppo", "demo-sft", "demo-rm"])
def test_a_config_has_the_keys_under_which_it_is_shown(recipe: str) -> None:
    values = read_mapping(dump_config(load_config(recipe))).values
    assert list(flat(values)) == list(shown_config(values, {}))
    assert flat({"a": {"b": [1, {"c": None}], "d": {}}, "e": 2}) == {"a.b.0": 1, "a.b.1.c": None, "e": 2}


def run(name: str, **values: list[float | None]) -> ComparedRun:
    count = max(len(column) for column in values.values())
    columns = {metric.replace("__", "/"): column for metric, column in values.items()}
    lines = [{"step": n + 1, "timestamp": 1.0, **{key: column[n] for key, column in columns.items() if n < len(column)}}
             for n in range(count)]  # fmt: skip
    return ComparedRun(name, lines)


def test_the_last_and_the_best_value_of_each_run_and_who_leads() -> None:
    first = run("first", gold__mean=[0.1, 0.9, 0.9, None], loss__sft=[3.0, 1.0, 2.0], entropy=[5.0, 4.0])
    second = run("second", gold__mean=[0.2, 0.3], loss__sft=[1.0], kl__k1=[1.0])
    judged, others = value_rows([first, second])
    assert [row.metric for row in judged] == ["gold/mean", "loss/sft"], "in the order of the registry"
    gold, loss = [[(cell.last, cell.best, cell.leads) for cell in row.cells] for row in judged]
    assert gold == [("0.9", "0.9 at 2", True), ("0.3", "0.3 at 2", False)], "the first of equal ones; higher is better"
    assert loss == [("2", "1 at 2", False), ("1", "1 at 1", False)], "lower is better, and nobody leads a draw"
    assert {row.metric: [cell.last for cell in row.cells] for row in others} == {
        "entropy": ["4", ""],
        "kl/k1": ["", "1"],
    }
    assert all(not cell.best and not cell.leads for row in others for cell in row.cells)
    alone, _ = value_rows([run("a", gold__mean=[0.5]), run("b", entropy=[1.0])])
    assert [cell.leads for cell in alone[0].cells] == [False, False], "who is alone leads nobody"


def test_better_is_said_of_metrics_with_one_meaning_alone() -> None:
    higher = [
        "gold/mean",
        "accuracy",
        "evaluation/reward",
        "evaluation/pass_at_8",
        "evaluation/reward/wiki",
        "useful_time",
    ]
    lower = ["loss/rm", "evaluation/loss", "evaluation/calibration_error"]
    open_ones = ["entropy", "kl/k1", "length/response", "evaluation/reward_start", "evaluation/length", "loss/policy"]
    assert [REGISTRY[name].better for name in higher] == ["higher"] * len(higher)
    assert [REGISTRY[name].better for name in lower] == ["lower"] * len(lower)
    assert [REGISTRY[name].better for name in open_ones] == [None] * len(open_ones)


def test_a_run_has_one_letter_and_one_colour_in_every_chart() -> None:
    runs = [ComparedRun(name, every_metric(4 + n)) for n, name in enumerate(("first", "second", "third"))]
    html = render_comparison(runs)
    Page(html)
    charts = re.findall("<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) > 20
    for chart in charts:
        legend = re.findall(r'<rect class="f(\d)".*?/>\s*<text class="legend".*?>(.*?)</text>', chart)
        assert legend and set(legend) <= {("0", "A"), ("1", "B"), ("2", "C")}, legend
    assert html.index("Settings that differ") < html.index("Final and best values") < html.index("<svg")
    assert "None: the configs and inputs are the same" in html


def test_each_chart_has_a_name_of_its_own_also_in_a_family() -> None:
    runs = [run(name, **{f"critical_path__{role}": [n, 2.0] for role in ("policy", "driver")}, idle__policy=[n, 1.0])
            for n, name in enumerate("ab")]  # fmt: skip
    titles = re.findall('<text class="title"[^>]*>(.*?)(?: <tspan|</text>)', render_comparison(runs))
    assert sorted(titles) == ["critical_path/driver", "critical_path/policy", "idle/policy"]


LINES = [{"step": 1, "timestamp": 1.0, "gold/mean": 0.5, "entropy": 1.0}, {"step": 2, "timestamp": 2.0, "entropy": 2.0}]


def test_texts_of_runs_are_shown_and_never_run() -> None:
    one = ComparedRun(HOSTILE, LINES, {HOSTILE: HOSTILE}, {HOSTILE: Setting(1, HOSTILE)})
    other = ComparedRun(HOSTILE, LINES, {HOSTILE: HOSTILE}, {HOSTILE: Setting(2, f"{HOSTILE}\x1b\u202e")})
    html = render_comparison([one, other])
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags) and "<script" not in html
    plain = render_comparison([ComparedRun("a", LINES, {"a": "b"}, {"a": Setting(n, "c")}) for n in (1, 2)])
    assert {name for name, _ in page.attributes} <= {name for name, _ in Page(plain).attributes}
    assert page.text.count(HOSTILE) >= 2 + 4 + 3 and "\\x1b\\u202e" in page.text and "\x1b" not in html
    assert "http" not in html and "url(" not in html and "@import" not in html
