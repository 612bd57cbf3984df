"""Which metrics share a panel."""

from __future__ import annotations

from collections import Counter

from rlhf_ray.monitoring.dashboards.shared import choose_panel
from rlhf_ray.monitoring.registry import REGISTRY


def test_a_metric_is_in_one_panel_and_a_panel_has_one_unit() -> None:
    names = [metric.name for metric in REGISTRY if not metric.is_family]
    panels = {title: tuple(members) for title, members in (choose_panel(name, names) for name in names)}
    shown = Counter(member for members in panels.values() for member in members)
    assert {name for name, count in shown.items() if count > 1} == set()
    assert set(names) <= set(shown)
    assert [title for title, members in panels.items() if len({REGISTRY[name].unit for name in members}) > 1] == []
