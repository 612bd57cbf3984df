"""What was spent and what is under way never pass a limit; the file holds at least what was spent, whenever a run is killed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from rlhf_ray.errors import IntegrityError
from rlhf_ray.rewards.judge.budget import PROMISED_AHEAD, Amount, Budget, Limits, Prices

PRICES = Prices(prompt=2.0, reply=10.0)


def test_the_price_is_by_the_million_of_tokens_and_the_most_is_never_less() -> None:
    assert PRICES.amount(500_000, 100_000) == Amount(1, 600_000, 2.0)
    text = "a letter of 日本 and é"
    most = PRICES.most(text, 512)
    assert most.tokens >= len(text.encode()) + 512  # no tokenizer makes more tokens than bytes
    assert most.holds(PRICES.amount(len(text.encode()), 512))


def drawn_budgets(seed: int, path: Path) -> None:
    """A run of reservations and settlements, killed at any moment, against plain sums."""
    draw = random.Random(seed)
    limits = Limits(draw.choice([None, 40]), draw.choice([None, 9000]), draw.choice([None, 0.05]))
    budget, spent, under_way = Budget(limits, path), Amount(), []
    for _ in range(300):
        if under_way and draw.random() < 0.5:
            most = under_way.pop(draw.randrange(len(under_way)))
            used = PRICES.amount(draw.randrange(most.tokens // 2 + 1), draw.randrange(most.tokens // 2 + 1))
            used = used if most.holds(used) else most
            budget.settle(most, used)
            spent += used
        else:
            most = PRICES.most("x" * draw.randrange(200), draw.randrange(1, 300))
            passed = budget.reserve(most)
            possible = sum(under_way, spent) + most
            assert (passed is None) == limits.allow(possible) or abs(possible.cost - 0.05) < 1e-9
            if passed is None:
                under_way.append(most)
        assert limits.allow(sum(under_way, spent))
        if path.exists():  # what another attempt would begin with
            kept = Budget(limits, path).spent
            assert kept.at_least(spent).requests == kept.requests and kept.tokens >= spent.tokens
            assert kept.cost >= spent.cost - 1e-12
            assert kept.requests <= spent.requests + len(under_way) + PROMISED_AHEAD + 1


@pytest.mark.parametrize("seed", range(4))
def test_no_limit_is_passed_and_the_file_never_holds_less(seed: int, tmp_path: Path) -> None:
    drawn_budgets(seed, tmp_path / "judges" / "reward.json")


def test_the_next_attempt_goes_on_with_what_was_spent(tmp_path: Path) -> None:
    path = tmp_path / "judges" / "reward.json"
    first = Budget(Limits(requests=3), path)
    for _ in range(2):
        assert first.reserve(PRICES.most("", 1)) is None
        first.settle(PRICES.most("", 1), PRICES.amount(5, 1))
    first.keep()
    assert json.loads(path.read_text())["requests"] == 2
    second = Budget(Limits(requests=3), path)
    assert second.spent == first.spent
    assert second.reserve(PRICES.most("", 1)) is None
    assert second.reserve(PRICES.most("", 1)) == "max_requests 3"


@pytest.mark.parametrize(
    "content", ["", "[]", '{"requests": -1}', '{"cost": NaN}', '{"requests": "2"}', '{"other": 1}']
)
def test_a_file_that_cannot_be_read_is_named_and_never_counts_as_nothing_spent(content: str, tmp_path: Path) -> None:
    path = tmp_path / "reward.json"
    path.write_text(content)
    with pytest.raises(IntegrityError, match=r"reward.json holds what a judge has spent"):
        Budget(Limits(), path)
