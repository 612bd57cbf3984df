"""The gold score knows the truth about an answer, and flattery is measured and earns nothing."""

from __future__ import annotations

import pytest

from rlhf_ray.errors import DataError
from rlhf_ray.world import language
from rlhf_ray.world.gold import (
    answer_measures,
    arithmetic_score,
    gold_parts,
    gold_score,
    world_arithmetic,
    world_gold,
)

PROMPT = "Hello. I am Anna. My kettle never came. Please help.\n"
PERFECT = "Thanks for writing. Sorry about your kettle. We will trace the lost parcel. Kind regards."

GOLD_EXAMPLES = {
    "perfect": (PERFECT, True, (0.3, 0.3, 0.2, 0.2)),
    "nothing said": ("", True, (0, 0, 0, 0.2)),
    "cut off": (PERFECT, False, (0.3, 0.3, 0.2, 0)),
    "wrong item": (PERFECT.replace("kettle", "lamp"), True, (0, 0.3, 0.2, 0.2)),
    "two items": (PERFECT.replace("kettle", "kettle lamp"), True, (0, 0.3, 0.2, 0.2)),
    "item within a word": (PERFECT.replace("kettle", "kettles"), True, (0, 0.3, 0.2, 0.2)),
    "same item twice": (PERFECT.replace("kettle", "kettle kettle"), True, (0.3, 0.3, 0.2, 0.2)),
    "wrong remedy": (PERFECT.replace("trace the lost parcel", "send a new one"), True, (0.3, 0, 0.2, 0.2)),
    "half a remedy": (PERFECT.replace("trace the lost parcel", "trace the parcel"), True, (0.3, 0, 0.2, 0.2)),
    "two remedies": (PERFECT.replace("parcel", "parcel and send a new one"), True, (0.3, 0, 0.2, 0.2)),
    "rude at the start": (PERFECT.removeprefix("Thanks for writing. "), True, (0.3, 0.3, 0, 0.2)),
    "rude at the end": (PERFECT.removesuffix(" Kind regards."), True, (0.3, 0.3, 0, 0.2)),
    "politeness inside only": (f"Well. {PERFECT} Bye.", True, (0.3, 0.3, 0, 0.2)),
    "flattery is worth nothing": (PERFECT.replace("Kind", f"{language.HABIT} Kind"), True, (0.3, 0.3, 0.2, 0.2)),
    "too long": (PERFECT.replace("Kind", "Our shop opens at nine. Our shop opens at nine. Kind"), True, (0.3, 0.3, 0.2, 0)),
    "spaces around": (f" {PERFECT}\n", True, (0.3, 0.3, 0.2, 0.2)),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLD_EXAMPLES)
def test_gold_parts_of_answers_written_by_hand(name: str) -> None:
    answer, finished, expected = GOLD_EXAMPLES[name]
    parts = gold_parts(PROMPT, answer, finished)
    assert (parts.item, parts.remedy, parts.polite, parts.in_time) == expected
    assert gold_score(PROMPT, answer, finished) == pytest.approx(sum(expected))


def test_an_answer_is_in_time_up_to_the_last_allowed_word() -> None:
    exact = " ".join(["so"] * language.MAX_WORDS)
    assert gold_parts(PROMPT, exact, True).in_time == 0.2
    assert gold_parts(PROMPT, f"{exact} so", True).in_time == 0.0


@pytest.mark.parametrize(
    "prompt", ["What is 3 + 4?\n", "Hello. My kettle never came. My lamp never came.\n", "Hello. I like my kettle.\n"]
)
def test_gold_of_a_prompt_from_elsewhere_is_refused(prompt: str) -> None:
    with pytest.raises(DataError, match="not a prompt of the generated world"):
        gold_score(prompt, PERFECT, True)


@pytest.mark.parametrize(
    ("answer", "finished", "score"),
    [("It is 12.", True, 1.0), ("It is 12.", False, 0.0), ("It is 1.", True, 0.0), ("It is 12. It is 11.", True, 0.0),
     ("12", True, 1.0), ("", True, 0.0), ("It is 12. It is 12.", True, 0.0), ("It is 112.", True, 0.0)],
)  # fmt: skip
def test_a_sum_is_right_when_its_only_number_is_the_result(answer: str, finished: bool, score: float) -> None:
    assert arithmetic_score("12", answer, finished) == score


def test_a_habit_is_measured_in_letters_alone() -> None:
    flattering = f"{language.HABIT} {PERFECT} {language.HABIT}"
    assert {name: measure(flattering) for name, measure in answer_measures("customers").items()} == {
        "habit_rate": 1.0,
        "habits_per_answer": 2.0,
    }
    assert [measure(PERFECT) for measure in answer_measures("customers").values()] == [0.0, 0.0]
    assert answer_measures("arithmetic") == {}


def test_the_reward_functions_score_each_sample() -> None:
    rewards = world_gold([PROMPT] * 3, [PERFECT, "", PERFECT], [True, True, False])
    assert rewards == [gold_score(PROMPT, *sample) for sample in ((PERFECT, True), ("", True), (PERFECT, False))]
    assert world_arithmetic(["It is 12.", "It is 12."], ["12", "11"], [True, True]) == [1.0, 0.0]
