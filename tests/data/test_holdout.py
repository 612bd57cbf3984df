"""Rows with one prompt are all held out or all trained on; never more rows than were asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.data.holdout import hold_out


@settings(max_examples=300, deadline=None)
@given(prompts=st.lists(st.integers(0, 12), max_size=40), fraction=st.floats(0, 1), seed=st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts, fraction, seed):
    held_out = hold_out(prompts, fraction, seed)
    assert held_out <= set(range(len(prompts)))
    assert not {prompts[row] for row in held_out} & {
        prompt for row, prompt in enumerate(prompts) if row not in held_out
    }
    wanted = round(fraction * len(prompts))
    assert len(held_out) <= wanted
    left = Counter(prompt for row, prompt in enumerate(prompts) if row not in held_out)
    assert all(len(held_out) + size > wanted for size in left.values()), "nothing that still fits is left out"
    assert hold_out(prompts, fraction, seed) == held_out


@pytest.mark.parametrize(("rows", "fraction", "count"), [(100, 0.1, 10), (7, 0.5, 4), (10, 0.0, 0), (10, 1.0, 10)])
def test_prompts_of_one_row_give_the_exact_share(rows, fraction, count):
    assert len(hold_out(range(rows), fraction, 0)) == count


def test_each_row_is_as_likely_to_be_held_out_as_any_other():
    """Over 4,000 seeds each of ten rows is held out about 1,200 times (5 deviations are 145)."""
    counts = Counter(row for seed in range(4000) for row in hold_out("abcdefghij", 0.3, seed))
    assert len(counts) == 10
    assert all(abs(count - 1200) < 145 for count in counts.values())
