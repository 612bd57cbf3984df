"""A row is encoded whole or dropped and counted; an answer ends once; a prompt has the same ids wherever it stands."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.answer_ids import encode_answers
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import (
    EQUAL,
    ROWS_AT_ONCE,
    TOO_LONG,
    Drops,
    EncodedDemonstration,
    encode_demonstrations,
    encode_pairs,
    encode_prompts,
)
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.prompts import Prompt

PLAIN, STARTING, BOTH = "$A", "<s> $A", "<s> $A </s>"
LETTERS = st.text("ab ?\n", min_size=1, max_size=12)
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
MANY = 10_000

quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode_prompt(tokenizer, row, max_tokens):
    (encoded,) = encode_prompts(ChatFormat(tokenizer), [row], max_tokens, Drops())
    return encoded


def encode_demonstration(tokenizer, row, max_tokens):
    (encoded,) = encode_demonstrations(ChatFormat(tokenizer), [row], max_tokens, Drops())
    (sequence,) = encoded.sequences
    return sequence


def encode_pair(tokenizer, row, max_tokens):
    (encoded,) = encode_pairs(ChatFormat(tokenizer), [row], max_tokens, Drops())
    return encoded


def check_row(tokenizer: PreTrainedTokenizerFast, prompt: str, one: str, other: str) -> None:
    """All that must hold for a prompt and two answers."""
    end = tokenizer.eos_token_id
    before = encode_prompt(tokenizer, Prompt(0, prompt), MANY)
    ids, mask = encode_demonstration(tokenizer, Demonstration(prompt, one), MANY)
    assert ids[: len(before)] == before
    assert mask == [False] * len(before) + [True] * (len(ids) - len(before))
    assert ids.count(end) == 1, "the end comes once"
    assert ids[-1] == end, "and it comes last"
    again, answers = encode_answers(tokenizer, prompt, [one, other])
    assert again == before
    assert before + answers[0] == ids
    pair = encode_pair(tokenizer, PreferencePair(prompt, one, other), MANY)
    if answers[0] == answers[1]:
        assert pair is None
    else:
        assert pair == (before + answers[0], before + answers[1], len(before), 0, None, *map(len, answers))


@quick
@given(ANY, ANY, ANY)
def test_bytes_keep_every_text(byte_tokenizer, prompt, one, other):
    check_row(byte_tokenizer, prompt, one, other)
    before, (answer,) = encode_answers(byte_tokenizer, prompt, [one])
    assert byte_tokenizer.decode(before) == prompt
    assert byte_tokenizer.decode(answer[:-1]) == one, "nothing of an answer is cut"


@pytest.mark.parametrize("template", [PLAIN, STARTING, BOTH])
@quick
@given(prompt=LETTERS, one=LETTERS, other=LETTERS)
def test_what_a_tokenizer_adds_by_itself_comes_once(spaced_tokenizer, template, prompt, one, other):
    check_row(spaced_tokenizer(template), prompt, one, other)


@pytest.mark.parametrize("template", [STARTING, BOTH])
def test_a_tokenizer_that_puts_spaces_puts_none_into_the_middle(spaced_tokenizer, template):
    tokenizer = spaced_tokenizer(template)
    before, (answer,) = encode_answers(tokenizer, "why?", ["yes"])
    assert tokenizer.convert_ids_to_tokens(before) == ["<s>", "▁", *"why?"]
    assert tokenizer.convert_ids_to_tokens(answer) == [*"yes", "</s>"]
    assert before + answer == tokenizer("why?yes")["input_ids"] + [tokenizer.eos_token_id] * (template == STARTING)


@pytest.mark.parametrize("template", [STARTING, BOTH])
def test_an_answer_that_is_encoded_alone_gets_no_start_of_its_own(spaced_tokenizer, template):
    """The "h" would melt into the prompt's last letter, so it cannot be taken from the joined text."""
    tokenizer = spaced_tokenizer(template)
    before, (answer,) = encode_answers(tokenizer, "t", ["h"])
    assert tokenizer.convert_ids_to_tokens(before + answer) == ["<s>", "▁", "t", "▁", "h", "</s>"]


def test_a_start_in_the_text_is_not_doubled(spaced_tokenizer):
    tokenizer = spaced_tokenizer(STARTING)
    ids = encode_prompt(tokenizer, Prompt(0, "<s>why?"), MANY)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("answer", [" fine", " fine<eos>", " fine<eos><eos>"])
def test_an_answer_ends_once_whatever_its_text_ends_with(byte_tokenizer, answer):
    _, (ids,) = encode_answers(byte_tokenizer, "how are you?", [answer])
    assert byte_tokenizer.decode(ids) == " fine<eos>"


def test_an_end_in_a_prompt_stays(byte_tokenizer):
    ids = encode_prompt(byte_tokenizer, Prompt(0, "fine<eos>"), MANY)
    assert ids[-1] == byte_tokenizer.eos_token_id


