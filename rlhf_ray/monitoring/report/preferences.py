"""Draw how a reward model scores held-out preference pairs: its calibration, and the scores of both sides.

Invariants: a perfectly calibrated model lies on the diagonal. Chosen and rejected answers are drawn over the same bins.
"""

from __future__ import annotations

from itertools import chain, pairwise

from rlhf_ray.monitoring.report.charts import Curve, Panel, Point, line_chart
from rlhf_ray.monitoring.report.curves import WIDE, Chart
from rlhf_ray.monitoring.report.summary import PreferencePage


def calibration_chart(page: PreferencePage) -> Chart | None:
    """The share of pairs that the model orders right against its confidence in them, or None without pairs."""
    if not page.calibration:
        return None
    points: list[Point] = [(confidence, accuracy) for confidence, accuracy, _ in page.calibration]
    names = [f"{count} pairs" for _, _, count in page.calibration]
    ideal: list[Point] = [(0.5, 0.5), (1.0, 1.0)]
    curves = [Curve("measured", points, 0, "both", names), Curve("what the margins say", ideal, 1)]
    panel = Panel("Accuracy at a confidence", "share of pairs, ties half", curves, height=260, include=(0.5, 1.0))
    caption = "Confidence is sigmoid of the margin's size. Below the line the model is surer than it is right."
    return Chart(line_chart([panel], "confidence", "Accuracy by confidence", WIDE), caption)


def histogram_chart(page: PreferencePage) -> Chart:
    """For each side, the share of answers in each bin of scores, as an outline."""
    curves = [
        Curve(side, _outline(page.edges, shares), colour)
        for colour, (side, shares) in enumerate(page.histograms.items())
    ]
    panel = Panel("Scores of both sides", "share of answers in a bin", curves, height=260, include=(0.0,))
    caption = "The less the two overlap, the more often a random chosen answer beats a random rejected one."
    return Chart(line_chart([panel], "score", "Histogram of the scores of both sides", WIDE), caption)


def _outline(edges: tuple[float, ...], shares: tuple[float, ...]) -> list[Point]:
    tops = (((low, share), (high, share)) for (low, high), share in zip(pairwise(edges), shares, strict=True))
    return [(edges[0], 0.0), *chain.from_iterable(tops), (edges[-1], 0.0)]
