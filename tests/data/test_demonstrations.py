"""What is learned of a conversation is what a policy would sample, token by token: each token of an answer, after the very ids
that it would be sampled after, once.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.data.encode import TOO_LONG, Drops, EncodedDemonstration, encode_demonstrations, join_learned
from rlhf_ray.data.load import load_demonstrations
from rlhf_ray.rows.demonstrations import Demonstration, DemonstrationReader
from rlhf_ray.rows.read import read_file

from .chat_templates import CHATS, SHAPES, assistant, sampled, user

MANY = 10_000
THOUGHT = "<think>\nwhy\n</think>\n\n"
TALK = (user("why?"), assistant("so."), user("and?\n"), assistant("  blanks \n"), user("then?"), assistant("the end"))
THINKING = (user("why?"), assistant(f"{THOUGHT}so."), user("and?"), assistant(f"{THOUGHT}the end"))
CHATML = "a newline after the end"
DROPS = "an empty think block before a finished answer"
IN_ONE = {
    CHATML: (TALK, THINKING),
    DROPS: (TALK,),
    "no generation prompt": (TALK, THINKING),
    "an end that is not the tokenizer's, and no system": (TALK[:2] + TALK[4:], THINKING),
    "an end of the turn and then an end of the conversation": (TALK, THINKING),
}
"""By shape the conversations whose answers can be learned in one sequence: what comes before each begins with all before it."""
IN_SEVERAL = {
    DROPS: ((THINKING, 2),),
    "a think block that the prompt opens and a finished answer closes": ((TALK, 3), (THINKING, 2)),
    "a think block that the prompt opens and a finished answer has not": ((TALK, 3), (THINKING, 2)),
    "a channel before a finished answer, and another end in the middle": ((TALK, 3),),
    "no end at all": ((TALK, 3),),
    "an end that is not the tokenizer's, and no system": ((TALK, 2),),
    "the next header after everything": ((TALK, 3),),
    "a closing of many tokens, none of them the tokenizer's end": ((TALK, 3),),
    "blanks stripped and the day written": ((TALK[:2] + TALK[4:], 2),),
}
"""By shape conversations with the number of their sequences: an answer, or what stands before it, changes in the middle.

In the last one the texts do not change, but the tokenizer splits the two newlines of a header otherwise before a letter.
"""


def answers_of(messages):
    return tuple(place for place, message in enumerate(messages) if message["role"] == "assistant")


def encode(name, messages, learned=None, max_tokens=MANY, **options):
    row = Demonstration("", "", messages, answers_of(messages) if learned is None else learned)
    (encoded,) = encode_demonstrations(CHATS[name], [row], max_tokens, Drops(), **options)
    return encoded.sequences


def predictions(sequences):
    """Every token that is learned, with all that stands before it."""
    return Counter(
        (tuple(ids[:place]), ids[place]) for ids, mask in sequences for place, learned in enumerate(mask) if learned
    )


def sampled_tokens(name, messages, learned):
    """The same as a policy would sample it, without the code under test."""
    tokens = Counter()
    for place in learned:
        before, ids, end = sampled(name, list(messages[:place]), messages[place]["content"])
        answer = [*ids, end]
        tokens.update(((*before, *answer[:number]), token) for number, token in enumerate(answer))
    return tokens


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("messages", [TALK, THINKING, TALK[:2], TALK[:4]])
def test_every_token_of_every_answer_is_learned_where_a_policy_would_sample_it(name, messages):
    for learned in (answers_of(messages), answers_of(messages)[-1:], answers_of(messages)[:1]):
        assert predictions(encode(name, messages, learned)) == sampled_tokens(name, messages, learned)


@pytest.mark.parametrize("name", IN_ONE)
def test_one_rendering_serves_all_answers_where_each_is_a_prefix_of_the_whole(name):
    for messages in IN_ONE[name]:
        assert len(encode(name, messages)) == 1, messages


@pytest.mark.parametrize("name", IN_SEVERAL)
def test_an_answer_that_the_template_changes_later_has_a_sequence_of_its_own(name):
    for messages, count in IN_SEVERAL[name]:
        assert len(encode(name, messages)) == count, messages


@pytest.mark.parametrize("name", SHAPES)
def test_every_token_is_learned_once_where_all_are(name):
    sequences = encode(name, THINKING, every_token=True)
    learned = predictions(sequences)
    assert set(learned.values()) == {1}
    everywhere = {(tuple(ids[:place]), ids[place]) for ids, _ in sequences for place in range(1, len(ids))}
    assert set(learned) == everywhere
    assert all(not mask[0] for _, mask in sequences), "nothing predicts the first token"


def test_no_user_and_no_header_is_learned_where_earlier_thinking_is_dropped():
    """Where the whole is rendered once and owners are found by lengths, a shift covers the user's words."""
    (first, first_mask), (second, second_mask) = encode(DROPS, THINKING)
    decode = CHATS[DROPS].tokenizer.decode
    shown = [
        decode([token for token, learned in zip(ids, mask, strict=True) if learned])
        for ids, mask in ((first, first_mask), (second, second_mask))
    ]
    assert shown == [f"{THOUGHT}so.<|im_end|>", f"{THOUGHT}the end<|im_end|>"]
    assert "why\n" not in decode([token for token, learned in zip(second, second_mask, strict=True) if not learned])


