"""Every action is in the eighth of its position, and a difference that grows with the position is told from noise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.evaluation.positions import PARTS, Part, by_position, growth

LONGEST = 20


@settings(deadline=None, max_examples=40)
@given(
    answers=st.lists(st.integers(0, 20), min_size=1, max_size=6), prompt=st.integers(1, 3), seed=st.integers(0, 999),
    longest=st.sampled_from([5, 20, 64]),
)  # fmt: skip
def test_every_action_is_in_the_part_of_its_position_and_no_other_token_counts(answers, prompt, seed, longest) -> None:
    mask = torch.tensor([token >= prompt for length in answers for token in range(prompt + length)])
    offsets = torch.tensor([0, *(prompt + length for length in answers)]).cumsum(0)
    values = torch.randn(len(mask), generator=torch.Generator().manual_seed(seed))
    groups: dict[int, list[float]] = {}
    for start, length in zip(offsets.tolist(), answers, strict=False):
        for place in range(length):
            part = min(place * PARTS // longest, PARTS - 1)
            groups.setdefault(part, []).append(abs(values[start + prompt + place].item()))
    values[~mask] = float("nan")
    found = by_position(values, mask, offsets, longest)
    assert [number for number, part in enumerate(found) if part is not None] == sorted(groups)
    for number, expected in groups.items():
        part = found[number]
        assert part is not None and part.count == len(expected)
        assert part.mean == pytest.approx(sum(expected) / len(expected))
        wanted = float(torch.tensor(expected, dtype=torch.float64).std(unbiased=False)) / len(expected) ** 0.5
        assert part.error == pytest.approx(wanted, abs=1e-9)


def drifting(slope: float, sequences: int = 50) -> list[Part | None]:
    """Answers whose difference is 0.01 nats of noise, and ``slope`` more at each position."""
    noise = 0.01 * torch.randn(sequences, LONGEST, generator=torch.Generator().manual_seed(0))
    difference = (noise.abs() + slope * torch.arange(LONGEST)).flatten()
    offsets = torch.arange(sequences + 1) * LONGEST
    return by_position(difference, torch.ones(len(difference), dtype=torch.bool), offsets, LONGEST)


def test_a_difference_that_grows_is_told_from_noise_and_from_rounding() -> None:
    first, last = growth(drifting(0.01), 0.015) or pytest.fail("growth of 0.01 nats a token was not seen")
    assert first.mean < 0.04 and last.mean > 0.15
    assert growth(drifting(0.0), 1e-6) is None, "noise that does not grow"
    assert growth(drifting(0.01), 0.5) is None, "within what rounding may be"
    assert growth(drifting(0.01)[:1], 0.0) is None, "one part shows no growth"
    rare = [Part(0.01, 0.001, 500), Part(0.2, 0.15, 2)]
    assert growth([rare[0], *[None] * 6, rare[1]], 0.0) is None, "two tokens prove nothing"


def test_a_part_of_a_few_actions_proves_nothing_whatever_its_error_seems_to_be() -> None:
    """One action alone has no spread, and would seem to be beyond doubt."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = [LONGEST - 2] * 40 + [LONGEST - 1]  # one reaches the last part, with one action
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        noise = torch.empty(sum(lengths)).exponential_(100.0, generator=generator)
        parts = by_position(noise, torch.ones(len(noise), dtype=torch.bool), offsets, LONGEST)
        assert parts[-1] is not None and parts[-1].count == 1
        assert growth(parts, 1e-6) is None, "noise that does not grow"


def test_what_is_no_number_has_not_grown() -> None:
    assert growth([Part(0.01, 0.001, 500), Part(float("nan"), float("nan"), 500)], 1e-6) is None