def test_tokens_that_reach_over_the_seam_leave_the_prompt_as_it_is(byte_tokenizer):
    """ "the cat" is cut inside a word that is one token: the prompt keeps the ids that it is sampled after."""
    whole = byte_tokenizer("the")["input_ids"]
    before, (answer,) = encode_answers(byte_tokenizer, "th", ["e"])
    assert whole[: len(before)] != before, "else this shows nothing"
    assert before == byte_tokenizer("th")["input_ids"]
    assert byte_tokenizer.decode(before + answer[:-1]) == "the"


@quick
@given(st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=6), st.integers(1, 30))
def test_long_rows_are_dropped_whole_and_counted(byte_tokenizer, texts, limit):
    pairs = [PreferencePair(*row) for row in texts]
    drops = Drops()
    fitted = encode_pairs(ChatFormat(byte_tokenizer), pairs, limit, drops)
    whole = encode_pairs(ChatFormat(byte_tokenizer), pairs, MANY, Drops())
    for row, full, kept in zip(pairs, whole, fitted, strict=True):
        assert kept == (full if full and max(map(len, full[:2])) <= limit else None), "as it is, or not at all"
        assert encode_pair(byte_tokenizer, row, limit) == kept
    assert drops.total() == fitted.count(None)
    assert drops[EQUAL] == whole.count(None)
    for encode, rows in (
        (encode_demonstrations, [Demonstration(prompt, answer) for prompt, answer, _ in texts]),
        (encode_prompts, [Prompt(0, prompt) for prompt, _, _ in texts]),
    ):
        drops = Drops()
        chat = ChatFormat(byte_tokenizer)
        fitted, whole = encode(chat, rows, limit, drops), encode(chat, rows, MANY, Drops())
        nothing = EncodedDemonstration() if encode is encode_demonstrations else None
        lengths = [len(each.sequences[0][0] if nothing else each) for each in whole]
        assert fitted == [each if length <= limit else nothing for each, length in zip(whole, lengths, strict=True)]
        assert dict(drops) == ({TOO_LONG: fitted.count(nothing)} if nothing in fitted else {})


@pytest.mark.parametrize("template", [PLAIN, STARTING, BOTH])
@quick
@given(prompt=LETTERS, one=LETTERS, other=LETTERS, limit=st.integers(2, 30))
def test_a_prompt_that_is_cut_loses_its_beginning_and_nothing_else_is_cut(
    spaced_tokenizer, template, prompt, one, other, limit
):
    tokenizer, row = spaced_tokenizer(template), PreferencePair(prompt, one, other)
    whole = encode_pair(tokenizer, row, MANY)
    drops = Drops()
    (cut,) = encode_pairs(ChatFormat(tokenizer), [row], limit, drops, cut_prompt=True)
    start = int(template != PLAIN)
    if whole is None:
        assert drops == {EQUAL: 1}
        return
    longest, length = max(map(len, whole[:2])), whole.prompt_length
    if cut is None:
        assert drops == {TOO_LONG: 1}
        assert longest - length + start >= limit, "no token of the prompt would be left"
        return
    assert max(map(len, cut[:2])) == min(longest, limit), "not a token more is cut than must be"
    assert cut.cut == max(longest - limit, 0)
    assert cut.prompt_length == length - cut.cut > 0
    for before, after in zip(whole[:2], cut[:2], strict=True):
        assert after == before[:start] + before[start + cut.cut :], "the start stays, the answer stays"
    assert encode_pairs(ChatFormat(tokenizer), [row], limit, Drops()) == [whole if not cut.cut else None], (
        "only where it is asked for"
    )


def test_many_rows_are_the_rows_one_by_one(byte_tokenizer):
    rows = [Prompt(number, f"row {number}") for number in range(ROWS_AT_ONCE + 7)]
    encoded = encode_prompts(ChatFormat(byte_tokenizer), rows, MANY, Drops())
    assert [byte_tokenizer.decode(ids) for ids in encoded] == [row.text for row in rows]
    assert encode_prompts(ChatFormat(byte_tokenizer), [], MANY, Drops()) == []


def test_the_limit_is_met_to_the_token(byte_tokenizer):
    row = PreferencePair("how?", " so", " not so long")
    longest = max(map(len, encode_pair(byte_tokenizer, row, MANY)[:2]))
    assert encode_pair(byte_tokenizer, row, longest) is not None
    assert encode_pair(byte_tokenizer, row, longest - 1) is None


def test_a_tokenizer_without_an_end_is_refused(spaced_tokenizer):
    tokenizer = spaced_tokenizer(PLAIN)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode_answers(tokenizer, "why?", ["yes"])
    assert encode_prompt(tokenizer, Prompt(0, "why?"), MANY) is not None


def test_word_tokens_of_the_world():
    tokenizer = make_tokenizer("world", 400)
    before, (answer,) = encode_answers(tokenizer, "What is 2 + 3?\n", ["It is 5."])
    assert tokenizer.unk_token_id not in before + answer
    assert tokenizer.decode(before + answer) == "What is 2 + 3?\nIt is 5.<eos>"