def test_thinking_that_the_prompt_opens_or_closes_is_not_learned():
    opens = "a think block that the prompt opens and a finished answer closes"
    ((ids, mask),) = encode(opens, (user("why?"), assistant(f"{THOUGHT}so.")))
    text = CHATS[opens].tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])
    assert text == "why\n</think>\n\nso.<|im_end|>"
    row = Demonstration("", "", TALK[:2], (1,), template_variables={"enable_thinking": False})
    (encoded,) = encode_demonstrations(CHATS[DROPS], [row], MANY, Drops())
    ((ids, mask),) = encoded.sequences
    assert "<think>" in CHATS[DROPS].tokenizer.decode(ids)
    text = CHATS[DROPS].tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])
    assert text == "so.<|im_end|>"


IDS = st.lists(st.integers(0, 2), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=4), st.booleans())
def test_any_answers_are_learned_after_what_stands_before_them(answers, follow):
    """Also where one prompt begins with the sequence before it by chance."""
    if follow:
        whole = []
        answers = [((whole := [*whole, *prompt]), answer, whole := [*whole, *answer])[:2] for prompt, answer in answers]
    wanted = Counter(
        ((*prompt, *answer[:place]), token) for prompt, answer in answers for place, token in enumerate(answer)
    )
    sequences = join_learned(answers)
    assert predictions(sequences) == wanted
    assert len(sequences) == 1 or not follow


def test_answers_that_fit_are_learned_and_those_behind_the_limit_are_not():
    whole = encode(CHATML, TALK)[0][0]
    (short, _), = encode(CHATML, TALK[:4])  # fmt: skip
    row = Demonstration("", "", TALK, (1, 3, 5))
    drops = Drops()
    (cut,) = encode_demonstrations(CHATS[CHATML], [row], len(whole) - 1, drops)
    assert ([ids for ids, _ in cut.sequences], cut.too_long, drops) == ([short], 1, Drops())
    (none,) = encode_demonstrations(CHATS[CHATML], [row], 5, drops)
    assert none == EncodedDemonstration() and drops == {TOO_LONG: 1}


def test_texts_and_conversations_side_by_side():
    texts = [Demonstration("one ", "two"), Demonstration("three ", "four")]
    rows = [texts[0], Demonstration("", "", TALK, (1, 3, 5)), texts[1], Demonstration("", "", THINKING, (3,))]
    encoded = encode_demonstrations(CHATS[DROPS], rows, MANY, Drops())
    alone = [encode_demonstrations(CHATS[DROPS], [row], MANY, Drops())[0] for row in rows]
    assert encoded == alone
    assert [one.losses is None for one in encoded] == [True, False, True, False]


def test_conversations_are_loaded_mixed_and_held_out_by_what_the_first_answer_is_given_to(write, project_log):
    tokenizer = CHATS[DROPS].tokenizer
    talks = [[user(f"number {number}?"), *THINKING[1:]] for number in range(10)]
    one = write([{"messages": talk} for talk in talks], name="one.jsonl")
    texts = [{"prompt": f" number {number}? ", "answer": "it"} for number in range(10)]
    two = write([*texts, {"messages": talks[0][:1] + talks[0][2:3]}], name="two.jsonl")
    data = DataConfig.model_validate({
        "sources": {"one": {"path": str(one)}, "two": {"path": str(two), "weight": 2}},
        "evaluation_fraction": 0.3, "apply_chat_template": True, "bad_rows": "drop",
    })  # fmt: skip
    split = load_demonstrations(data, tokenizer, 0)
    shown = [[tokenizer.decode(example.token_ids).partition("?")[0] for example in half]
             for half in (split.train, split.held_out)]  # fmt: skip
    assert not {*shown[0]} & {*shown[1]}, "a prompt is in one half, whichever file it is in"
    assert (len(split.train), len(split.held_out)) == (7 * 3, 3 * 3)
    assert [(part.size, part.per_epoch) for part in split.parts] == [(14, 14), (7, 14)]
    assert "1 bad rows are left out" in project_log.getvalue()


def test_the_log_says_what_becomes_of_texts_and_of_answers_that_are_too_long(write, project_log):
    chat = CHATS[CHATML]
    limit = len(encode(CHATML, TALK)[0][0]) - 1
    path = str(write([{"messages": TALK}, {"prompt": "one ", "answer": "two"}]))
    split = load_demonstrations(DataConfig(path=path, max_tokens=limit), chat.tokenizer, 0)
    assert len(split.train) == 2
    said = project_log.getvalue()
    assert "1 answers of 1 conversations end behind data.max_tokens and are not learned; those before them are" in said
    assert "1 of 2 demonstrations are plain texts, which are learned as they stand" in said


def test_the_section_says_what_is_learned(write):
    path = str(write([{"messages": THINKING}]))
    learned = {}
    for train_on in ("answers", "last_answer", "all"):
        data = DataConfig(path=path, train_on=train_on)
        (row,) = read_file(path, data.demonstration_reader(data.file("")))
        assert isinstance(data.demonstration_reader(data.file("")), DemonstrationReader)
        split = load_demonstrations(data, CHATS[CHATML].tokenizer, 0)
        learned[train_on] = (row.learned, sum(sum(example.action_mask) for example in split.train))
    assert learned["answers"][0] == (1, 3) and learned["last_answer"][0] == (3,)
    tokens = {train_on: count for train_on, (_, count) in learned.items()}
    assert tokens["last_answer"] < tokens["answers"] < tokens["all"]
