"""Section scores by hand, and what they are over a part of the benchmark."""

from __future__ import annotations

import pytest

from rlhf_ray.evaluation.rewardbench import SECTIONS, missing_subsets, section_scores


def test_sections_are_weighted_means_and_the_overall_score_their_mean() -> None:
    accuracies = {subset: 1.0 for section in SECTIONS.values() for subset in section}
    accuracies |= {"math-prm": 0.5, "mt-bench-hard": 0.0, "donotanswer": 0.25}
    scores = section_scores(accuracies)
    assert scores["Chat"] == 1.0
    assert scores["Chat Hard"] == pytest.approx((456 - 37) / 456)
    assert scores["Safety"] == pytest.approx((740 - 0.75 * 136) / 740)
    assert scores["Reasoning"] == pytest.approx(0.75), "math weighs as much as all six languages together"
    assert scores["Overall"] == pytest.approx(sum(scores[name] for name in SECTIONS) / 4)
    assert missing_subsets(accuracies) == []


def test_it_has_the_23_subsets_of_the_benchmark() -> None:
    assert sum(map(len, SECTIONS.values())) == 23


def test_a_part_of_the_benchmark_has_its_sections_and_says_what_lacks() -> None:
    accuracies = {"hep-go": 0.5, "hep-cpp": 1.0, "some other source": 0.0}
    assert section_scores(accuracies) == {"Reasoning": 0.75}
    assert missing_subsets(accuracies) == ["math-prm", "hep-java", "hep-js", "hep-python", "hep-rust"]


def test_other_data_have_no_sections() -> None:
    assert section_scores({"hh": 0.7}) == {} and missing_subsets({"hh": 0.7}) == []
