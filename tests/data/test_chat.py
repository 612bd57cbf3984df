"""A conversation is the ids that its answer is sampled after, the answer's own, and one end token, on every path; a template
that is missing, refuses, or leaves out what is said, is an error that names the row.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import EQUAL, TOO_LONG, Drops, encode_pairs, encode_prompts
from rlhf_ray.errors import DataError, ScoringError
from rlhf_ray.models.reward_reading import assumed_reading
from rlhf_ray.rewards.encoding import encode_request
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rows.preferences import PreferencePair, read_preferences
from rlhf_ray.rows.prompts import Prompt

from .chat_templates import CHATS, SHAPES, assistant, make_tokenizer, sampled, user

CHATML = "a newline after the end"
THINKS = "an empty think block before a finished answer"
OPENS = "a think block that the prompt opens and a finished answer closes"
MANY = 10_000
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>"), min_size=1, max_size=8)
ANSWERS = ["yes", "It is the end.", "  blanks \n", "\nthe", "\n\nthe", "<think>\nwhy\n</think>\n\nthe"]
quick = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def limits(chat):
    """How a model that remembers nothing reads, and no limits."""
    reading = assumed_reading("model", chat.tokenizer, None, form="conversation")
    return {"reading": reading, "max_tokens": MANY, "vocabulary": MANY}


def encode_pair(chat, row, max_tokens=MANY, **options):
    (encoded,) = encode_pairs(chat, [row], max_tokens, Drops(), **options)
    return encoded


def conversations(name):
    """With and without a message of the system, and after an earlier answer."""
    plain = [user("why?")]
    yield plain
    yield [*plain, assistant("<think>\nso\n</think>\n\nso."), user("and?\n")]
    if SHAPES[name].system:
        yield [{"role": "system", "content": "Be brief."}, *plain]


@pytest.mark.parametrize("name", SHAPES)
def test_training_scoring_and_sampling_have_the_same_ids(name):
    chat = CHATS[name]
    for prompt in conversations(name):
        (asked,) = encode_prompts(chat, [Prompt(0, "", messages=prompt)], MANY, Drops())
        for answer in ANSWERS:
            before, ids, end = sampled(name, prompt, answer)
            whole = [*before, *ids, end]
            pair = encode_pair(chat, PreferencePair(prompt, [assistant(answer)], [assistant("no")]))
            assert asked == before, "what PPO samples after"
            assert pair.chosen == whole
            assert pair.rejected == [*before, *chat.tokenizer("no")["input_ids"], end]
            assert pair.prompt_length >= len(before)
            item = ScoreRequest(messages=(*prompt, assistant(answer)), chat_template_kwargs=dict(chat.variables))
            assert list(encode_request(chat, item, **limits(chat)).token_ids) == whole
            cut = ScoreRequest(messages=(*prompt, assistant(answer)), finished=False)
            assert list(encode_request(chat, cut, **limits(chat)).token_ids) == whole[:-1]
            if prompt == [user("why?")]:
                item = ScoreRequest(prompt="why?", response=answer)
                assert list(encode_request(chat, item, **limits(chat)).token_ids) == whole


@quick
@given(ANY, ANY)
def test_any_text_of_an_answer_stays_as_it_is(question, answer):
    chat = CHATS["blanks stripped and the day written"]
    prompt, ids = chat.encode([user(question), assistant(answer)])
    assert chat.tokenizer.decode(ids) == answer + "<|eot_id|>"
    assert prompt == chat.prompt_ids([user(question)])


@pytest.mark.parametrize("answer", ["yes", "yes<|im_end|>", "yes<|im_end|><|im_end|>"])
def test_an_answer_ends_once_whatever_its_text_ends_with(answer):
    chat = CHATS[CHATML]
    _, ids = chat.encode([user("why?"), assistant(answer)])
    assert chat.tokenizer.decode(ids) == "yes<|im_end|>"


@pytest.mark.parametrize("field", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_beside_the_content_is_written_as_the_template_does(field):
    chat = CHATS[THINKS]
    _, ids = chat.encode([user("why?"), assistant("so", **{field: "hm"})])
    assert chat.tokenizer.decode(ids) == "<think>\nhm\n</think>\n\nso<|im_end|>"


@pytest.mark.parametrize("name", [OPENS, "a think block that the prompt opens and a finished answer has not"])
def test_thinking_that_the_template_drops_is_written_after_the_opening_of_the_prompt(name):
    chat = CHATS[name]
    prompt, ids = chat.encode([user("why?"), assistant("so", reasoning_content="hm")])
    assert chat.tokenizer.decode(prompt).endswith("<think>\n")
    assert chat.tokenizer.decode(ids) == f"hm\n</think>\n\nso{SHAPES[name].end}"


def test_a_call_is_what_the_template_writes_after_the_prompt_without_its_empty_block():
    chat, call = CHATS[THINKS], {"type": "function", "function": {"name": "find", "arguments": {}}}
    for content in ("", "so "):
        prompt, ids = chat.encode([user("why?"), assistant(content, tool_calls=[call])])
        assert chat.tokenizer.decode(ids) == f"{content}<tool_call>find</tool_call><|im_end|>"
        assert prompt == chat.prompt_ids([user("why?")])


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.thinking %}<think>{{ m.thinking }}<|im_end|>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}END{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "end", ["<|im_end|>\n", "{{ '<eos>' if m.tool_calls else '<|im_end|>\n' }}", "<|im_end|>\nAct:<|im_end|>"]
)
def test_a_call_ends_where_its_template_ends_it_behind_all_its_texts(end):
    """Another token may end calls; the end token may also stand between the parts of an answer, or in what follows it."""
    tokenizer = make_tokenizer(SHAPES[CHATML])
    tokenizer.chat_template = CALLS.replace("END", end)
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    _, ids = ChatFormat(tokenizer).encode([user("why?"), assistant("so ", reasoning_content="hm", tool_calls=[call])])
    assert tokenizer.decode(ids) == "<think>hm<|im_end|>so [find]<|im_end|>"


def test_tools_and_variables_are_in_the_prompt():
    chat, tools = CHATS[THINKS], [{"type": "function", "function": {"name": "find"}}]
    quiet = ChatFormat(chat.tokenizer, {"enable_thinking": False})
    pair = PreferencePair([user("why?")], [assistant("a")], [assistant("b")], tools=tools)
    text = "tools: find\n<|im_start|>user\nwhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.tokenizer.decode(encode_pair(chat, pair).chosen) == f"{text}a<|im_end|>"
    block = "<think>\n\n</think>\n\n"
    assert chat.tokenizer.decode(encode_pair(quiet, pair).chosen) == f"{text}{block}a<|im_end|>"
    row = PreferencePair(*pair.conversations, tools=tools, template_variables={"enable_thinking": True})
    assert encode_pair(quiet, row) == encode_pair(chat, pair), "a row's own variables win"


def test_the_prompt_of_sides_with_several_messages_is_what_both_begin_with():
    chat, prompt = CHATS[THINKS], [user("why?")]
    one = [assistant("<think>\nhm\n</think>\n\na"), user("go on"), assistant("b")]
    pair = encode_pair(chat, PreferencePair(prompt, one, [assistant("c")]))
    assert pair.chosen == [*chat.prompt_ids([*prompt, *one[:-1]]), *chat.tokenizer("b<|im_end|>")["input_ids"]]
    assert pair.chosen[: pair.prompt_length] == pair.rejected[: pair.prompt_length] == chat.prompt_ids(prompt)


@pytest.mark.parametrize("name", SHAPES)
def test_every_template_tells_where_a_long_prompt_may_be_cut(name):
    chat = CHATS[name]
    row = PreferencePair([user("why? " * 50)], [assistant("yes")], [assistant("no")])
    whole = encode_pair(chat, row)
    limit = len(whole.chosen) - 20
    cut = encode_pair(chat, row, limit, cut_prompt=True)
    assert (len(cut.chosen), cut.cut) == (limit, 20)
    assert cut.chosen[cut.prompt_length - 5 :] == whole.chosen[whole.prompt_length - 5 :]
    drops = Drops()
    assert encode_pairs(chat, [row], limit, drops) == [None]
    assert drops == {TOO_LONG: 1}


def test_texts_and_conversations_side_by_side():
    chat = CHATS[CHATML]
    texts = PreferencePair("p", " a", " b")
    talk = PreferencePair([user("p")], [assistant("a")], [assistant("b")])
    same = PreferencePair([user("p")], [assistant("a")], [assistant("a")])
    drops = Drops()
    encoded = encode_pairs(chat, [talk, texts, same, texts, talk], MANY, drops)
    one, other = encode_pair(chat, talk), encode_pair(chat, texts)
    assert encoded == [one, other, None, other, one]
    assert drops == {EQUAL: 1}
    assert chat.tokenizer.decode(other.chosen) == "p a<eos>", "a text ends in the tokenizer's own end"


def test_sides_that_differ_in_blanks_or_thinking_alone_are_a_pair():
    for name in SHAPES:
        for one, other in (("a", "a "), ("<think>\nx\n</think>\n\na", "<think>\ny\n</think>\n\na")):
            assert (
                encode_pair(CHATS[name], PreferencePair([user("p")], [assistant(one)], [assistant(other)])) is not None
            )


def test_the_day_is_told_where_the_template_writes_it():
    dated = CHATS["blanks stripped and the day written"]
    assert dated.day == "", "a variable takes its place"
    assert len(ChatFormat(dated.tokenizer).day) == len("2026-11-29")
    assert all(not chat.day for chat in CHATS.values())


def test_a_tokenizer_without_a_template_is_told_with_the_row(byte_tokenizer, write):
    path = write([{"prompt": "secret", "chosen": [assistant("secret")], "rejected": [assistant("b")]}])
    rows = read_preferences(path)
    problem = r"rows\.jsonl:1: holds a conversation, but the tokenizer has no chat template: .*chat_template\.jinja"
    with pytest.raises(DataError, match=problem) as error:
        encode_pair(ChatFormat(byte_tokenizer), rows[0])
    assert "secret" not in str(error.value)


@pytest.fixture
def talking(byte_tokenizer, monkeypatch):
    """The byte-level tokenizer with a chat template."""

    def with_template(template):
        monkeypatch.setattr(byte_tokenizer, "chat_template", template)
        return ChatFormat(byte_tokenizer)

    return with_template


def test_a_template_that_refuses_is_told_with_the_row(talking, write):
    path = write([{"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}])
    chat = talking("{{ raise_exception('only system may speak') }}")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: the tokenizer's chat template refuses .*only system may speak"
    ):
        encode_pair(chat, read_preferences(path)[0])


PARTS = "{% for m in messages %}{{ m.role }}: {% for p in m.content if p is mapping %}{{ p.text }}{% endfor %}\n{% endfor %}"
ANSWERLESS = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize(("template", "whose"), [(PARTS, "user"), (ANSWERLESS, "assistant")])
def test_a_template_that_leaves_out_what_is_said_is_refused(talking, template, whose):
    chat = talking(template)
    problem = f"leaves out the text of a message of the {whose}.*chat_template.jinja"
    with pytest.raises(DataError, match=problem):
        encode_pair(chat, PreferencePair([user("q")], [assistant("a")], [assistant("b")]))
    item = ScoreRequest(messages=(user("q"), assistant("a")))
    with pytest.raises(ScoringError, match=problem):
        encode_request(chat, item, **limits(chat))


def test_a_template_that_wants_tools_is_read_with_them(talking):
    chat = talking("{% for tool in tools %}{{ tool.function.name }}{% endfor %}" + SHAPES[CHATML].template)
    tools = [{"type": "function", "function": {"name": "find"}}]
    prompt, answer = chat.encode([user("q"), assistant("a")], tools)
    assert chat.tokenizer.decode([*prompt, *answer]).startswith("find<|im_start|>user")
    assert answer[-1] == chat.tokenizer.eos_token_id, "the tokenizer knows no <|im_end|> as a token of its own"
