"""A census of constructed pairs gives the figures that they were constructed with, in any order and keeps no text."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.evaluation.pair_census import PairCensus, text_length
from rlhf_ray.rows.preferences import PreferencePair

Pairs = list[PreferencePair]


def pair(prompt: str, chosen: str, rejected: str, source: str = "", grade: float | None = None) -> PreferencePair:
    return PreferencePair(prompt, chosen, rejected, None, source, grade)


def census_of(pairs: Pairs) -> PairCensus:
    census = PairCensus()
    for number, one in enumerate(pairs, 1):
        lengths = (text_length(one.prompt), text_length(one.chosen), text_length(one.rejected))
        census.add(replace(one, where=f"f:{number}"), lengths)
    return census


CONSTRUCTED: Pairs = [
    pair("p1", "aa", "b", "x"),
    pair("p1", "aa", "b", "x"),  # a duplicate
    pair("p1", "b", "aa", "x"),  # contradicts both
    pair(" p1 ", "b", "aa", "y"),  # blanks around a prompt do not count: a duplicate of the row before
    pair("P1!", "aa", "b", "y"),  # nearly the same prompt: no duplicate
    pair("p2", "same", "same", "y"),
    pair("p3", "dd", "c", "y", grade=0.0),
    pair("p3", "c", "dd", "y", grade=0.0),  # a tie contradicts nothing, and has no order: a duplicate
    pair("p3", "dd", "c", "y", grade=1.0),
    pair("p4", "ee", "ff", "y"),
]


def test_counts_of_repeated_and_contradicting_pairs() -> None:
    figures, _ = census_of(CONSTRUCTED).figures()
    expected = {
        "pairs": 10, "prompts": 5, "prompts_but_for_writing": 4, "ties": 2, "equal_sides": 1, "duplicate_rows": 3,
        "contradicting_pairs": 1, "contradicting_rows": 4, "labelled_again": 1, "disagreement": 2 / 3, "label_noise": 0.5,
    }  # fmt: skip
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_length_bias_is_that_of_the_construction() -> None:
    """Decided: five longer chosen (1, 2, 5, 9 and none else), two shorter, one of equal lengths."""
    figures, intervals = census_of(CONSTRUCTED).figures()
    difference = np.array([1, 1, -1, -1, 1, 1, 0.0])
    assert figures["longer_chosen"] == pytest.approx(4 / 6)
    assert figures["longer_wins_accuracy"] == pytest.approx(4.5 / 7)
    labels, sides = np.array([1.0] * 7 + [-1.0] * 7), np.concatenate([difference, -difference])
    assert figures["length_correlation"] == pytest.approx(np.corrcoef(labels, sides)[0, 1])
    assert intervals["longer_chosen"][0] < 4 / 6 < intervals["longer_chosen"][1]


def test_sources_are_told_apart_the_largest_first() -> None:
    sources = census_of(CONSTRUCTED).by_source()
    assert list(sources) == ["y", "x"]
    assert sources["x"]["pairs"] == 3 and sources["x"]["longer_chosen"] == pytest.approx(2 / 3)
    assert sources["y"]["ties"] == 2 and sources["x"]["chosen_length"] == pytest.approx(5 / 3)


def test_figures_do_not_depend_on_the_order_of_the_rows() -> None:
    shuffled = random.Random(0).sample(CONSTRUCTED, len(CONSTRUCTED))
    one, other = census_of(CONSTRUCTED), census_of(shuffled)
    assert one.figures() == other.figures()
    assert one.by_source() == other.by_source()
    assert one.lengths() == other.lengths()


def test_what_is_undefined_is_left_out() -> None:
    figures, intervals = census_of([pair("p", "a", "b", grade=0.0)]).figures()
    assert not {"longer_chosen", "longer_wins_accuracy", "label_noise"} & {*figures, *intervals}
    figures, _ = census_of([pair("p", "a", "b")]).figures()
    assert figures["longer_wins_accuracy"] == 0.5 and "longer_chosen" not in figures


def test_places_name_the_rows_to_look_at() -> None:
    places = census_of(CONSTRUCTED).places()
    assert places["contradicting"] == ["f:1 and f:3"]
    assert places["duplicate"] == ["f:1 and f:2", "f:1 and f:4", "f:7 and f:8"]
    assert places["equal_sides"] == ["f:6"]


def test_shared_prompts_exactly_and_but_for_how_they_are_written() -> None:
    messages = [{"role": "user", "content": "p1"}]
    turns = [{"role": "assistant", "content": "z"}], [{"role": "assistant", "content": "zz"}]
    held_out = [
        pair("p2", "x", "y"),
        PreferencePair(messages, *turns),  # a message of the user is its text
        pair("P4 ?", "x", "y"),
        pair("p5", "x", "y"),
        pair("p 1", "x", "y"),
    ]
    shared = census_of(CONSTRUCTED).shared_prompts(census_of(held_out))
    assert shared == {"held_out_pairs": 5, "held_out_prompts": 5, "shared_prompts": 2, "nearly_shared_prompts": 1}


def test_no_text_is_kept() -> None:
    census = census_of([pair("secret prompt", "secret answer", "secret other")])
    assert b"secret" not in pickle.dumps(census)
