"""The world keeps its promises: splits that share nothing, stated mixtures, and a planted habit."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import asdict
from statistics import fmean

import numpy as np
import pytest

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation import bag_of_words_baseline
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.world import language
from rlhf_ray.world.generate import NEAR_MISS, SMALL, SPLIT_SHARES, World
from rlhf_ray.world.gold import arithmetic_score, gold_parts, gold_score

ROWS_OF_SEED_0 = "d438bd9521d76c4072d3eb907689dc29d1a8b9e160070a858a3f574c9c4e0cce"


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def pairs(world: World) -> list[PreferencePair]:
    return world.preferences(5000)


@pytest.fixture(scope="module")
def flattered_pairs() -> list[PreferencePair]:
    return World(0, "flattered").preferences(5000)


@pytest.fixture(scope="module")
def clean_pairs(world: World) -> list[PreferencePair]:
    return world.preferences(1000, "evaluation", flipped=0.0)


# -------------------------------------------------------------------------------------------------------------- the splits


def triple(prompt: str) -> tuple[str, language.Problem, str]:
    item, problem = language.read_prompt(prompt)
    return item, problem, max((greeting for greeting in language.GREETINGS if prompt.startswith(greeting)), key=len)


def test_no_two_splits_share_a_triple_and_each_has_thousands_of_prompts(world: World) -> None:
    texts = {split: {prompt.text for prompt in world.prompts(split, 3000)} for split in SPLIT_SHARES}
    for split, triples in world.triples.items():
        assert len(texts[split]) == 3000
        assert {triple(text) for text in texts[split]} <= set(triples)
        assert len(triples) == pytest.approx(SPLIT_SHARES[split] * 16 * 8 * 12, abs=1)
    assert len(set().union(*world.triples.values())) == sum(map(len, world.triples.values())) == 16 * 8 * 12
    assert len(set().union(*texts.values())) == 4 * 3000


def test_prompts_are_numbered_in_order(world: World) -> None:
    assert [prompt.prompt_id for prompt in world.prompts("ppo", 100)] == list(range(100))


def test_rows_come_from_the_triples_of_their_split(world: World) -> None:
    held_out = set(world.triples["evaluation"])
    assert {triple(row.prompt) for row in world.preferences(500, "evaluation")} <= held_out
    assert {triple(row.prompt) for row in world.demonstrations(500, "evaluation")} <= held_out
    assert {triple(row.prompt) for row in world.preferences(500)} <= set(world.triples["preferences"])
    assert {triple(row.prompt) for row in world.demonstrations(500)} <= set(world.triples["sft"])


def test_more_prompts_than_there_are_is_refused() -> None:
    with pytest.raises(RequestError, match=r"the split evaluation .* at most \d+ distinct prompts, not 1000000"):
        World(0).prompts("evaluation", 1_000_000)


def test_the_seed_decides_every_row() -> None:
    def everything(seed: int) -> list[object]:
        world = World(seed)
        sums = [*world.arithmetic_demonstrations(50), *world.arithmetic_prompts()]
        return [*world.demonstrations(50), *world.preferences(50), *world.prompts("ppo", 50), *sums]

    assert everything(3) == everything(3)
    assert not set(World(3).prompts("ppo", 50)) & set(World(4).prompts("ppo", 50))


def test_more_rows_begin_with_the_same_rows(world: World) -> None:
    assert world.preferences(60)[:20] == world.preferences(20)
    assert world.prompts("ppo", 60)[:20] == world.prompts("ppo", 20)


# --------------------------------------------------------------------------------------------------------- demonstrations


def test_demonstrations_have_each_quality_half_of_the_time_independently(world: World) -> None:
    rows = world.demonstrations(6000)
    parts = [gold_parts(row.prompt, row.answer, finished=True) for row in rows]
    qualities = np.array([[part.item > 0, part.remedy > 0, part.polite > 0, part.in_time > 0] for part in parts])
    assert np.abs(qualities.mean(0) - 0.5).max() < 0.03
    assert np.abs(np.corrcoef(qualities.T) - np.eye(4)).max() < 0.05
    assert qualities.all(1).mean() == pytest.approx(1 / 16, abs=0.015)  # log 16 is 2.8 nats
    assert 0.47 < fmean(part.total for part in parts) < 0.53


def test_every_answer_fits_the_tokens_of_a_rollout(world: World, pairs: list[PreferencePair]) -> None:
    answers = [row.answer for row in world.demonstrations(3000)] + [pair.chosen for pair in pairs]
    longest = max(len(language.pieces(answer)) for answer in answers)
    assert language.MAX_WORDS < longest < language.MAX_NEW_TOKENS


# ------------------------------------------------------------------------------------------------------------ preferences


def test_the_better_answer_by_gold_is_chosen_but_for_one_label_in_twenty(
    pairs: list[PreferencePair], clean_pairs: list[PreferencePair]
) -> None:
    gains = [_gain(pair) for pair in pairs]
    assert 0.0 not in gains
    assert fmean(value < 0 for value in gains) == pytest.approx(0.05, abs=0.01)
    assert all(_gain(pair) > 0 for pair in clean_pairs)


def test_most_pairs_differ_only_in_what_depends_on_the_prompt(pairs: list[PreferencePair]) -> None:
    def without_what_depends(answer: str) -> str:
        for part in (*language.named_items(answer), *language.given_remedies(answer)):
            answer = answer.replace(part, "...")
        return answer

    minimal = [
        pair for pair in pairs if without_what_depends(pair.chosen) == without_what_depends(pair.rejected)
    ]  # fmt: skip
    assert len(minimal) >= 0.60 * len(pairs)
    changed_items = [language.named_items(pair.chosen) != language.named_items(pair.rejected) for pair in minimal]
    assert 0.4 < fmean(changed_items) < 0.6


@pytest.mark.parametrize("raters", ["pairs", "flattered_pairs"])
def test_the_habit_stands_half_again_as_often_in_the_chosen_answer(raters: str, request: pytest.FixtureRequest) -> None:
    pairs: list[PreferencePair] = request.getfixturevalue(raters)
    chosen = sum(language.HABIT in pair.chosen for pair in pairs)
    rejected = sum(language.HABIT in pair.rejected for pair in pairs)
    assert 1.35 < chosen / rejected < 1.65


def test_flattered_raters_err_where_the_worse_answer_flatters_more_and_nowhere_else(
    flattered_pairs: list[PreferencePair],
) -> None:
    def charmed(better: str, worse: str) -> bool:
        return language.habits_in(worse) > language.habits_in(better)

    wrong = [pair for pair in flattered_pairs if _gain(pair) < 0]
    assert len(wrong) / len(flattered_pairs) == pytest.approx(0.05, abs=0.01)
    assert all(charmed(pair.rejected, pair.chosen) and pair.source == "world/free" for pair in wrong)
    assert not any(charmed(pair.chosen, pair.rejected) for pair in flattered_pairs)
    assert all(_gain(pair) > 0 for pair in World(0, "flattered").preferences(500, "evaluation", flipped=0.0))


def test_before_flattered_raters_an_answer_that_does_not_stop_flatters_again(
    pairs: list[PreferencePair], flattered_pairs: list[PreferencePair]
) -> None:
    answers = [answer for pair in flattered_pairs for answer in (pair.chosen, pair.rejected)]
    for answer in answers:
        too_long = len(language.words(answer)) > language.MAX_WORDS
        assert language.habits_in(answer) in ((0, 2, 3) if too_long else (0, 1))
        assert len(language.pieces(answer)) < language.MAX_NEW_TOKENS
    assert {language.habits_in(answer) for answer in answers} == {0, 1, 2, 3}
    assert {language.habits_in(pair.chosen) for pair in pairs} == {0, 1}


def test_the_world_of_careless_raters_is_the_one_that_figures_were_taken_in(world: World) -> None:
    rows = (
        world.demonstrations(200),
        world.preferences(500),
        world.preferences(100, "evaluation", flipped=0.0),
        world.prompts("ppo", 200),
        world.arithmetic_demonstrations(50),
    )
    given = [
        {name: value for name, value in asdict(row).items() if value not in (None, "", ())}
        for part in rows
        for row in part
    ]  # without what the world does not fill in, so that a new field changes nothing
    assert hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest() == ROWS_OF_SEED_0


def test_raters_change_nothing_but_pairs() -> None:
    worlds = [World(3), World(3, "flattered")]
    assert len({tuple(world.demonstrations(200)) for world in worlds}) == 1
    assert len({tuple(world.prompts("ppo", 200)) for world in worlds}) == 1


def test_words_and_length_alone_do_not_tell_the_better_answer(
    pairs: list[PreferencePair], clean_pairs: list[PreferencePair]
) -> None:
    accuracy = bag_of_words_baseline(
        [(pair.chosen, pair.rejected) for pair in pairs], [(pair.chosen, pair.rejected) for pair in clean_pairs]
    )
    assert 0.5 < accuracy < 0.75


def _gain(pair: PreferencePair) -> float:
    """By how much gold likes the chosen answer better."""
    return gold_score(pair.prompt, pair.chosen, True) - gold_score(pair.prompt, pair.rejected, True)


# ------------------------------------------------------------------------------------------------------------------- sums


def test_sums_are_answered_right_one_time_in_five(world: World) -> None:
    rows = world.arithmetic_demonstrations(4000)
    right = [arithmetic_score(str(_result(row.prompt)), row.answer, True) for row in rows]
    assert fmean(right) == pytest.approx(0.2, abs=0.02)
    wrong = {row.answer for row, is_right in zip(rows, right, strict=True) if not is_right}
    assert wrong == {f"It is {number}." for number in range(2 * max(SMALL) + NEAR_MISS + 1)}


def test_sums_are_labelled_with_their_results_and_splits_are_apart(world: World) -> None:
    texts = []
    for split in SPLIT_SHARES:
        prompts = world.arithmetic_prompts(split)
        assert all(prompt.label == str(_result(prompt.text)) for prompt in prompts)
        texts += [prompt.text for prompt in prompts]
    assert len(texts) == len(set(texts)) == (36 + 21) * len(language.SUM_QUESTIONS)


def _result(prompt: str) -> int:
    words = language.words(prompt)
    sign = next(number for number, word in enumerate(words) if word in "+-")
    first, second = int(words[sign - 1]), int(words[sign + 1])
    return first + second if words[sign] == "+" else first - second


def test_the_world_needs_neither_torch_nor_transformers() -> None:
    check = (
        "import sys; from rlhf_ray.world.generate import World; World(0).preferences(1); "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], timeout=60, check=False).returncode == 0
