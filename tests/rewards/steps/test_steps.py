"""Rewards of steps: the tokens at which they stand, against a slow search through the ids; and what is refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.rewards.function_source import FunctionSource, InThisProcess
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.steps.placement import Reduction, SteppedResult, step_tokens
from rlhf_ray.rewards.steps.source import SteppedSource
from tests.rewards.answers import answer
from tests.serving.reward_models import EOS, make_tokenizer

TEXTS = ["one\ntwo\nthree", "2 + 2\n\n= 4\n", "déjà vu\n是的\n🙂🙂", "no line"]


def slow_token(response: str, end: int, ids: Sequence[int], tokenizer: Any) -> int:
    """The first token up to which the whole text of the step can be read."""
    for count in range(1, len(ids) + 1):
        read = tokenizer.decode(ids[:count], skip_special_tokens=True)
        if len(read) >= end and read[:end] == response[:end]:
            return count - 1
    raise AssertionError("the text is that of the ids")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("ended", [True, False])
def test_a_step_stands_at_the_token_that_ends_its_text(text: str, ended: bool) -> None:
    """Each character is a token or, of one byte after the other, several: no place in the text is that in the ids."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False) + [tokenizer.convert_tokens_to_ids(EOS)] * ended
    ends = sorted({number + 1 for number, letter in enumerate(text) if letter == "\n"} | {len(text)})
    found = step_tokens(tuple((end, 1.0) for end in ends), text, ids, tokenizer)
    assert found[:-1] == [slow_token(text, end, ids, tokenizer) for end in ends[:-1]]
    assert found[-1] == len(ids) - 1
    for place, end in zip(found[:-1], ends[:-1], strict=True):
        assert tokenizer.decode(ids[: place + 1]) == text[:end]


def test_ids_that_the_text_would_not_be_tokenized_into_keep_their_places() -> None:
    """A policy samples `a` and `b` where the tokenizer would write `ab`: counting the text's own tokens would miss."""

    class Pairs:
        def decode(self, ids: Sequence[int], **options: Any) -> str:
            return "".join({1: "a", 2: "b", 3: "ab", 4: "\n"}[number] for number in ids)

    assert step_tokens(((3, 1.0), (6, 1.0)), "ab\nab\n", [1, 2, 4, 3, 4], Pairs()) == [2, 4]
    assert step_tokens(((3, 1.0), (6, 1.0)), "ab\nab\n", [3, 4, 1, 2, 4], Pairs()) == [1, 4]
    assert step_tokens(((1, 1.0), (6, 1.0)), "ab\nab\n", [3, 4, 1, 2, 4], Pairs()) == [0, 4]  # inside of a token
    with pytest.raises(ValueError, match="no token of the answer ends after its first 2 characters"):
        step_tokens(((2, 1.0), (6, 1.0)), "ba\nab\n", [3, 4, 1, 2, 4], Pairs())


def test_drawn_steps_stand_where_a_slow_search_finds_them() -> None:
    draw, tokenizer = random.Random(3), make_tokenizer()
    for _ in range(50):
        text = "".join(draw.choice("ab é是🙂\n") for _ in range(draw.randint(2, 40)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        ends = sorted(draw.sample(range(1, len(text)), draw.randint(1, min(5, len(text) - 1))))
        found = step_tokens(tuple((end, 0.0) for end in ends), text, ids, tokenizer)
        assert found == [slow_token(text, end, ids, tokenizer) for end in ends]


def results(returned: Any, reduction: Reduction | None, *texts: str) -> list[ScoreResult]:
    """What becomes of what a function returns."""

    def function(responses: list[str]) -> Any:
        return returned[: len(responses)]

    source = FunctionSource("mine.py:steps", InThisProcess("mine.py:steps", function), steps=reduction is not None)
    samples: list[TextSample] = [replace(answer("a question", text), sample_index=n) for n, text in enumerate(texts)]
    return (source if reduction is None else SteppedSource(source, reduction)).score(samples).result()


@pytest.mark.parametrize(("reduction", "reward"), [("sum", 0.25), ("min", -1.0), ("last", 0.5)])
def test_the_score_is_the_reduction_and_only_the_sum_keeps_its_steps(reduction: Reduction, reward: float) -> None:
    (result,) = results([[(2, 0.75), (4, -1.0), (6, 0.5)]], reduction, "123456")
    assert result.reward == result.raw == reward
    assert (isinstance(result, SteppedResult) and result.steps == ((2, 0.75), (4, -1.0), (6, 0.5))) == (
        reduction == "sum"
    )


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([[]], "an answer has one step at least"),
        (
            [[(7, 1.0)]],
            "step 1 ends after 7 characters, where it must be more than 0 and at most 6, the length of the answer",
        ),
        ([[(0, 1.0)]], "step 1 ends after 0 characters"),
        ([[(3, 1.0), (3, 1.0)]], "step 2 ends after 3 characters, where it must be more than 3"),
        ([[(3, float("nan"))]], "returned nan, which is not a finite number"),
        ([[(3.5, 1.0)]], "returned [(3.5, 1.0)], which is not a finite number, nor a list of steps (characters"),
        ([[3]], "returned [3], which is not a finite number, nor a list of steps"),
        ([[(True, 1.0)]], "returned [(True, 1.0)], which is not a finite number, nor a list of steps"),
        ([1.0], "has the reward 1.0 and none for its steps"),
        ([[(3, 1e308), (6, 1e308)]], "inf, which is not a finite reward"),
    ],
)
def test_what_are_no_steps_is_no_reward(returned: Any, said: str) -> None:
    (result,) = results(returned, "sum", "123456")
    assert result.reward is None and result.fault == "model" and said in str(result.error)


def test_an_answer_that_ends_at_once_has_its_step_at_its_end_token() -> None:
    (result,) = results([[(0, -1.0)]], "sum", "")
    assert isinstance(result, SteppedResult) and result.reward == -1.0
    assert step_tokens(result.steps, "", [2], make_tokenizer()) == [0]


def test_steps_that_nobody_asked_for_are_not_summed_silently() -> None:
    (result,) = results([[(3, 1.0)]], None, "123456")
    assert result.reward is None and "set reward.steps if these are its steps" in str(result.error)
