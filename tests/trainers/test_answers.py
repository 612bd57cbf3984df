"""Both sides answered the same prompts and are compared answer by answer; a figure of a source is that of its prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from rlhf_ray.monitoring.report.summary import BestOf
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer, compare_answers
from rlhf_ray.trainers.ppo.comparison_table import comparison_rows, first_answers
from rlhf_ray.trainers.ppo.evaluation import Comparison, best_of_sizes
from rlhf_ray.world.gold import answer_measures
from rlhf_ray.world.language import HABIT


def rows(
    rewards: Sequence[float], gold: Sequence[float | None], sources: Sequence[str], samples: int = 1
) -> list[HeldOutAnswer]:
    return [
        HeldOutAnswer(number // samples, f"p{number // samples}", "r", finished=reward > 0, tokens=number, reward=reward,
                      gold=truth, source=source)
        for number, (reward, truth, source) in enumerate(zip(rewards, gold, sources, strict=True))
    ]  # fmt: skip


def test_figures_of_all_prompts_and_of_each_source() -> None:
    sources = ["world", "world", "math/easy"]
    now, start = rows([3.0, 1.0, 5.0], [1.0, 0.5, 0.0], sources), rows([1.0, 1.0, 6.0], [0.5, 0.5, 0.5], sources)
    figures = compare_answers(now, start)
    assert figures["evaluation/reward"] == 3.0 and figures["evaluation/reward_start"] == pytest.approx(8 / 3)
    assert figures["evaluation/reward_win_rate"] == pytest.approx(1.5 / 3)
    assert figures["evaluation/gold"] == 0.5 and figures["evaluation/gold_win_rate"] == pytest.approx(1.5 / 3)
    assert figures["evaluation/gold_win_rate/world"] == 0.75 and figures["evaluation/gold_win_rate/math_easy"] == 0.0
    assert figures["evaluation/length/math_easy"] == 2.0
    alone = compare_answers(now[:2], start[:2])
    assert alone == {name.removesuffix("/world"): value for name, value in figures.items() if name.endswith("/world")}


def test_a_planted_habit_is_counted_where_it_is_known() -> None:
    def flattering(*habits: int) -> list[HeldOutAnswer]:
        judged = rows([1.0] * len(habits), [None] * len(habits), ["s"] * len(habits))
        return [replace(row, response=HABIT * count) for row, count in zip(judged, habits, strict=True)]

    now, start, measures = flattering(3, 1, 0, 2), flattering(1, 0, 0, 0), answer_measures("customers")
    figures = compare_answers(now, start, measures=measures)
    habit_figures = {name: value for name, value in figures.items() if "habit" in name}
    assert habit_figures == {
        "evaluation/habit_rate": 0.75, "evaluation/habit_rate_start": 0.25,
        "evaluation/habits_per_answer": 1.5, "evaluation/habits_per_answer_start": 0.25,
    }  # fmt: skip
    table = comparison_rows(Comparison(figures, start, now, [BestOf(2, 0.0, 0.6, 0.7)], tuple(measures)), "ppo")
    assert [row[-2:] for row in table] == [("0.250", "0.250"), ("0.750", "1.500"), ("-", "-")]
    assert not any("habit" in name for name in compare_answers(now, start, measures=answer_measures("arithmetic")))


def test_pass_at_k_is_by_gold_where_it_is_known_and_else_by_the_reward() -> None:
    source = ["s"] * 4
    now = rows([0.0, 0.0, 9.0, 9.0], [1.0, 0.0, 0.0, 0.0], source, samples=2)
    start = rows([0.0] * 4, [0.0] * 4, source, samples=2)
    figures = compare_answers(now, start, [1, 2])
    assert (figures["evaluation/pass_at_1"], figures["evaluation/pass_at_2"]) == (0.25, 0.5)
    assert figures["evaluation/pass_at_1_start"] == 0.0
    by_reward = compare_answers(rows([1.0, 0.9, 2.0, 3.0], [None] * 4, source, samples=2), start, [1, 2])
    assert (by_reward["evaluation/pass_at_1"], by_reward["evaluation/pass_at_2"]) == (0.75, 1.0)
    assert "evaluation/gold" not in by_reward and "evaluation/gold_win_rate" not in by_reward


def test_the_closing_table_has_best_of_n_at_no_more_kl_and_every_source() -> None:
    sources = ["a", "b"]
    now, start = rows([3.0, 1.0], [1.0, 0.5], sources), rows([1.0, 1.0], [0.5, 0.5], sources)
    best = [BestOf(2, 0.19, 0.6, 0.7), BestOf(4, 0.64, 0.8, 0.9)]
    figures = {"evaluation/kl": 0.5, **compare_answers(now, start, [1])}
    table = comparison_rows(Comparison(figures, start, now, best), "grpo", [1])
    assert [row[0] for row in table] == [
        "start (SFT)", "grpo", "best of 2 of SFT", "start (SFT), a", "grpo, a", "start (SFT), b", "grpo, b",
    ]  # fmt: skip
    assert table[1] == ("grpo", "2.000", "0.750", "0.750", "0.500", "0.500", "0.500")
    assert len({len(row) for row in table}) == 1
    greedy = comparison_rows(Comparison(compare_answers(now, start), start, now, best), "ppo")
    assert greedy[1][4] == "-" and not any("best of" in row[0] for row in greedy)


@pytest.mark.parametrize(
    ("largest", "sizes"), [(2, [2]), (3, [2, 3]), (8, [2, 4, 8]), (191, [2, 4, 8, 16, 32, 64, 128, 191])]
)
def test_best_of_n_is_taken_at_powers_of_two_and_at_the_largest_n(largest: int, sizes: list[int]) -> None:
    assert best_of_sizes(largest) == sizes


def test_samples_of_the_report_are_the_first_of_each_prompt() -> None:
    now = rows([1.0, 2.0, 3.0, 4.0], [None] * 4, ["s"] * 4, samples=2)
    pairs = first_answers(Comparison({}, now, now, []))
    assert [(before.reward, after.reward) for before, after in pairs] == [(1.0, 1.0), (3.0, 3.0)]
