"""Figures are means over single pairs, in any order and grouping; ties by label and undefined figures count nowhere."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.evaluation.scored_pairs import ScoredPairs, correlation, histogram

CHOSEN, REJECTED = [2.0, 0.5, -1.0, 3.0], [1.0, 0.5, 1.5, -1.0]
LENGTHS = [4.0, 9.0, 2.0, 7.0], [5.0, 3.0, 2.0, 1.0]


def scored(decided: list[bool] | None = None) -> ScoredPairs:
    loss = [math.log1p(math.exp(r - c)) for c, r in zip(CHOSEN, REJECTED, strict=True)]
    return ScoredPairs.from_columns(
        CHOSEN, REJECTED, loss=loss, chosen_length=LENGTHS[0], rejected_length=LENGTHS[1], sources=["a", "b", "a", "a"],
        decided=decided,
    )  # fmt: skip


def test_every_figure_is_what_its_name_says() -> None:
    all_scores, all_lengths = CHOSEN + REJECTED, LENGTHS[0] + LENGTHS[1]
    differences = [c - r for c, r in zip(CHOSEN, REJECTED, strict=True)]
    in_pairs = [c - r for c, r in zip(*LENGTHS, strict=True)]
    bins = [(1 / (1 + math.exp(-abs(d))), 1.0 if d > 0 else 0.5 if d == 0 else 0.0) for d in differences]
    assert len({int((p - 0.5) * 20) for p, _ in bins}) == 4  # each pair in a bin of its own
    assert scored().figures() == pytest.approx({
        "pairs": 4.0, "accuracy": 2.5 / 4, "margin": statistics.mean(differences), "tie_rate": 0.25,
        "loss": statistics.mean(math.log1p(math.exp(-d)) for d in differences),
        "chosen_mean": statistics.mean(CHOSEN), "chosen_std": statistics.pstdev(CHOSEN),
        "rejected_mean": statistics.mean(REJECTED), "rejected_std": statistics.pstdev(REJECTED),
        "score_mean": statistics.mean(all_scores), "score_std": statistics.pstdev(all_scores),
        "calibration_error": statistics.mean(abs(p - right) for p, right in bins),
        "length_correlation": statistics.correlation(all_scores, all_lengths),
        "length_correlation_in_pairs": statistics.correlation(differences, in_pairs),
    })  # fmt: skip


def test_ties_by_label_count_in_no_accuracy_margin_or_calibration() -> None:
    figures = scored(decided=[True, False, True, False]).figures()
    assert (figures["pairs"], figures["accuracy"], figures["margin"]) == (4.0, 0.5, -0.75)
    assert figures["loss"] == scored().figures()["loss"]
    nothing = scored(decided=[False] * 4)
    assert not {"accuracy", "margin", "calibration_error"} & nothing.figures().keys()
    assert nothing.calibration() == [] and nothing.worst(3) == []


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(1, 12), st.integers(0, 2**31))
def test_figures_do_not_depend_on_the_order_and_sources_add_up(data: st.DataObject, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    numbers = draw.normal(size=(3, count)).round(1)
    pairs = ScoredPairs.from_columns(
        numbers[0], numbers[1], loss=numbers[2], chosen_length=draw.integers(1, 9, count),
        rejected_length=draw.integers(1, 9, count), sources=[f"s{number}" for number in draw.integers(0, 3, count)],
    )  # fmt: skip
    figures = pairs.figures()
    assert pairs.take(data.draw(st.permutations(range(count)))).figures() == pytest.approx(figures, abs=1e-12)
    parts = [part.figures() for part in pairs.by_source().values()]
    assert [part["pairs"] for part in parts] == sorted((part["pairs"] for part in parts), reverse=True)
    for name in ("accuracy", "margin", "loss", "tie_rate", "chosen_mean"):
        assert sum(part[name] * part["pairs"] for part in parts) / count == pytest.approx(figures[name], abs=1e-12)


def test_the_worst_pairs_are_the_wrong_ones_the_worst_first() -> None:
    assert scored().worst(10) == [2, 1] and scored().worst(1) == [2]


def test_a_correlation_with_what_never_changes_is_left_out() -> None:
    same = ScoredPairs.from_columns([1.0], [0.0], loss=[0.3], chosen_length=[5], rejected_length=[5], sources=[""])
    assert not any("correlation" in name for name in same.figures())
    assert correlation(np.ones(3), np.arange(3.0)) is None


def test_histograms_share_their_edges_and_hold_everything() -> None:
    edges, shares = histogram({"chosen": np.array(CHOSEN), "rejected": np.array(REJECTED)}, bins=4)
    assert edges == [-1.0, 0.0, 1.0, 2.0, 3.0]
    assert shares == {"chosen": [0.25, 0.25, 0.0, 0.5], "rejected": [0.25, 0.25, 0.5, 0.0]}
    assert sum(histogram({"one": np.array([2.0, 2.0])})[1]["one"]) == 1.0


def test_columns_of_other_lengths_and_broken_scores_are_refused() -> None:
    rest = {"chosen_length": [1], "rejected_length": [1], "sources": [""]}
    with pytest.raises(RequestError, match="have 1, 2 entries"):
        ScoredPairs.from_columns([1.0], [0.0], loss=[0.1, 0.2], **rest)
    with pytest.raises(NumericalError, match=r"rejected\[0\] is nan"):
        ScoredPairs.from_columns([1.0], [math.nan], loss=[0.1], **rest)
