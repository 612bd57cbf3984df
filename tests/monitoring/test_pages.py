"""The report and the comparison in a browser: nothing is asked for or complained of, and nothing is wider than the screen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.runs.directory import RunDirectory

from ..browser import VIEWS, Watched, chromium
from .test_report import HOSTILE, SUMMARY
from .test_tokens import sample


def make(path: Path, rate: float) -> RunDirectory:
    """A run of 20 steps with samples whose texts are hostile."""
    run = RunDirectory.create(path, f"kind: ppo\nrun: {{name: {path.name}}}\npolicy: {{learning_rate: {rate}}}\n")
    for step in range(1, 21):
        values = {"gold/mean": step * rate, "reward/learned": step / 10, "kl/k1": step / 5, "time/step": 2.0}
        run.metrics.append({"step": step, "timestamp": time.time(), **values})
    run.write_samples(20, [sample(score, "fine", HOSTILE, " " + "x" * 300, prompt=HOSTILE) for score in (1.0, 0.0)])
    run.write_summary(SUMMARY)
    run.release()
    return run


def test_the_pages_open_offline_at_every_width_and_in_both_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with chromium() as browser:
        make(tmp_path / "first", 0.01), make(tmp_path / "second", 0.02)
        assert main(["report", "first"]) == main(["compare", "first", "second"]) == 0
        grounds = set()
        for width, scheme in VIEWS:
            for page in ("first/report.html", "comparison.html"):
                with Watched(browser, width=width, scheme=scheme) as watched:
                    look(watched, tmp_path / page)
                    grounds.add((scheme, watched.page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert len(grounds) == 2, "one ground for light, another for dark"


def look(watched: Watched, path: Path) -> None:
    """Open a page as its reader would: every part of it, the folded ones too."""
    page: Any = watched.page
    watched.context.set_offline(True)
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is cut off or scrolls"
    assert watched.complaints == [] and [one.url for one in watched.requests] == [path.as_uri()]
    if path.name == "report.html":
        answers = page.locator(".sample")
        assert answers.count() == 2 and answers.first.locator("p.tokens span").count() == 3
        rows = answers.first.locator("table.numbers tbody tr")
        assert rows.nth(1).locator("td").all_inner_texts() == ["2", HOSTILE, "-0.500", "-0.500"]
        assert rows.nth(1).is_visible()
    else:
        headings = page.locator("h2").all_inner_texts()
        assert headings[:2] == ["Settings that differ", "Final and best values"] and "Curves" in headings
        assert page.locator("table.settings tbody tr").all_inner_texts() == ["policy.learning_rate\t0.01\t0.02"]
        assert page.locator("svg polyline.s0").count() == page.locator("svg polyline.s1").count() > 0
