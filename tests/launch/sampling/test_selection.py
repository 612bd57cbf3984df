"""Which answers become rows: against a slow reference that looks at every answer, and what a row looks like."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.evaluation import top_k_of_n_kl
from rlhf_ray.launch.sampling.answers import Answer, AnsweredPrompt
from rlhf_ray.launch.sampling.figures import kl_of_choice
from rlhf_ray.launch.sampling.selection import ALIKE, CUT, EMPTY, UNSCORED, Choice, choose

TALK = [{"role": "user", "content": "Hello?"}]
TOOLS = [{"name": "look_up"}]


def answer(response: str, reward: float | None = None, *, finished: bool = True) -> Answer:
    return Answer(response, finished, 3, -1.5, reward, None if reward is not None else "it failed")


def prompt(*answers: Answer, asked: Any = "Say.", number: int = 0, **more: Any) -> AnsweredPrompt:
    return AnsweredPrompt(number, asked, answers, **more)


def drawn(seed: int) -> list[AnsweredPrompt]:
    draw = random.Random(seed)
    return [
        prompt(
            *(
                answer(
                    draw.choice(["", " ", "yes", "no", f"perhaps {index}"]),
                    draw.choice([None, -1.0, 0.0, 0.5, draw.random()]),
                    finished=draw.random() < 0.7,
                )
                for index in range(draw.randint(1, 6))
            ),
            number=number,
        )
        for number in range(30)
    ]


def readable(one: Answer, *, keep_cut: bool) -> bool:
    return bool(one.response.strip()) and (one.finished or keep_cut) and one.reward is not None


@pytest.mark.parametrize("keep_cut", [False, True])
@pytest.mark.parametrize("top", [1, 3])
def test_the_best_are_those_than_which_no_answer_left_out_is_better(keep_cut: bool, top: int) -> None:
    prompts = drawn(1)
    rows, _ = choose(prompts, Choice("top-k", top, keep_cut, scored=True))
    taken = {number: [row for row in rows if row["prompt_id"] == number] for number in range(len(prompts))}
    for each in prompts:
        rest = [one.reward for one in each.answers if readable(one, keep_cut=keep_cut)]
        mine = [row["reward"] for row in taken[each.prompt_id]]
        assert mine == sorted(rest, reverse=True)[:top]
        written = [(one.response, one.reward) for one in each.answers]
        assert all((row["answer"], row["reward"]) in written for row in taken[each.prompt_id])
    assert rows == choose(prompts, Choice("best", 1, keep_cut, scored=True))[0] or top > 1


def test_a_pair_is_the_best_and_the_worst_of_a_prompt_and_never_two_that_are_alike() -> None:
    prompts = drawn(2)
    rows, left_out = choose(prompts, Choice("worst-best", scored=True))
    by_prompt = {row["prompt_id"]: row for row in rows}
    for each in prompts:
        rewards = [one.reward for one in each.answers if readable(one, keep_cut=False)]
        row = by_prompt.get(each.prompt_id)
        if row is None:
            texts = {one.response for one in each.answers if readable(one, keep_cut=False)}
            assert len(set(rewards)) < 2 or len(texts) < len(rewards)
        else:
            assert (row["chosen_value"], row["rejected_value"]) == (max(rewards), min(rewards))
            assert row["chosen_value"] > row["rejected_value"] and row["chosen"] != row["rejected"]
    assert left_out[ALIKE] == len(prompts) - len(rows) > 0


def test_every_answer_is_in_a_row_or_counted() -> None:
    prompts = drawn(3)
    everything = [one for each in prompts for one in each.answers]
    for choice in (Choice(), Choice(keep_cut=True), Choice(scored=True)):
        rows, left_out = choose(prompts, choice)
        assert len(rows) + left_out.total() == len(everything)
    _, left_out = choose([prompt(answer(" "), answer("a", finished=False), answer("b"))], Choice(scored=True))
    assert left_out == Counter({EMPTY: 1, CUT: 1, UNSCORED: 1})


def test_rows_of_a_conversation_are_conversations_with_what_stood_beside_them() -> None:
    talk = prompt(answer("Hi!", 1.0), answer("No.", 0.0), asked=TALK, tools=TOOLS, template_variables={"think": False})
    (row,), _ = choose([talk], Choice("worst-best", scored=True))
    assert row["prompt"] == TALK
    assert row["chosen"] == [{"role": "assistant", "content": "Hi!"}]
    assert row["rejected"] == [{"role": "assistant", "content": "No."}]
    (best,), _ = choose([talk], Choice("best", scored=True))
    assert (best["prompt"], best["answer"]) == (TALK, "Hi!")
    assert all((one["tools"], one["chat_template_kwargs"]) == (TOOLS, {"think": False}) for one in (row, best))


def test_a_condition_tells_the_reward_or_the_tenth_that_it_is_in() -> None:
    prompts = [prompt(answer("a", float(reward)), number=reward) for reward in range(20)]
    rows, _ = choose(prompts, Choice(condition="<{decile}> ", scored=True))
    assert [row["prompt"] for row in rows] == [f"<{1 + reward // 2}> Say." for reward in range(20)]
    talk = replace(prompts[7], prompt=TALK)
    (row,), _ = choose([talk], Choice(condition="<{reward:.1f}> ", scored=True))
    assert row["prompt"] == [{"role": "system", "content": "<7.0>"}, *TALK]
    system = [{"role": "system", "content": "Be kind."}, *TALK]
    (row,), _ = choose([replace(talk, prompt=system)], Choice(condition="<{reward:.1f}> ", scored=True))
    assert row["prompt"] == [{"role": "system", "content": "<7.0> Be kind."}, *TALK]


def test_a_line_gives_back_what_was_written() -> None:
    import json

    for each in [
        *drawn(4),
        prompt(answer("x", 0.0), asked=TALK, tools=TOOLS, template_variables={"a": 1}, label=["4"], source="s"),
    ]:
        assert AnsweredPrompt.of_line(json.loads(each.line())) == each


def test_the_best_of_tied_answers_are_in_the_last_tenth() -> None:
    """A policy that learned on such rows is asked for the last tenth, so that there have to be rows of it."""
    prompts = [prompt(answer("a", float(reward >= 3)), number=reward) for reward in range(10)]
    rows, _ = choose(prompts, Choice(condition="{decile}", scored=True))
    assert [row["prompt"] for row in rows] == [f"{tenth}Say." for tenth in [3] * 3 + [10] * 7]


def test_the_kl_of_a_choice_is_that_of_the_answers_it_chose_among() -> None:
    whole = [prompt(*(answer(f"a{place}", float(place)) for place in range(4)), number=number) for number in range(3)]
    best, top = Choice("best", scored=True), Choice("top-k", 2, scored=True)
    assert kl_of_choice(whole, best) == pytest.approx(math.log(4) - 3 / 4)
    assert kl_of_choice(whole, Choice("all", scored=True)) == 0.0
    assert kl_of_choice(whole, Choice("worst-best", scored=True)) is None
    cut = [prompt(*(answer(f"a{place}", float(place), finished=place < 1) for place in range(4)))]
    assert kl_of_choice(cut, Choice("all", scored=True)) is None, "answers that end are answers of another policy"
    assert kl_of_choice(cut, replace(best, keep_cut=True)) == kl_of_choice(whole, best)
    assert kl_of_choice(cut, top) == pytest.approx(top_k_of_n_kl(1, 4)), "one is left, which was picked out of four"
    unscored = [prompt(answer("a", 1.0), answer("b", 2.0), answer("c"), answer("d"))]
    assert kl_of_choice(unscored, best) == pytest.approx(math.log(2) - 1 / 2), "it was picked out of two"
    assert kl_of_choice([*whole, *unscored], best) == pytest.approx((3 * (math.log(4) - 0.75) + math.log(2) - 0.5) / 4)
