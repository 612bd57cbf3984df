"""Nothing is added to ids or text and nothing stripped; conversations and answers are written as in training, once; what is
too long is refused, or loses its beginning.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.actors.workers.request_scoring import RequestScorer
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import Drops, encode_demonstrations, encode_pairs
from rlhf_ray.errors import ScoringError
from rlhf_ray.models.reward_reading import assumed_reading
from rlhf_ray.rewards.encoding import EncodedItem, encode_request, longest_read, refuse_unread
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import read_preferences

from ..serving.reward_models import BOS, EOS, make_tokenizer

TEMPLATED, PLAIN, ENDLESS = make_tokenizer(), make_tokenizer(template=None), make_tokenizer(template=None, eos=False)
VOCABULARY = len(PLAIN)


def encoded(
    request: ScoreRequest, tokenizer: PreTrainedTokenizerFast = PLAIN, max_tokens: int = 1000
) -> tuple[int, ...]:
    reading = assumed_reading("model", tokenizer, tokenizer.pad_token_id)
    chat = ChatFormat(tokenizer)
    return encode_request(chat, request, reading=reading, max_tokens=max_tokens, vocabulary=VOCABULARY).token_ids


def written(text: str) -> tuple[int, ...]:
    """The ids of a text with its special tokens in it: one a byte, found without the code under test."""
    pieces = text.replace(BOS, "\0\x01").replace(EOS, "\0\x02").split("\0")
    ids = list(_bytes(pieces[0]))
    for piece in pieces[1:]:
        ids += [ord(piece[0]), *_bytes(piece[1:])]
    return tuple(ids)


def _bytes(text: str) -> list[int]:
    return [PLAIN.convert_tokens_to_ids(letter) for letter in PLAIN.tokenize(text, add_special_tokens=False)]


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30).map(tuple))
def test_ids_stay_what_they_are(token_ids: tuple[int, ...]) -> None:
    assert encoded(ScoreRequest(token_ids=token_ids)) == token_ids


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_text_is_tokenised_as_it_stands(text: str) -> None:
    ids = encoded(ScoreRequest(text=text))
    assert PLAIN.decode(ids, skip_special_tokens=False) == text
    if "<" not in text:
        assert len(ids) == len(text.encode())


@pytest.mark.parametrize("text", [f"{BOS}a{EOS}", f"  a \n{EOS}\n", "a", f"{EOS}{EOS}"])
def test_special_tokens_in_a_text_are_one_token_each_and_none_is_added(text: str) -> None:
    ids = encoded(ScoreRequest(text=text))
    assert ids == written(text)
    assert (ids.count(1), ids.count(2)) == (text.count(BOS), text.count(EOS))


@pytest.mark.parametrize("answer", ["yes", " yes ", f"yes{EOS}", ""])
def test_an_answer_is_written_as_reward_training_writes_it(answer: str) -> None:
    ids = encoded(ScoreRequest(prompt="why? ", response=answer))
    assert ids == written(f"{BOS}why? {answer.removesuffix(EOS)}{EOS}")
    (trained,) = encode_demonstrations(ChatFormat(PLAIN), [Demonstration("why? ", answer)], 1000, Drops())
    assert [list(ids)] == [sequence for sequence, _ in trained.sequences]


def test_a_prompt_that_holds_its_start_token_gets_no_second_one() -> None:
    assert encoded(ScoreRequest(prompt=f"{BOS}a", response="b")) == written(f"{BOS}ab{EOS}")


def test_a_conversation_goes_through_the_template_once() -> None:
    turns = ({"role": "user", "content": " why?"}, {"role": "assistant", "content": "so "})
    expected = written(f"{BOS}[user] why?{EOS}[assistant]so {EOS}")
    assert encoded(ScoreRequest(messages=turns), TEMPLATED) == expected
    assert encoded(ScoreRequest(prompt=" why?", response="so "), TEMPLATED) == expected


def test_the_template_reads_the_tools_the_variables_and_a_message_without_a_text() -> None:
    template = (
        "{% for tool in tools or [] %}({{ tool.name }}){% endfor %}{{ style }}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content or m.tool_calls[0].name }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = (
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]},
        {"role": "tool", "content": "nine"},
        {"role": "assistant", "content": "so"},
    )
    request = ScoreRequest(messages=turns, tools=({"name": "clock"},), chat_template_kwargs={"style": "!"})
    expected = written(f"(clock)![user]why?[assistant]clock[tool]nine[assistant]so{EOS}")
    assert encoded(request, make_tokenizer(template=template)) == expected


@pytest.mark.parametrize(
    ("request_", "tokenizer", "message"),
    [
        (ScoreRequest(token_ids=()), PLAIN, "the item is empty"),
        (ScoreRequest(text=""), PLAIN, "the item is empty"),
        (ScoreRequest(token_ids=(3, VOCABULARY)), PLAIN, f"token id {VOCABULARY} is outside .* of {VOCABULARY}"),
        (ScoreRequest(token_ids=(-1, 3)), PLAIN, "token id -1 is outside"),
        (ScoreRequest(messages=({"role": "assistant", "content": "a"},)), PLAIN, "has no chat template: send text"),
        (ScoreRequest(messages=()), TEMPLATED, "must end with a message of the assistant"),
        (ScoreRequest(messages=({"role": "user", "content": "a"},)), TEMPLATED, "must end with a message"),
        (ScoreRequest(prompt="a", response="b"), ENDLESS, "no end-of-sequence token"),
        (
            ScoreRequest(messages=({"role": "tool", "content": "a"}, {"role": "assistant", "content": "b"})),
            TEMPLATED,
            "template refuses the conversation: no tools",
        ),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_says_why(
    request_: ScoreRequest, tokenizer: PreTrainedTokenizerFast, message: str
) -> None:
    with pytest.raises(ScoringError, match=message):
        encoded(request_, tokenizer)


ECHOING = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "{% if m.content == 'sum' %}{{ m.content + 1 }}{% endif %}{{ m.content }}<eos>{% endfor %}"
)


@pytest.mark.parametrize("turn", [{"role": "my secret", "content": "a"}, {"role": "user", "content": "sum"}])
def test_the_message_of_a_template_holds_no_text_of_the_item(turn: dict[str, str]) -> None:
    tokenizer = make_tokenizer(template=ECHOING)
    with pytest.raises(ScoringError, match=r"refuses the conversation with (TemplateError|TypeError)") as caught:
        encoded(ScoreRequest(messages=(turn, {"role": "assistant", "content": "b"})), tokenizer)
    assert "secret" not in str(caught.value) and "concatenate" not in str(caught.value)


class Unread:
    """A tokenizer that must not be asked."""

    chat_template = None
    bos_token_id = eos_token_id = 1

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a text that is many times too long was read")


TURNS = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(
    "values",
    [
        {"text": "x" * 300_000},
        {"prompt": "ü" * 150_000, "response": "b"},
        {"messages": ({"role": "user", "content": "x" * 300_000}, {"role": "assistant", "content": "b"})},
        {"messages": TURNS, "tools": ({"x" * 300_000: 1},)},
        {"messages": TURNS, "tools": ({"enum": [1] * 100_000},)},
        {"messages": TURNS, "tools": ({"enum": [""] * 75_000},)},
        {"messages": TURNS, "chat_template_kwargs": {"values": [[]] * 75_000}},
        {"messages": ({"role": "user", "content": "a", "x" * 300_000: "b"}, TURNS[1])},
        {"messages": (TURNS[0], {**TURNS[1], "tool_calls": [{"x" * 300_000: 1}]})},
    ],
    ids=["text", "prompt", "content", "key", "numbers", "empty-texts", "empty-lists", "key-of-message", "key-of-call"],
)
def test_an_item_that_is_many_times_too_long_is_refused_before_it_is_read(values: Any, truncate: bool) -> None:
    with pytest.raises(ScoringError, match=r"3000\d\d bytes of text, and this service reads 262144 at most"):
        refuse_unread(ScoreRequest(**values, truncate=truncate), max_bytes=longest_read(4096))
    refuse_unread(ScoreRequest(text="x" * 262_144), max_bytes=longest_read(4096))
    refuse_unread(ScoreRequest(text="x" * 65_536), max_bytes=longest_read(1))


def test_a_rank_refuses_such_an_item_unread_and_scores_the_others() -> None:
    scorer = RequestScorer.__new__(RequestScorer)
    scorer.max_item_tokens, scorer.max_item_bytes, scorer._markers, scorer.vocabulary = 100, 65_536, None, 10
    scorer.chat, scorer.reading = ChatFormat(Unread()), assumed_reading("model", PLAIN, 0)
    items, refused = scorer._encode([ScoreRequest(text="x" * 70_000), ScoreRequest(token_ids=(1,))])
    assert [position for position, _ in refused] == [0] and list(items) == [1]


def test_what_is_too_long_is_refused_or_loses_its_beginning() -> None:
    assert encoded(ScoreRequest(text="abcd"), max_tokens=4) == written("abcd")
    with pytest.raises(ScoringError, match="has 5 tokens, the limit is 4: shorten it, or ask for truncate"):
        encoded(ScoreRequest(text="abcde"), max_tokens=4)
    limits: Any = {"reading": assumed_reading("model", PLAIN, 0), "max_tokens": 4, "vocabulary": VOCABULARY}
    cut = encode_request(ChatFormat(PLAIN), ScoreRequest(text="abcde", truncate=True), **limits)
    assert cut == EncodedItem(written("bcde"), truncated=True)
    whole = encode_request(ChatFormat(PLAIN), ScoreRequest(text="abcd", truncate=True), **limits)
    assert not whole.truncated


@pytest.mark.parametrize("text", ["a", f"a{EOS}", f"{BOS}a", f"{BOS}a{EOS}", f"{BOS}{BOS}a", f"a{BOS}", BOS])
def test_special_tokens_that_are_asked_for_are_there_once(text: str) -> None:
    ids = encoded(ScoreRequest(text=text, add_special_tokens=True))
    assert ids == written(text if text.startswith(BOS) else BOS + text), (
        "the tokenizer puts a start token before a text"
    )


def test_an_end_token_is_not_added_twice_either() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 1), (EOS, 2)]
    )
    for text in ("a", f"{BOS}a", f"a{EOS}", f"{BOS}a{EOS}"):
        assert encoded(ScoreRequest(text=text, add_special_tokens=True), tokenizer) == written(f"{BOS}a{EOS}")


def test_an_empty_text_stays_empty() -> None:
    with pytest.raises(ScoringError, match="the item is empty"):
        encoded(ScoreRequest(text="", add_special_tokens=True))


@pytest.mark.parametrize("answer", [" Not yet.", "Not yet.", " Wait.\n\nHuman: How long?\n\nAssistant: An hour."])
def test_a_dialogue_written_as_text_has_the_turns_that_training_makes_of_it(tmp_path: Path, answer: str) -> None:
    prompt = "\n\nHuman: Hello.\n\nAssistant: Hi.\n\nHuman: Is it late?\n\nAssistant:"
    row = {"prompt": prompt, "chosen": answer, "rejected": " No idea."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (pair,) = encode_pairs(ChatFormat(TEMPLATED), read_preferences(tmp_path / "rows.jsonl", turns=True), 1000, Drops())
    assert pair is not None
    assert encoded(ScoreRequest(prompt=prompt, response=answer), TEMPLATED) == tuple(pair.chosen)


def test_a_prompt_that_only_begins_like_a_dialogue_is_what_the_user_says() -> None:
    turns = ({"role": "user", "content": "Human: hi"}, {"role": "assistant", "content": "hello"})
    assert encoded(ScoreRequest(prompt="Human: hi", response="hello"), TEMPLATED) == encoded(
        ScoreRequest(messages=turns), TEMPLATED
    )
