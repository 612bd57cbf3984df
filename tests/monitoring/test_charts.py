"""Charts: every point where the axes say, every axis labelled with round numbers, nothing outside its panel."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.monitoring.report.charts import (
    LEFT,
    RIGHT,
    SHOWN_POINTS,
    TOP,
    Axis,
    Curve,
    Panel,
    line_chart,
    number,
    smoothed,
    smoothing_window,
    thinned,
)

WIDTH, HEIGHT = 390, 170
SVG = "{http://www.w3.org/2000/svg}"

values = st.floats(-1e9, 1e9, allow_subnormal=False).map(lambda value: 0.0 if abs(value) < 1e-9 else value)


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def texts(svg: str, style: str) -> list[str]:
    return [node.text or "" for node in parse(svg).iter("text") if style in (node.get("class") or "").split()]


def places(svg: str, style: str = "s0") -> list[tuple[float, float]]:
    lines = [node for node in parse(svg).iter("polyline") if node.get("class") == style]
    return [tuple(map(float, place.split(","))) for line in lines for place in (line.get("points") or "").split()]  # type: ignore[misc]


def test_points_stand_where_the_labelled_axes_say() -> None:
    svg = line_chart([Panel("loss", "nats", [Curve("loss", [(0, 0.0), (50, 2.0), (100, 4.0)])])], "step", "loss")
    (x0, y0), (x1, y1), (x2, y2) = places(svg)
    assert (x0, x1, x2) == (LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT)
    assert y0 > y1 > y2 and y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    ticks = {node.text: node for node in parse(svg).iter("text") if node.get("class") == "tick"}
    grid = {float(node.get("y1") or 0) for node in parse(svg).iter("line") if node.get("class") == "grid"}
    assert any(abs(y - y1) < 0.11 for y in grid), "the grid line of 2 goes through the point of value 2"
    assert abs(float(ticks["2"].get("y") or 0) - 3.5 - y1) < 0.11
    assert float(ticks["50"].get("x") or 0) == pytest.approx(x1, abs=0.1)
    assert texts(svg, "label") == ["step"]
    assert "loss" in texts(svg, "title")[0]
    assert texts(svg, "last") == ["4"]


@given(st.lists(st.tuples(st.integers(0, 10**6), values | st.none()), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_curve_leaves_its_panel(points: list[tuple[float, float | None]]) -> None:
    svg = line_chart([Panel("a", "", [Curve("a", sorted(points, key=lambda point: point[0]))])], "step", "a")
    if all(y is None for _, y in points):
        assert svg == ""
        return
    marks = [(float(node.get("cx") or 0), float(node.get("cy") or 0)) for node in parse(svg).iter("circle")]
    assert len(marks) == sum(y is not None for _, y in points)
    for x, y in places(svg) + marks:
        assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
        assert TOP - 0.1 <= y <= TOP + HEIGHT + 0.1
    assert 1 <= len(texts(svg, "tick")) <= 20


def test_a_missing_value_breaks_the_line() -> None:
    svg = line_chart([Panel("a", "", [Curve("a", [(1, 1.0), (2, 2.0), (3, None), (4, 4.0), (5, 5.0)])])], "step", "a")
    lines = list(parse(svg).iter("polyline"))
    assert [len((line.get("points") or "").split()) for line in lines] == [2, 2]


def test_a_curve_without_a_value_is_left_out_of_panel_and_legend() -> None:
    nothing = Curve("nothing", [(1, None)] * 500)
    svg = line_chart([Panel("a", "", [nothing, Curve("b", [(1, 1.0), (2, 2.0)], 1)])], "step", "a")
    assert texts(svg, "legend") == []
    assert places(svg, "s0") == [] and len(places(svg, "s1")) == 2


def test_panels_share_the_axis_of_steps() -> None:
    long = Panel("gold", "", [Curve("gold", [(0, 1.0), (100, 2.0)])])
    short = Panel("learned", "", [Curve("learned", [(0, 5.0), (50, 9.0)], 1)])
    svg = line_chart([long, short], "step", "both")
    assert places(svg, "s1")[-1][0] == (LEFT + WIDTH - RIGHT) / 2
    assert texts(svg, "label") == ["step"]
    assert max(y for _, y in places(svg, "s0")) < min(y for _, y in places(svg, "s1"))


@given(low=values, size=st.floats(1e-6, 1e9), wanted=st.integers(2, 8))
def test_ticks_are_round_and_inside(low: float, size: float, wanted: int) -> None:
    axis = Axis(low, low + size, 0, 100)
    if axis.high - axis.low < abs(low) * 1e-9:
        return
    ticks = axis.ticks(wanted)
    slack = (axis.high - axis.low) * 1e-6 + abs(low) * 1e-9
    assert 1 <= len(ticks) <= wanted + 1
    assert all(axis.low - slack <= tick <= axis.high + slack for tick in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        leading = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(leading - round_one) for round_one in (1, 2, 2.5, 5, 10)) < 1e-2


def test_last_values_do_not_cover_each_other() -> None:
    curves = [Curve(str(index), [(0, 0.0), (1, 1.0 + index / 1000)], index) for index in range(5)]
    svg = line_chart([Panel("a", "", curves)], "step", "a")
    ys = sorted(float(node.get("y") or 0) for node in parse(svg).iter("text") if "last" in (node.get("class") or ""))
    assert all(after - before >= 12.9 for before, after in pairwise(ys))
    assert min(ys) > 0 and max(ys) <= TOP + HEIGHT + 4


def test_only_long_and_noisy_curves_are_averaged_and_they_say_so() -> None:
    noisy = Curve("noisy", [(step, float(step % 2)) for step in range(400)])
    smooth = Curve("smooth", [(step, step**0.5) for step in range(400)])
    assert smoothing_window(noisy) == 10
    assert smoothing_window(smooth) == 1
    assert smoothing_window(Curve("short", noisy.points[:100])) == 1
    svg = line_chart([Panel("accuracy", "share", [noisy])], "step", "a")
    assert "share, mean of the last 10" in svg
    assert len(places(svg, "s0 raw")) == 400
    assert {y for _, y in smoothed(noisy.points, 2)[1:]} == {0.5}
    assert smoothed([(0, 1.0), (1, None), (2, 3.0)], 2) == [(0, 1.0), (1, None), (2, 2.0)]


@given(st.integers(0, 5000))
def test_thinning_keeps_the_last_point_and_few_enough(count: int) -> None:
    points = [(float(step), 1.0) for step in range(count)]
    kept = thinned(points)
    assert len(kept) <= SHOWN_POINTS + 1
    assert kept[-1:] == points[-1:]
    assert kept == sorted(set(kept) & set(points))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0, "0"), (1, "1"), (0.5, "0.5"), (1234.5678, "1,235"), (0.0123456, "0.01235"), (123456.0, "123,456")],
        *[(1.5e-6, "1.5e-6"), (-2e-05, "-2e-5"), (1e9, "1e9"), (99.999, "100"), (float("nan"), "nan")],
    ],
)
def test_numbers_read_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text
