"""Demonstrations, preference pairs and prompts: one a row, in the order of the file, none with an empty side."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration, read_demonstrations
from rlhf_ray.rows.preferences import ANSWER_BEGINS, PreferencePair, read_preferences, shared_prompt
from rlhf_ray.rows.prompts import Prompt, read_prompts

ASKED = "\n\nHuman: Is it late?\n\nAssistant:"


def test_demonstrations(write):
    rows = [{"prompt": "p", "answer": "a", "more": 1}, {"prompt": "q", "answer": "b"}]
    assert read_demonstrations(write(rows)) == [Demonstration("p", "a"), Demonstration("q", "b")]
    renamed = write([{"question": "p", "solution": "a"}])
    assert read_demonstrations(renamed, "question", "solution") == [Demonstration("p", "a")]
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:1: no 'prompt' and 'answer' or 'messages' or .*; its keys are 'question', 'solution'",
    ):
        read_demonstrations(renamed)


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_with_a_prompt_are_taken_as_they_are(write):
    rows = [{"prompt": "p", "chosen": "pa", "rejected": "pb", "margin": 2, "grade": 0, "source": "s"}]
    assert read_preferences(write(rows)) == [PreferencePair("p", "pa", "pb", 2.0, "s", 0.0)]


def test_the_subset_of_rewardbench_is_a_source(write):
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_model": "m", "subset": "alpacaeval-easy", "id": 7}
    assert read_preferences(write([row])) == [PreferencePair("p", "a", "b", source="alpacaeval-easy")]


def test_a_dialogue_is_split_where_the_answers_begin(write):
    longer = f"{ASKED} Yes.\n\nHuman: Really?\n\nAssistant:"
    rows = [
        {"chosen": f"{ASKED} No.", "rejected": f"{ASKED} Now?"},
        {"chosen": f"{longer} No.", "rejected": f"{longer} Not at all."},
        {
            "chosen": f"{ASKED} Yes.\n\nHuman: So?\n\nAssistant: a",
            "rejected": f"{ASKED} Yes.\n\nHuman: Oh?\n\nAssistant: b",
        },
        {"chosen": ASKED, "rejected": f"{ASKED} No."},
    ]
    assert read_preferences(write(rows)) == [
        PreferencePair(ASKED, " No.", " Now?"),
        PreferencePair(longer, " No.", " Not at all."),
        PreferencePair(ASKED, " Yes.\n\nHuman: So?\n\nAssistant: a", " Yes.\n\nHuman: Oh?\n\nAssistant: b"),
        PreferencePair(ASKED, "", " No."),
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The cat sat.", "The cat slept.", "The cat"),
        ("The cat sat.", "The cat, yes.", "The cat"),
        ("Why?\nBecause", "Why?\nBut", "Why?\n"),
        ("one two", "one two three", "one two"),
        ("one two", "one twofold", "one"),
        ("same", "same", "same"),
        ("a  b", "a  c", "a "),
        ("问？甲乙", "问？甲丙", "问？"),
        ("It's", "It is", "It"),
        ("abc", "abd", ""),
        ("abc", "xyz", ""),
    ],
)
def test_other_texts_are_split_between_words(chosen, rejected, prompt):
    assert shared_prompt(chosen, rejected) == shared_prompt(rejected, chosen) == prompt


TURNS = st.lists(st.sampled_from(["a", "b", " ", "\n", "?", "é", "\n\nHuman:", ANSWER_BEGINS]), max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(TURNS, TURNS, TURNS)
@example("a" + ANSWER_BEGINS[:-1], ": a", "; a")
def test_a_shared_prompt_is_shared_and_ends_as_late_as_it_may(start, one, other):
    one, other = start + one, start + other
    prompt = shared_prompt(one, other)
    assert one.startswith(prompt)
    assert other.startswith(prompt)
    shared = max(end for end in range(min(len(one), len(other)) + 1) if one[:end] == other[:end])
    if ANSWER_BEGINS in one[:shared]:
        assert prompt.endswith(ANSWER_BEGINS)
        assert ANSWER_BEGINS not in one[len(prompt) - len(ANSWER_BEGINS) + 1 : shared]
        return
    for end in range(len(prompt), shared + 1):
        cut = any(
            0 < end < len(text)
            and (
                (text[end - 1].isalnum() and text[end].isalnum()) or (text[end - 1] == " " and not text[end].isspace())
            )
            for text in (one, other)
        )
        assert cut == (end > len(prompt))


def test_pairs_that_begin_differently_need_a_prompt(write):
    path = write([{"topic": "secret", "chosen": "yes", "rejected": "no"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*set data\.prompt_key .*'topic', 'chosen', 'rejected'"):
        read_preferences(path)
    assert read_preferences(path, "topic") == [PreferencePair("secret", "yes", "no")]


@pytest.mark.parametrize("key", ["prompt", "margin", "grade"])
def test_a_layout_holds_for_a_whole_file(write, key):
    full = {"prompt": "1", "chosen": "c x", "rejected": "c y", "margin": "1", "grade": 2}
    lacking = {name: value for name, value in full.items() if name != key}
    for rows in ([full, lacking], [lacking, full]):
        bad = rows.index(lacking) + 1
        with pytest.raises(DataError, match=rf"rows\.jsonl:{bad}: nothing under '{key}'"):
            read_preferences(write(rows))


@pytest.mark.parametrize("margin", ["NaN", "Infinity", '"much"', "true", "[1]"])
def test_a_margin_that_is_no_finite_number(write, margin):
    good = '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0}\n'
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 'margin' must hold a finite number"):
        read_preferences(write(good + good.replace("0", margin)))


def test_empty_columns_of_a_table_are_no_columns(write):
    path = write("prompt,chosen,rejected,margin,source\n,c x,c y,,\n,c x,c z,,\n", "rows.csv")
    assert read_preferences(path) == [PreferencePair("c", " x", " y"), PreferencePair("c", " x", " z")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "chosen": "c"}, "no 'chosen' and 'rejected'; its keys are 'prompt', 'chosen'"),
        (
            {"prompt": "p", "chosen": "c", "rejected": ""},
            "'rejected' must hold a text or a list of messages, this is empty",
        ),
        (
            {"prompt": "p", "chosen": "c", "rejected": 7},
            "'rejected' must hold a text or a list of messages, this is of type int",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": "r", "source": [7]}, "'source' must hold a text"),
    ],
)
def test_bad_pairs(write, row, problem):
    path = write([{"prompt": "p", "chosen": "c", "rejected": "r"}, row])
    with pytest.raises(DataError) as error:
        read_preferences(path)
    assert str(error.value).startswith(f"{path}:2: {problem}")


# -------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_with_labels(write):
    rows = [{"prompt": "p", "label": 7}, {"prompt": "q", "label": "x", "source": "s"}, {"prompt": "r"}]
    assert read_prompts(write(rows)) == [Prompt(0, "p", "7"), Prompt(1, "q", "x", "s"), Prompt(2, "r")]


def test_word_problems(write):
    rows = [{"question": "1 + 1?", "answer": "It is\n#### 2"}]
    assert read_prompts(write(rows), "question") == [Prompt(0, "1 + 1?", "It is\n#### 2")]
    assert read_prompts(write(rows), "answer") == [Prompt(0, "It is\n#### 2")], "a prompt is not its own label"


TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "why?"},
]


def test_prompts_that_are_conversations(write):
    tools = [{"name": "clock"}]
    rows = [{"prompt": TALK, "label": "7", "source": "s", "tools": tools}, {"prompt": TALK[2:], "system": "be brief"}]
    first, second = read_prompts(write(rows))
    assert (first.messages, first.label, first.source, first.tools, first.text) == (TALK, "7", "s", tools, "")
    assert second.messages == [{"role": "system", "content": "be brief"}, TALK[2]]
    assert first.where.endswith("rows.jsonl:1")


def test_texts_become_turns_where_that_is_asked_for(write):
    (prompt,) = read_prompts(write([{"prompt": "why?", "system": "be brief"}]), turns=True)
    assert prompt.messages == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]


def test_prompts_of_pairs_of_conversations_are_what_both_begin_with(write):
    sides = [[*TALK, {"role": "assistant", "content": answer}] for answer in ("yes", "no")]
    (prompt,) = read_prompts(write([{"chosen": sides[0], "rejected": sides[1]}]))
    assert prompt.messages == TALK


def test_prompts_of_pairs(write):
    rows = [
        {"chosen": f"{ASKED} Yes.", "rejected": f"{ASKED} No."},
        {"chosen": "The cat sat", "rejected": "The cat ran"},
    ]
    assert read_prompts(write(rows)) == [Prompt(0, ASKED), Prompt(1, "The cat")]
    renamed = write([{"better": "The cat sat", "worse": "The cat ran"}])
    assert read_prompts(renamed, chosen_key="better", rejected_key="worse") == [Prompt(0, "The cat")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "q"}, "no 'prompt' or 'chosen' and 'rejected'; its keys are 'question'"),
        ({"chosen": f"{ASKED} Yes."}, "no 'prompt' or 'chosen' and 'rejected'"),
        ({"prompt": None, "chosen": "c", "rejected": "c d"}, "'prompt' must hold a text"),
        ({"chosen": "one", "rejected": "two"}, "'chosen' and 'rejected' begin differently"),
        ({"chosen": f"\n\nHuman: a{ANSWER_BEGINS} x", "rejected": f"\n\nHuman: b{ANSWER_BEGINS} x"}, "its two dialogues part"),
        ({"prompt": []}, "'prompt': holds no message"),
        ({"prompt": TALK[:2]}, "'prompt' ends with 'assistant', who is to answer next: leave the last message out"),
        ({"prompt": [{"role": "user"}]}, "'prompt': message 1 must hold a text under 'content'"),
        ({"prompt": "p", "system": "be brief"}, "there is something under 'system', for which a plain text has no place"),
        ({"prompt": "p", "tools": [{"name": "clock"}]}, "there is something under 'tools', for which a plain text"),
        ({"prompt": "[{'role': 'user', 'content': 'q'}]"}, "'prompt' must hold a text or a list of messages, these are m"),
        ({"prompt": "p", "label": "x", "answer": "y"}, "'label' and 'answer' could each be the label, and they differ"),
    ],
)  # fmt: skip
def test_bad_prompts(write, row, problem):
    path = write([row])
    with pytest.raises(DataError) as error:
        read_prompts(path)
    assert str(error.value).startswith(f"{path}:1: {problem}")
