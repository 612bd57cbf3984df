"""What ends an answer, in one sentence, and why nearly every answer of a step was cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.ends import EndTokens, find_end_tokens, why_cut
from rlhf_ray.data.tokenizers import make_byte_pair_tokenizer, make_word_tokenizer
from rlhf_ray.errors import RequestError
from tests.data.chat_templates import SHAPES, make_tokenizer

WORDS = ChatFormat(make_word_tokenizer())
(NEWLINE,) = WORDS.tokenizer("\n")["input_ids"]
GEMMA = ChatFormat(make_tokenizer(SHAPES["an end that is not the tokenizer's, and no system"]))
EOS, TURN, START = GEMMA.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>", "<start_of_turn>"])
SO: list[int] = GEMMA.tokenizer("so", add_special_tokens=False)["input_ids"]


def find(chat: ChatFormat, *texts: str, **recorded: Any) -> EndTokens:
    return find_end_tokens(chat, recorded, texts, conversations=False)


def test_stop_tokens_are_single_tokens_beside_the_end_of_sequence() -> None:
    assert find(WORDS).ids == (WORDS.tokenizer.eos_token_id,)
    assert find(WORDS, "\n", "\n", "<eos>").ids == (WORDS.tokenizer.eos_token_id, NEWLINE)
    with pytest.raises(RequestError, match=r"rollout.stop_tokens: 'zebra' is not one token of the policy's tokenizer"):
        find(WORDS, "zebra")
    byte_pairs = ChatFormat(make_byte_pair_tokenizer(iter(["a text"]), 300))
    with pytest.raises(RequestError, match=r"'<.im_end.>' is not one token .*\(\d+ tokens\)"):
        find(byte_pairs, "<|im_end|>")
    endless = copy.deepcopy(WORDS.tokenizer)
    endless.eos_token = None
    assert find(ChatFormat(endless), "\n").ids == (NEWLINE,)
    with pytest.raises(RequestError, match="no end of sequence, so no answer could end: name a token"):
        find(ChatFormat(endless))


def test_every_end_is_named_with_all_who_name_it() -> None:
    ends = find_end_tokens(GEMMA, {"generation_config.json": [EOS, TURN]}, ["<end_of_turn>"], conversations=True)
    assert ends.sentence() == (
        f"an answer ends with '<eos>' ({EOS}, the tokenizer and generation_config.json) or '<end_of_turn>' ({TURN}, the chat "
        "template and generation_config.json and rollout.stop_tokens)"
    )


def reason(*answers: list[int], conversations: bool = False) -> str | None:
    ends = find_end_tokens(GEMMA, {}, [], conversations=conversations)
    return why_cut(GEMMA.tokenizer, ends, answers, 4)


def test_nothing_is_said_where_a_tenth_of_the_answers_and_more_end() -> None:
    assert reason(*[SO * 4] * 8, [*SO, EOS], [EOS]) is None
    assert reason() is None


def test_a_policy_that_ends_with_a_token_which_ends_nothing_is_told_to_name_it() -> None:
    text = reason(*[[*SO, TURN, *SO]] * 9, SO * 4)
    assert (
        text is not None
        and f"10 of 10 answers were cut at rollout.max_new_tokens 4: no end ('<eos>' ({EOS})) came in " in text
    )
    assert text.endswith("but '<end_of_turn>' in 9 of them: if that ends an answer, name it in rollout.stop_tokens")
    assert reason([*SO, TURN], conversations=True) is None


def test_an_unnamed_end_is_told_of_also_where_a_few_answers_end() -> None:
    text = reason(*[[*SO, TURN, *SO]] * 19, [*SO, EOS])
    assert text is not None and "came 1 times in" in text and "but '<end_of_turn>' in 19 of them" in text


def test_answers_that_end_now_and_then_are_longer_than_the_limit() -> None:
    text = reason(*[SO * 3] * 19, [*SO, EOS])
    tokens = 19 * 3 * len(SO) + len(SO) + 1
    assert (
        text is not None and f"came 1 times in {tokens} tokens, once in {tokens}. Raise rollout.max_new_tokens" in text
    )


def test_answers_that_never_end_may_be_long_or_of_a_policy_that_never_learned_to() -> None:
    text = reason(*[SO * 4] * 3)
    assert text is not None and "raise rollout.max_new_tokens; or the policy was never trained to end" in text


def test_a_special_token_that_is_rare_is_not_taken_for_an_end() -> None:
    text = reason(*[SO * 4] * 19, [*SO, START, *SO])
    assert text is not None and "<start_of_turn>" not in text
