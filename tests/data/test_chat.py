"""A conversation's ids are those of its template's text alone; a template that is missing or refuses names the row."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.data.encode import EQUAL, Drops, encode_pairs
from rlhf_ray.errors import DataError
from rlhf_ray.rows.preferences import PreferencePair, read_preferences

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS_INSIDE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = "{% if tools %}{{ tools[0].name }};{% endif %}" + CHATML
WANTS_AN_ANSWER = "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}" + CHATML
THINKING = (  # the answer's turn begins differently from what an answer is asked with, as templates of thinking models do
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTS = {
    CHATML: "<user>{}<eos>\n<assistant>",
    THINKING: "<user>{}\n<assistant>",
    WITH_TOOLS: "find;<user>{}<eos>\n<assistant>",
    WANTS_AN_ANSWER: "",
}
"""What stands before the answer, as far as each template tells it."""
MANY = 10_000
ANY = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


def encode_pair(tokenizer, row, max_tokens):
    (encoded,) = encode_pairs(tokenizer, [row], max_tokens, Drops())
    return encoded


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def talking(byte_tokenizer, monkeypatch):
    """The byte-level tokenizer with a chat template."""

    def with_template(template, tokenizer=byte_tokenizer):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return tokenizer

    return with_template


quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("template", PROMPTS)
@quick
@given(texts=st.lists(ANY, min_size=2, max_size=2, unique=True), question=ANY)
def test_ids_are_those_of_one_call_of_the_template(talking, template, texts, question):
    tokenizer = talking(template)
    tools = [{"name": "find"}] if template == WITH_TOOLS else None
    pair = PreferencePair([user(question)], [assistant(texts[0])], [assistant(texts[1])], tools=tools)
    encoded = encode_pair(tokenizer, pair, MANY)
    for ids, text in zip(encoded[:2], texts, strict=True):
        whole = tokenizer.apply_chat_template(
            [user(question), assistant(text)], tools=tools, tokenize=True, return_dict=False
        )
        assert ids == whole
    assert tokenizer.decode(encoded.chosen[: encoded.prompt_length]) == PROMPTS[template].format(question)


@pytest.mark.parametrize("adds", ["$A", "<s> $A", "<s> $A </s>"])
def test_a_start_comes_once_and_an_end_as_the_template_says(talking, spaced_tokenizer, adds):
    tokenizer = talking(BOS_INSIDE, spaced_tokenizer(adds))
    pair = PreferencePair([user("why?")], [assistant("yes")], [assistant("no")])
    chosen, rejected, length, _ = encode_pair(tokenizer, pair, MANY)
    for ids in (chosen, rejected):
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 2, "one a message, and none besides"
        assert ids[-1] == tokenizer.eos_token_id
    assert chosen[:length] == rejected[:length]
    assert tokenizer.decode(chosen[length:]).strip() == "yes</s>"


def test_texts_and_conversations_side_by_side(talking):
    tokenizer = talking(CHATML)
    texts = PreferencePair("p", " a", " b")
    talk = PreferencePair([user("p")], [assistant("a")], [assistant("b")])
    same = PreferencePair([user("p")], [assistant("a")], [assistant("a")])
    drops = Drops()
    encoded = encode_pairs(tokenizer, [talk, texts, same, texts, talk], MANY, drops)
    one, other = encode_pair(tokenizer, talk, MANY), encode_pair(tokenizer, texts, MANY)
    assert encoded == [one, other, None, other, one]
    assert drops == {EQUAL: 1}


def test_a_tokenizer_without_a_template_is_told_with_the_row(byte_tokenizer, write):
    path = write([{"prompt": "secret", "chosen": [assistant("secret")], "rejected": [assistant("b")]}])
    rows = read_preferences(path)
    problem = r"rows\.jsonl:1: holds a conversation, but the tokenizer has no chat template: .*chat_template\.jinja"
    with pytest.raises(DataError, match=problem) as error:
        encode_pair(byte_tokenizer, rows[0], MANY)
    assert "secret" not in str(error.value)


def test_a_template_that_refuses_is_told_with_the_row(talking, write):
    path = write([{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}])
    template = "{{ raise_exception('only system may speak') }}"
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: the tokenizer's chat template refuses .*only system may speak"
    ):
        encode_pair(talking(template), read_preferences(path)[0], MANY)
